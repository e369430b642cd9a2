//! A run's output folder against the oracle, from the inputs that its manifest records.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

use crate::backend::reference::{Oracle, SourceBytes};
use crate::compile::{CompileError, CompileInputs, Compiled, compile};
use crate::diag::{Diagnostic, SourceMap};
use crate::error::{Error, ErrorKind, Result};
use crate::exec::{MANIFEST_SCHEMA, ManifestRank, OutputManifest};
use crate::io::{Checkpoint, checksum_tensor, read_json};
use crate::ir::Place;
use crate::load::OpenModel;
use crate::script::{Limits, ModuleFiles};
use crate::topo::RankId;

use super::{FileTensor, verify_rank};

/// What was compared, and found equal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    pub ranks: u64,
    pub tensors: u64,
    pub bytes: u64,
}

/// Recomputes a run's output with the oracle and compares every byte and every checksum.
///
/// `model` stands in for the checkpoint folder that the manifest names.
///
/// # Errors
/// E0606 for each tensor that differs (exit status 4); E0607 for a manifest that cannot be read
/// or belongs to another version; whatever the model's folder gives.
pub fn verify_output(
    out: &Path,
    model: Option<&Path>,
) -> std::result::Result<VerifyReport, CompileError> {
    let plain = |error: Error| CompileError { error, files: SourceMap::default() };
    let manifest = read_manifest(out).map_err(plain)?;
    let folder = model.map_or_else(|| manifest.recorded.model.clone(), Path::to_owned);
    let model = OpenModel::open(&folder).map_err(plain)?;
    let compiled = recompile(&manifest, &model)?;
    let files = compiled.files().clone();
    compare(out, &manifest, &compiled, &model).map_err(|error| CompileError { error, files })
}

fn read_manifest(out: &Path) -> Result<OutputManifest> {
    let damaged = |why: String| {
        let d = Diagnostic::error("E0607", why);
        d.hint("verify takes the folder that `engine run` wrote; run again if it is damaged")
    };
    let value: serde_json::Value =
        read_json(&out.join("manifest.json"), "manifest").map_err(|e| {
            let why = e.diagnostics.first().map_or_else(String::new, |d| d.message.clone());
            damaged(why)
        })?;
    if value.get("schema").and_then(serde_json::Value::as_u64)
        != Some(u64::from(MANIFEST_SCHEMA))
    {
        return Err(
            damaged(format!("{} is not of schema {MANIFEST_SCHEMA}", out.display())).into()
        );
    }
    serde_json::from_value(value)
        .map_err(|e| damaged(format!("{}/manifest.json: {e}", out.display())).into())
}

/// Serves the modules that the manifest recorded.
struct RecordedModules(Vec<(String, String)>);

impl ModuleFiles for RecordedModules {
    fn read(&self, path: &str) -> std::result::Result<Option<(String, String)>, String> {
        let below = format!("/{path}");
        let found = self.0.iter().find(|(n, _)| n == path || n.ends_with(&below));
        Ok(found.cloned())
    }
}

fn recompile(
    manifest: &OutputManifest,
    model: &OpenModel,
) -> std::result::Result<Compiled, CompileError> {
    let recorded = &manifest.recorded;
    let refuse = |d: Diagnostic| CompileError { error: d.into(), files: SourceMap::default() };
    let Some((name, text)) = recorded.files.first() else {
        return Err(refuse(Diagnostic::error("E0607", "the manifest records no plan")));
    };
    let compiled = compile(CompileInputs {
        name,
        text,
        modules: Rc::new(RecordedModules(recorded.files.clone())),
        model: Some(model.input(None)),
        open_model: &|_| Ok(model.input(None)),
        mesh: Some(manifest.infer.clone()),
        train: manifest.train.clone(),
        placements: None,
        options: recorded.options.clone(),
        target: recorded.target.clone(),
        experts: recorded.expert_map.clone(),
        limits: Limits::default(),
    })?;
    if compiled.digest != manifest.digest {
        return Err(refuse(
            Diagnostic::error(
                "E0607",
                format!(
                    "the recorded inputs give plan {}, the output is of {}",
                    compiled.digest, manifest.digest
                ),
            )
            .hint("the checkpoint's shapes have changed, or another engine version wrote it"),
        ));
    }
    Ok(compiled)
}

