//! The GPU's approximate reciprocal, bit for bit: `div.full.f32` of 1 by a scale.
//! Knows nothing of recipes.
//!
//! Triton divides with `div.full.f32`, which is not IEEE: on an H100, 13.2 % of the mantissas
//! give a reciprocal one unit in the last place off. The table was read off that GPU.

use std::io::Read;
use std::sync::OnceLock;

use flate2::read::ZlibDecoder;

use super::codec::GPU_NAN_BITS;

/// zlib data of 2 bits a mantissa: `div.full(1, m)` less the IEEE reciprocal, plus 1, in units
/// of the last place.
static PACKED: &[u8] = include_bytes!("rcp_full_minus_ieee.bin.z");
const TABLE_BYTES: usize = 1 << 21;
const MANTISSA_MASK: u32 = 0x007f_ffff;

/// 1 / `scale` as `div.full.f32` gives it on the GPU (H100).
///
/// The correction depends on the mantissa alone; it was checked at nine exponent fields from 1
/// to 252, and the scales of every recipe lie within them (2.2e-7 to 7.6e35). Outside, by the
/// instruction's description only: a subnormal scale is used as if normalized, a subnormal
/// result is the IEEE one. Zero gives infinity, infinity zero, NaN the GPU's NaN.
pub fn rcp_full(scale: f32) -> f32 {
    if scale.is_nan() {
        return f32::from_bits(GPU_NAN_BITS);
    }
    let ieee = 1.0 / scale;
    if !ieee.is_normal() {
        return ieee;
    }
    // A normal result differs from zero and infinity by at least one unit, so no wrap.
    f32::from_bits(ieee.to_bits().wrapping_add_signed(correction(mantissa_of(scale))))
}

/// The 23 mantissa bits of a non-zero finite f32, normalized if it is subnormal.
fn mantissa_of(x: f32) -> u32 {
    let bits = x.to_bits() & 0x7fff_ffff;
    if bits > MANTISSA_MASK {
        return bits & MANTISSA_MASK;
    }
    (bits << (bits.leading_zeros() - 8)) & MANTISSA_MASK
}

/// What the GPU's reciprocal has more than the IEEE one: -1, 0 or 1 unit in the last place.
fn correction(mantissa: u32) -> i32 {
    let byte = table()[(mantissa / 4) as usize];
    i32::from((byte >> (2 * (mantissa % 4))) & 3) - 1
}

fn table() -> &'static [u8] {
    static TABLE: OnceLock<Vec<u8>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut bytes = Vec::with_capacity(TABLE_BYTES);
        ZlibDecoder::new(PACKED)
            .read_to_end(&mut bytes)
            .expect("the table compiled into the program is whole zlib data");
        assert_eq!(bytes.len(), TABLE_BYTES, "the table holds every mantissa");
        bytes
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_holds_the_counts_it_was_published_with() {
        let mut counts = [0u32; 3];
        for mantissa in 0..=MANTISSA_MASK {
            counts[(correction(mantissa) + 1) as usize] += 1;
        }
        assert_eq!(counts, [374_723, 7_280_086, 733_799]);
    }

    #[test]
    fn powers_of_two_are_exact() {
        for exponent in 1..=253u32 {
            let scale = f32::from_bits(exponent << 23);
            assert_eq!(rcp_full(scale), 1.0 / scale);
            assert_eq!(rcp_full(-scale), -1.0 / scale);
        }
    }

    #[test]
    fn the_correction_is_the_same_at_every_exponent() {
        let mantissa = (0..=MANTISSA_MASK).find(|&m| correction(m) == 1).expect("one exists");
        for exponent in 1..=252u32 {
            let scale = f32::from_bits(exponent << 23 | mantissa);
            assert_eq!(rcp_full(scale).to_bits(), (1.0 / scale).to_bits() + 1);
        }
    }

    #[test]
    fn extremes() {
        assert_eq!(rcp_full(0.0), f32::INFINITY);
        assert_eq!(rcp_full(-0.0), f32::NEG_INFINITY);
        assert_eq!(rcp_full(f32::INFINITY).to_bits(), 0);
        assert_eq!(rcp_full(f32::NAN).to_bits(), GPU_NAN_BITS);
        assert_eq!(rcp_full(f32::from_bits(0x0040_0000)), 2.0f32.powi(127));
        assert_eq!(rcp_full(f32::from_bits(1)), f32::INFINITY);
        assert_eq!(rcp_full(f32::MAX), 1.0 / f32::MAX);
        assert_eq!(mantissa_of(f32::from_bits(0x0060_0000)), 0x0040_0000);
    }
}
