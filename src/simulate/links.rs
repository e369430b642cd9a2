//! The links of a cluster as the simulation runs: NVLinks and NICs, each way.

use crate::topo::Cluster;

use super::LinkClass;
use super::roofline::Roofline;

/// One direction of an NVLink or a NIC.
#[derive(Clone, Copy, Debug, Default)]
struct Link {
    /// When it has carried all that it was given so far, in seconds.
    free_s: f64,
    bytes: u64,
}

/// Links of one kind, out and in.
struct Duplex {
    /// Bytes a second.
    rate: f64,
    out: Vec<Link>,
    into: Vec<Link>,
}

impl Duplex {
    fn new(count: u64, gb_s: f64) -> Self {
        let links = vec![Link::default(); count as usize];
        Duplex { rate: gb_s * 1e9, out: links.clone(), into: links }
    }
}

pub(super) struct Links<'a> {
    cluster: &'a Cluster,
    /// By GPU.
    nvlink: Duplex,
    nic: Duplex,
}

impl<'a> Links<'a> {
    /// The idle links of a number of GPUs.
    pub fn new(cluster: &'a Cluster, gpus: usize) -> Self {
        let gpus = gpus as u64;
        let nics = gpus.div_ceil(cluster.gpus_per_host) * cluster.nics_per_host;
        Links {
            cluster,
            nvlink: Duplex::new(gpus, cluster.nvlink_gb_s),
            nic: Duplex::new(nics, cluster.nic_gb_s),
        }
    }

    /// Sends a message from GPU to GPU: when both links serve it, and when it has arrived.
    pub fn carry(&mut self, from: u64, to: u64, bytes: u64, ready: f64) -> (f64, f64) {
        let c = self.cluster;
        let (links, from, to) = if c.host(from) == c.host(to) {
            (&mut self.nvlink, from, to)
        } else {
            (&mut self.nic, c.nic(from), c.nic(to))
        };
        let seconds = bytes as f64 / links.rate;
        let (out, into) = (&mut links.out[from as usize], &mut links.into[to as usize]);
        let start = ready.max(out.free_s).max(into.free_s);
        for link in [&mut *out, &mut *into] {
            link.free_s = link.free_s.max(ready) + seconds;
            link.bytes += bytes;
        }
        (start, out.free_s.max(into.free_s))
    }

    /// The classes that carried anything.
    pub fn classes(&self, least: &Roofline) -> Vec<LinkClass> {
        let class = |class, links: &[Link], rate: f64| {
            let busiest_bytes = links.iter().map(|l| l.bytes).max().unwrap_or(0);
            LinkClass {
                class,
                bytes: links.iter().map(|l| l.bytes).sum(),
                least_bytes: None,
                busiest_bytes,
                busiest_s: busiest_bytes as f64 / rate,
                least_s: None,
            }
        };
        let (nvlink, nic) = (&self.nvlink, &self.nic);
        let mut classes = vec![
            class("nvlink out", &nvlink.out, nvlink.rate),
            class("nvlink in", &nvlink.into, nvlink.rate),
            LinkClass {
                least_s: Some(least.out_of_hosts_s),
                ..class("nic out", &nic.out, nic.rate)
            },
            LinkClass {
                least_bytes: Some(least.into_hosts_bytes),
                least_s: Some(least.into_hosts_s),
                ..class("nic in", &nic.into, nic.rate)
            },
        ];
        classes.retain(|c| c.bytes > 0);
        classes
    }
}
