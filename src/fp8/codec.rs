//! Codecs of single numbers: e4m3fn, e8m0, bf16 and f16, from and to f32.
//! Knows nothing of scales or tiles.

/// Largest finite e4m3fn magnitude.
pub const E4M3_MAX: f32 = 448.0;

/// The e4m3fn code of NaN as GPU arithmetic leaves it (positive).
pub const E4M3_NAN: u8 = 0x7f;

/// Bits of the NaN that every GPU arithmetic instruction returns.
pub const GPU_NAN_BITS: u32 = 0x7fff_ffff;

/// Bits of f32 infinity; absolute bits above it are NaN, from it on non-finite.
pub const INFINITY_BITS: u32 = 0x7f80_0000;

const ABS_MASK: u32 = 0x7fff_ffff;
/// Half of the gap between 448 and the next step, 480: beyond it eager casts give NaN.
const EAGER_LIMIT: f32 = 464.0;
/// Smallest normal e4m3fn magnitude, 2^-6.
const E4M3_MIN_NORMAL: f32 = 0.015_625;
/// 2^14: its f32 neighbour lies 2^-9 away, which is the e4m3fn subnormal step.
const SUBNORMAL_MAGIC: f32 = 16_384.0;
const MANTISSA_DROP: u32 = 20;
/// Difference of the exponent biases (127 - 7) in e4m3fn codes of 3 mantissa bits.
const REBIAS: u32 = 120 << 3;

const DECODE: [f32; 256] = decode_table();

/// f32 to e4m3fn, ties to even, saturating: PTX `cvt.rn.satfinite.e4m3x2.f32`.
///
/// Beyond 448, infinity included, the code is ±448 (0x7e, 0xfe); NaN of either sign is 0x7f.
/// `e4m3_satfinite(-500.0) == 0xfe`.
#[inline]
pub fn e4m3_satfinite(x: f32) -> u8 {
    if x.is_nan() {
        return E4M3_NAN;
    }
    sign_of(x) | round_magnitude(x.abs().min(E4M3_MAX))
}

/// f32 to e4m3fn, ties to even, not saturating: torch's eager `.to(torch.float8_e4m3fn)`.
///
/// Beyond 464, infinity included, the code is NaN; NaN keeps its sign (0x7f, 0xff).
/// `e4m3_eager(-500.0) == 0xff`.
#[inline]
pub fn e4m3_eager(x: f32) -> u8 {
    if x.is_nan() || x.abs() > EAGER_LIMIT {
        return sign_of(x) | E4M3_NAN;
    }
    sign_of(x) | round_magnitude(x.abs().min(E4M3_MAX))
}

/// e4m3fn to f32, exact; 0x7f and 0xff are NaN. `e4m3_decode(0x38) == 1.0`.
#[inline]
pub fn e4m3_decode(code: u8) -> f32 {
    DECODE[usize::from(code)]
}

/// The e8m0 byte of the smallest power of two not below |x|: byte b means 2^(b - 127).
///
/// Above 2^127 the byte is 254, the largest; infinity and NaN are 255, which means NaN.
/// `e8m0_encode(3.0) == 129`, which is 4.0.
pub fn e8m0_encode(x: f32) -> u8 {
    let bits = x.to_bits() & ABS_MASK;
    if bits >= INFINITY_BITS {
        return 255;
    }
    // Byte 0 is 2^-127, a subnormal f32, so the step from 0 to 1 lies inside exponent 0.
    if bits <= 0x0040_0000 {
        return 0;
    }
    let exponent = (bits >> 23) + u32::from(bits & 0x007f_ffff != 0);
    exponent.min(254) as u8
}

/// e8m0 to f32, exact: 2^(byte - 127); 255 is NaN. `e8m0_decode(127) == 1.0`.
pub fn e8m0_decode(byte: u8) -> f32 {
    match byte {
        0 => f32::from_bits(0x0040_0000),
        255 => f32::from_bits(GPU_NAN_BITS),
        _ => f32::from_bits(u32::from(byte) << 23),
    }
}

/// bf16 bits to f32, exact.
#[inline]
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// f32 to bf16 bits, ties to even; NaN is 0x7fc0, as in torch's scalar conversion.
#[inline]
pub fn f32_to_bf16(x: f32) -> u16 {
    if x.is_nan() { 0x7fc0 } else { half::bf16::from_f32(x).to_bits() }
}

/// f16 bits to f32, exact.
#[inline]
pub fn f16_to_f32(bits: u16) -> f32 {
    half::f16::from_bits(bits).to_f32()
}

/// f32 to f16 bits, ties to even, overflow to infinity; NaN is 0x7e00 with its sign, as in
/// torch's scalar conversion.
#[inline]
pub fn f32_to_f16(x: f32) -> u16 {
    if x.is_nan() {
        return (x.to_bits() >> 16) as u16 & 0x8000 | 0x7e00;
    }
    half::f16::from_f32(x).to_bits()
}

