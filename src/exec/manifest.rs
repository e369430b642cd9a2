//! An output's manifest.json.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::files::FileSink;
use crate::backend::cpu::NonFinite;
use crate::compile::Compiled;
use crate::diag::Diagnostic;
use crate::dtype::DType;
use crate::error::Result;
use crate::lower::TargetKind;
use crate::shard::ExpertMap;
use crate::topo::{InferMesh, TrainMesh};

/// Version of the output's manifest.json.
pub const MANIFEST_SCHEMA: u32 = 1;

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

/// What a manifest says of some ranks' files, which are then complete.
pub(super) fn ranks_of(compiled: &Compiled, sinks: &[FileSink]) -> Result<Vec<ManifestRank>> {
    let ranks = sinks.iter().map(|sink| {
        let rank = &compiled.program.ranks[sink.rank];
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
        Ok(ManifestRank {
            rank: rank.rank.0,
            file: sink.name.clone(),
            tensors: tensors.collect(),
            derived: rank.targets.iter().filter_map(|t| derived_row(t)).collect(),
        })
    });
    ranks.collect()
}

/// The whole manifest.
pub(super) fn manifest(
    compiled: &Compiled,
    recorded: &Recorded,
    ranks: Vec<ManifestRank>,
    non_finite: &[NonFinite],
) -> Result<serde_json::Value> {
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
