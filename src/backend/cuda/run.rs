//! A whole update on GPUs, from readers to sinks: in one process, or in one of several that a
//! launcher started.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Fallible;
use super::driver::{self, Gpu};
use super::live::{Live, Sides};
use super::neighbours::{Neighbour, Published};
use super::packed::Room;
use super::seats::Seats;
use super::session::Path;
use crate::backend::cpu::{Rows, Sink};
use crate::diag::Diagnostic;
use crate::error::{Error, Result};
use crate::graph::{Bounds, Graph};
use crate::lower::Program;
use crate::rendezvous::{Member, World, join};
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
    pub bounds: Bounds,
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
#[derive(Clone, Debug)]
pub struct Done {
    /// Units in which something was not finite.
    pub suspects: Vec<u32>,
    pub staging: u64,
    /// Names of this process' cards.
    pub cards: Vec<String>,
    pub path: Path,
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
    let sides = Sides { trainers: ends.rows.len() as u32, ranks: ends.sinks.len() as u32 };
    let mut live = Live::open(launch, program, digest, schedules, ends.rows, sides, options)?;
    let suspects = live.update()?;
    live.store(program, ends.sinks, options.derived)?;
    let (staging, cards) = (live.staging(), live.cards().to_vec());
    Ok(Done { suspects, staging, cards, path: live.path() })
}

impl Plan {
    /// Hash of the schedule, which all must have.
    pub fn hash(&self) -> String {
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
        let all = |bucket| Bounds { staging: u64::MAX, in_flight: 2, bucket };
        let mut bounds = all(u64::MAX);
        let mut graphs = schedules(bounds).map_err(Error::refused)?;
        if graphs.iter().any(|g| seats.passes_on(g)) {
            bounds = all(PEER_BUCKET);
            graphs = schedules(bounds).map_err(Error::refused)?;
        }
        return Ok(Plan { path, graphs, bounds, staging: 0 });
    }
    let mut bounds = Bounds::for_links(options.staging);
    loop {
        let graphs = schedules(bounds).map_err(Error::refused)?;
        let rooms = graphs.iter().map(|g| Room::of(g, seats));
        let staging = rooms.flatten().map(|r| r.bytes()).max().unwrap_or(0);
        if staging <= options.staging {
            return Ok(Plan { path, graphs, bounds, staging });
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
