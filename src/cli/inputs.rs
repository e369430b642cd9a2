//! From arguments to a compiled plan: the part that every command shares.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

use crate::compile::{CompileInputs, Compiled, compile};
use crate::diag::Diagnostic;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{ExpertMapFile, SourceManifest};
use crate::load::{FolderModules, OpenModel, beside, read_plan};
use crate::script::Limits;
use crate::shard::ExpertMap;
use crate::topo::{InferMesh, RankId, TrainMesh};

use super::Failure;
use super::args::PlanArgs;

/// A compiled plan and the model that it was compiled for.
pub(super) struct Loaded {
    pub compiled: Compiled,
    pub model: Option<OpenModel>,
}

/// Whether a command reads weights, or only shapes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Weights {
    Needed,
    /// A folder without safetensors counts as a bare config.
    Optional,
}

pub(super) fn load(args: &PlanArgs, weights: Weights) -> std::result::Result<Loaded, Failure> {
    let text = read_plan(&args.plan)?;
    let name = args.plan.display().to_string();
    if args.train.is_some() && args.source_manifest.is_some() {
        let text = "--train and --source-manifest both say where the sources are";
        return Err(misused(Diagnostic::error("E0109", text).hint("give one of them")).into());
    }
    let manifest = match &args.source_manifest {
        Some(path) => Some(SourceManifest::read(path)?),
        None => None,
    };
    let experts = expert_map(args)?;
    let given = match &args.model {
        Some(path) => Some(open(path, weights)?),
        None => None,
    };
    let opened = OnceCell::new();
    let open_model = |path: &str| {
        let model = open(&beside(&args.plan, path), weights)?;
        let input = model.input(manifest.as_ref());
        // The compiler opens a declared model once; it keeps the first.
        let _ = opened.set(model);
        Ok(input)
    };
    let compiled = compile(CompileInputs {
        name: &name,
        text: &text,
        modules: Rc::new(FolderModules::beside(&args.plan)),
        model: given.as_ref().map(|m| m.input(manifest.as_ref())),
        open_model: &open_model,
        mesh: args.infer.as_deref().map(mesh).transpose()?,
        train: match &args.train {
            Some(axes) => TrainMesh::parse(axes).map_err(misused)?,
            None => TrainMesh::single(),
        },
        placements: manifest.as_ref(),
        options: pairs("--set", &args.set)?,
        target: facts(&args.target)?,
        experts,
        limits: Limits::default(),
    })?;
    let model = given.or_else(|| opened.into_inner());
    Ok(Loaded { compiled, model })
}

/// Text that names no axes is a slip of the command line; a mesh that cannot be is refused.
fn mesh(text: &str) -> Result<InferMesh> {
    Ok(InferMesh::from_axes(InferMesh::axes(text).map_err(misused)?)?)
}

fn open(path: &Path, weights: Weights) -> Result<OpenModel> {
    let bare = weights == Weights::Optional && path.is_dir() && !has_weights(path);
    if bare { OpenModel::open_config(path) } else { OpenModel::open(path) }
}

fn has_weights(folder: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(folder) else { return true };
    entries.flatten().any(|e| {
        let name = e.file_name();
        let name = name.to_string_lossy();
        name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json")
    })
}

fn usage(message: String, hint: &str) -> Error {
    misused(Diagnostic::error("E0109", message).hint(hint))
}

/// An error of the command line itself, with its own exit status.
pub(super) fn misused(d: Diagnostic) -> Error {
    Error { kind: ErrorKind::Usage, diagnostics: vec![d] }
}

fn pairs(flag: &str, words: &[String]) -> Result<BTreeMap<String, String>> {
    let mut out = BTreeMap::new();
    for word in words.iter().map(|w| w.trim()).filter(|w| !w.is_empty()) {
        let Some((key, value)) = word.split_once('=') else {
            let example = if flag == "--set" { "quant=fp8_block" } else { "sm=90" };
            return Err(usage(
                format!("{flag} {word} is not K=V"),
                &format!("for example {flag} {example}"),
            ));
        };
        // Only `--target` takes commas; here the rest would become part of the value.
        if value.split_once(',').is_some_and(|(_, rest)| rest.contains('=')) {
            let hint = format!(
                "give {flag} once for each: {flag} {}",
                word.replace(',', &format!(" {flag} "))
            );
            return Err(usage(format!("{flag} {word} holds more than one K=V"), &hint));
        }
        if out.insert(key.to_owned(), value.to_owned()).is_some() {
            return Err(usage(format!("{flag} gives {key} twice"), "give each key once"));
        }
    }
    Ok(out)
}

/// The map of `--expert-map`; empty without one.
pub(super) fn expert_map(args: &PlanArgs) -> Result<ExpertMap> {
    match &args.expert_map {
        Some(path) => Ok(ExpertMapFile::read(path)?.layers),
        None => Ok(BTreeMap::new()),
    }
}

pub(super) fn facts(words: &[String]) -> Result<BTreeMap<String, String>> {
    let facts = pairs("--target", words)?;
    match facts.keys().find(|k| !crate::script::FACTS.contains(&k.as_str())) {
        Some(key) => Err(usage(
            format!("--target has no fact `{key}`"),
            &format!("facts are {}", crate::script::FACTS.join(", ")),
        )),
        None => Ok(facts),
    }
}

/// The ranks that `--rank` names; none if it is left out.
pub(super) fn ranks(text: Option<&str>, mesh: &InferMesh) -> Result<Option<Vec<RankId>>> {
    let world = mesh.replica_world();
    match text {
        None => Ok(None),
        Some("all") => Ok(Some(mesh.ranks().collect())),
        Some(text) => match text.parse::<u64>() {
            Ok(rank) if rank < world => Ok(Some(vec![RankId(rank)])),
            _ => Err(misused(Diagnostic::error(
                "E0307",
                format!(
                    "--rank {text} is neither `all` nor a rank: one replica of {mesh} has {}",
                    if world == 1 {
                        "rank 0".to_owned()
                    } else {
                        format!("ranks 0 to {}", world - 1)
                    }
                ),
            ))),
        },
    }
}
