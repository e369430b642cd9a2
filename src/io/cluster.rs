//! The cluster file: hosts and links of the machines under the ranks, as JSON.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::json;
use super::manifest::{form, refused, schema_is_1};
use crate::error::Result;
use crate::topo::Cluster;

/// More GPUs than any host has; a larger number is a slip.
const MOST_GPUS: u64 = 4096;
/// GB/s of a link that can be.
const RATES: std::ops::RangeInclusive<f64> = 1e-3..=1e6;
/// Microseconds of latency that can be: up to a minute.
const LATENCIES: std::ops::RangeInclusive<f64> = 0.0..=60e6;

/// The file's form. A key left out has its default.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Raw {
    schema: u64,
    gpus_per_host: u64,
    nics_per_host: u64,
    nvlink_gb_s: f64,
    nic_gb_s: f64,
    latency_us: f64,
}

impl Default for Raw {
    fn default() -> Self {
        let Cluster { gpus_per_host, nics_per_host, nvlink_gb_s, nic_gb_s, latency_us } =
            Cluster::default();
        Raw { schema: 1, gpus_per_host, nics_per_host, nvlink_gb_s, nic_gb_s, latency_us }
    }
}

/// Reads and checks a cluster file.
///
/// # Errors
/// E0419 for a file that is not of the form or describes no machine, E0601 if it cannot be read.
pub fn read_cluster(path: &Path) -> Result<Cluster> {
    let what = "cluster file";
    // Serde would also take a list, as the values in order.
    form(json::read::<Map<String, Value>>(path, what, "E0419"))?;
    let raw: Raw = form(json::read(path, what, "E0419"))?;
    check(&raw).map_err(|reason| refused(what, path, &reason))?;
    Ok(Cluster {
        gpus_per_host: raw.gpus_per_host,
        nics_per_host: raw.nics_per_host,
        nvlink_gb_s: raw.nvlink_gb_s,
        nic_gb_s: raw.nic_gb_s,
        latency_us: raw.latency_us,
    })
}

fn check(raw: &Raw) -> std::result::Result<(), String> {
    schema_is_1(raw.schema)?;
    let (gpus, nics) = (raw.gpus_per_host, raw.nics_per_host);
    if !(1..=MOST_GPUS).contains(&gpus) {
        return Err(format!("gpus_per_host is {gpus}, not 1 to {MOST_GPUS}"));
    }
    if nics == 0 || !gpus.is_multiple_of(nics) {
        return Err(format!(
            "nics_per_host is {nics}, and {gpus} GPUs cannot be spread evenly over them; \
             count several NICs of one GPU as one with the sum of their rates"
        ));
    }
    let (least, most) = (RATES.start(), RATES.end());
    for (key, rate) in [("nvlink_gb_s", raw.nvlink_gb_s), ("nic_gb_s", raw.nic_gb_s)] {
        if !RATES.contains(&rate) {
            return Err(format!("{key} is {rate}, not {least} to {most}"));
        }
    }
    if !LATENCIES.contains(&raw.latency_us) {
        let most = LATENCIES.end();
        return Err(format!("latency_us is {}, not 0 to {most}", raw.latency_us));
    }
    Ok(())
}
