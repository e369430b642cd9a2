//! A whole update: bind what is read and written, run the graph, commit. Nothing of a file run
//! is published before all of it is right.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::backend::cpu::{self, Fenced, FiniteCheck, NonFinite, Rows, Sink, Strided};
use crate::compile::Compiled;
use crate::diag::Diagnostic;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::graph::{Bounds, Graph, Setup, build, check, each_value};
use crate::io::{Checkpoint, OutputDir, RankFile, TensorEntry};
use crate::lower::{Part, Program, RankProgram, TargetKind};
use crate::shard::{ExpertMap, Storage};
use crate::simulate::{Traffic, Values};
use crate::topo::{Cluster, Coords, InferMesh, TrainMesh};

/// Version of the output's manifest.json.
pub const MANIFEST_SCHEMA: u32 = 1;

/// Staging memory of a run that does not say otherwise, in bytes.
pub const DEFAULT_STAGING: u64 = 256 << 20;

/// How a run is bounded and checked.
#[derive(Clone, Copy, Debug)]
pub struct RunOptions {
    pub finite: FiniteCheck,
    pub timeout: Duration,
    /// Cap on staging memory in bytes.
    pub staging: u64,
    /// Replace an earlier run's output.
    pub force: bool,
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
    /// Warnings: non-finite values that were let through.
    pub notes: Vec<Diagnostic>,
}

/// What all ranks agree on before the first update: who makes and sends what, in which order.
///
/// What follows the expert map is a graph of its own: a changed map leaves the other as it is.
#[derive(Clone, Debug)]
pub struct Schedule {
    pub fixed: Graph,
    pub mapped: Graph,
    /// The expert map that it is for.
    experts: ExpertMap,
}

impl Schedule {
    /// Builds and verifies the schedule of a compiled plan for a number of replicas.
    ///
    /// # Errors
    /// E0502, a bug of the compiler.
    pub fn of(compiled: &Compiled, setup: &Setup<'_>) -> Result<Schedule> {
        let mapped = compiled.program.mapped();
        let fixed = graph_of(&compiled.program, 0..mapped.start, setup)?;
        let mapped = graph_of(&compiled.program, mapped, setup)?;
        Ok(Schedule { fixed, mapped, experts: compiled.experts.clone() })
    }

    /// The schedule of the same plan for another expert map: only the experts' part is new.
    ///
    /// # Errors
    /// E0305 if more than the map has changed.
    pub fn remap(&self, compiled: &Compiled, setup: &Setup<'_>) -> Result<Schedule> {
        let program = &compiled.program;
        let mapped = program.mapped();
        if check(program, 0..mapped.start, &self.fixed).is_err() {
            let text = "more than the expert map has changed since the schedule was agreed";
            return Err(Diagnostic::error("E0305", text)
                .hint("agree on a new schedule")
                .into());
        }
        let mapped = graph_of(program, mapped, setup)?;
        let fixed = self.fixed.clone();
        Ok(Schedule { fixed, mapped, experts: compiled.experts.clone() })
    }

    /// Refuses a plan that was compiled for another expert map.
    ///
    /// # Errors
    /// E0305 with the first layer that differs.
    pub fn fits(&self, compiled: &Compiled) -> Result<()> {
        let layers = self.experts.keys().chain(compiled.experts.keys());
        let differs = |l: &&String| self.experts.get(*l) != compiled.experts.get(*l);
        match layers.min_by_key(|l| (!differs(l), *l)).filter(differs) {
            Some(layer) => Err(Diagnostic::error(
                "E0305",
                format!("the expert map of {layer} has changed since the schedule was agreed"),
            )
            .hint("remap the schedule on every rank, then update")
            .into()),
            None => Ok(()),
        }
    }

    /// The whole schedule as one graph.
    pub fn joined(&self) -> Cow<'_, Graph> {
        match self.mapped.buckets.is_empty() {
            true => Cow::Borrowed(&self.fixed),
            false => Cow::Owned(self.fixed.then(&self.mapped)),
        }
    }

    /// Hash of the whole schedule: equal on all ranks that agree.
    pub fn digest(&self) -> String {
        format!("{:032x}", self.joined().digest)
    }
}

fn graph_of(
    program: &Program,
    units: std::ops::Range<u32>,
    setup: &Setup<'_>,
) -> Result<Graph> {
    let started = Instant::now();
    let graph = build(program, units.clone(), setup).map_err(Error::refused)?;
    tracing::debug!(parts = graph.parts.len(), took = ?started.elapsed(), "schedule built");
    // A part of a graph covers a part of the units.
    if setup.only.is_none() {
        check(program, units, &graph)?;
    }
    Ok(graph)
}

