//! The machines under the ranks: GPUs of a host, and the links between them.

use serde::{Deserialize, Serialize};

use super::RankId;

/// One process: a trainer rank or a global inference rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub enum Peer {
    Trainer(u32),
    Rank(RankId),
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Peer::Trainer(t) => write!(f, "trainer {t}"),
            Peer::Rank(r) => write!(f, "rank {r}"),
        }
    }
}

/// Hosts of equal size, filled in launch order: trainer ranks first, then inference ranks,
/// replica by replica.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cluster {
    pub gpus_per_host: u64,
    /// NICs of a host, spread evenly over its GPUs.
    pub nics_per_host: u64,
    /// GB/s (10^9 bytes) of a GPU's NVLink, each way.
    pub nvlink_gb_s: f64,
    /// GB/s of a NIC, each way.
    pub nic_gb_s: f64,
    /// Microseconds that a message takes before its first byte arrives.
    pub latency_us: f64,
}

impl Default for Cluster {
    /// 8 GPUs a host, NVLink 370 GB/s, one NIC of 45 GB/s a GPU, 20 µs.
    fn default() -> Self {
        Cluster {
            gpus_per_host: 8,
            nics_per_host: 8,
            nvlink_gb_s: 370.0,
            nic_gb_s: 45.0,
            latency_us: 20.0,
        }
    }
}

impl Cluster {
    /// Place of a process in launch order, for a number of trainer ranks.
    pub fn gpu(&self, peer: Peer, trainers: u32) -> u64 {
        match peer {
            Peer::Trainer(t) => u64::from(t),
            Peer::Rank(r) => u64::from(trainers) + r.0,
        }
    }

    /// Host of a GPU.
    pub fn host(&self, gpu: u64) -> u64 {
        gpu / self.gpus_per_host
    }

    /// NIC that a GPU uses, counted over all hosts.
    pub fn nic(&self, gpu: u64) -> u64 {
        let local = gpu % self.gpus_per_host * self.nics_per_host / self.gpus_per_host;
        self.host(gpu) * self.nics_per_host + local
    }
}
