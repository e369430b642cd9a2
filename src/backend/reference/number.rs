//! Single elements as bits: widening to f32, rounding back, constants.
//! Knows nothing of tensors.

use crate::dtype::DType;
use crate::fp8::codec;

/// The value of an element as f32; exact for every type but i32.
pub(super) fn widen(dtype: DType, bits: u32) -> f32 {
    match dtype {
        DType::F32 => f32::from_bits(bits),
        DType::Bf16 => codec::bf16_to_f32(bits as u16),
        DType::F16 => codec::f16_to_f32(bits as u16),
        DType::E4m3 => codec::e4m3_decode(bits as u8),
        DType::E8m0 => codec::e8m0_decode(bits as u8),
        DType::I32 => bits as i32 as f32,
        DType::U8 => bits as f32,
    }
}

/// The bits of an arithmetic result, rounded to nearest even. A NaN is the one that every GPU
/// instruction gives, whatever went in.
pub(super) fn result(dtype: DType, x: f32) -> u32 {
    narrow(dtype, if x.is_nan() { f32::from_bits(codec::GPU_NAN_BITS) } else { x })
}

/// The bits of a number, rounded to nearest even.
fn narrow(dtype: DType, x: f32) -> u32 {
    match dtype {
        DType::F32 => x.to_bits(),
        DType::Bf16 => u32::from(codec::f32_to_bf16(x)),
        DType::F16 => u32::from(codec::f32_to_f16(x)),
        DType::E4m3 => u32::from(codec::e4m3_satfinite(x)),
        DType::E8m0 => u32::from(codec::e8m0_encode(x)),
        DType::I32 => x as i32 as u32,
        DType::U8 => u32::from(x as u8),
    }
}

/// A cast. Between equal types it copies bits; to f32 it only widens.
pub(super) fn cast(from: DType, to: DType, bits: u32) -> u32 {
    match (from, to) {
        _ if from == to => bits,
        (_, DType::F32) => widen(from, bits).to_bits(),
        _ => narrow(to, widen(from, bits)),
    }
}

/// A constant of the plan: the f64 becomes f32 first, then the element type.
pub(super) fn constant(dtype: DType, value: f64) -> u32 {
    match dtype {
        DType::I32 => value as i32 as u32,
        DType::U8 => u32::from(value as u8),
        _ => narrow(dtype, value as f32),
    }
}

/// Elements of `size` bytes each, little-endian, as bits.
pub(super) fn unpack(bytes: &[u8], size: usize, out: &mut [u32]) {
    for (bits, b) in out.iter_mut().zip(bytes.chunks_exact(size)) {
        *bits = match *b {
            [a] => u32::from(a),
            [a, b] => u32::from(u16::from_le_bytes([a, b])),
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
            _ => 0,
        };
    }
}

/// The inverse of [`unpack`].
pub(super) fn pack(bits: &[u32], size: usize, out: &mut [u8]) {
    for (bits, b) in bits.iter().zip(out.chunks_exact_mut(size)) {
        b.copy_from_slice(&bits.to_le_bytes()[..size]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_keep_bits_and_arithmetic_has_one_nan() {
        assert_eq!(cast(DType::Bf16, DType::Bf16, 0x7f81), 0x7f81);
        assert_eq!(cast(DType::Bf16, DType::F32, 0xff81), 0xff81_0000);
        assert_eq!(cast(DType::F32, DType::Bf16, 0xff81_0001), 0x7fc0);
        assert_eq!(result(DType::F32, f32::from_bits(0xffc0_0001)), 0x7fff_ffff);
    }

    #[test]
    fn casts_round_to_even_and_constants_pass_through_f32() {
        assert_eq!(cast(DType::F32, DType::Bf16, 0x3f80_8000), 0x3f80);
        assert_eq!(cast(DType::F32, DType::Bf16, 0x3f81_8000), 0x3f82);
        assert_eq!(cast(DType::F16, DType::Bf16, 0x3c01), 0x3f80);
        assert_eq!(constant(DType::Bf16, -0.0), 0x8000);
        assert_eq!(constant(DType::U8, 300.0), 255);
        // 1 + 2^-8 + 2^-30 is a tie once it is f32.
        assert_eq!(constant(DType::Bf16, 1.0 + 1.0 / 256.0 + 2f64.powi(-30)), 0x3f80);
    }

    #[test]
    fn packing_is_little_endian() {
        let mut out = [0; 4];
        pack(&[0x0102_0304], 4, &mut out);
        assert_eq!(out, [4, 3, 2, 1]);
        let mut bits = [0; 2];
        unpack(&out, 2, &mut bits);
        assert_eq!(bits, [0x0304, 0x0102]);
    }
}
