//! The execution graph: what each rank launches, sends, receives and stores, in order.
//! Never calls a driver: the CPU backend runs it with threads, the CUDA backend captures it.

mod build;
mod check;
mod print;

pub(crate) use build::tiles;
pub use build::{Bounds, build};
pub use check::check;
pub use print::print_graph;

use crate::shard::Window;

/// A contiguous part of a unit: made in one go, stored with one write a storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    pub unit: usize,
    /// The part of the unit's shape.
    pub window: Window,
    /// Bytes of values (or codes) and of scales; in the bucket they lie one after the other.
    pub value_bytes: u64,
    pub scale_bytes: u64,
    /// Where the chunk begins in the target's storages, in bytes.
    pub value_at: u64,
    pub scale_at: u64,
}

impl Chunk {
    pub fn bytes(&self) -> u64 {
        self.value_bytes + self.scale_bytes
    }
}

/// What is made, sent and stored as one step. Two or more are in flight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    pub chunks: Vec<Chunk>,
    pub bytes: u64,
}

/// One step of a rank's own program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Make every chunk of a bucket.
    Launch { bucket: usize },
    /// Hand a bucket's chunks to an inference rank (by index in the program).
    Send { bucket: usize, to: usize },
    /// Take a bucket's chunks from the trainer rank.
    Recv { bucket: usize },
    /// Put the chunks that are this rank's into its parameters.
    Store { bucket: usize },
    /// Compute a derived parameter (by index on the rank) from what has landed.
    Derive { target: usize },
}

/// The steps of every rank over one set of buckets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Graph {
    pub buckets: Vec<Bucket>,
    /// Steps of the trainer rank.
    pub trainer: Vec<Step>,
    /// Steps of each inference rank of the program.
    pub ranks: Vec<Vec<Step>>,
    /// Buckets in flight times the largest bucket: the most that staging ever holds.
    pub staging_bytes: u64,
}
