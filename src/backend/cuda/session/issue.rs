//! Puts a program's instructions into the lanes of a GPU: at once, or into a graph.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Blocks, Path, Session, Stage, join};
use crate::backend::cuda::Fallible;
use crate::backend::cuda::driver::Stream;
use crate::backend::cuda::program::{Instruction, Lane};
use crate::diag::Diagnostic;
use crate::graph::Graph;
use crate::lower::Program;

impl Session {
    /// Records a stage's instructions as a graph.
    pub(super) fn capture(&mut self, stage: usize) -> Fallible<()> {
        self.lane(Lane::Make).begin_capture()?;
        if let Err(problem) = self.issue(stage) {
            self.lane(Lane::Make).cancel_capture();
            return Err(problem);
        }
        let mut captured = self.lane(Lane::Make).end_capture()?;
        if let Some(comm) = &self.comm {
            captured.keep(Arc::clone(comm));
        }
        captured.upload(self.lane(Lane::Make))?;
        self.lane(Lane::Make).synchronize()?;
        self.stages[stage].captured = Some(captured);
        Ok(())
    }

    pub(super) fn lane(&self, lane: Lane) -> &Stream {
        &self.lanes[lane as usize]
    }

    /// Puts a stage's instructions into the lanes: forked from the first, and joined to it.
    pub(super) fn issue(&self, number: usize) -> Fallible<()> {
        let stage = &self.stages[number];
        let extra = &stage.events[stage.program.events..];
        let make = self.lane(Lane::Make);
        make.record(&extra[0])?;
        for lane in [Lane::Move, Lane::Store] {
            self.lane(lane).wait(&extra[0])?;
        }
        let mut group = Vec::new();
        for instruction in &stage.program.instructions {
            self.step(number, instruction, &mut group)?;
        }
        for (lane, event) in [Lane::Move, Lane::Store].into_iter().zip(&extra[1..]) {
            self.lane(lane).record(event)?;
            make.wait(event)?;
        }
        Ok(())
    }

    fn step(
        &self,
        number: usize,
        instruction: &Instruction,
        group: &mut Vec<Instruction>,
    ) -> Fallible<()> {
        let stage = &self.stages[number];
        match *instruction {
            Instruction::Launch { lane, table } => self.launch(stage, lane, table),
            Instruction::Clear { lane, address, bytes } => {
                self.lane(lane).fill(address, 0, bytes)
            }
            Instruction::GroupStart => {
                group.clear();
                Ok(())
            }
            Instruction::Send { .. } | Instruction::Receive { .. } => {
                group.push(*instruction);
                Ok(())
            }
            Instruction::GroupEnd => self.messages(group),
            Instruction::Record { lane, event } => self.lane(lane).record(&stage.events[event]),
            Instruction::Wait { lane, event } => self.lane(lane).wait(&stage.events[event]),
            Instruction::Signal { lane, to, flag, value } => {
                let at = self.arenas[to].flag(number, self.setting.member.rank(), flag);
                self.lane(lane).write_flag(self.base(to)? + at, value)
            }
            Instruction::Await { lane, from, flag, value } => {
                let me = self.setting.member.rank();
                let at = self.arenas[me].flag(number, from, flag);
                self.lane(lane).wait_flag(self.own.address() + at, value)
            }
            Instruction::Step { number: step } => {
                let at = self.progress.device_address() + 4 * number as u64;
                match self.setting.seats.count {
                    1 => Ok(()),
                    _ => self.lane(Lane::Make).write_flag(at, step + 1),
                }
            }
        }
    }

    fn launch(&self, stage: &Stage, lane: Lane, table: usize) -> Fallible<()> {
        let table = &stage.tables[table];
        let blocks = self.setting.blocks.unwrap_or(match &self.comm {
            Some(_) => Blocks::BESIDE_NCCL,
            None => Blocks::ALL,
        });
        let most = if lane == Lane::Make { blocks.make } else { blocks.store };
        let (at, bad) = (table.memory.address(), self.bad.address());
        self.kernels.launch(self.lane(lane), table.jobs, at, bad, most)
    }

    fn messages(&self, group: &[Instruction]) -> Fallible<()> {
        if group.is_empty() {
            return Ok(());
        }
        let Some(comm) = &self.comm else {
            return Err(Diagnostic::error("E0502", "a message, and no communicator"));
        };
        let stream = self.lane(Lane::Move);
        comm.group(Instant::now() + self.setting.timeout, |open| {
            for message in group {
                match *message {
                    Instruction::Send { to, address, bytes } => {
                        open.send(address, bytes, to, stream)?;
                    }
                    Instruction::Receive { from, address, bytes } => {
                        open.recv(address, bytes, from, stream)?;
                    }
                    _ => {}
                }
            }
            Ok(())
        })
    }

    /// One update by graphs that are not captured, on the NCCL path: what fusing saves.
    ///
    /// # Errors
    /// As [`Session::update`].
    pub(in crate::backend::cuda) fn unfused(
        &mut self,
        program: &Program,
        graphs: &[Graph],
    ) -> Fallible<Duration> {
        let before = self.stages.len();
        if self.comm.is_none() {
            self.comm = Some(join(&self.setting)?);
        }
        self.setting.path = Path::Nccl;
        self.take_staging(program, &graphs.iter().collect::<Vec<_>>())?;
        for (stage, graph) in graphs.iter().enumerate() {
            let built = self.build(program, graph, stage, graphs.len())?;
            let stage = self.stage(built)?;
            self.stages.push(stage);
        }
        let mut took = Duration::ZERO;
        // The first round makes NCCL's connections.
        for _ in 0..2 {
            self.setting.member.barrier("tensor by tensor", self.setting.timeout)?;
            let started = Instant::now();
            (before..self.stages.len()).try_for_each(|stage| self.issue(stage))?;
            self.watch(started + self.setting.timeout)?;
            took = started.elapsed();
        }
        Ok(took)
    }
}
