//! The tables that the kernel works through, as it reads them: `kernels/update.cu` mirrors them.

use bytemuck::{Pod, Zeroable};

use crate::dtype::DType;
use crate::fp8::{RecipeKind, ScaleFormat};

/// Most rows and columns of a tile.
pub const TILE: u64 = 128;

/// Most elements of a job.
pub const ELEMENTS: u64 = TILE * TILE;

/// Bytes of shared memory of a job of kind [`EVALUATE`]: one f32 an element, rows of odd length.
pub const SHARED_BYTES: u32 = (TILE as u32 + 1) * TILE as u32 * 4;

/// Kinds of a job.
pub const COPY: u8 = 0;
pub const QUANTIZE: u8 = 1;
pub const MAXIMUM: u8 = 2;
pub const EVALUATE: u8 = 3;
pub const SCAN: u8 = 4;

/// What becomes of a box's values.
pub const VALUES: u8 = 0;
pub const TILES: u8 = 1;
pub const AMAX: u8 = 2;

/// Operations on the value of an element.
pub const RAW_LOAD: u32 = 0;
pub const RAW_FILL: u32 = 1;
pub const LOAD: u32 = 2;
pub const FILL: u32 = 3;
pub const LOAD_MULTIPLY: u32 = 4;
pub const ROUND: u32 = 5;
pub const MULTIPLY: u32 = 6;
pub const PUSH: u32 = 7;
pub const ADD: u32 = 8;

/// Values that [`PUSH`] can keep.
pub const DEPTH: usize = 3;

/// Most recipes that follow one another on one grid.
pub const STEPS: usize = 4;

/// Flags of a segment: iterate along columns; what is loaded is looked at for NaN and infinity;
/// its values are bits; its values are not the plan's constants.
pub const BY_COLUMN: u32 = 1;
pub const WATCHED: u32 = 2;
pub const RAW: u32 = 4;
pub const NOT_CONSTANT: u32 = 8;

/// A box of at most [`ELEMENTS`] elements. Addresses and strides are bytes; for [`EVALUATE`],
/// `src` is an index.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Job {
    pub src: u64,
    pub dst: u64,
    /// Where a tile's scale goes.
    pub aux: u64,
    pub src_row: u32,
    pub dst_row: u32,
    /// Index among the program's units, by which a value that is not finite is told.
    pub unit: u32,
    pub rows: u16,
    pub cols: u16,
    pub kind: u8,
    pub dtype: u8,
    pub recipe: u8,
    pub scales: u8,
    pub pad: u32,
}

/// A box of any expression: evaluated into shared memory, then stored, quantized or measured.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Evaluation {
    /// First stored element; 0 if none is stored.
    pub dst: u64,
    pub scale: u64,
    /// The agreed maximum of a tile, or where [`AMAX`] raises one; 0 for a tile that is whole.
    pub amax: u64,
    pub dst_row: i64,
    pub dst_col: i64,
    pub scale_row: i64,
    pub scale_col: i64,
    pub unit: u32,
    pub segments: u32,
    pub segment_count: u32,
    pub rows: u16,
    pub cols: u16,
    pub store_row: u16,
    pub store_col: u16,
    pub store_rows: u16,
    pub store_cols: u16,
    pub scale_rows: u16,
    pub scale_cols: u16,
    pub mode: u8,
    pub dtype: u8,
    pub scales: u8,
    pub step_count: u8,
    pub recipe: [u8; STEPS],
    /// Type to which each step but the last is dequantized.
    pub between: [u8; STEPS],
}

/// A part of a box and the operations that fill it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Segment {
    pub ops: u32,
    pub op_count: u32,
    pub operands: u32,
    pub flags: u32,
    pub row: u16,
    pub col: u16,
    pub rows: u16,
    pub cols: u16,
}

/// Strided elements; where `block` is not 1, element (r, c) is entry
/// `((phase + (r, c) × step) / block)`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Operand {
    pub address: u64,
    pub row: i64,
    pub col: i64,
    pub phase_row: u32,
    pub phase_col: u32,
    pub step: u32,
    pub block: u32,
    pub dtype: u32,
    pub pad: u32,
}

/// An operation: `arg` is an operand's index, the bits of an f32, or a type.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Op {
    pub what: u32,
    pub arg: u32,
}

/// Where a table's parts lie, and how many jobs it has.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Header {
    pub jobs: u64,
    pub evaluations: u64,
    pub segments: u64,
    pub operands: u64,
    pub ops: u64,
    pub count: u32,
    pub pad: u32,
}

/// The kernel's number of a type.
pub fn number(dtype: DType) -> u8 {
    match dtype {
        DType::F32 => 0,
        DType::Bf16 => 1,
        DType::F16 => 2,
        DType::E4m3 => 3,
        DType::E8m0 => 4,
        DType::I32 => 5,
        DType::U8 => 6,
    }
}

/// The kernel's number of a recipe.
pub fn recipe_number(kind: RecipeKind) -> u8 {
    match kind {
        RecipeKind::Vllm => 0,
        RecipeKind::Deepgemm => 1,
        RecipeKind::PrimeRl => 2,
        RecipeKind::Ue8m0 => 3,
    }
}

/// The kernel's number of a scale's form.
pub fn scales_number(format: ScaleFormat) -> u8 {
    number(format.dtype())
}
