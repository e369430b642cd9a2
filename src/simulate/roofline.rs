//! The fewest seconds that any schedule needs: distinct bytes over the links that they must cross.

use crate::topo::{Cluster, Peer};

use super::Traffic;

/// What must cross the links around hosts and GPUs, whatever the schedule.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Roofline {
    /// Bytes that inference hosts need and no trainer rank of theirs holds, over all hosts.
    pub into_hosts_bytes: u64,
    /// The same of the host that needs the most, over the rate of its NICs.
    pub into_hosts_s: f64,
    /// What a GPU needs over its NVLink and NIC together.
    pub into_gpus_s: f64,
    /// What only one trainer host holds and others need, over the rate of its NICs.
    pub out_of_hosts_s: f64,
}

impl Roofline {
    pub fn of(traffic: &Traffic, cluster: &Cluster) -> Self {
        let trainers = u64::from(traffic.trainers);
        let gpus = trainers + u64::from(traffic.ranks);
        let mut into_gpus = vec![0u64; gpus as usize];
        let mut into_hosts = vec![0u64; gpus.div_ceil(cluster.gpus_per_host) as usize];
        let mut out_of_hosts = into_hosts.clone();
        for group in traffic.values.groups() {
            let held = distinct(group.holders.iter().map(|t| cluster.host(u64::from(*t))));
            let receivers = group.needed_by.iter();
            let receivers = receivers.map(|r| cluster.gpu(Peer::Rank(*r), traffic.trainers));
            receivers.clone().for_each(|gpu| into_gpus[gpu as usize] += group.bytes);
            let hosts = distinct(receivers.map(|gpu| cluster.host(gpu)));
            for host in hosts.iter().filter(|h| !held.contains(h)) {
                into_hosts[*host as usize] += group.bytes;
            }
            if let [only] = held[..]
                && hosts.iter().any(|host| *host != only)
            {
                out_of_hosts[only as usize] += group.bytes;
            }
        }
        let nics = cluster.nics_per_host as f64 * cluster.nic_gb_s * 1e9;
        let all_on_one_host = trainers <= cluster.gpus_per_host;
        let gpu_rate = |gpu: u64| match all_on_one_host && cluster.host(gpu) == 0 {
            true => cluster.nvlink_gb_s * 1e9,
            false => (cluster.nvlink_gb_s + cluster.nic_gb_s) * 1e9,
        };
        let into_gpus = (0..).zip(&into_gpus).map(|(gpu, b)| *b as f64 / gpu_rate(gpu));
        Roofline {
            into_hosts_bytes: into_hosts.iter().sum(),
            into_hosts_s: most(&into_hosts) / nics,
            into_gpus_s: into_gpus.fold(0.0, f64::max),
            out_of_hosts_s: most(&out_of_hosts) / nics,
        }
    }

    pub fn seconds(&self) -> f64 {
        self.into_hosts_s.max(self.into_gpus_s).max(self.out_of_hosts_s)
    }
}

fn most(bytes: &[u64]) -> f64 {
    bytes.iter().max().copied().unwrap_or(0) as f64
}

fn distinct(hosts: impl Iterator<Item = u64>) -> Vec<u64> {
    let mut hosts: Vec<u64> = hosts.collect();
    hosts.sort_unstable();
    hosts.dedup();
    hosts
}
