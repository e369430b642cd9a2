//! A whole update: bind what is read and written, run the graph, commit. Nothing of a file run
//! is published before all of it is right.

mod files;
mod manifest;
mod schedule;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use crate::backend::cpu::{self, Fenced, FiniteCheck, NonFinite, Rows, Sink};
use crate::backend::cuda::bench;
use crate::backend::cuda::run::{self as cuda, Ends, Launch};
use crate::backend::cuda::session::Blocks;
use crate::compile::Compiled;
use crate::diag::Diagnostic;
use crate::error::{Error, Result};
use crate::graph::{Bounds, Setup};
use crate::io::{Checkpoint, OutputDir};
use crate::lower::RankProgram;
use crate::rendezvous::{Member, agree};
use crate::topo::{Cluster, RankId};

use files::{FileRows, FileSink, Stop};
use manifest::{manifest, ranks_of};

pub use crate::backend::cuda::session::Path as GpuPath;
pub use manifest::{
    DerivedTensor, MANIFEST_SCHEMA, ManifestRank, ManifestTensor, OutputManifest, Recorded,
};
pub use schedule::{Schedule, traffic_of};

/// Staging memory of a run that does not say otherwise, in bytes.
pub const DEFAULT_STAGING: u64 = 256 << 20;

/// What runs an update.
#[derive(Clone)]
pub enum Engine {
    /// Threads of this process.
    Cpu,
    /// GPUs; no path for the one that they allow.
    Cuda { launch: Launch, path: Option<GpuPath> },
}

/// How a run is bounded and checked.
#[derive(Clone)]
pub struct RunOptions {
    pub engine: Engine,
    pub finite: FiniteCheck,
    pub timeout: Duration,
    /// Cap on staging memory in bytes; of each GPU, where GPUs run it.
    pub staging: u64,
    /// Replace an earlier run's output.
    pub force: bool,
    /// Set by the host program to end the run at its next read or write.
    pub stop: Arc<AtomicBool>,
}

/// What a file run did.
#[derive(Clone, Debug)]
pub struct RunSummary {
    pub out: PathBuf,
    pub ranks: usize,
    pub params: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub staging_bytes: u64,
    pub elapsed: Duration,
    /// The GPUs of this process that ran it; none for threads.
    pub cards: Vec<String>,
    /// Warnings: non-finite values that were let through.
    pub notes: Vec<Diagnostic>,
}

/// Runs a compiled plan from a checkpoint to one safetensors file a rank. Of several processes
/// each writes its own ranks' files, and process 0 publishes them.
///
/// # Errors
/// E0603 for an output folder that cannot be used, E0602 for non-finite weights, E0601 and
/// E0414 for reads and writes that fail, E0608 for one that was asked to stop; E0604 and E0605 for GPUs and other processes. On every
/// error the output is absent or unchanged.
pub fn run_to_files(
    compiled: &Compiled,
    checkpoint: &Checkpoint,
    recorded: &Recorded,
    out: &Path,
    options: &RunOptions,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<RunSummary> {
    let run = FileRun { compiled, checkpoint, options, progress, started: Instant::now() };
    let result = run.files(recorded, out);
    if let (Err(error), Some(member)) = (&result, run.member())
        && let Some(first) = error.diagnostics.first()
    {
        member.fail(first);
    }
    result
}

struct FileRun<'a> {
    compiled: &'a Compiled,
    checkpoint: &'a Checkpoint,
    options: &'a RunOptions,
    progress: &'a (dyn Fn(u64) + Sync),
    started: Instant,
}

/// What a run of either backend gives.
struct Ran {
    non_finite: Vec<NonFinite>,
    staging: u64,
    cards: Vec<String>,
}

