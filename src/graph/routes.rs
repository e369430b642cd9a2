//! How bytes that several inference ranks need reach them all: into each host once, from host to
//! host along a chain, and inside a host over NVLink.

use std::collections::HashMap;

use crate::topo::{Cluster, Peer, RankId};

use super::Route;

/// Who feeds the hosts that need the same bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fan {
    /// The trainer rank sends to one host, each host to the next: a byte leaves the trainer once.
    Chain,
    /// The trainer rank sends to every host.
    Direct,
}

/// Chooses routes so that the GPUs of a host take equal shares of what enters it.
pub(super) struct Router<'a> {
    cluster: &'a Cluster,
    trainers: u32,
    fan: Fan,
    /// Bytes that entered each inference rank so far from another host or a trainer rank.
    entered: Vec<u64>,
    known: HashMap<Route, u32>,
    pub(super) routes: Vec<Route>,
}

impl<'a> Router<'a> {
    pub(super) fn new(cluster: &'a Cluster, trainers: u32, ranks: u32, fan: Fan) -> Self {
        let entered = vec![0; ranks as usize];
        Router { cluster, trainers, fan, entered, known: HashMap::new(), routes: Vec::new() }
    }

    fn host(&self, peer: Peer) -> u64 {
        self.cluster.host(self.cluster.gpu(peer, self.trainers))
    }

    /// The rank of each host by which some bytes enter it, and the host's other receivers.
    /// `receivers` are in ascending order, so a host's stand together.
    pub(super) fn heads(
        &mut self,
        receivers: &[RankId],
        bytes: u64,
    ) -> Vec<(RankId, Vec<RankId>)> {
        let mut out = Vec::new();
        let (cluster, trainers) = (self.cluster, self.trainers);
        let host = |r: &RankId| cluster.host(cluster.gpu(Peer::Rank(*r), trainers));
        for group in receivers.chunk_by(|a, b| host(a) == host(b)) {
            let load = |r: &&RankId| self.entered[r.0 as usize];
            let Some(head) = group.iter().min_by_key(load).copied() else { continue };
            self.entered[head.0 as usize] += bytes;
            out.push((head, group.iter().copied().filter(|r| *r != head).collect()));
        }
        out
    }

    /// How often the trainer rank sends what goes by some heads.
    pub(super) fn entries(&self, heads: &[(RankId, Vec<RankId>)]) -> u64 {
        match self.fan {
            Fan::Chain => 1,
            Fan::Direct => heads.len() as u64,
        }
    }

    /// Where the route from a trainer rank begins: on its own host if that is among them, for its
    /// hop is then NVLink.
    pub(super) fn first(&self, from: u32, heads: &[(RankId, Vec<RankId>)]) -> usize {
        let home = self.host(Peer::Trainer(from));
        heads.iter().position(|(h, _)| self.host(Peer::Rank(*h)) == home).unwrap_or(0)
    }

    /// The route through the heads of all hosts, from the given one on.
    pub(super) fn route(&mut self, first: usize, heads: &[(RankId, Vec<RankId>)]) -> u32 {
        let order = || heads[first..].iter().chain(&heads[..first]);
        let mut route = Route { entries: Vec::new(), relays: Vec::new() };
        let mut last: Option<RankId> = None;
        for (head, _) in order() {
            match last {
                Some(last) if self.fan == Fan::Chain => route.relays.push((last, *head)),
                _ => route.entries.push(*head),
            }
            last = Some(*head);
        }
        for (head, others) in order() {
            route.relays.extend(others.iter().map(|to| (*head, *to)));
        }
        let next = self.routes.len() as u32;
        if let Some(known) = self.known.get(&route) {
            return *known;
        }
        self.known.insert(route.clone(), next);
        self.routes.push(route);
        next
    }
}
