//! The block-quantization recipes: from a tile's absolute maximum to its scale, and from the
//! scale to what each element is multiplied or divided by.
//! Knows nothing of tiles in memory.

use crate::dtype::DType;

use super::codec::{GPU_NAN_BITS, INFINITY_BITS, e8m0_encode};
use super::rcp::rcp_full;

/// f32(1 / 448), the constant that every recipe multiplies the absolute maximum with.
const INV_448: f32 = f32::from_bits(0x3b12_4925);
/// Floor of the absolute maximum (vLLM, DeepGEMM), in units of the weight.
const AMAX_FLOOR: f32 = 1e-4;
/// Floor of the scale (prime-rl).
const SCALE_FLOOR: f32 = 1e-12;

/// Whose block quantization a recipe repeats, bit for bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RecipeKind {
    /// vLLM `per_block_cast_to_fp8`, compiled: s = max(amax, 1e-4) * f32(1/448); the code is
    /// satfinite(x * r), r the GPU's approximate 1/s (`div.full.f32`).
    Vllm,
    /// DeepGEMM `per_block_cast_to_fp8`, eager: the same with the IEEE reciprocal.
    Deepgemm,
    /// prime-rl `quantize_to_fp8_blockwise`: s = max(amax * f32(1/448), 1e-12); the code is
    /// that of clamp(x / s, ±448), an IEEE division.
    PrimeRl,
    /// vLLM and DeepGEMM with `use_ue8m0`: s as vLLM's, then the smallest power of two not
    /// below it; the reciprocal is exact, so all implementations agree.
    Ue8m0,
}

/// How the scales are stored beside the codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ScaleFormat {
    /// One f32 a tile, the dequantization multiplier.
    F32,
    /// One byte a tile, the exponent of a power of two (float8_e8m0fnu).
    E8m0,
}

impl ScaleFormat {
    /// The form whose elements have a type; f32 for every other than e8m0.
    pub fn of(dtype: DType) -> ScaleFormat {
        if dtype == DType::E8m0 { ScaleFormat::E8m0 } else { ScaleFormat::F32 }
    }

    /// Element type of the stored scales.
    pub const fn dtype(self) -> DType {
        match self {
            ScaleFormat::F32 => DType::F32,
            ScaleFormat::E8m0 => DType::E8m0,
        }
    }
}

/// A named way to quantize a weight to e4m3fn with one scale a square tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Recipe {
    /// Whose numerics.
    pub kind: RecipeKind,
    /// Rows and columns of a full tile, in elements: 128, 64 or 32.
    pub block: u32,
    /// How scales are stored; `E8m0` only with `RecipeKind::Ue8m0`.
    pub scales: ScaleFormat,
}

/// How an element becomes the number that is cast to e4m3fn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Step {
    /// Multiply with this, rounding to nearest even.
    Multiply(f32),
    /// Divide by this, rounding to nearest even.
    Divide(f32),
}

impl RecipeKind {
    /// Every recipe, in the order of declaration.
    pub const ALL: [RecipeKind; 4] =
        [RecipeKind::Vllm, RecipeKind::Deepgemm, RecipeKind::PrimeRl, RecipeKind::Ue8m0];

    /// The name that plans use (`prime_rl`).
    pub const fn name(self) -> &'static str {
        match self {
            RecipeKind::Vllm => "vllm",
            RecipeKind::Deepgemm => "deepgemm",
            RecipeKind::PrimeRl => "prime_rl",
            RecipeKind::Ue8m0 => "ue8m0",
        }
    }
}

impl Recipe {
    /// The tile sizes that exist, in elements a side.
    pub const BLOCKS: [u32; 3] = [128, 64, 32];

    /// The recipe of a kind, in tiles of 128 x 128 with f32 scales.
    pub const fn new(kind: RecipeKind) -> Recipe {
        Recipe { kind, block: 128, scales: ScaleFormat::F32 }
    }

    /// Looks a plan's name up (`vllm`); tiles are 128 x 128 and scales f32.
    pub fn parse(name: &str) -> Option<Recipe> {
        RecipeKind::ALL.into_iter().find(|k| k.name() == name).map(Recipe::new)
    }

