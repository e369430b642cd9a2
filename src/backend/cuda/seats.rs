//! Which GPU each logical rank runs on, and the tree of GPUs that a flow travels along.

use std::collections::BTreeMap;

use crate::graph::{Flow, Graph};
use crate::topo::RankId;

/// A GPU of a process, by number: the world's GPUs in order of process.
pub type Seat = usize;

/// Where logical ranks run: trainer ranks first, then inference ranks, replica by replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seats {
    pub count: usize,
    trainers: Vec<Seat>,
    ranks: Vec<Seat>,
}

impl Seats {
    /// Neighbours share a GPU, as many on each as on any other or one less. Of more GPUs than
    /// ranks the last are idle.
    pub fn even(trainers: u32, ranks: u32, gpus: usize) -> Seats {
        let all = (trainers + ranks) as usize;
        let used = gpus.min(all).max(1);
        let seat = |i: usize| i * used / all.max(1);
        Seats {
            count: gpus.max(1),
            trainers: (0..trainers as usize).map(seat).collect(),
            ranks: (trainers as usize..all).map(seat).collect(),
        }
    }

    pub fn of_trainer(&self, trainer: u32) -> Seat {
        self.trainers[trainer as usize]
    }

    pub fn of_rank(&self, rank: RankId) -> Seat {
        self.ranks[rank.0 as usize]
    }

    pub fn rank_count(&self) -> usize {
        self.ranks.len()
    }

    /// True if a GPU passes on what it was given.
    pub fn passes_on(&self, graph: &Graph) -> bool {
        graph.flows.iter().any(|f| Tree::of(graph, f, self).edges.iter().any(|e| e.hop > 0))
    }

    /// How many times a flow crosses from one GPU to another.
    pub fn hops(&self, graph: &Graph, flow: &Flow) -> u64 {
        Tree::of(graph, flow, self).edges.len() as u64
    }

    /// Trainer ranks of a GPU.
    pub fn trainers_on(&self, seat: Seat) -> impl Iterator<Item = u32> + '_ {
        (0..).zip(&self.trainers).filter(move |(_, s)| **s == seat).map(|(i, _)| i)
    }

    /// Inference ranks of a GPU.
    pub fn ranks_on(&self, seat: Seat) -> impl Iterator<Item = RankId> + '_ {
        (0..).zip(&self.ranks).filter(move |(_, s)| **s == seat).map(|(i, _)| RankId(i))
    }
}

/// A hop between GPUs: what is made in bucket `b` goes over it in step `b + hop`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Edge {
    pub hop: u32,
    pub from: Seat,
    pub to: Seat,
}

/// How a flow reaches the GPUs of all ranks that need it.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tree {
    pub home: Seat,
    /// In order: each sender has the bytes by then.
    pub edges: Vec<Edge>,
}

impl Tree {
    /// Of a flow's route; ranks of one GPU take it once.
    pub fn of(graph: &Graph, flow: &Flow, seats: &Seats) -> Tree {
        let route = graph.route(flow);
        let home = seats.of_trainer(flow.from);
        let mut reached = BTreeMap::from([(home, 0)]);
        let mut edges = Vec::new();
        let entries = route.entries.iter().map(|to| (home, *to));
        let relays = route.relays.iter().map(|(from, to)| (seats.of_rank(*from), *to));
        for (from, rank) in entries.chain(relays) {
            let to = seats.of_rank(rank);
            if !reached.contains_key(&to) {
                let hop = reached.get(&from).copied().unwrap_or(0);
                reached.insert(to, hop + 1);
                edges.push(Edge { hop, from, to });
            }
        }
        Tree { home, edges }
    }

    /// The hop over which it reaches a GPU.
    pub fn arrival(&self, seat: Seat) -> Option<Edge> {
        self.edges.iter().copied().find(|e| e.to == seat)
    }
}

/// Flows of one bucket that travel together.
#[derive(Clone, Debug)]
pub struct Parcel {
    pub bucket: usize,
    pub tree: Tree,
    /// Indices of the graph's flows.
    pub flows: Vec<u32>,
}

/// The parcels of all buckets, in order.
pub fn parcels(graph: &Graph, seats: &Seats) -> Vec<Parcel> {
    let mut known: BTreeMap<(u32, u32), Tree> = BTreeMap::new();
    let mut out = Vec::new();
    for bucket in 0..graph.buckets.len() {
        let mut groups: BTreeMap<Tree, Vec<u32>> = BTreeMap::new();
        for (i, flow) in graph.flows_of(bucket) {
            let tree = known
                .entry((flow.from, flow.route))
                .or_insert_with(|| Tree::of(graph, flow, seats));
            match groups.get_mut(tree) {
                Some(flows) => flows.push(i),
                None => {
                    groups.insert(tree.clone(), vec![i]);
                }
            }
        }
        out.extend(groups.into_iter().map(|(tree, flows)| Parcel { bucket, tree, flows }));
    }
    out
}
