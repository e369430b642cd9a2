//! The NCCL path: parts are packed, sent in few large messages, and stored where they belong.

use std::collections::BTreeMap;

use crate::diag::Diagnostic;
use crate::graph::{Graph, Part as GraphPart};

use super::Fallible;
use super::build::Build;
use super::land::{copy_part, packed, packed_bytes};
use super::program::{Instruction, Lane, SeatProgram};
use super::seats::{Parcel, Seat, Seats, parcels};
use super::table::Table;

/// Bytes of the largest step of a GPU: what it packs, and what it receives. Two of each are in
/// use at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    pub sent: u64,
    pub received: u64,
}

impl Room {
    pub fn bytes(&self) -> u64 {
        2 * (self.sent + self.received)
    }

    /// Of every GPU.
    pub fn of(graph: &Graph, seats: &Seats) -> Vec<Room> {
        let mut sent: BTreeMap<(Seat, usize), u64> = BTreeMap::new();
        let mut received: BTreeMap<(Seat, usize), u64> = BTreeMap::new();
        for parcel in parcels(graph, seats) {
            let bytes = bytes_of(graph, &parcel);
            *sent.entry((parcel.tree.home, parcel.bucket)).or_default() += bytes;
            for edge in &parcel.tree.edges {
                let step = parcel.bucket + edge.hop as usize;
                *received.entry((edge.to, step)).or_default() += bytes;
            }
        }
        let mut rooms = vec![Room::default(); seats.count];
        sent.iter().for_each(|((s, _), b)| rooms[*s].sent = rooms[*s].sent.max(*b));
        received.iter().for_each(|((s, _), b)| rooms[*s].received = rooms[*s].received.max(*b));
        rooms
    }
}

fn parts_of<'a>(graph: &'a Graph, parcel: &'a Parcel) -> impl Iterator<Item = &'a GraphPart> {
    parcel.flows.iter().flat_map(|f| graph.parts_of(&graph.flows[*f as usize]))
}

fn bytes_of(graph: &Graph, parcel: &Parcel) -> u64 {
    parts_of(graph, parcel).map(packed_bytes).sum()
}

/// Steps of a GPU that are done, by the events that say so.
#[derive(Default)]
struct Done {
    moved: BTreeMap<usize, usize>,
    stored: BTreeMap<usize, usize>,
}

