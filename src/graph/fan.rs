//! Whether bytes that several hosts need go along a chain of them or from the trainer to each: a
//! cost model of NIC rates, evaluated alike on every rank.

use std::collections::HashMap;

use crate::lower::Program;
use crate::topo::{Cluster, Peer, RankId};

use super::build::Bounds;
use super::owners::receivers;
use super::routes::Fan;

/// Bytes that cross NICs, by how they are fanned out.
#[derive(Default)]
struct Loads {
    /// Into each inference host; the same either way.
    into_hosts: HashMap<u64, u64>,
    /// Out of all trainer ranks together.
    chain: u64,
    direct: u64,
    /// Hosts of the longest chain.
    longest: u64,
}

/// The faster way for a program; a chain unless sending directly saves a tenth of the time, for
/// then every byte leaves the trainers once.
pub(super) fn choose(
    program: &Program,
    replicas: u32,
    cluster: &Cluster,
    bounds: Bounds,
) -> Fan {
    let loads = loads(program, replicas, cluster);
    let host_rate = cluster.nics_per_host as f64 * cluster.nic_gb_s * 1e9;
    let gpus = f64::from(program.trainers);
    let trainers_rate = gpus / cluster.gpus_per_host as f64 * host_rate;
    let into = loads.into_hosts.values().max().copied().unwrap_or(0) as f64 / host_rate;
    // A chain is full only when a bucket has come to its last host.
    let step = (bounds.limit() as f64 / (cluster.nic_gb_s * 1e9)).min(into);
    let fill = loads.longest.saturating_sub(1) as f64 * (step + cluster.latency_us * 1e-6);
    let chain = into.max(loads.chain as f64 / trainers_rate) + fill;
    let direct = into.max(loads.direct as f64 / trainers_rate);
    if direct < 0.9 * chain { Fan::Direct } else { Fan::Chain }
}

fn loads(program: &Program, replicas: u32, cluster: &Cluster) -> Loads {
    let mut loads = Loads::default();
    let mut known: HashMap<Vec<u32>, Vec<u64>> = HashMap::new();
    for unit in program.units.iter().filter(|u| !u.is_constant()) {
        let hosts = known.entry(unit.ranks()).or_insert_with_key(|ranks| {
            let host = |r: &RankId| cluster.host(cluster.gpu(Peer::Rank(*r), program.trainers));
            let mut hosts: Vec<u64> =
                receivers(program, replicas, ranks).iter().map(host).collect();
            hosts.dedup();
            hosts
        });
        let bytes = unit.bytes();
        hosts.iter().for_each(|h| *loads.into_hosts.entry(*h).or_default() += bytes);
        loads.chain += bytes;
        loads.direct += bytes * hosts.len() as u64;
        loads.longest = loads.longest.max(hosts.len() as u64);
    }
    loads
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diag::{FileId, Span};
    use crate::dtype::DType;
    use crate::lower::{ProgramSource, RankProgram, Receiver, Unit};
    use crate::shard::{Expr, Storage, View};
    use crate::topo::{Coords, Layout};

    /// A tensor of bytes that one rank of each replica holds.
    fn program(trainers: u32, bytes: u64) -> Program {
        let layout = Layout::whole(&[bytes], (0..trainers).collect()).into();
        let view = View {
            storage: Storage::Source(0),
            dtype: DType::U8,
            start: 0,
            strides: [1].as_slice().into(),
        };
        let unit = Unit {
            name: "w".to_owned(),
            span: Span { file: FileId(0), line: 1, column: 1, len: 1 },
            shape: [bytes].as_slice().into(),
            dtype: DType::U8,
            quant: None,
            expr: Expr::Load(view),
            mapped: false,
            receivers: vec![Receiver { rank: 0, target: 0, place: 0 }],
        };
        let coords = Coords { replica: 0, tp: 0, dp: 0, ep: 0, etp: 0, pp: 0 };
        let rank = RankProgram { rank: RankId(0), coords, targets: Vec::new() };
        let shape = unit.shape.clone();
        let source = ProgramSource { name: "w".to_owned(), dtype: DType::U8, shape, layout };
        Program { sources: vec![source], ranks: vec![rank], units: vec![unit], trainers }
    }

    #[test]
    fn few_trainers_feed_a_chain_and_many_feed_every_host() {
        // One GPU a host, 1 GB/s: 8 replicas on 8 hosts, 10 GB each, buckets of 1 GB.
        let cluster = Cluster {
            gpus_per_host: 1,
            nics_per_host: 1,
            nic_gb_s: 1.0,
            latency_us: 0.0,
            ..Cluster::default()
        };
        let bounds = Bounds { staging: 2 << 30, in_flight: 2, bucket: 1 << 30 };
        let fan = |trainers| choose(&program(trainers, 10 << 30), 8, &cluster, bounds);
        // 80 GB out of one trainer take 80 s, a chain takes 10 and 7 to fill.
        assert_eq!(fan(1), Fan::Chain);
        // Out of 8 trainers they take the 10 s that each host needs anyway.
        assert_eq!(fan(8), Fan::Direct);
    }
}
