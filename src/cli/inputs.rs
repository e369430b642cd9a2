//! From arguments to a compiled plan: the part that every command shares.

use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

use crate::compile::{CompileInputs, Compiled, compile};
use crate::diag::Diagnostic;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{ExpertMapFile, SourceManifest};
use crate::load::{FolderModules, OpenModel, Opened, beside, read_plan};
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
    let manifest = match &args.source_manifest {
        Some(path) => Some(SourceManifest::read(path)?),
        None => None,
    };
    let experts = expert_map(args)?;
    let given = match &args.model {
        Some(path) => Some(open(path, weights)?),
        None => None,
    };
    let opened = Opened::default();
    let open_model = |path: &str| {
        let model = open(&beside(&args.plan, path), weights)?;
        let input = model.input(manifest.as_ref());
        opened.keep(model);
        Ok(input)
    };
    let compiled = compile(CompileInputs {
        name: &name,
        text: &text,
        modules: Rc::new(FolderModules::beside(&args.plan)),
        model: given.as_ref().map(|m| m.input(manifest.as_ref())),
        open_model: &open_model,
        mesh: args.infer.as_deref().map(InferMesh::parse).transpose()?,
        train: match &args.train {
            Some(axes) => TrainMesh::parse(axes)?,
            None => TrainMesh::single(),
        },
        options: pairs("--set", &args.set)?,
        target: facts(&args.target)?,
        experts,
        limits: Limits::default(),
    })?;
    let model = given.or_else(|| opened.take());
    Ok(Loaded { compiled, model })
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
    let d = Diagnostic::error("E0109", message).hint(hint);
    Error { kind: ErrorKind::Usage, diagnostics: vec![d] }
}

fn pairs(flag: &str, words: &[String]) -> Result<BTreeMap<String, String>> {
    let mut out = BTreeMap::new();
    for word in words.iter().map(|w| w.trim()).filter(|w| !w.is_empty()) {
        let Some((key, value)) = word.split_once('=') else {
            return Err(usage(
                format!("{flag} {word} is not K=V"),
                "for example quant=fp8_block",
            ));
        };
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
            _ => Err(Diagnostic::error(
                "E0307",
                format!("--rank {text}: ranks of one replica of {mesh} are 0 to {}", world - 1),
            )
            .into()),
        },
    }
}