/// What a simulation sees of a compiled plan's schedule: buckets for links of the cluster's kind.
///
/// # Errors
/// As [`Schedule::of`].
pub fn traffic_of(compiled: &Compiled, cluster: &Cluster, staging: u64) -> Result<Traffic> {
    let (program, replicas) = (&compiled.program, compiled.mesh.replicas as u32);
    let setup = Setup::new(replicas, cluster, Bounds::for_links(staging));
    let schedule = Schedule::of(compiled, &setup)?;
    let graph = schedule.joined().into_owned();
    let mut values = Values::default();
    each_value(program, replicas, &mut |bytes, holders, needed_by| {
        values.add(bytes, holders, needed_by);
    });
    Ok(Traffic {
        trainers: graph.trainers,
        ranks: graph.ranks,
        in_flight: graph.in_flight,
        staging_bytes: graph.staging_bytes,
        buckets: graph.buckets.len(),
        amax: graph.amax_bytes(),
        values,
        messages: Box::new(move |bucket| graph.messages(bucket)),
    })
}

/// Runs a compiled plan from a checkpoint to one safetensors file a rank.
///
/// # Errors
/// E0603 for an output folder that cannot be used, E0602 for non-finite weights, E0601 and
/// E0414 for reads and writes that fail. On every error the output is absent or unchanged.
pub fn run_to_files(
    compiled: &Compiled,
    checkpoint: &Checkpoint,
    recorded: &Recorded,
    out: &Path,
    options: &RunOptions,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<RunSummary> {
    let started = Instant::now();
    let program = &compiled.program;
    // The files are replica 0's: the others would hold the same.
    let (cluster, bounds) = (Cluster::default(), Bounds::with_staging(options.staging));
    let schedule = Schedule::of(compiled, &Setup::for_threads(1, &cluster, bounds))?;
    let graph = schedule.joined();
    let files = FileRows::bind(program, checkpoint)?;
    let fenced = (0..program.trainers).map(|rank| Fenced { program, rank, rows: &files });
    let fenced: Vec<Fenced<'_>> = fenced.collect();
    let rows: Vec<&dyn Rows> = fenced.iter().map(|r| r as &dyn Rows).collect();
    let output = OutputDir::create(out, options.force)?;
    let sinks: Result<Vec<FileSink>> =
        program.ranks.iter().map(|r| FileSink::create(&output, compiled, r)).collect();
    let sinks = sinks?;
    let bound: Vec<&dyn Sink> = sinks.iter().map(|s| s as &dyn Sink).collect();
    let cpu_options =
        cpu::Options { finite: options.finite, timeout: options.timeout, progress };
    let report = cpu::run(program, &graph, &rows, &bound, &cpu_options)?;
    let manifest = manifest(compiled, recorded, &sinks, &report.non_finite)?;
    let written = program.ranks.iter().map(RankProgram::bytes).sum();
    output.publish(&manifest)?;
    Ok(RunSummary {
        out: out.to_owned(),
        ranks: program.ranks.len(),
        params: sinks.iter().map(|s| s.tensors.len() as u64).sum(),
        read_bytes: program.source_bytes(),
        written_bytes: written,
        staging_bytes: graph.staging_bytes,
        elapsed: started.elapsed(),
        notes: report.non_finite.iter().map(let_through).collect(),
    })
}

fn let_through(found: &NonFinite) -> Diagnostic {
    Diagnostic::warning("E0609", format!("let through: {}", found.message()))
        .about(&found.tensor)
}

/// The program's sources as tensors of an open checkpoint.
struct FileRows<'a> {
    checkpoint: &'a Checkpoint,
    tensors: Vec<&'a TensorEntry>,
}

impl<'a> FileRows<'a> {
    fn bind(program: &Program, checkpoint: &'a Checkpoint) -> Result<Self> {
        let found = program.sources.iter().map(|s| {
            let tensor = checkpoint.get(&s.name).ok_or_else(|| missing(&s.name))?;
            let same = s.dtype.reads(&tensor.dtype_name) && tensor.shape[..] == s.shape[..];
            if same { Ok(tensor) } else { Err(missing(&s.name)) }
        });
        let tensors: std::result::Result<Vec<_>, Diagnostic> = found.collect();
        Ok(FileRows { checkpoint, tensors: tensors? })
    }
}

fn missing(name: &str) -> Diagnostic {
    Diagnostic::error(
        "E0401",
        format!("{name} is not in the checkpoint as it was compiled for"),
    )
}

impl Rows for FileRows<'_> {
    fn read(
        &self,
        storage: Storage,
        rows: Strided,
        buf: &mut [u8],
    ) -> std::result::Result<(), Diagnostic> {
        let Storage::Source(id) = storage else {
            return Err(Diagnostic::error("E0502", "a file run reads landed parameters"));
        };
        let tensor = self.tensors[id as usize];
        if rows.rows == 1 {
            return self.checkpoint.read_at(tensor, rows.offset, buf);
        }
        self.checkpoint.read_rows(
            tensor,
            rows.offset,
            rows.row_bytes,
            rows.stride,
            rows.rows,
            buf,
        )
    }
}

/// One rank's file, and which tensor of it each storage is.
struct FileSink {
    file: RankFile,
    /// Path below the output folder.
    name: String,
    tensors: Vec<(String, DType, Vec<u64>)>,
    /// First tensor of each target; scales follow values.
    first: Vec<usize>,
}