    /// The name that plans use (`prime_rl`).
    pub const fn name(&self) -> &'static str {
        self.kind.name()
    }

    /// The same recipe in tiles of `block` x `block` elements; none if no kernel reads them.
    pub fn with_block(self, block: u32) -> Option<Recipe> {
        Recipe::BLOCKS.contains(&block).then_some(Recipe { block, ..self })
    }

    /// The same recipe with its scales stored so; none if the scales are no powers of two.
    pub fn with_scales(self, scales: ScaleFormat) -> Option<Recipe> {
        let fits = scales == ScaleFormat::F32 || self.kind == RecipeKind::Ue8m0;
        fits.then_some(Recipe { scales, ..self })
    }

    /// The dequantization multiplier of a tile whose largest |x| has these f32 bits.
    ///
    /// A NaN maximum gives the GPU's NaN and an infinite one infinity, as the originals do.
    /// For UE8M0 they disagree; both give 2^127 here, as in DeepGEMM.
    pub fn scale_of(&self, amax_bits: u32) -> f32 {
        if amax_bits > INFINITY_BITS && self.kind != RecipeKind::Ue8m0 {
            return f32::from_bits(GPU_NAN_BITS);
        }
        let amax = f32::from_bits(amax_bits);
        match self.kind {
            RecipeKind::Vllm | RecipeKind::Deepgemm => amax.max(AMAX_FLOOR) * INV_448,
            RecipeKind::PrimeRl => (amax * INV_448).max(SCALE_FLOOR),
            RecipeKind::Ue8m0 if amax_bits >= INFINITY_BITS => f32::from_bits(254 << 23),
            RecipeKind::Ue8m0 => ceil_power_of_two(amax.max(AMAX_FLOOR) * INV_448),
        }
    }

    /// The e8m0 byte of a scale of `RecipeKind::Ue8m0`, its exponent field.
    pub fn scale_byte(&self, scale: f32) -> u8 {
        e8m0_encode(scale)
    }

    /// What every element of a tile with this scale is multiplied or divided by.
    pub fn step(&self, scale: f32) -> Step {
        match self.kind {
            RecipeKind::Vllm => Step::Multiply(rcp_full(scale)),
            RecipeKind::Deepgemm | RecipeKind::Ue8m0 => Step::Multiply(1.0 / scale),
            RecipeKind::PrimeRl => Step::Divide(scale),
        }
    }
}

impl std::fmt::Display for Recipe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The smallest power of two not below a positive normal f32, at most 2^127.
fn ceil_power_of_two(x: f32) -> f32 {
    let bits = x.to_bits();
    let exponent = (bits >> 23) + u32::from(bits & 0x007f_ffff != 0);
    f32::from_bits(exponent.clamp(1, 254) << 23)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for kind in RecipeKind::ALL {
            assert_eq!(Recipe::parse(kind.name()), Some(Recipe::new(kind)));
        }
        assert_eq!(Recipe::parse("fp8"), None);
    }

    #[test]
    fn blocks_and_scale_formats_are_checked() {
        let vllm = Recipe::new(RecipeKind::Vllm);
        let ue8m0 = Recipe::new(RecipeKind::Ue8m0);
        assert_eq!(vllm.with_block(64).map(|r| r.block), Some(64));
        assert_eq!(vllm.with_block(100), None);
        assert_eq!(vllm.with_scales(ScaleFormat::E8m0), None);
        assert!(ue8m0.with_scales(ScaleFormat::E8m0).is_some());
    }

    #[test]
    fn zero_tiles_get_the_floor() {
        let bits = |kind| Recipe::new(kind).scale_of(0).to_bits();
        assert_eq!(bits(RecipeKind::Vllm), 879_733_933);
        assert_eq!(bits(RecipeKind::Deepgemm), 879_733_933);
        assert_eq!(bits(RecipeKind::PrimeRl), 1e-12f32.to_bits());
        assert_eq!(bits(RecipeKind::Ue8m0), 2.0f32.powi(-22).to_bits());
    }

    #[test]
    fn scales_lie_where_the_reciprocal_table_was_checked() {
        for kind in RecipeKind::ALL {
            let recipe = Recipe::new(kind);
            let (low, high) = (recipe.scale_of(0), recipe.scale_of(f32::MAX.to_bits()));
            assert!(low.to_bits() >> 23 >= 1 && high.to_bits() >> 23 <= 252, "{recipe}");
        }
    }

    #[test]
    fn power_of_two_scales_round_up_and_have_their_byte() {
        let recipe = Recipe::new(RecipeKind::Ue8m0);
        assert_eq!(recipe.scale_of(448.0f32.to_bits()), 1.0);
        assert_eq!(recipe.scale_of(449.0f32.to_bits()), 2.0);
        assert_eq!(recipe.scale_byte(1.0), 127);
        assert_eq!(recipe.scale_byte(recipe.scale_of(0)), 105);
        assert_eq!(recipe.scale_of(u32::MAX >> 1), 2.0f32.powi(127));
    }
}
