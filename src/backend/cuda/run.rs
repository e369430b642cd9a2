//! A whole update on GPUs, from readers to sinks: in one process, or in one of several that a
//! launcher started.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Fallible;
use super::driver::{self, Gpu};
use super::files::{load, store};
use super::neighbours::{Neighbour, Published};
use super::packed::Room;
use super::seats::Seats;
use super::session::{Path, Session, Setting};
use crate::backend::cpu::{Rows, Sink};
use crate::diag::Diagnostic;
use crate::error::{Error, Result};
use crate::graph::{Bounds, Graph};
use crate::lower::Program;
use crate::rendezvous::{Hall, Member, World, agree, join};
use crate::topo::RankId;

/// Smallest bucket of the NCCL path, in bytes.
const LEAST_BUCKET: u64 = 64 << 10;

/// A bucket of the peer path, which stages nothing: large, for each ends a launch. Where nothing
/// is passed on, one is enough.
const PEER_BUCKET: u64 = 1 << 30;

/// What all GPUs agree on before anything is allocated.
#[derive(Clone, Debug)]
pub struct Plan {
    pub path: Path,
    pub graphs: Vec<Graph>,
    /// The most staging memory that a GPU takes, in bytes.
    pub staging: u64,
}

/// Builds the graphs of an update within some bounds.
pub type Schedules<'a> =
    &'a (dyn Fn(Bounds) -> std::result::Result<Vec<Graph>, Vec<Diagnostic>> + Sync);

/// How an update is run on GPUs.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// None for the peer path where all GPUs reach one another.
    pub path: Option<Path>,
    pub timeout: Duration,
    /// Cap on a GPU's staging memory, in bytes.
    pub staging: u64,
    /// Whether derived parameters are brought down as well.
    pub derived: bool,
    /// GPUs of this process to use at most; none for all.
    pub gpus: Option<usize>,
}

/// What an update on GPUs did.
#[derive(Clone, Debug, Default)]
pub struct Done {
    /// Units in which something was not finite.
    pub suspects: Vec<u32>,
    pub staging: u64,
    /// In words, for people: which cards, which path.
    pub cards: Vec<String>,
    pub path: Option<Path>,
}

/// What the two ends of an update are.
#[derive(Clone, Copy)]
pub struct Ends<'a> {
    /// By trainer rank.
    pub rows: &'a [&'a dyn Rows],
    /// By inference rank of all replicas; none for those that other processes hold.
    pub sinks: &'a [Option<&'a dyn Sink>],
}

/// Which GPUs a run has.
#[derive(Clone)]
pub enum Launch {
    /// Those of this process.
    Here { gpus: usize },
    /// One in each of several processes.
    Process { gpu: Arc<Gpu>, member: Arc<Member> },
}

impl Launch {
    /// Finds the GPUs, and meets the other processes if a launcher started several.
    ///
    /// # Errors
    /// E0605 if no GPU can be used; E0610 for a launcher's environment that makes no sense;
    /// E0604 for processes that do not come.
    pub fn find(timeout: Duration) -> Fallible<Launch> {
        driver::load()?;
        let gpus = driver::device_count()?;
        if gpus == 0 {
            let text = "the driver shows this process no GPU";
            return Err(Diagnostic::error("E0605", text).hint("look at CUDA_VISIBLE_DEVICES"));
        }
        match World::from_env(&|name| std::env::var(name).ok())? {
            Some(world) if world.size > 1 => {
                let gpu = Gpu::open(world.local_rank % gpus)?;
                Ok(Launch::Process { gpu, member: Arc::new(join(&world, timeout)?) })
            }
            _ => Ok(Launch::Here { gpus }),
        }
    }

    /// This process among several.
    pub fn member(&self) -> Option<&Arc<Member>> {
        match self {
            Launch::Here { .. } => None,
            Launch::Process { member, .. } => Some(member),
        }
    }

    /// Inference ranks of this process, of so many of both sides.
    pub fn ranks(&self, trainers: u32, ranks: u32) -> Vec<RankId> {
        match self {
            Launch::Here { .. } => (0..u64::from(ranks)).map(RankId).collect(),
            Launch::Process { member, .. } => {
                let seats = Seats::even(trainers, ranks, member.size());
                seats.ranks_on(member.rank()).collect()
            }
        }
    }
}

