//! An update between slices that the caller owns: no files. For embedding the engine.

use std::collections::BTreeMap;
use std::sync::Mutex;

use crate::backend::cpu::{
    self, FiniteCheck, NonFinite, Options, Report, Rows, Shards, Sink, Strided, derive,
};
use crate::backend::cuda::run::{self as cuda, Ends, Launch};
use crate::compile::Compiled;
use crate::diag::Diagnostic;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::exec::{Schedule, on_gpus};
use crate::graph::{Bounds, Setup};
use crate::ir::show_shape;
use crate::lower::{Part, RankProgram, TargetKind};
use crate::script::{Catalog, CatalogEntry};
use crate::shard::Storage;
use crate::topo::{Cluster, RankId};

/// A trainer tensor in memory: little-endian, row-major.
#[derive(Clone, Debug)]
pub struct SourceTensor<'a> {
    pub dtype: DType,
    pub shape: Vec<u64>,
    pub bytes: &'a [u8],
}

/// The trainer's tensors by name.
#[derive(Clone, Debug, Default)]
pub struct Sources<'a> {
    tensors: BTreeMap<String, SourceTensor<'a>>,
}

impl<'a> Sources<'a> {
    /// Adds a tensor.
    ///
    /// # Errors
    /// E0402 if the bytes are not those of the shape and type.
    pub fn add(
        &mut self,
        name: &str,
        dtype: DType,
        shape: &[u64],
        bytes: &'a [u8],
    ) -> Result<()> {
        let wanted = shape.iter().try_fold(dtype.size(), |a, n| a.checked_mul(*n));
        if wanted != Some(bytes.len() as u64) {
            let d = Diagnostic::error(
                "E0402",
                format!("{name}: {} bytes are not {dtype} {}", bytes.len(), show_shape(shape)),
            );
            return Err(d.into());
        }
        let tensor = SourceTensor { dtype, shape: shape.to_vec(), bytes };
        self.tensors.insert(name.to_owned(), tensor);
        Ok(())
    }

    /// What the compiler sees of the tensors.
    pub fn catalog(&self) -> Box<dyn Catalog> {
        let entries = self.tensors.iter().map(|(name, t)| {
            let entry = CatalogEntry {
                dtype: Some(t.dtype),
                dtype_name: t.dtype.safetensors_name().to_owned(),
                shape: t.shape.as_slice().into(),
            };
            (name.clone(), entry)
        });
        Box::new(Entries(entries.collect()))
    }
}

struct Entries(BTreeMap<String, CatalogEntry>);

impl Catalog for Entries {
    fn find(&self, name: &str) -> Option<CatalogEntry> {
        self.0.get(name).cloned()
    }

    fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }
}

/// The parameters of inference ranks, as slices of the caller: row-major, exactly as large as
/// the storage. Scales are bound under their own names.
#[derive(Default)]
pub struct Targets<'a> {
    slices: BTreeMap<(RankId, String), Mutex<&'a mut [u8]>>,
}

impl<'a> Targets<'a> {
    pub fn bind(&mut self, rank: RankId, name: &str, bytes: &'a mut [u8]) {
        self.slices.insert((rank, name.to_owned()), Mutex::new(bytes));
    }
}

