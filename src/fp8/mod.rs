//! FP8 numerics: codecs and the named block-quantization recipes, bit-exact.
pub mod recipe;
pub use recipe::*;
