//! Who sends what to whom in a bucket, and the amax exchange before the first.

use std::collections::BTreeMap;

use crate::topo::{Peer, RankId};

use super::check::range;
use super::{Flow, Graph, Part, Route, SharedTiles};

/// All that one process sends another in one bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// 0 from a trainer rank, else the number of relays. Hop `h` of bucket `b` is sent in step
    /// `b + h`, when a rank makes or receives bucket `b + h`: a chain of relays never waits.
    pub hop: u32,
    pub from: Peer,
    pub to: RankId,
    /// Indices of [`Graph::flows`].
    pub flows: Vec<u32>,
    pub bytes: u64,
}

impl Graph {
    pub fn route(&self, flow: &Flow) -> &Route {
        &self.routes[flow.route as usize]
    }

    pub fn parts_of(&self, flow: &Flow) -> &[Part] {
        &self.parts[range(&flow.parts)]
    }

    /// Flows of a bucket with their numbers.
    pub fn flows_of(&self, bucket: usize) -> impl Iterator<Item = (u32, &Flow)> {
        self.buckets[bucket].flows.clone().map(|i| (i, &self.flows[i as usize]))
    }

    /// The messages of a bucket: those of trainer ranks first, then relays in an order in which
    /// each sender has all that it sends by then.
    pub fn messages(&self, bucket: usize) -> Vec<Message> {
        let mut all: BTreeMap<(u32, Peer, RankId), (Vec<u32>, u64)> = BTreeMap::new();
        for (i, flow) in self.flows_of(bucket) {
            let mut add = |hop: u32, from: Peer, to: RankId| {
                let (flows, bytes) = all.entry((hop, from, to)).or_default();
                flows.push(i);
                *bytes += flow.bytes;
            };
            let route = self.route(flow);
            route.entries.iter().for_each(|to| add(0, Peer::Trainer(flow.from), *to));
            let mut hops: BTreeMap<RankId, u32> =
                route.entries.iter().map(|r| (*r, 0)).collect();
            for (from, to) in &route.relays {
                let hop = hops.get(from).copied().unwrap_or(0) + 1;
                hops.insert(*to, hop);
                add(hop, Peer::Rank(*from), *to);
            }
        }
        let message =
            |((hop, from, to), (flows, bytes))| Message { hop, from, to, flows, bytes };
        all.into_iter().map(message).collect()
    }

    /// Trainer ranks of shared tiles.
    pub fn holders_of(&self, shared: &SharedTiles) -> &[u32] {
        &self.holders[range(&shared.holders)]
    }

    /// Bytes that each trainer rank sends and receives in the amax exchange: 4 a tile to the
    /// collector, 4 back.
    pub fn amax_bytes(&self) -> Vec<(u64, u64)> {
        let mut bytes = vec![(0, 0); self.trainers as usize];
        for shared in &self.shared {
            let [first, others @ ..] = self.holders_of(shared) else { continue };
            let one = 4 * shared.tiles.len.iter().product::<u64>();
            let collector = &mut bytes[*first as usize];
            collector.0 += one * others.len() as u64;
            collector.1 += one * others.len() as u64;
            for other in others {
                bytes[*other as usize].0 += one;
                bytes[*other as usize].1 += one;
            }
        }
        bytes
    }
}
