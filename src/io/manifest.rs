//! JSON inputs beside the config: receiver manifests, expert maps, source manifests.
//! Checks their form; whether they fit a plan is asked elsewhere.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::fault::some_names;
use super::json::{self, Pairs};
use crate::diag::Diagnostic;
use crate::dtype::DType;
use crate::error::Result;
use crate::topo::{MAX_TRAINERS, Placement};

/// What one inference rank of a server holds, as the server printed it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(expecting = "an object")]
pub struct ReceiverManifest {
    #[serde(default)]
    pub model: Option<String>,
    #[serde(default)]
    pub family: Option<String>,
    #[serde(default)]
    pub vllm: Option<String>,
    /// The model config, or text that says where it is written in full.
    #[serde(default)]
    pub hf_config: Option<Value>,
    #[serde(default)]
    pub topology: Option<ReceiverTopology>,
    /// The target's quantization scheme (`fp8_block`).
    #[serde(default)]
    pub quant: Option<String>,
    /// Before or after the server's processing of loaded weights.
    #[serde(default)]
    pub state: Option<String>,
    #[serde(default)]
    pub parameters: Vec<ParamEntry>,
    #[serde(default)]
    pub buffers: Vec<ParamEntry>,
    #[serde(default)]
    pub aliases: Vec<Alias>,
    /// The server's own message, if it would not build this model at all.
    #[serde(default)]
    pub refused: Option<String>,
    /// Keys that nothing reads.
    #[serde(flatten)]
    pub rest: BTreeMap<String, Value>,
}

/// Where a receiver stands in its mesh. A size that the manifest does not name is not known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiverTopology {
    pub tp: Option<u64>,
    pub dp: Option<u64>,
    pub ep: Option<u64>,
    pub pp: Option<u64>,
    #[serde(default)]
    pub enable_expert_parallel: bool,
    #[serde(default)]
    pub redundant_experts: u64,
    #[serde(default)]
    pub global_rank: u64,
    #[serde(default)]
    pub tp_rank: u64,
    #[serde(default)]
    pub dp_rank: u64,
    #[serde(default)]
    pub ep_rank: u64,
    #[serde(default)]
    pub pp_rank: u64,
}

/// A parameter or buffer of a receiver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParamEntry {
    pub name: String,
    /// torch's name of the element type, also of types that no plan can write.
    #[serde(rename = "dtype")]
    pub dtype_name: String,
    pub shape: Vec<u64>,
    /// In elements; none if contiguous.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stride: Option<Vec<u64>>,
    /// Of a buffer: whether a state dict has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent: Option<bool>,
}

impl ParamEntry {
    /// The element type, if a plan can write it.
    pub fn dtype(&self) -> Option<DType> {
        DType::from_torch_name(&self.dtype_name)
    }
}

/// A further name of a parameter or buffer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alias {
    pub name: String,
    pub of: String,
}

/// Physical to logical experts of each layer, as the server last balanced them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpertMapFile {
    pub schema: u64,
    /// Layer (`model.layers.3`) to the logical expert of each physical slot.
    pub layers: BTreeMap<String, Vec<u64>>,
}

/// What a trainer holds and how its mesh cuts it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(expecting = "an object")]
pub struct SourceManifest {
    pub schema: u64,
    /// Mesh axes and their sizes, outermost first.
    pub mesh: Vec<(String, u64)>,
    pub tensors: Vec<SourceTensor>,
}

/// A source tensor: its full shape, and one placement for each mesh axis.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceTensor {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<u64>,
    pub placements: Vec<Placement>,
    /// Axes of which one index alone holds the tensor, such as a pipeline stage.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub on: BTreeMap<String, u64>,
}

impl ReceiverManifest {
    /// Reads and checks a receiver manifest.
    pub fn read(path: &Path) -> Result<ReceiverManifest> {
        let what = "receiver manifest";
        let manifest: ReceiverManifest = form(json::read(path, what, "E0419"))?;
        let refuse = |reason: &str| refused(what, path, reason);
        if manifest.rest.contains_key("relative_to") {
            return Err(refuse("it is a difference to another manifest")
                .hint("give a manifest that lists all parameters")
                .into());
        }
        if manifest.parameters.is_empty() && manifest.refused.is_none() {
            return Err(refuse("it lists no parameters").into());
        }
        let all = manifest.parameters.iter().chain(&manifest.buffers);
        let names = all.map(|p| p.name.as_str());
        let names = names.chain(manifest.aliases.iter().map(|a| a.name.as_str()));
        no_repeats(json::repeated(names)).map_err(|reason| refuse(&reason))?;
        Ok(manifest)
    }
}