impl FileSink {
    fn create(output: &OutputDir, compiled: &Compiled, rank: &RankProgram) -> Result<Self> {
        let mut tensors = Vec::new();
        let mut first = Vec::with_capacity(rank.targets.len());
        for target in &rank.targets {
            first.push(tensors.len());
            if target.kind == TargetKind::Parameter {
                let storages = target.storages.iter();
                tensors.extend(storages.map(|s| (s.name.clone(), s.dtype, s.shape.to_vec())));
            }
        }
        let name = file_name(&compiled.mesh, rank.coords);
        let file = output.rank_file(rank.rank.0, &name, &tensors)?;
        Ok(FileSink { file, name: format!("rank-{}/{name}", rank.rank), tensors, first })
    }
}

impl Sink for FileSink {
    fn write(
        &self,
        target: usize,
        part: Part,
        rows: Strided,
        bytes: &[u8],
    ) -> std::result::Result<(), Diagnostic> {
        let tensor = self.first[target] + usize::from(part == Part::Scales);
        let parts = bytes.chunks_exact((rows.row_bytes as usize).max(1)).enumerate();
        for (i, row) in parts {
            self.file.write_at(tensor, rows.offset + i as u64 * rows.stride, row)?;
        }
        Ok(())
    }
}

/// vLLM's sharded_state file names.
fn file_name(mesh: &InferMesh, at: Coords) -> String {
    match mesh.pp {
        1 => format!("model-rank-{}-part-0.safetensors", at.tp),
        _ => format!("model-pp-{}-tp-{}-part-0.safetensors", at.pp, at.tp),
    }
}

/// What an output's manifest.json holds: enough to verify it without anything else but the model.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OutputManifest {
    pub schema: u32,
    pub engine: String,
    pub digest: String,
    pub state: String,
    pub recorded: Recorded,
    pub infer: InferMesh,
    pub train: TrainMesh,
    pub ranks: Vec<ManifestRank>,
    /// Non-finite values that `--finite-check allow` let through, one message a tensor.
    pub non_finite: Vec<String>,
}

/// The inputs of a run, as they were given.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Recorded {
    pub plan: String,
    /// Plan files by name as shown to a person, the plan itself first.
    pub files: Vec<(String, String)>,
    /// Folder of the checkpoint.
    pub model: PathBuf,
    pub options: std::collections::BTreeMap<String, String>,
    pub target: std::collections::BTreeMap<String, String>,
    pub expert_map: ExpertMap,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ManifestRank {
    pub rank: u64,
    pub file: String,
    pub tensors: Vec<ManifestTensor>,
    /// Derived parameters and aliases: not stored, with the shape and stride they would have.
    pub derived: Vec<DerivedTensor>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ManifestTensor {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<u64>,
    pub bytes: u64,
    /// xxh3-128 of the bytes in hexadecimal.
    pub checksum: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DerivedTensor {
    pub name: String,
    /// `derived` or `alias`.
    pub kind: String,
    pub dtype: DType,
    pub shape: Vec<u64>,
    pub stride: Vec<u64>,
}

fn manifest(
    compiled: &Compiled,
    recorded: &Recorded,
    sinks: &[FileSink],
    non_finite: &[NonFinite],
) -> Result<serde_json::Value> {
    let mut ranks = Vec::new();
    for (sink, rank) in sinks.iter().zip(&compiled.program.ranks) {
        let checksums = sink.file.finish()?;
        let tensors =
            sink.tensors.iter().zip(checksums).map(|((name, dtype, shape), checksum)| {
                ManifestTensor {
                    name: name.clone(),
                    dtype: *dtype,
                    bytes: shape.iter().product::<u64>() * dtype.size(),
                    shape: shape.clone(),
                    checksum,
                }
            });
        ranks.push(ManifestRank {
            rank: rank.rank.0,
            file: sink.name.clone(),
            tensors: tensors.collect(),
            derived: rank.targets.iter().filter_map(|t| derived_row(t)).collect(),
        });
    }
    let manifest = OutputManifest {
        schema: MANIFEST_SCHEMA,
        engine: env!("CARGO_PKG_VERSION").to_owned(),
        digest: compiled.digest.clone(),
        state: "before process_weights_after_loading".to_owned(),
        recorded: recorded.clone(),
        infer: compiled.mesh.clone(),
        train: compiled.train.clone(),
        ranks,
        non_finite: non_finite.iter().map(NonFinite::message).collect(),
    };
    serde_json::to_value(&manifest).map_err(|e| {
        Diagnostic::error("E0601", format!("cannot write the manifest: {e}")).into()
    })
}

fn derived_row(target: &crate::lower::Target) -> Option<DerivedTensor> {
    let kind = match target.kind {
        TargetKind::Parameter => return None,
        TargetKind::Derived => "derived",
        TargetKind::Alias => "alias",
    };
    let s = target.storages.first()?;
    Some(DerivedTensor {
        name: s.name.clone(),
        kind: kind.to_owned(),
        dtype: s.dtype,
        shape: s.shape.to_vec(),
        stride: s.strides.to_vec(),
    })
}