/// Runs one update of a compiled plan from slices into slices.
///
/// # Errors
/// E0407, E0408 and E0409 if the targets do not match what the plan writes, all together and
/// before anything is written; E0602 for non-finite weights (with `FiniteCheck::During` the
/// targets are then part old, part new); see [`cpu::run`].
pub fn update(
    compiled: &Compiled,
    trainers: &[Sources<'_>],
    targets: &mut Targets<'_>,
    staging: u64,
    options: &Options<'_>,
) -> Result<Report> {
    let (replicas, bounds) = (compiled.mesh.replicas as u32, Bounds::with_staging(staging));
    let schedule =
        Schedule::of(compiled, &Setup::for_threads(replicas, &Cluster::default(), bounds))?;
    update_agreed(compiled, &schedule, trainers, targets, options)
}

/// Runs one update by a schedule that was agreed before.
///
/// # Errors
/// As [`update`]; E0305 if the plan was compiled for another expert map than the schedule.
pub fn update_agreed(
    compiled: &Compiled,
    schedule: &Schedule,
    trainers: &[Sources<'_>],
    targets: &mut Targets<'_>,
    options: &Options<'_>,
) -> Result<Report> {
    let program = &compiled.program;
    schedule.fits(compiled)?;
    let graph = schedule.joined();
    let shards = bind_sources(compiled, trainers)?;
    let rows: Vec<&dyn Rows> = shards.iter().map(|s| s as &dyn Rows).collect();
    match_targets(compiled, targets)?;
    let sinks: Vec<RankSink<'_, '_>> =
        all_ranks(compiled).map(|(id, rank)| RankSink { id, rank, targets }).collect();
    let bound: Vec<&dyn Sink> = sinks.iter().map(|s| s as &dyn Sink).collect();
    let report = cpu::run(program, &graph, &rows, &bound, options)?;
    for sink in &sinks {
        for target in sink.rank.targets.iter().filter(|t| t.kind == TargetKind::Derived) {
            let s = &target.storages[0];
            let mut bytes = vec![0; s.bytes() as usize];
            derive(sink, &target.derived, &s.shape, s.dtype, &mut bytes)?;
            let all = Strided { offset: 0, row_bytes: s.bytes(), stride: 0, rows: 1 };
            sink.put(&s.name, all, &bytes)?;
        }
    }
    Ok(report)
}

/// Calls `work` with readers of the sources and writers of the targets, once all fit the plan.
///
/// # Errors
/// E0401 and E0407 to E0409 for what does not fit; what `work` gives.
pub fn with_ends<T>(
    compiled: &Compiled,
    trainers: &[Sources<'_>],
    targets: &mut Targets<'_>,
    work: impl FnOnce(&[&dyn Rows], &[Option<&dyn Sink>]) -> Result<T>,
) -> Result<T> {
    let shards = bind_sources(compiled, trainers)?;
    let rows: Vec<&dyn Rows> = shards.iter().map(|s| s as &dyn Rows).collect();
    match_targets(compiled, targets)?;
    let sinks: Vec<RankSink<'_, '_>> =
        all_ranks(compiled).map(|(id, rank)| RankSink { id, rank, targets }).collect();
    let bound: Vec<Option<&dyn Sink>> = sinks.iter().map(|s| Some(s as &dyn Sink)).collect();
    work(&rows, &bound)
}

/// Runs one update on GPUs: sources are brought up, targets down. Derived parameters as well.
///
/// # Errors
/// As [`update`]; E0605 and E0604 for GPUs and other processes.
pub fn update_on_gpus(
    compiled: &Compiled,
    launch: &Launch,
    trainers: &[Sources<'_>],
    targets: &mut Targets<'_>,
    finite: FiniteCheck,
    options: &cuda::Options,
) -> Result<Vec<NonFinite>> {
    let replicas = compiled.mesh.replicas as u32;
    with_ends(compiled, trainers, targets, |rows, sinks| {
        let ends = Ends { rows, sinks };
        Ok(on_gpus(compiled, launch, replicas, ends, finite, options)?.1)
    })
}

/// The local tensors of each trainer rank, of the shapes that the placements give.
fn bind_sources<'a>(
    compiled: &'a Compiled,
    trainers: &[Sources<'a>],
) -> Result<Vec<Shards<'a>>> {
    let program = &compiled.program;
    let mut problems = Vec::new();
    if trainers.len() != program.trainers as usize {
        let text =
            format!("{} trainer ranks, the plan has {}", trainers.len(), program.trainers);
        problems.push(Diagnostic::error("E0401", text));
    }
    let mut all = Vec::with_capacity(trainers.len());
    for (rank, sources) in (0..).zip(trainers) {
        let mut own = Shards { program, rank, tensors: Vec::new(), held: Vec::new() };
        for s in &program.sources {
            let held = s.layout.held(rank);
            let size = |d: &Vec<std::ops::Range<u64>>| d.iter().map(|r| r.end - r.start).sum();
            let local: Option<Vec<u64>> = held.as_ref().map(|h| h.iter().map(size).collect());
            let bytes: &[u8] = match (&local, sources.tensors.get(&s.name)) {
                (None, _) => &[],
                (Some(shape), Some(t))
                    if s.dtype.reads(t.dtype.safetensors_name()) && t.shape == *shape =>
                {
                    t.bytes
                }
                (Some(shape), _) => {
                    let shape = show_shape(shape);
                    let text = format!(
                        "{} {} {shape} is not among the sources of trainer {rank}",
                        s.name, s.dtype
                    );
                    problems.push(Diagnostic::error("E0401", text).about(&s.name));
                    &[]
                }
            };
            own.tensors.push(bytes);
            own.held.push(held);
        }
        all.push(own);
    }
    if problems.is_empty() { Ok(all) } else { Err(Error::refused(problems)) }
}

fn copy_rows(from: &[u8], rows: Strided, buf: &mut [u8]) {
    let row = rows.row_bytes as usize;
    for (i, out) in buf.chunks_exact_mut(row.max(1)).enumerate() {
        let at = (rows.offset + i as u64 * rows.stride) as usize;
        out.copy_from_slice(&from[at..at + row]);
    }
}

/// Every inference rank of all replicas, and what it holds.
fn all_ranks(compiled: &Compiled) -> impl Iterator<Item = (RankId, &RankProgram)> {
    let (ranks, replicas) = (&compiled.program.ranks, compiled.mesh.replicas);
    let world = ranks.len() as u64;
    (0..replicas).flat_map(move |replica| {
        ranks.iter().map(move |r| (RankId(replica * world + r.rank.0), r))
    })
}

/// One rank's slices, as a place to write to and, for derived parameters, to read from.
struct RankSink<'a, 'b> {
    id: RankId,
    rank: &'a RankProgram,
    targets: &'a Targets<'b>,
}

impl RankSink<'_, '_> {
    fn put(
        &self,
        name: &str,
        rows: Strided,
        bytes: &[u8],
    ) -> std::result::Result<(), Diagnostic> {
        let key = (self.id, name.to_owned());
        let Some(slice) = self.targets.slices.get(&key) else {
            return Err(Diagnostic::error("E0502", format!("{name} is not bound")));
        };
        let mut slice = slice.lock().unwrap_or_else(|e| e.into_inner());
        for (i, row) in bytes.chunks_exact((rows.row_bytes as usize).max(1)).enumerate() {
            let at = (rows.offset + i as u64 * rows.stride) as usize;
            slice[at..at + row.len()].copy_from_slice(row);
        }
        Ok(())
    }
}

impl Sink for RankSink<'_, '_> {
    fn write(
        &self,
        target: usize,
        part: Part,
        rows: Strided,
        bytes: &[u8],
    ) -> std::result::Result<(), Diagnostic> {
        let storages = &self.rank.targets[target].storages;
        match storages.iter().find(|s| s.part == part) {
            Some(s) => self.put(&s.name, rows, bytes),
            None => Err(Diagnostic::error("E0502", "a target has no such storage")),
        }
    }
}

impl Rows for RankSink<'_, '_> {
    fn read(
        &self,
        storage: Storage,
        rows: Strided,
        buf: &mut [u8],
    ) -> std::result::Result<(), Diagnostic> {
        let (target, part) = match storage {
            Storage::Landed(id) => (id, Part::Values),
            Storage::LandedScale(id) => (id, Part::Scales),
            Storage::Source(_) => {
                return Err(Diagnostic::error("E0502", "a derived parameter reads a source"));
            }
        };
        let storages = &self.rank.targets[target as usize].storages;
        let name = storages.iter().find(|s| s.part == part).map_or("", |s| s.name.as_str());
        match self.targets.slices.get(&(self.id, name.to_owned())) {
            Some(slice) => {
                copy_rows(&slice.lock().unwrap_or_else(|e| e.into_inner()), rows, buf);
                Ok(())
            }
            None => Err(Diagnostic::error("E0502", format!("{name} is not bound"))),
        }
    }
}

/// Every storage that the plan writes is bound at its size, and nothing else is bound.
fn match_targets(compiled: &Compiled, targets: &Targets<'_>) -> Result<()> {
    let mut problems = Vec::new();
    let mut open: std::collections::BTreeSet<_> = targets.slices.keys().cloned().collect();
    for (id, rank) in all_ranks(compiled) {
        let written = rank.targets.iter().filter(|t| t.kind != TargetKind::Alias);
        for s in written.flat_map(|t| &t.storages) {
            let key = (id, s.name.clone());
            open.remove(&key);
            let have = targets.slices.get(&key);
            let have = have.map(|b| b.lock().unwrap_or_else(|e| e.into_inner()).len() as u64);
            let what = match have {
                None => ("E0408", "is not bound".to_owned()),
                Some(n) if n != s.bytes() => (
                    "E0409",
                    format!("has {n} bytes, {} needs {}", show_shape(&s.shape), s.bytes()),
                ),
                Some(_) => continue,
            };
            let message = format!("{} of rank {id} {}", s.name, what.1);
            problems.push(Diagnostic::error(what.0, message).about(&s.name));
        }
    }
    for (rank, name) in open {
        let message = format!("{name} of rank {rank} is bound, but the plan does not write it");
        problems.push(Diagnostic::error("E0407", message).about(name));
    }
    if problems.is_empty() { Ok(()) } else { Err(Error::refused(problems)) }
}