fn compare(
    out: &Path,
    manifest: &OutputManifest,
    compiled: &Compiled,
    model: &OpenModel,
) -> Result<VerifyReport> {
    let Some(checkpoint) = &model.checkpoint else {
        return Err(Diagnostic::error("E0413", "verification needs the model's weights").into());
    };
    let sources = CachedSources::new(Arc::clone(checkpoint));
    let mut report = VerifyReport::default();
    let mut problems = Vec::new();
    for rank in compiled.mesh.ranks() {
        let Some(listed) = manifest.ranks.iter().find(|r| RankId(r.rank) == rank) else {
            let why = format!("the manifest does not list rank {rank}");
            problems.push(Diagnostic::error("E0607", why));
            continue;
        };
        let coords = compiled.mesh.coords(rank);
        let place = Place::of(&compiled.mesh, coords);
        let plan = &compiled.stages[coords.pp as usize];
        let oracle = Oracle::new(plan, place, &manifest.recorded.expert_map, &sources)?;
        problems.extend(compare_rank(out, listed, &oracle)?);
        report.ranks += 1;
        report.tensors += listed.tensors.len() as u64;
        report.bytes += listed.tensors.iter().map(|t| t.bytes).sum::<u64>();
    }
    if problems.is_empty() {
        return Ok(report);
    }
    Err(Error { kind: ErrorKind::Mismatch, diagnostics: problems })
}

fn compare_rank(
    out: &Path,
    listed: &ManifestRank,
    oracle: &Oracle<'_>,
) -> Result<Vec<Diagnostic>> {
    let path: PathBuf = out.join(&listed.file);
    let file = Checkpoint::open(&path)?;
    let mut problems = Vec::new();
    let mut tensors = Vec::new();
    for t in &listed.tensors {
        let Some(entry) = file.get(&t.name) else {
            let why = format!("{} lists {}, which it does not hold", path.display(), t.name);
            problems.push(Diagnostic::error("E0606", why));
            continue;
        };
        if checksum_tensor(&file, entry)? != t.checksum {
            let why = format!("{} of rank {} has another checksum", t.name, listed.rank);
            let d = Diagnostic::error("E0606", why).about(&t.name);
            problems.push(d.hint("the file has changed since the run wrote it"));
        }
        tensors.push(FileTensor {
            name: t.name.clone(),
            dtype: t.dtype,
            shape: t.shape.as_slice().into(),
        });
    }
    let read = |name: &str| -> Result<Vec<u8>> {
        let entry = file.get(name).ok_or_else(|| {
            Diagnostic::error("E0606", format!("{} has no {name}", path.display()))
        })?;
        let mut bytes = vec![0; entry.bytes as usize];
        file.read_at(entry, 0, &mut bytes)?;
        Ok(bytes)
    };
    let mismatches = verify_rank(oracle, listed.rank, &tensors, &read)?;
    // Files that are as the run wrote them point at its input, which trainers overwrite.
    let intact = problems.is_empty();
    problems.extend(mismatches.iter().map(super::Mismatch::diagnostic).map(|d| match intact {
        true => d.hint("the file is as the run wrote it: has the checkpoint changed since?"),
        false => d,
    }));
    Ok(problems)
}

/// Whole source tensors, the last few of them kept.
struct CachedSources {
    checkpoint: Arc<Checkpoint>,
    recent: Mutex<VecDeque<(String, Arc<Vec<u8>>)>>,
}

/// Bytes of source tensors that are kept for the next parameter or rank.
const KEPT: usize = 512 << 20;

impl CachedSources {
    fn new(checkpoint: Arc<Checkpoint>) -> Self {
        CachedSources { checkpoint, recent: Mutex::new(VecDeque::new()) }
    }
}

impl SourceBytes for CachedSources {
    fn read(&self, name: &str) -> Result<Arc<Vec<u8>>> {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, bytes)) = recent.iter().find(|(n, _)| n == name) {
            return Ok(Arc::clone(bytes));
        }
        let entry = self.checkpoint.get(name).ok_or_else(|| {
            Diagnostic::error("E0401", format!("there is no source tensor {name}"))
        })?;
        let mut bytes = vec![0; entry.bytes as usize];
        self.checkpoint.read_at(entry, 0, &mut bytes)?;
        let bytes = Arc::new(bytes);
        recent.push_back((name.to_owned(), Arc::clone(&bytes)));
        while recent.len() > 1 && recent.iter().map(|r| r.1.len()).sum::<usize>() > KEPT {
            recent.pop_front();
        }
        Ok(bytes)
    }
}