impl FileRun<'_> {
    fn stop(&self) -> Stop {
        Stop(Arc::clone(&self.options.stop))
    }

    /// This process among several.
    fn member(&self) -> Option<&Arc<Member>> {
        match &self.options.engine {
            Engine::Cpu => None,
            Engine::Cuda { launch, .. } => launch.member(),
        }
    }

    fn files(&self, recorded: &Recorded, out: &Path) -> Result<RunSummary> {
        let (compiled, program) = (self.compiled, &self.compiled.program);
        if let Some(member) = self.member() {
            let digest = [("plan digest", compiled.digest.clone())];
            agree(member, &digest, self.options.timeout).map_err(Error::device)?;
        }
        let output = match self.member() {
            Some(member) if member.rank() > 0 => None,
            _ => Some(OutputDir::create(out, self.options.force)?),
        };
        let staging = self.shared("output", output.as_ref().map(OutputDir::staging))?;
        // The files are replica 0's: the others would hold the same.
        let own = self.ranks().into_iter().map(|id| &program.ranks[id.0 as usize]);
        let sinks: Result<Vec<FileSink>> =
            own.map(|rank| FileSink::create(&staging, compiled, rank, self.stop())).collect();
        let sinks = sinks?;
        let ran = self.run(&sinks)?;
        let ranks = self.gathered("files", ranks_of(compiled, &sinks)?)?;
        self.stop().check()?;
        let params = ranks.iter().map(|r| r.tensors.len() as u64).sum();
        if let Some(output) = output {
            output.publish(&manifest(compiled, recorded, ranks, &ran.non_finite)?)?;
        }
        self.shared("published", Some(Path::new("")))?;
        Ok(RunSummary {
            out: out.to_owned(),
            ranks: program.ranks.len(),
            params,
            read_bytes: program.source_bytes(),
            written_bytes: program.ranks.iter().map(RankProgram::bytes).sum(),
            staging_bytes: ran.staging,
            elapsed: self.started.elapsed(),
            cards: ran.cards,
            notes: ran.non_finite.iter().map(let_through).collect(),
        })
    }

    /// A path that process 0 gives all.
    fn shared(&self, round: &str, path: Option<&Path>) -> Result<PathBuf> {
        let own = path.map(Path::to_owned).unwrap_or_default();
        let Some(member) = self.member() else { return Ok(own) };
        let all = member.share(round, &own, self.options.timeout);
        Ok(all.map_err(Error::device)?.swap_remove(0))
    }

    /// The ranks of all processes, in order.
    fn gathered(&self, round: &str, own: Vec<ManifestRank>) -> Result<Vec<ManifestRank>> {
        let Some(member) = self.member() else { return Ok(own) };
        let all = member.share(round, &own, self.options.timeout).map_err(Error::device)?;
        let mut all: Vec<ManifestRank> = all.into_iter().flatten().collect();
        all.sort_by_key(|r| r.rank);
        Ok(all)
    }

    /// Inference ranks of this process.
    fn ranks(&self) -> Vec<RankId> {
        let program = &self.compiled.program;
        let ranks = program.ranks.len() as u32;
        match &self.options.engine {
            Engine::Cpu => (0..u64::from(ranks)).map(RankId).collect(),
            Engine::Cuda { launch, .. } => launch.ranks(program.trainers, ranks),
        }
    }

    fn run(&self, sinks: &[FileSink]) -> Result<Ran> {
        let program = &self.compiled.program;
        let files = FileRows::bind(program, self.checkpoint, self.stop())?;
        let fenced = (0..program.trainers).map(|rank| Fenced { program, rank, rows: &files });
        let fenced: Vec<Fenced<'_>> = fenced.collect();
        let rows: Vec<&dyn Rows> = fenced.iter().map(|r| r as &dyn Rows).collect();
        match &self.options.engine {
            Engine::Cpu => self.on_threads(&rows, sinks),
            Engine::Cuda { launch, path } => self.on_gpus(launch, *path, &rows, sinks),
        }
    }

    fn on_threads(&self, rows: &[&dyn Rows], sinks: &[FileSink]) -> Result<Ran> {
        let (options, cluster) = (self.options, Cluster::default());
        let bounds = Bounds::with_staging(options.staging);
        let schedule = Schedule::of(self.compiled, &Setup::for_threads(1, &cluster, bounds))?;
        let graph = schedule.joined();
        let bound: Vec<&dyn Sink> = sinks.iter().map(|s| s as &dyn Sink).collect();
        let (finite, timeout, progress) = (options.finite, options.timeout, self.progress);
        let how = cpu::Options { finite, timeout, progress };
        let report = cpu::run(&self.compiled.program, &graph, rows, &bound, &how)?;
        let staging = graph.staging_bytes;
        Ok(Ran { non_finite: report.non_finite, staging, cards: Vec::new() })
    }

    fn on_gpus(
        &self,
        launch: &Launch,
        path: Option<GpuPath>,
        rows: &[&dyn Rows],
        sinks: &[FileSink],
    ) -> Result<Ran> {
        let program = &self.compiled.program;
        let mut bound: Vec<Option<&dyn Sink>> = vec![None; program.ranks.len()];
        for sink in sinks {
            bound[sink.rank] = Some(sink);
        }
        let options = cuda::Options {
            path,
            timeout: self.options.timeout,
            staging: self.options.staging,
            derived: false,
            gpus: None,
        };
        let ends = Ends { rows, sinks: &bound };
        let (done, non_finite) =
            on_gpus(self.compiled, launch, 1, ends, self.options.finite, &options)?;
        (self.progress)(program.units.iter().map(|u| u.bytes()).sum());
        Ok(Ran { non_finite, staging: done.staging, cards: done.cards })
    }
}

