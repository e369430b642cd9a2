//! The execution graph: what each rank makes, sends, receives and stores, bucket by bucket.
//! Never calls a driver: the CPU backend runs it with threads, the CUDA backend captures it.

mod build;
mod check;
mod cuts;
mod fan;
mod join;
mod messages;
mod owners;
mod print;
mod routes;
mod shared;

use std::ops::Range;

pub use build::{Bounds, Setup, build};
pub(crate) use build::{slabs, tiles};
pub use check::check;
pub use messages::Message;
pub use owners::{each_value, unmakeable};
pub use print::print_graph;
pub use routes::Fan;

use crate::shard::Window;
use crate::topo::RankId;

/// A box of a unit that one trainer rank makes: its values (or codes), then its scales.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Part {
    /// Index in the program.
    pub unit: u32,
    pub window: Window,
    /// Bytes of values and of scales; in a message they lie one after the other.
    pub value_bytes: u64,
    pub scale_bytes: u64,
}

impl Part {
    pub fn bytes(&self) -> u64 {
        self.value_bytes + self.scale_bytes
    }
}

/// Parts that go from one trainer rank to the same inference ranks in one bucket.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Flow {
    pub from: u32,
    /// Index into [`Graph::routes`].
    pub route: u32,
    /// Range of [`Graph::parts`].
    pub parts: Range<u32>,
    pub bytes: u64,
}

/// How bytes reach all inference ranks that need them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Route {
    /// Ranks that the trainer rank sends to.
    pub entries: Vec<RankId>,
    /// Relays inside the inference side, in order: each sender has the bytes by then.
    pub relays: Vec<(RankId, RankId)>,
}

/// What is made, packed, sent and stored as one step. Two or more are in flight.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Bucket {
    /// Range of [`Graph::flows`], in order of sender.
    pub flows: Range<u32>,
}

/// Tiles whose parts lie on several trainer ranks: a box of them with one set of holders, who
/// agree on each tile's absolute maximum before the first bucket.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SharedTiles {
    /// The unit, by index in the program.
    pub unit: u32,
    /// In tiles of the grid on which the unit's scales are computed.
    pub tiles: Window,
    /// Range of [`Graph::holders`]: trainer ranks, of which the first collects the maxima and
    /// hands the result back.
    pub holders: Range<u32>,
}

/// The schedule of a whole update over all ranks of both sides.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Graph {
    /// Number of trainer ranks.
    pub trainers: u32,
    /// Number of inference ranks, all replicas.
    pub ranks: u32,
    pub parts: Vec<Part>,
    pub flows: Vec<Flow>,
    pub routes: Vec<Route>,
    pub buckets: Vec<Bucket>,
    /// Tiles that no single trainer rank makes, in order of unit.
    pub shared: Vec<SharedTiles>,
    /// Trainer ranks of the shared tiles.
    pub holders: Vec<u32>,
    /// Buckets in flight.
    pub in_flight: u64,
    /// The most that staging ever holds on any rank, in bytes.
    pub staging_bytes: u64,
    /// Hash of every decision that the schedule rests on: equal on all ranks that agree.
    pub digest: u128,
}
