//! The operations of a tensor expression and what each one means.

use crate::dtype::DType;
use crate::fp8::Recipe;
use crate::topo::Axis;

use super::{Dims, SourceId};

/// What is put behind a parameter's name to get the name of its scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleName {
    /// `weight` → `weight_scale_inv` (Hugging Face FP8 checkpoints and vLLM's Fp8 methods).
    ScaleInv,
    /// `weight` → `weight_scale` (compressed-tensors).
    Scale,
}

impl ScaleName {
    pub const fn suffix(self) -> &'static str {
        match self {
            ScaleName::ScaleInv => "_scale_inv",
            ScaleName::Scale => "_scale",
        }
    }
}

/// One operation. Inputs are the node's; shapes are local (what one rank holds).
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// A whole trainer tensor: `[1536, 2048]` on every rank until something cuts it.
    Source(SourceId),
    /// Joins along `dim`: `[2, 8]` and `[3, 8]` along 0 give `[5, 8]`.
    Cat { dim: usize },
    /// Adds a leading dimension: four of `[2, 8]` give `[4, 2, 8]`.
    Stack,
    /// Elements `start..end` of `dim`.
    Slice { dim: usize, start: u64, end: u64 },
    /// Same elements in row-major order; one size may be -1, which takes what is left.
    Reshape { shape: Vec<i64> },
    /// `dims[i]` of the input becomes dimension i.
    Permute { dims: Vec<usize> },
    /// Grows `dim` to the next multiple, filled with `value`: 330 to a multiple of 64 is 384.
    Pad { dim: usize, multiple: u64, value: f64 },
    /// Value conversion, rounded to nearest even where it narrows.
    Cast { dtype: DType },
    /// The rank's equal contiguous part of `dim`; a size that does not divide is an error.
    Shard { dim: usize, axis: Axis },
    /// Dimension 0 is `heads` equal heads: whole heads for a rank, or one head repeated over
    /// size / heads ranks in a row (vLLM's QKV rule).
    Heads { axis: Axis, heads: u64 },
    /// Dimension 0 is logical experts: the rank's physical slots, in order.
    Experts { axis: Axis },
    /// Codes and scales, one scale a tile of the local tensor's last two dimensions.
    Quantize { recipe: Recipe, scale_name: ScaleName },
    /// Repeats each scale onto a finer grid; codes stay.
    Refine { block: u64 },
    /// f32(code) × f32(scale), rounded once to `dtype`; of an unquantized value a cast.
    Dequantize { dtype: DType },
    /// The codes of a quantized value as a plain e4m3 tensor.
    Codes,
    /// The scales of a quantized value as a plain tensor: one number a tile, in the grid's shape.
    Scales,
    /// Sum in f32, rounded to the operands' type.
    Add,
    /// Product with a constant in f32, rounded to the operand's type.
    Scale { factor: f64 },
}

impl Op {
    /// The plan's word for the operation.
    pub const fn name(&self) -> &'static str {
        match self {
            Op::Source(_) => "src",
            Op::Cat { .. } => "cat",
            Op::Stack => "stack",
            Op::Slice { .. } => "slice",
            Op::Reshape { .. } => "reshape",
            Op::Permute { .. } => "permute",
            Op::Pad { .. } => "pad_to",
            Op::Cast { .. } => "to",
            Op::Shard { .. } => "shard",
            Op::Heads { .. } => "heads",
            Op::Experts { .. } => "experts",
            Op::Quantize { .. } => "quantize",
            Op::Refine { .. } => "refine",
            Op::Dequantize { .. } => "dequantize",
            Op::Codes => "codes",
            Op::Scales => "scales",
            Op::Add => "+",
            Op::Scale { .. } => "*",
        }
    }
}

/// The sizes of a reshape with its -1 resolved, or none if the element count differs.
pub(crate) fn reshape_dims(shape: &[i64], elements: u64) -> Option<Dims> {
    if shape.iter().filter(|s| **s == -1).count() > 1 || shape.iter().any(|s| *s < -1) {
        return None;
    }
    let known =
        shape.iter().filter(|s| **s >= 0).try_fold(1u64, |a, s| a.checked_mul(*s as u64))?;
    let rest = elements.checked_div(known)?;
    let dims: Dims = shape.iter().map(|s| if *s < 0 { rest } else { *s as u64 }).collect();
    let product = dims.iter().try_fold(1u64, |a, s| a.checked_mul(*s))?;
    (product == elements).then_some(dims)
}