impl Build<'_> {
    /// The program of a GPU that exchanges messages with others.
    ///
    /// # Errors
    /// E0501 for an expression that no job computes.
    pub fn nccl(mut self) -> Fallible<SeatProgram> {
        self.agree(false)?;
        self.fill_constants()?;
        let parcels = std::mem::take(&mut self.parcels);
        let last = |p: &Parcel| {
            p.bucket + p.tree.edges.iter().map(|e| e.hop as usize).max().unwrap_or(0)
        };
        let steps = parcels.iter().map(last).max().map_or(0, |s| s + 1);
        let mut done = Done::default();
        // The maxima have used the lanes before.
        self.out.after(Lane::Move, Lane::Make);
        self.out.after(Lane::Store, Lane::Make);
        for step in 0..steps {
            self.out.push(Instruction::Step { number: step as u32 });
            self.step(&parcels, step, &mut done)?;
        }
        self.out.after(Lane::Make, Lane::Store);
        self.out.after(Lane::Make, Lane::Move);
        self.derive()?;
        Ok(self.out)
    }

    fn step(&mut self, parcels: &[Parcel], step: usize, done: &mut Done) -> Fallible<()> {
        let me = self.seat;
        let at = |p: &Parcel, hop: u32| p.bucket + hop as usize == step;
        let own: Vec<&Parcel> =
            parcels.iter().filter(|p| p.bucket == step && p.tree.home == me).collect();
        let came: Vec<&Parcel> = parcels
            .iter()
            .filter(|p| p.tree.arrival(me).is_some_and(|e| at(p, e.hop)))
            .collect();
        let sends: bool =
            (parcels.iter()).any(|p| p.tree.edges.iter().any(|e| e.from == me && at(p, e.hop)));
        if own.is_empty() && came.is_empty() && !sends {
            return Ok(());
        }
        if !own.is_empty() {
            // Two steps ago the same buffer was sent, and stored here.
            self.wait(Lane::Make, step, &done.moved);
            self.wait(Lane::Make, step, &done.stored);
            self.pack(&own, step)?;
        }
        if sends || !came.is_empty() {
            self.out.after(Lane::Move, Lane::Make);
            self.wait(Lane::Move, step, &done.stored);
            self.exchange(parcels, step);
            done.moved.insert(step, self.out.record(Lane::Move));
        }
        self.out.after(Lane::Store, if came.is_empty() { Lane::Make } else { Lane::Move });
        let staging = self.memory.staging();
        self.store(&own, staging.sent[step % 2])?;
        self.store(&came, staging.received[step % 2])?;
        done.stored.insert(step, self.out.record(Lane::Store));
        Ok(())
    }

    fn wait(&mut self, lane: Lane, step: usize, done: &BTreeMap<usize, usize>) {
        if let Some(event) = step.checked_sub(2).and_then(|s| done.get(&s)) {
            self.out.push(Instruction::Wait { lane, event: *event });
        }
    }

    /// Packs parcels one after the other.
    fn pack(&mut self, own: &[&Parcel], step: usize) -> Fallible<()> {
        let mut at = self.memory.staging().sent[step % 2];
        let mut places = Vec::new();
        let mut flows = Vec::new();
        for parcel in own {
            for part in parts_of(self.graph, parcel) {
                places.push((part, at));
                at += packed_bytes(part);
            }
            flows.extend(&parcel.flows);
        }
        let places: BTreeMap<*const GraphPart, u64> =
            places.into_iter().map(|(p, at)| (std::ptr::from_ref(p), at)).collect();
        self.make(&flows, &mut |unit, part| {
            let at = places.get(&std::ptr::from_ref(part)).ok_or_else(|| {
                Diagnostic::error("E0502", "a part has no place in its message")
            })?;
            Ok(packed(unit, part, *at))
        })?;
        Ok(())
    }

    /// All that this GPU sends and receives in a step, as one group.
    fn exchange(&mut self, parcels: &[Parcel], step: usize) {
        let (me, staging) = (self.seat, self.memory.staging());
        self.out.push(Instruction::GroupStart);
        let (mut packed_at, mut came_at) = (BTreeMap::new(), BTreeMap::new());
        let mut next = [staging.sent[step % 2], staging.received[(step + 1) % 2]];
        let mut to = staging.received[step % 2];
        for (i, parcel) in parcels.iter().enumerate() {
            let bytes = bytes_of(self.graph, parcel);
            if parcel.tree.home == me && parcel.bucket == step {
                packed_at.insert(i, next[0]);
                next[0] += bytes;
            }
            let arrival = parcel.tree.arrival(me);
            if arrival.is_some_and(|e| parcel.bucket + e.hop as usize + 1 == step) {
                came_at.insert(i, next[1]);
                next[1] += bytes;
            }
            for edge in
                parcel.tree.edges.iter().filter(|e| parcel.bucket + e.hop as usize == step)
            {
                let from = if edge.hop == 0 { &packed_at } else { &came_at };
                if let Some(address) = from.get(&i).copied().filter(|_| edge.from == me) {
                    self.out.push(Instruction::Send { to: edge.to, address, bytes });
                }
                if edge.to == me {
                    let (from, address) = (edge.from, to);
                    self.out.push(Instruction::Receive { from, address, bytes });
                    to += bytes;
                }
            }
        }
        self.out.push(Instruction::GroupEnd);
    }

    /// Puts what lies packed at an address into every parameter here that holds it.
    fn store(&mut self, parcels: &[&Parcel], address: u64) -> Fallible<()> {
        let mut at = address;
        let mut table = Table::default();
        for part in parcels.iter().flat_map(|p| parts_of(self.graph, p)) {
            let unit = self.unit(part);
            let from = packed(unit, part, at);
            for to in self.places(unit, self.seat)? {
                copy_part(&mut table, part.unit, unit, &part.window, &from, &to);
            }
            at += packed_bytes(part);
        }
        self.out.launch(Lane::Store, vec![table], 0);
        Ok(())
    }
}