impl ExpertMapFile {
    /// Reads and checks an expert map.
    pub fn read(path: &Path) -> Result<ExpertMapFile> {
        #[derive(Deserialize)]
        #[serde(expecting = "an object")]
        struct Raw {
            schema: u64,
            layers: Pairs<Vec<i64>>,
        }
        let what = "expert map";
        let raw: Raw = form(json::read(path, what, "E0419"))?;
        let assigned = |(layer, map): (String, Vec<i64>)| {
            let slot = |(slot, expert): (usize, &i64)| {
                // The server writes -1 where it has not placed an expert yet.
                u64::try_from(*expert).map_err(|_| {
                    format!(
                        "slot {slot} of {layer} is {expert}: it is not assigned to an expert"
                    )
                })
            };
            let map: std::result::Result<Vec<u64>, String> =
                map.iter().enumerate().map(slot).collect();
            map.map(|map| (layer.clone(), map))
        };
        let layers = schema_is_1(raw.schema)
            .and_then(|()| no_repeats(raw.layers.repeated))
            .and_then(|()| raw.layers.pairs.into_iter().map(assigned).collect())
            .map_err(|reason: String| refused(what, path, &reason))?;
        Ok(ExpertMapFile { schema: raw.schema, layers })
    }
}

impl SourceManifest {
    /// Reads and checks a source manifest.
    pub fn read(path: &Path) -> Result<SourceManifest> {
        let what = "source manifest";
        let manifest: SourceManifest = form(json::read(path, what, "E0419"))?;
        manifest.check().map_err(|reason| refused(what, path, &reason))?;
        Ok(manifest)
    }

    fn check(&self) -> std::result::Result<(), String> {
        schema_is_1(self.schema)?;
        no_repeats(json::repeated(self.mesh.iter().map(|(axis, _)| axis.as_str())))?;
        no_repeats(json::repeated(self.tensors.iter().map(|t| t.name.as_str())))?;
        if let Some((axis, _)) = self.mesh.iter().find(|(_, size)| *size == 0) {
            return Err(format!("mesh axis {axis} has size 0"));
        }
        let world = self.mesh.iter().try_fold(1u64, |all, (_, size)| all.checked_mul(*size));
        if world.is_none_or(|w| w > MAX_TRAINERS) {
            return Err(format!("its mesh has more than {MAX_TRAINERS} ranks"));
        }
        self.tensors.iter().try_for_each(|t| self.check_tensor(t))
    }

    fn check_tensor(&self, tensor: &SourceTensor) -> std::result::Result<(), String> {
        let SourceTensor { name, shape, placements, on, .. } = tensor;
        if placements.len() != self.mesh.len() {
            return Err(format!(
                "{name} has {} placements, the mesh has {} axes",
                placements.len(),
                self.mesh.len()
            ));
        }
        for placement in placements {
            if placement.dim().is_some_and(|dim| dim >= shape.len() as u64) {
                return Err(format!("{name} {shape:?} has no dim for {placement}"));
            }
            if matches!(placement, Placement::StridedShard { split, .. } if *split > MAX_TRAINERS)
            {
                return Err(format!("{name}: {placement} has more than {MAX_TRAINERS} parts"));
            }
        }
        for (axis, index) in on {
            let Some(at) = self.mesh.iter().position(|(name, _)| name == axis) else {
                return Err(format!("{name} is on axis {axis}, which the mesh does not have"));
            };
            if *index >= self.mesh[at].1 {
                let size = self.mesh[at].1;
                return Err(format!("{name} is on {axis}={index}, the axis has size {size}"));
            }
            if placements[at] != Placement::Replicate {
                return Err(format!("{name} is on {axis}={index} and cut by {axis}"));
            }
        }
        Ok(())
    }
}

/// Adds where the expected form is written down, unless the problem has a hint of its own.
pub(super) fn form<T>(
    read: std::result::Result<T, Diagnostic>,
) -> std::result::Result<T, Diagnostic> {
    read.map_err(|d| match (d.code, &d.hint) {
        ("E0419", None) => d.hint("`engine explain E0419` shows the form of each input file"),
        _ => d,
    })
}

pub(super) fn schema_is_1(schema: u64) -> std::result::Result<(), String> {
    let text = || format!("its schema is {schema}; this version reads schema 1");
    if schema == 1 { Ok(()) } else { Err(text()) }
}

fn no_repeats(repeated: BTreeSet<String>) -> std::result::Result<(), String> {
    let names: Vec<String> = repeated.into_iter().collect();
    if names.is_empty() {
        Ok(())
    } else {
        Err(format!("it lists {} twice", some_names(&names)))
    }
}

pub(super) fn refused(what: &str, path: &Path, reason: &str) -> Diagnostic {
    Diagnostic::error("E0419", format!("{what} {}: {reason}", path.display()))
}
