//! Element types: sizes and the names that torch, safetensors and plans give them.
//! Knows nothing of tensors.

use serde::{Deserialize, Serialize};

/// An element type of a source tensor or of a target parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum DType {
    #[serde(rename = "float32")]
    F32,
    #[serde(rename = "bfloat16")]
    Bf16,
    #[serde(rename = "float16")]
    F16,
    #[serde(rename = "float8_e4m3fn")]
    E4m3,
    #[serde(rename = "float8_e8m0fnu")]
    E8m0,
    #[serde(rename = "int32")]
    I32,
    #[serde(rename = "uint8")]
    U8,
}

impl DType {
    /// Every element type, in the order of declaration.
    pub const ALL: [DType; 7] =
        [DType::F32, DType::Bf16, DType::F16, DType::E4m3, DType::E8m0, DType::I32, DType::U8];

    /// Size of one element in bytes.
    pub const fn size(self) -> u64 {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::Bf16 | DType::F16 => 2,
            DType::E4m3 | DType::E8m0 | DType::U8 => 1,
        }
    }

    /// The name that torch prints (`bfloat16`), used in every JSON interface.
    pub const fn torch_name(self) -> &'static str {
        match self {
            DType::F32 => "float32",
            DType::Bf16 => "bfloat16",
            DType::F16 => "float16",
            DType::E4m3 => "float8_e4m3fn",
            DType::E8m0 => "float8_e8m0fnu",
            DType::I32 => "int32",
            DType::U8 => "uint8",
        }
    }

    /// The word that plans and messages use (`bf16`).
    pub const fn short_name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::E4m3 => "e4m3",
            DType::E8m0 => "e8m0",
            DType::I32 => "i32",
            DType::U8 => "u8",
        }
    }

    /// The tag in a safetensors header (`BF16`).
    pub const fn safetensors_name(self) -> &'static str {
        match self {
            DType::F32 => "F32",
            DType::Bf16 => "BF16",
            DType::F16 => "F16",
            DType::E4m3 => "F8_E4M3",
            DType::E8m0 => "F8_E8M0",
            DType::I32 => "I32",
            DType::U8 => "U8",
        }
    }

    /// Looks a plan's word up (`bf16`).
    pub fn from_short_name(name: &str) -> Option<DType> {
        DType::ALL.into_iter().find(|d| d.short_name() == name)
    }

    /// Looks a torch name up (`bfloat16`, with or without the `torch.` in front).
    pub fn from_torch_name(name: &str) -> Option<DType> {
        let name = name.strip_prefix("torch.").unwrap_or(name);
        DType::ALL.into_iter().find(|d| d.torch_name() == name)
    }

    /// Looks a safetensors tag up (`BF16`).
    pub fn from_safetensors_name(name: &str) -> Option<DType> {
        DType::ALL.into_iter().find(|d| d.safetensors_name() == name)
    }

    /// True if what a file stores under a safetensors tag can be read as `self`, byte for byte.
    /// Packed codes and their exponents, which are `u8` here, go by the names that writers give.
    pub fn reads(self, tag: &str) -> bool {
        self.safetensors_name() == tag
            || (self == DType::U8 && ["I8", "F8_E8M0"].contains(&tag))
    }

    /// True for the types that a recipe can quantize and arithmetic can read.
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::Bf16 | DType::F16)
    }

    /// True if every value of `self` is a value of `to`, so that the cast loses nothing.
    pub fn widens_to(self, to: DType) -> bool {
        self == to || (matches!(self, DType::Bf16 | DType::F16) && to == DType::F32)
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.short_name())
    }
}
