//! GPUs that stay ready between updates: opened once, updated as often as weights change.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Fallible;
use super::driver::{Gpu, Memory};
use super::files::{place, store, upload};
use super::place::Tensor;
use super::run::{Launch, Options, Plan, Schedules, plan};
use super::seats::Seats;
use super::session::{Path, Session, Setting};
use crate::backend::cpu::{Rows, Sink};
use crate::diag::Diagnostic;
use crate::error::{Error, Result};
use crate::graph::{Bounds, Graph};
use crate::lower::Program;
use crate::rendezvous::{Hall, Member, agree};

/// The GPUs of this process that take part in updates.
pub struct Live {
    sessions: Vec<Session>,
    trainers: BTreeMap<u32, (Vec<Option<Tensor>>, usize)>,
    path: Path,
    bounds: Bounds,
    /// Hash of what does not follow the expert map.
    rest: u128,
    staging: u64,
    cards: Vec<String>,
}

/// Sizes of both sides of an update.
#[derive(Clone, Copy, Debug)]
pub struct Sides {
    pub trainers: u32,
    /// Inference ranks of all replicas.
    pub ranks: u32,
}

impl Live {
    /// Opens the GPUs, takes memory for both sides, and captures the update. Sources are as the
    /// readers give them now.
    ///
    /// # Errors
    /// E0605 for a GPU, a library, memory or a path that is missing; E0604 and E0611 for other
    /// processes; what readers give; E0308 and E0502 of the schedule.
    pub fn open(
        launch: &Launch,
        program: &Program,
        digest: &str,
        schedules: Schedules<'_>,
        rows: &[&dyn Rows],
        sides: Sides,
        options: &Options,
    ) -> Result<Live> {
        let gpus: Vec<(Arc<Gpu>, Arc<Member>)> = match launch {
            Launch::Process { gpu, member } => vec![(Arc::clone(gpu), Arc::clone(member))],
            Launch::Here { gpus } => {
                let ranks = (sides.trainers + sides.ranks) as usize;
                let count = options.gpus.unwrap_or(*gpus).min(*gpus).min(ranks).max(1);
                let hall = Hall::new(count);
                let open = |seat| Ok((Gpu::open(seat)?, Arc::new(hall.member(seat))));
                (0..count).map(open).collect::<Fallible<_>>()?
            }
        };
        let opened = together(gpus, |(gpu, member)| {
            let opening =
                Opening { program, digest, schedules, rows, sides, options, member: &member };
            let result = opening.session(gpu);
            told(&member, result)
        })?;
        let mut live = Live {
            sessions: Vec::new(),
            trainers: BTreeMap::new(),
            path: Path::Peer,
            bounds: Bounds::with_staging(options.staging),
            rest: program.fixed_digest(),
            staging: 0,
            cards: Vec::new(),
        };
        for (session, trainers, plan) in opened {
            let gpu = &session.setting().gpu;
            live.cards.push(gpu.name().to_owned());
            let seat = live.sessions.len();
            live.trainers.extend(trainers.into_iter().map(|(t, own)| (t, (own, seat))));
            (live.path, live.bounds, live.staging) = (plan.path, plan.bounds, plan.staging);
            live.sessions.push(session);
        }
        Ok(live)
    }

    /// Reads the sources anew, to where they were before.
    ///
    /// # Errors
    /// What readers give; E0605.
    pub fn reload(&self, program: &Program, rows: &[&dyn Rows]) -> Result<()> {
        for (trainer, (tensors, seat)) in &self.trainers {
            let stream = self.sessions[*seat].control();
            upload(program, *trainer, rows[*trainer as usize], tensors, stream)?;
        }
        Ok(())
    }

    /// Runs one update. Gives the units in which something was not finite.
    ///
    /// # Errors
    /// See [`Session::update`].
    pub fn update(&mut self) -> Result<Vec<u32>> {
        let all = together(self.sessions.iter_mut().collect(), |s| Ok(s.update()?))?;
        Ok(all.into_iter().next().unwrap_or_default())
    }

    /// Takes the schedule of another expert map. True if a graph had to be captured again.
    ///
    /// # Errors
    /// E0305 if more than the map has changed; see [`Session::remap`]; E0611 for a process with
    /// another map.
    pub fn remap(&mut self, program: &Program, schedules: Schedules<'_>) -> Result<bool> {
        if program.fixed_digest() != self.rest {
            let text = "more than the expert map has changed since the update was captured";
            let d = Diagnostic::error("E0305", text);
            return Err(d.hint("open the GPUs anew for this plan").into());
        }
        let graphs = schedules(self.bounds).map_err(Error::refused)?;
        let graphs: Vec<&Graph> = graphs.iter().collect();
        let hash: String = graphs.iter().map(|g| format!("{:032x}", g.digest)).collect();
        let all = together(self.sessions.iter_mut().collect(), |session| {
            let Setting { member, timeout, .. } = session.setting();
            let member = Arc::clone(member);
            agree(&member, &[("schedule hash", hash.clone())], *timeout)?;
            let result = session.remap(program, &graphs).map_err(Error::from);
            told(&member, result)
        })?;
        Ok(all.contains(&true))
    }

