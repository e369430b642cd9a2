//! The values that a plan handles beside rhai's own: blocks, tensors, axes, recipes.

use crate::dtype::DType;
use crate::fp8::Recipe;
use crate::ir::{NodeId, ScaleName};
use crate::topo::Axis;

/// A module path, as in model code: `model.layers.3.mlp`. The root is empty.
#[derive(Clone, Debug)]
pub(super) struct Block {
    pub path: String,
}

impl Block {
    pub fn join(&self, name: &str) -> String {
        match (self.path.is_empty(), name.is_empty()) {
            (true, _) => name.to_owned(),
            (false, true) => self.path.clone(),
            (false, false) => format!("{}.{name}", self.path),
        }
    }
}

/// A tensor expression; none where an earlier problem left nothing to go on with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tensor(pub Option<NodeId>);

/// A mesh axis; `.size` is readable.
#[derive(Clone, Copy, Debug)]
pub(super) struct AxisValue {
    pub axis: Axis,
    pub size: u64,
}

/// What `.quantize` takes: steps to apply in order, none for bf16 plans.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum RecipeValue {
    None,
    One {
        recipe: Recipe,
        scale_name: ScaleName,
    },
    /// vLLM's DeepGEMM load path: quantize, dequantize to f32, quantize to powers of two.
    TwoStep {
        first: Recipe,
        second: Recipe,
        scale_name: ScaleName,
    },
}

/// An element type's name in a plan.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct DTypeValue(pub DType);

/// Facts about the receiver.
#[derive(Clone, Debug)]
pub(super) struct Facts;

/// The model's config, or an object inside it; `path` leads there.
#[derive(Clone, Debug)]
pub(super) struct Config {
    pub path: Vec<String>,
}