/// Runs an update on GPUs for some replicas; gives what non-finite values it let through.
///
/// # Errors
/// See [`cuda::run`]; E0602 for non-finite weights.
pub(crate) fn on_gpus(
    compiled: &Compiled,
    launch: &Launch,
    replicas: u32,
    ends: Ends<'_>,
    finite: FiniteCheck,
    options: &cuda::Options,
) -> Result<(cuda::Done, Vec<NonFinite>)> {
    let program = &compiled.program;
    if finite == FiniteCheck::Before {
        cpu::refuse_sources(program, ends.rows)?;
    }
    let (cluster, experts) = (Cluster::default(), &compiled.experts);
    let schedules = |bounds: Bounds| {
        let setup = Setup::for_threads(replicas, &cluster, bounds);
        let schedule = Schedule::of_program(program, experts, &setup);
        Ok(schedule.map_err(|e| e.diagnostics)?.parts())
    };
    let done = cuda::run(launch, program, &compiled.digest, &schedules, ends, options)?;
    let suspects = done.suspects.iter().map(|u| *u as usize).collect();
    let found = cpu::judge(program, ends.rows, &suspects, finite == FiniteCheck::Allow)?;
    Ok((done, found))
}

/// Measures updates of a compiled plan on the GPUs of this process.
///
/// # Errors
/// E0605 and E0604 for GPUs; E0308 and E0502 of the schedule.
pub fn measure(
    compiled: &Compiled,
    options: cuda::Options,
    updates: usize,
    blocks: Option<Blocks>,
    unfused: bool,
) -> Result<bench::Report> {
    let (program, experts) = (&compiled.program, &compiled.experts);
    let (cluster, replicas) = (Cluster::default(), compiled.mesh.replicas as u32);
    let schedules = |bounds: Bounds| {
        let setup = Setup::for_threads(replicas, &cluster, bounds);
        let schedule = Schedule::of_program(program, experts, &setup);
        Ok(schedule.map_err(|e| e.diagnostics)?.parts())
    };
    bench::transfer(&bench::Transfer {
        program,
        schedules: &schedules,
        trainers: program.trainers,
        ranks: program.ranks.len() as u32 * replicas,
        options,
        updates,
        blocks,
        unfused,
    })
}

fn let_through(found: &NonFinite) -> Diagnostic {
    Diagnostic::warning("E0609", format!("let through: {}", found.message()))
        .about(&found.tensor)
}