    /// Brings the parameters of the inference ranks here down.
    ///
    /// # Errors
    /// What sinks give; E0605; E0604 for other processes.
    pub fn store(
        &mut self,
        program: &Program,
        sinks: &[Option<&dyn Sink>],
        derived: bool,
    ) -> Result<()> {
        together(self.sessions.iter_mut().collect(), |session| {
            let Setting { member, seats, timeout, .. } = session.setting();
            let stored = seats.ranks_on(member.rank()).try_for_each(|id| {
                match sinks.get(id.0 as usize).copied().flatten() {
                    Some(sink) => store(program, id, sink, derived, &*session),
                    None => Ok(()),
                }
            });
            told(member, stored.map_err(Error::from))?;
            Ok(member.barrier("stored", *timeout)?)
        })?;
        Ok(())
    }

    /// After a failed update: meets the others again, so that the next one can run.
    ///
    /// # Errors
    /// E0604 for a GPU that does not come.
    pub fn retry(&mut self) -> Result<()> {
        together(self.sessions.iter_mut().collect(), |session| Ok(session.retry()?))?;
        Ok(())
    }

    pub fn path(&self) -> Path {
        self.path
    }

    /// Bytes of staging memory of the GPU that takes the most.
    pub fn staging(&self) -> u64 {
        self.staging
    }

    /// Names of the cards of this process.
    pub fn cards(&self) -> &[String] {
        &self.cards
    }
}

/// What a GPU is opened for.
struct Opening<'a> {
    program: &'a Program,
    digest: &'a str,
    schedules: Schedules<'a>,
    rows: &'a [&'a dyn Rows],
    sides: Sides,
    options: &'a Options,
    member: &'a Arc<Member>,
}

type Opened = (Session, BTreeMap<u32, Vec<Option<Tensor>>>, Plan);

impl Opening<'_> {
    fn session(&self, gpu: Arc<Gpu>) -> Result<Opened> {
        let (program, member, timeout) = (self.program, self.member, self.options.timeout);
        let seats = Seats::even(self.sides.trainers, self.sides.ranks, member.size());
        let planned = plan(&gpu, member, &seats, self.schedules, self.options)?;
        let hashes =
            [("plan digest", self.digest.to_owned()), ("schedule hash", planned.hash())];
        agree(member, &hashes, timeout)?;
        let graphs: Vec<&Graph> = planned.graphs.iter().collect();
        let mine: Vec<u32> = seats.trainers_on(member.rank()).collect();
        let (path, blocks, member) = (planned.path, None, Arc::clone(member));
        let setting = Setting { gpu: Arc::clone(&gpu), member, seats, path, timeout, blocks };
        let mut session = Session::open(setting, program, &graphs)?;
        let mut trainers = BTreeMap::new();
        for trainer in mine {
            let (tensors, memory): (_, Memory) = place(program, trainer, &gpu)?;
            let rows = self.rows[trainer as usize];
            upload(program, trainer, rows, &tensors, session.control())?;
            session.bind(trainer, tensors.clone(), vec![memory]);
            trainers.insert(trainer, tensors);
        }
        session.prepare(program, &graphs)?;
        Ok((session, trainers, planned))
    }
}

/// Tells the others of a failure. One that was told before is the reason of a wait in vain.
fn told<T>(member: &Member, result: Result<T>) -> Result<T> {
    let Err(error) = result else { return result };
    let waited = error.diagnostics.iter().all(|d| d.code == "E0604");
    if let Some(reason) = member.failure().filter(|_| waited) {
        return Err(Error::device(reason));
    }
    if let Some(first) = error.diagnostics.first() {
        member.fail(first);
    }
    Err(error)
}

/// A thread for each; all results, or the failure that is not an echo of another's.
fn together<S: Send, T: Send>(
    all: Vec<S>,
    work: impl Fn(S) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let work = &work;
    let results: Vec<Result<T>> = std::thread::scope(|scope| {
        let threads: Vec<_> = all.into_iter().map(|s| scope.spawn(move || work(s))).collect();
        let stopped = |_| Err(Diagnostic::error("E0502", "a GPU's thread stopped").into());
        threads.into_iter().map(|t| t.join().unwrap_or_else(stopped)).collect()
    });
    let mut done = Vec::with_capacity(results.len());
    let mut failed: Vec<Error> = Vec::new();
    for result in results {
        match result {
            Ok(value) => done.push(value),
            Err(error) => failed.push(error),
        }
    }
    let echo = |e: &Error| e.diagnostics.iter().all(|d| d.message.contains(" failed: "));
    failed.sort_by_key(echo);
    match failed.into_iter().next() {
        Some(error) => Err(error.of_device()),
        None => Ok(done),
    }
}