/// Runs one update. In a world of several processes each calls this with the same plan.
///
/// # Errors
/// E0605 where a GPU, a library, memory or a path is missing; E0604 and E0611 for other
/// processes; what readers and sinks give.
pub fn run(
    launch: &Launch,
    program: &Program,
    digest: &str,
    schedules: Schedules<'_>,
    ends: Ends<'_>,
    options: &Options,
) -> Result<Done> {
    let work = Work { program, digest, schedules, ends, options };
    let done = match launch {
        Launch::Here { gpus } => work.here(*gpus),
        Launch::Process { gpu, member } => work.seat(Arc::clone(gpu), Arc::clone(member)),
    };
    done.map_err(Error::of_device)
}

struct Work<'a> {
    program: &'a Program,
    digest: &'a str,
    schedules: Schedules<'a>,
    ends: Ends<'a>,
    options: &'a Options,
}

impl Work<'_> {
    /// A thread for each GPU of this process.
    fn here(&self, all: usize) -> Result<Done> {
        let ranks = self.ends.rows.len() + self.ends.sinks.len();
        let count = self.options.gpus.unwrap_or(all).min(all).min(ranks).max(1);
        let hall = Hall::new(count);
        let gpus: Fallible<Vec<Arc<Gpu>>> = (0..count).map(Gpu::open).collect();
        let results: Vec<Result<Done>> = std::thread::scope(|scope| {
            let threads = gpus?.into_iter().enumerate().map(|(seat, gpu)| {
                let member = Arc::new(hall.member(seat));
                scope.spawn(move || self.seat(gpu, member))
            });
            let threads: Vec<_> = threads.collect();
            let join = |t: std::thread::ScopedJoinHandle<'_, _>| {
                t.join().unwrap_or_else(|_| Err(stopped().into()))
            };
            Ok::<_, Error>(threads.into_iter().map(join).collect())
        })?;
        first(results)
    }

    /// One GPU's part.
    fn seat(&self, gpu: Arc<Gpu>, member: Arc<Member>) -> Result<Done> {
        let (timeout, rank) = (self.options.timeout, member.rank());
        let card = format!("{} (driver {})", gpu.name(), version_text());
        let (program, size) = (self.program, member.size());
        let (trainers, ranks) = (self.ends.rows.len() as u32, self.ends.sinks.len() as u32);
        let seats = Seats::even(trainers, ranks, size);
        let planned = plan(&gpu, &member, &seats, self.schedules, self.options)?;
        agree(
            &member,
            &[("plan digest", self.digest.to_owned()), ("schedule hash", planned.digest())],
            timeout,
        )?;
        let path = planned.path;
        let gpu_of = Arc::clone(&gpu);
        let setting = Setting { gpu, member, seats, path, timeout, blocks: None };
        let graphs: Vec<&Graph> = planned.graphs.iter().collect();
        let mut session = Session::open(setting, program, &graphs)?;
        let trainers: Vec<u32> = session.setting().seats.trainers_on(rank).collect();
        for trainer in trainers {
            let rows = self.ends.rows[trainer as usize];
            let loaded = load(program, trainer, rows, &gpu_of, session.control());
            let (tensors, memory) = self.told(&session, loaded)?;
            session.bind(trainer, tensors, vec![memory]);
        }
        let prepared = session.prepare(program, &graphs);
        self.told(&session, prepared)?;
        let suspects = session.update()?;
        for id in session.setting().seats.ranks_on(rank) {
            if let Some(sink) = self.ends.sinks.get(id.0 as usize).copied().flatten() {
                let stored = store(program, id, sink, self.options.derived, &session);
                self.told(&session, stored)?;
            }
        }
        session.setting().member.barrier("stored", timeout)?;
        Ok(Done { suspects, staging: planned.staging, cards: vec![card], path: Some(path) })
    }

    /// Tells the others of a failure.
    fn told<T>(&self, session: &Session, result: Fallible<T>) -> Fallible<T> {
        if let Err(problem) = &result {
            session.setting().member.fail(problem);
        }
        result
    }
}

