//! What a GPU lends to the others: one allocation, laid out alike by all who know the schedule.

use std::collections::BTreeMap;

use crate::graph::Graph;
use crate::lower::{Part, Program, TargetKind};

use super::build::words_of;
use super::program::Flag;
use super::seats::{Seat, Seats};

/// Alignment of everything in it, in bytes.
const ALIGN: u64 = 256;

/// Offsets in bytes.
#[derive(Clone, Debug, Default)]
pub struct Arena {
    /// One word for each stage, other GPU and flag.
    flags: u64,
    seats: usize,
    /// By stage and trainer rank.
    maxima: BTreeMap<(usize, u32), u64>,
    /// By inference rank and target.
    targets: BTreeMap<(u64, u32, Part), u64>,
    maxima_bytes: u64,
    pub bytes: u64,
}

impl Arena {
    /// The arena of a GPU; `targets` says whether inference ranks' parameters lie in it.
    pub fn of(program: &Program, stages: &[&Graph], seats: &Seats, seat: Seat) -> Arena {
        let mut arena = Arena { seats: seats.count, ..Arena::default() };
        arena.flags = arena.add((stages.len() * seats.count * Flag::ALL.len() * 4) as u64);
        for rank in seats.ranks_on(seat) {
            let index = (rank.0 % program.ranks.len().max(1) as u64) as usize;
            for (i, target) in (0..).zip(&program.ranks[index].targets) {
                if target.kind == TargetKind::Alias {
                    continue;
                }
                for s in &target.storages {
                    let at = arena.add(s.span());
                    arena.targets.insert((rank.0, i, s.part), at);
                }
            }
        }
        // Last, for only these change with the expert map.
        let targets = arena.bytes;
        for (stage, graph) in stages.iter().enumerate() {
            let words = words_of(graph);
            for trainer in seats.trainers_on(seat) {
                let bytes = 4 * words.get(&trainer).copied().unwrap_or(0);
                let at = arena.add(bytes);
                arena.maxima.insert((stage, trainer), at);
            }
        }
        arena.maxima_bytes = arena.bytes - targets;
        arena
    }

    fn add(&mut self, bytes: u64) -> u64 {
        let at = self.bytes;
        self.bytes = (at + bytes).next_multiple_of(ALIGN);
        at
    }

    /// Room for the maxima of another expert map, in bytes.
    pub fn spare(&self) -> u64 {
        self.maxima_bytes / 4
    }

    /// Bytes of all flags, from the arena's start.
    pub fn flag_bytes(&self, stages: usize) -> u64 {
        (stages * self.seats * Flag::ALL.len() * 4) as u64
    }

    pub fn flag(&self, stage: usize, from: Seat, flag: Flag) -> u64 {
        let word = (stage * self.seats + from) * Flag::ALL.len() + flag as usize;
        self.flags + 4 * word as u64
    }

    pub fn maxima(&self, stage: usize, trainer: u32) -> Option<u64> {
        self.maxima.get(&(stage, trainer)).copied()
    }

    pub fn target(&self, rank: u64, target: u32, part: Part) -> Option<u64> {
        self.targets.get(&(rank, target, part)).copied()
    }
}
