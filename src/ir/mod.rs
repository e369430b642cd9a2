//! The plan as data: operations, tensor expressions, their types. Knows nothing of rhai or ranks;
//! a mesh reaches it as numbers (`Place`).

mod infer;
mod op;
mod pattern;
mod place;
mod plan;
mod print;

pub use infer::{TypeError, infer, infer_all};
pub use op::{Op, ScaleName};
pub use pattern::Pattern;
pub use place::Place;
pub use plan::{
    Node, NodeId, Param, Plan, Rule, Source, SourceFormat, SourceId, SourceScale, first_source,
};
pub use print::{print_plan, show_shape};

use smallvec::SmallVec;

use crate::dtype::DType;
use crate::fp8::ScaleFormat;

/// A shape, or one number a dimension.
pub type Dims = SmallVec<[u64; 4]>;

/// What an expression evaluates to on one rank (or, for the full shape, on a mesh of one).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Type {
    pub shape: Dims,
    /// Element type; `e4m3` for a quantized value.
    pub dtype: DType,
    /// Present for a quantized value: codes in `shape`, and a scale for each tile.
    pub quant: Option<Quant>,
}

/// The tile grid of a quantized value: square tiles over the last two dimensions, from their start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quant {
    pub block: u64,
    pub scales: ScaleFormat,
    pub scale_name: ScaleName,
}

impl Type {
    pub fn plain(shape: Dims, dtype: DType) -> Self {
        Type { shape, dtype, quant: None }
    }

    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Bytes of the elements (the codes of a quantized value).
    pub fn bytes(&self) -> u64 {
        self.elements() * self.dtype.size()
    }

    /// Shape of the scales: the last two dimensions divided by the block, rounded up.
    pub fn scale_shape(&self) -> Option<Dims> {
        let block = self.quant?.block;
        let matrix = self.shape.len().saturating_sub(2);
        Some(
            self.shape
                .iter()
                .enumerate()
                .map(|(d, n)| if d >= matrix { n.div_ceil(block) } else { *n })
                .collect(),
        )
    }

    /// Element type of the scales as stored.
    pub fn scale_dtype(&self) -> Option<DType> {
        Some(self.quant?.scales.dtype())
    }
}
