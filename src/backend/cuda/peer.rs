//! The peer path: codes and scales are stored straight into the parameters of the GPU that needs
//! them; what several GPUs need is passed on from where it has landed.

use std::collections::{BTreeMap, BTreeSet};

use super::Fallible;
use super::build::Build;
use super::land::copy_part;
use super::program::{Flag, Instruction, Lane, SeatProgram};
use super::seats::{Parcel, Seat};
use super::table::Table;
use crate::diag::Diagnostic;

impl Build<'_> {
    /// The program of a GPU that sees the memory of those it writes to.
    ///
    /// # Errors
    /// E0501 for an expression that no job computes, E0605 for memory that this GPU does not see.
    pub fn peer(mut self) -> Fallible<SeatProgram> {
        self.agree(true)?;
        self.fill_constants()?;
        let parcels = std::mem::take(&mut self.parcels);
        let hops = parcels.iter().flat_map(|p| &p.tree.edges).map(|e| e.hop as usize).max();
        let steps = self.graph.buckets.len() + hops.unwrap_or(0);
        let mut told = BTreeMap::new();
        for step in 0..=steps {
            self.out.push(Instruction::Step { number: step as u32 });
            self.make_step(&parcels, step)?;
            self.store_step(&parcels, step, &mut told)?;
        }
        self.out.after(Lane::Make, Lane::Store);
        self.derive()?;
        Ok(self.out)
    }

    /// Makes what this GPU's trainer ranks give each GPU in a step.
    fn make_step(&mut self, parcels: &[Parcel], step: usize) -> Fallible<()> {
        let me = self.seat;
        let mut by_seat: BTreeMap<Seat, Vec<u32>> = BTreeMap::new();
        for parcel in parcels.iter().filter(|p| p.bucket == step && p.tree.home == me) {
            for edge in parcel.tree.edges.iter().filter(|e| e.hop == 0) {
                by_seat.entry(edge.to).or_default().extend(&parcel.flows);
            }
            by_seat.entry(me).or_default().extend(&parcel.flows);
        }
        for (to, mut flows) in by_seat {
            if to == me {
                flows.retain(|f| self.is_needed(*f, me));
            }
            let units: BTreeSet<u32> =
                flows.iter().flat_map(|f| self.parts(*f).1).map(|p| p.unit).collect();
            let mut places = BTreeMap::new();
            for unit in units {
                let first = self.places(&self.program.units[unit as usize], to)?;
                places.insert(unit, first.into_iter().next());
            }
            let made = self.make(&flows, &mut |_, part| {
                places.get(&part.unit).cloned().flatten().ok_or_else(|| {
                    Diagnostic::error("E0502", "a part goes where nobody needs it")
                })
            })?;
            if made && to != me {
                let value = step as u32 + 1;
                let (lane, flag) = (Lane::Make, Flag::Made);
                self.out.push(Instruction::Signal { lane, to, flag, value });
            }
        }
        Ok(())
    }

    /// True if ranks of a GPU need the parts of a flow.
    fn is_needed(&self, flow: u32, seat: Seat) -> bool {
        let parts = self.parts(flow).1;
        parts.iter().any(|p| self.places(self.unit(p), seat).is_ok_and(|p| !p.is_empty()))
    }

    /// Passes on, and copies to further places here, what came in the step before.
    fn store_step(
        &mut self,
        parcels: &[Parcel],
        step: usize,
        told: &mut BTreeMap<(Seat, Flag), u32>,
    ) -> Fallible<()> {
        let (me, lane) = (self.seat, Lane::Store);
        let Some(before) = step.checked_sub(1) else { return Ok(()) };
        let came = |p: &&Parcel| {
            let here = p.tree.arrival(me).is_some_and(|e| p.bucket + e.hop as usize == before);
            here || p.tree.home == me && p.bucket == before
        };
        let came: Vec<&Parcel> = parcels.iter().filter(came).collect();
        if came.is_empty() {
            return Ok(());
        }
        let senders: BTreeSet<(Seat, Flag)> = came
            .iter()
            .filter_map(|p| p.tree.arrival(me))
            .map(|e| (e.from, if e.hop == 0 { Flag::Made } else { Flag::Relayed }))
            .collect();
        for (from, flag) in senders {
            let value = step as u32;
            if told.insert((from, flag), value) != Some(value) {
                self.out.push(Instruction::Await { lane, from, flag, value });
            }
        }
        if came.iter().any(|p| p.tree.home == me) {
            self.out.after(lane, Lane::Make);
        }
        self.relay(&came, step)?;
        let mut table = Table::default();
        for flow in came.iter().flat_map(|p| &p.flows) {
            for part in self.parts(*flow).1 {
                let unit = self.unit(part);
                let places = self.places(unit, me)?;
                let Some((first, others)) = places.split_first() else { continue };
                for to in others {
                    copy_part(&mut table, part.unit, unit, &part.window, first, to);
                }
            }
        }
        self.out.launch(lane, vec![table], 0);
        Ok(())
    }

    fn relay(&mut self, came: &[&Parcel], step: usize) -> Fallible<()> {
        let (me, lane) = (self.seat, Lane::Store);
        let mut by_seat: BTreeMap<Seat, Table> = BTreeMap::new();
        for parcel in came {
            for edge in parcel.tree.edges.iter().filter(|e| e.from == me && e.hop > 0) {
                let table = by_seat.entry(edge.to).or_default();
                for part in parcel.flows.iter().flat_map(|f| self.parts(*f).1) {
                    let unit = self.unit(part);
                    let (from, to) = (self.places(unit, me)?, self.places(unit, edge.to)?);
                    if let (Some(from), Some(to)) = (from.first(), to.first()) {
                        copy_part(table, part.unit, unit, &part.window, from, to);
                    }
                }
            }
        }
        for (to, table) in by_seat {
            self.out.launch(lane, vec![table], 0);
            let value = step as u32 + 1;
            self.out.push(Instruction::Signal { lane, to, flag: Flag::Relayed, value });
        }
        Ok(())
    }
}