impl Plan {
    fn digest(&self) -> String {
        self.graphs.iter().map(|g| format!("{:032x}", g.digest)).collect()
    }
}

/// Chooses the path and builds the schedule for it, within the cap on staging memory.
///
/// # Errors
/// E0605 for a path that the GPUs do not have; E0308 and E0502 of the schedule.
pub fn plan(
    gpu: &Arc<Gpu>,
    member: &Member,
    seats: &Seats,
    schedules: Schedules<'_>,
    options: &Options,
) -> Result<Plan> {
    let path = choose(gpu, member, options)?;
    if path == Path::Peer {
        let bounds = Bounds { staging: u64::MAX, in_flight: 2, bucket: PEER_BUCKET };
        return Ok(Plan {
            path,
            graphs: schedules(bounds).map_err(Error::refused)?,
            staging: 0,
        });
    }
    let mut bounds = Bounds::for_links(options.staging);
    loop {
        let graphs = schedules(bounds).map_err(Error::refused)?;
        let rooms = graphs.iter().map(|g| Room::of(g, seats));
        let staging = rooms.flatten().map(|r| r.bytes()).max().unwrap_or(0);
        if staging <= options.staging {
            return Ok(Plan { path, graphs, staging });
        }
        if bounds.bucket <= LEAST_BUCKET {
            let text = format!(
                "one step needs {staging} bytes of staging memory, more than the {} allowed",
                options.staging
            );
            let d = Diagnostic::error("E0605", text).hint("raise --staging");
            return Err(d.into());
        }
        // What all receivers of a bucket get at once may be more than one bucket.
        bounds.bucket = bounds.bucket.min(bounds.staging / bounds.in_flight) / 2;
    }
}

#[derive(Serialize, Deserialize)]
struct Reached {
    problem: Option<String>,
}

/// The peer path if every GPU reaches all others.
fn choose(gpu: &Arc<Gpu>, member: &Member, options: &Options) -> Fallible<Path> {
    if options.path == Some(Path::Nccl) || member.size() == 1 {
        return Ok(options.path.unwrap_or(Path::Peer));
    }
    let probe = gpu.alloc_shared(1)?;
    let own = Published::of(gpu, &probe)?;
    let all = member.share("probe", &own, options.timeout)?;
    let reached = Neighbour::reach_all(gpu, member, &all);
    let problem = reached.as_ref().err().map(|d| d.message.clone());
    let votes = member.share("reached", &Reached { problem }, options.timeout)?;
    match (votes.into_iter().find_map(|v| v.problem), options.path) {
        (None, _) => Ok(Path::Peer),
        (Some(why), None) => {
            tracing::info!(why, "GPUs do not see one another's memory: messages by NCCL");
            Ok(Path::Nccl)
        }
        (Some(why), Some(_)) => Err(Diagnostic::error("E0605", why)
            .note("--path peer needs GPUs of one machine that reach one another's memory")
            .hint("--path nccl works everywhere")),
    }
}

/// All results, or the failure that is not an echo of another's.
fn first(results: Vec<Result<Done>>) -> Result<Done> {
    let mut all = Done::default();
    let mut failed: Vec<Error> = Vec::new();
    for result in results {
        match result {
            Ok(done) => {
                all.cards.extend(done.cards);
                all.suspects = done.suspects;
                (all.staging, all.path) = (done.staging, done.path);
            }
            Err(problem) => failed.push(problem),
        }
    }
    let echo = |e: &Error| e.diagnostics.iter().all(|d| d.message.contains(" failed: "));
    failed.sort_by_key(echo);
    match failed.into_iter().next() {
        Some(problem) => Err(problem),
        None => Ok(all),
    }
}

fn stopped() -> Diagnostic {
    Diagnostic::error("E0502", "a GPU's thread stopped at a bug")
}

fn version_text() -> String {
    driver::version().map_or_else(|_| "unknown".to_owned(), |(a, b)| format!("CUDA {a}.{b}"))
}
