//! The front of the pipeline: a plan script becomes a checked program for every rank.

mod axes;
mod coverage;
mod derived;
mod experts;
mod front;
mod lowering;
mod placements;

use std::collections::BTreeMap;
use std::rc::Rc;

use serde_json::Value;

use crate::diag::{Diagnostic, SourceMap};
use crate::error::{Error, Result};
use crate::graph::unmakeable;
use crate::io::SourceManifest;
use crate::ir::Plan;
use crate::lower::Program;
use crate::script::{Catalog, Declared, Limits, ModuleFiles};
use crate::shard::ExpertMap;
use crate::topo::{InferMesh, TrainMesh};

use coverage::{empty_drops, unused_sources};
use front::{Front, FrontError};
use lowering::Lowering;

/// Most bytes of an update over all ranks and sources: sums of them and their parts then fit.
const MOST_BYTES: u64 = 1 << 62;

/// The model side of a compilation: its config, and what its files hold.
pub struct ModelInput {
    pub config: Value,
    /// None in a dry run from a bare config: sources then count as unquantized.
    pub catalog: Option<Box<dyn Catalog>>,
}

/// What a compilation depends on.
pub struct CompileInputs<'a> {
    /// Name of the plan file as shown to a person.
    pub name: &'a str,
    pub text: &'a str,
    pub modules: Rc<dyn ModuleFiles>,
    /// The model as given from outside; else the plan's own `input(path)` is opened.
    pub model: Option<ModelInput>,
    /// Opens the path of a plan's `input(path)`.
    pub open_model: &'a dyn Fn(&str) -> Result<ModelInput>,
    /// The topology as given from outside; else the plan's own, else one rank.
    pub mesh: Option<InferMesh>,
    pub train: TrainMesh,
    /// Where the source tensors are, if not where the rules for `train` put them.
    pub placements: Option<&'a SourceManifest>,
    pub options: BTreeMap<String, String>,
    pub target: BTreeMap<String, String>,
    pub experts: ExpertMap,
    pub limits: Limits,
}

/// A checked plan for every rank of replica 0.
pub struct Compiled {
    /// The plan of each pipeline stage.
    pub stages: Vec<Plan>,
    pub mesh: InferMesh,
    pub train: TrainMesh,
    pub declared: Declared,
    pub model: Option<ModelInput>,
    /// The expert map that the program was made for.
    pub experts: ExpertMap,
    pub program: Program,
    /// Warnings and notes.
    pub notes: Vec<Diagnostic>,
    /// Hex digest of everything that the schedule depends on.
    pub digest: String,
}

impl Compiled {
    /// The plan files, for messages.
    pub fn files(&self) -> &SourceMap {
        &self.stages[0].files
    }
}

/// An error with the plan files that its spans point into.
pub struct CompileError {
    pub error: Error,
    pub files: SourceMap,
}

/// Compiles a plan: evaluate, check, shard for every rank, find distinct units.
///
/// # Errors
/// Every problem of the plan and its inputs, together; nothing has been touched.
pub fn compile(inputs: CompileInputs<'_>) -> std::result::Result<Compiled, CompileError> {
    let started = std::time::Instant::now();
    let mut files = SourceMap::default();
    files.add(inputs.name, inputs.text);
    let early = |error: Error| CompileError { error, files: files.clone() };
    let front = Front::run(&inputs).map_err(|e| match e {
        FrontError::Early(error) => early(error),
        FrontError::Plan(problems, files) => {
            CompileError { error: Error::refused(problems), files }
        }
    })?;
    let mut work = Lowering::new(&inputs, &front);
    work.lower();
    let files = front.stages[0].files.clone();
    let mut problems = front.explain(&inputs, std::mem::take(&mut work.problems));
    let model = front.opened.as_ref().or(inputs.model.as_ref());
    // What a refused parameter would have read is not known.
    let whole = !problems.iter().any(Diagnostic::is_error);
    if let Some(catalog) = model.and_then(|m| m.catalog.as_deref()) {
        problems.extend(empty_drops(&front.stages, catalog));
        if whole {
            problems.extend(unused_sources(&front.stages, catalog, &work.used));
        }
    }
    if problems.iter().any(Diagnostic::is_error) {
        return Err(CompileError { error: Error::refused(problems), files });
    }
    let trainers = work.trainers();
    let program =
        Program { sources: work.sources, ranks: work.ranks, units: work.units, trainers };
    if let Some(d) = uncountable(&program, front.mesh.replicas) {
        return Err(CompileError { error: Error::refused(vec![d]), files });
    }
    let apart = if trainers > 1 { unmakeable(&program) } else { Vec::new() };
    if !apart.is_empty() {
        let late =
            apart.into_iter().map(|(unit, d)| front.late(&program.units[unit as usize], d));
        problems.extend(front.explain(&inputs, late.collect()));
        return Err(CompileError { error: Error::refused(problems), files });
    }
    let digest = digest(&inputs, &front, &program);
    let mut notes: Vec<Diagnostic> =
        front.stages.iter().flat_map(|p| p.notes.iter().cloned()).collect();
    notes.dedup();
    notes.extend(problems);
    tracing::debug!(units = program.units.len(), took = ?started.elapsed(), "plan compiled");
    Ok(Compiled {
        mesh: front.mesh,
        train: inputs.train,
        experts: inputs.experts,
        declared: front.declared,
        model: front.opened.or(inputs.model),
        stages: front.stages,
        program,
        notes,
        digest,
    })
}

/// Refuses an update whose bytes, over all ranks, no counter holds.
fn uncountable(program: &Program, replicas: u64) -> Option<Diagnostic> {
    let storages = program
        .ranks
        .iter()
        .flat_map(|r| &r.targets)
        .flat_map(|t| t.storages.iter().map(|s| (s.bytes().max(s.span()), t.span)));
    let mut all = program.sources.iter().fold(0u64, |all, s| all.saturating_add(s.bytes()));
    for (bytes, span) in storages {
        all = all.saturating_add(bytes.saturating_mul(replicas));
        if all > MOST_BYTES {
            let d = Diagnostic::error("E0209", "an update of more bytes than fit 62 bits");
            return Some(d.at(span).label("here the sum of all ranks passes them"));
        }
    }
    None
}

/// Digest of the plan files' texts, options, topology and the whole program. Where the files lie
/// does not count: ranks of several hosts compare it.
fn digest(inputs: &CompileInputs<'_>, front: &Front, program: &Program) -> String {
    let mut hash = xxhash_rust::xxh3::Xxh3::new();
    for plan in &front.stages {
        for (_, text) in plan.files.files() {
            hash.update(text.as_bytes());
        }
        hash.update(format!("{:?}", plan.options).as_bytes());
    }
    hash.update(format!("{} | {}", front.mesh, inputs.train).as_bytes());
    hash.update(crate::lower::print_program(program).as_bytes());
    format!("{:032x}", hash.digest128())
}
