//! Elements as bits of their type's size, and their widening and narrowing.

use crate::dtype::DType;
use crate::fp8::codec::{
    bf16_to_f32, e4m3_decode, e8m0_decode, f16_to_f32, f32_to_bf16, f32_to_f16,
};

/// Elements of a box in row-major order, as bits of their type's size.
pub(super) enum Bits {
    B8(Vec<u8>),
    B16(Vec<u16>),
    B32(Vec<u32>),
}

impl Bits {
    pub(super) fn zeros(dtype: DType, count: usize) -> Self {
        match dtype.size() {
            1 => Bits::B8(vec![0; count]),
            2 => Bits::B16(vec![0; count]),
            _ => Bits::B32(vec![0; count]),
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Bits::B8(v) => v,
            Bits::B16(v) => bytemuck::cast_slice(v),
            Bits::B32(v) => bytemuck::cast_slice(v),
        }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Bits::B8(v) => v,
            Bits::B16(v) => bytemuck::cast_slice_mut(v),
            Bits::B32(v) => bytemuck::cast_slice_mut(v),
        }
    }

    /// The numbers as f32; every float type of the engine widens exactly.
    pub(super) fn to_f32(&self, dtype: DType) -> Vec<f32> {
        match (self, dtype) {
            (Bits::B16(v), DType::F16) => v.iter().map(|b| f16_to_f32(*b)).collect(),
            (Bits::B16(v), _) => v.iter().map(|b| bf16_to_f32(*b)).collect(),
            (Bits::B32(v), _) => v.iter().map(|b| f32::from_bits(*b)).collect(),
            (Bits::B8(v), DType::E8m0) => v.iter().map(|b| e8m0_decode(*b)).collect(),
            (Bits::B8(v), _) => v.iter().map(|b| e4m3_decode(*b)).collect(),
        }
    }

    /// Rounds to nearest even.
    pub(super) fn from_f32(values: &[f32], dtype: DType) -> Self {
        match dtype {
            DType::Bf16 => Bits::B16(values.iter().map(|x| f32_to_bf16(*x)).collect()),
            DType::F16 => Bits::B16(values.iter().map(|x| f32_to_f16(*x)).collect()),
            _ => Bits::B32(values.iter().map(|x| x.to_bits()).collect()),
        }
    }
}