fn sign_of(x: f32) -> u8 {
    (x.to_bits() >> 24) as u8 & 0x80
}

/// The code of a magnitude of at most 448.
#[inline]
fn round_magnitude(magnitude: f32) -> u8 {
    if magnitude < E4M3_MIN_NORMAL {
        // The f32 addition itself rounds to the nearest even multiple of 2^-9.
        return ((magnitude + SUBNORMAL_MAGIC).to_bits() - SUBNORMAL_MAGIC.to_bits()) as u8;
    }
    let bits = magnitude.to_bits();
    let odd = (bits >> MANTISSA_DROP) & 1;
    // Half a step less one, plus one where the kept part is odd: ties go to even.
    let rounded = (bits + (1 << (MANTISSA_DROP - 1)) - 1 + odd) >> MANTISSA_DROP;
    (rounded - REBIAS) as u8
}

const fn decode_table() -> [f32; 256] {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let sign = ((code as u32) & 0x80) << 24;
        let magnitude = (code as u32) & 0x7f;
        let bits = if magnitude == 0x7f {
            GPU_NAN_BITS
        } else if magnitude >= 8 {
            (magnitude + REBIAS) << MANTISSA_DROP
        } else {
            // Subnormals: a small integer times 2^-9.
            (magnitude as f32 / 512.0).to_bits()
        };
        table[code] = f32::from_bits(sign | bits);
        code += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_survives_decode_and_encode() {
        for code in 0..=255u8 {
            let value = e4m3_decode(code);
            if code & 0x7f == 0x7f {
                assert!(value.is_nan());
                assert_eq!(e4m3_satfinite(value), 0x7f);
                assert_eq!(e4m3_eager(value), code);
            } else {
                assert_eq!(e4m3_satfinite(value), code);
                assert_eq!(e4m3_eager(value), code);
            }
        }
    }

    #[test]
    fn codes_ascend_and_round_to_the_nearest_even() {
        for code in 0..0x7e_u8 {
            let (low, high) = (e4m3_decode(code), e4m3_decode(code + 1));
            assert!(low < high);
            let middle = (low + high) / 2.0;
            let even = code + (code & 1);
            assert_eq!(e4m3_satfinite(middle), even, "tie above {low}");
            assert_eq!(e4m3_satfinite(middle.next_down()), code);
            assert_eq!(e4m3_satfinite(middle.next_up()), code + 1);
            assert_eq!(e4m3_satfinite(-middle), even | 0x80);
            assert_eq!(e4m3_eager(-middle), even | 0x80);
        }
    }

    #[test]
    fn the_two_casts_differ_beyond_464_only() {
        assert_eq!((e4m3_satfinite(464.0), e4m3_eager(464.0)), (0x7e, 0x7e));
        let above = 464.0f32.next_up();
        assert_eq!((e4m3_satfinite(above), e4m3_eager(above)), (0x7e, 0x7f));
        assert_eq!((e4m3_satfinite(-above), e4m3_eager(-above)), (0xfe, 0xff));
        let inf = f32::NEG_INFINITY;
        assert_eq!((e4m3_satfinite(inf), e4m3_eager(inf)), (0xfe, 0xff));
    }

    #[test]
    fn every_e8m0_byte_survives() {
        for byte in 0..=255u8 {
            assert_eq!(e8m0_encode(e8m0_decode(byte)), byte);
        }
        for byte in 1..254u8 {
            assert_eq!(e8m0_encode(e8m0_decode(byte).next_up()), byte + 1);
            assert_eq!(e8m0_encode(e8m0_decode(byte).next_down()), byte);
        }
        assert_eq!(e8m0_encode(0.0), 0);
        assert_eq!(e8m0_encode(f32::MAX), 254);
        assert_eq!(e8m0_encode(f32::INFINITY), 255);
    }

    #[test]
    fn every_half_survives_widening_and_narrowing() {
        for bits in 0..=u16::MAX {
            let (b, h) = (bf16_to_f32(bits), f16_to_f32(bits));
            assert_eq!(b.is_nan(), bits & 0x7fff > 0x7f80);
            assert_eq!(h.is_nan(), bits & 0x7fff > 0x7c00);
            assert_eq!(f32_to_bf16(b), if b.is_nan() { 0x7fc0 } else { bits });
            assert_eq!(f32_to_f16(h), if h.is_nan() { bits & 0x8000 | 0x7e00 } else { bits });
        }
    }

    #[test]
    fn narrowing_ties_go_to_even() {
        assert_eq!(f32_to_bf16(f32::from_bits(0x3f80_8000)), 0x3f80);
        assert_eq!(f32_to_bf16(f32::from_bits(0x3f81_8000)), 0x3f82);
        assert_eq!(f32_to_bf16(f32::from_bits(0x3f80_8001)), 0x3f81);
        assert_eq!(f32_to_bf16(f32::MAX), 0x7f80);
        assert_eq!(f32_to_f16(65_520.0), 0x7c00);
        assert_eq!(f32_to_f16(65_519.0), 0x7bff);
    }
}
