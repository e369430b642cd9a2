//! FP8 numerics: codecs and the named block-quantization recipes, bit-exact.
//! Knows slices of numbers; knows nothing of tensors, plans or devices.
//!
//! Read in this order: `codec` (one number), `recipe` (one scale), `rcp` (the GPU's
//! reciprocal), `tile` (one tile and one matrix), `simd` (the same, fast).

pub mod codec;
pub mod rcp;
pub mod recipe;
mod simd;
pub mod tile;

pub use recipe::{Recipe, RecipeKind, ScaleFormat};
pub use tile::{TileScale, Values};
