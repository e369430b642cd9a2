//! The AVX-512 VBMI kernel for bf16: codes by table instead of by arithmetic.
//! Knows nothing of dispatch: the caller has seen that the processor has the instructions.
//!
//! A bf16 number has 7 mantissa bits, and multiplying or dividing by one operand rounds the
//! mantissa alike at every exponent. So 128 codes, made by the arithmetic kernel at one
//! exponent, give every normal code: the exponents' difference is added to the code's exponent
//! field. Quotients that are subnormal in e4m3 round elsewhere and take the arithmetic path.

use std::arch::x86_64::*;

use super::super::codec::bf16_to_f32;
use super::super::recipe::Step;
use super::super::tile::{Next, Tile};
use super::{CHUNK, ROWS_AHEAD, Source, avx512, bits, prefetch};

/// Elements of one step: a vector of codes.
const WIDE: usize = 64;

/// bf16 exponents between which the table's own exponent and its neighbours fit.
const EXPONENTS: std::ops::RangeInclusive<i32> = 16..=238;

/// False if a quotient lies beyond 464 or is NaN: then the codes are not valid.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
pub fn encode_bf16(
    step: Step,
    tile: Tile<'_, u16>,
    next: Next,
    out: &mut [u8],
    out_stride: usize,
) -> bool {
    let Some((table, exponent)) = table(step) else {
        return avx512::encode(step, Source::Bf16(tile), next, out, out_stride);
    };
    let wide = tile.cols / WIDE * WIDE;
    let mut seen = _mm512_setzero_si512();
    for row in 0..tile.rows {
        prefetch(next.row(row), next.bytes);
        let codes_ahead = out.as_ptr().wrapping_add((row + ROWS_AHEAD) * out_stride);
        prefetch(codes_ahead, tile.cols);
        let (chunks, _) = tile.row(row).as_chunks::<WIDE>();
        let (codes, _) = out[row * out_stride..][..wide].as_chunks_mut::<WIDE>();
        for (chunk, codes) in chunks.iter().zip(codes) {
            if !by_table(chunk, &table, exponent, &mut seen, codes) {
                avx512::encode_chunk(step, chunk, codes);
            }
        }
    }
    let largest = bf16_to_f32(avx512::max_u16(seen));
    let quotient = match step {
        Step::Multiply(by) => largest * by,
        Step::Divide(by) => largest / by,
    };
    let mut fits = quotient <= bits::LIMIT;
    if wide < tile.cols {
        let rest = Tile { values: &tile.values[wide..], cols: tile.cols - wide, ..tile };
        let rest = Source::Bf16(rest);
        fits &= avx512::encode(step, rest, Next::NONE, &mut out[wide..], out_stride);
    }
    fits
}

/// The codes of all mantissas at the bf16 exponent (returned with them) whose quotients lie in
/// [1, 4); none where that exponent is too near an end of the range.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn table(step: Step) -> Option<([__m512i; 2], u8)> {
    let biased = |by: f32| (by.to_bits() >> 23) as i32;
    let exponent = match step {
        Step::Multiply(by) => 254 - biased(by),
        Step::Divide(by) => biased(by) + 1,
    };
    if !EXPONENTS.contains(&exponent) {
        return None;
    }
    let mantissas: [u16; 128] = std::array::from_fn(|m| (exponent as u16) << 7 | m as u16);
    let mut codes = [0u8; 128];
    let tile = Tile { values: &mantissas, stride: 128, rows: 1, cols: 128 };
    avx512::encode(step, Source::Bf16(tile), Next::NONE, &mut codes, 128);
    // SAFETY: 128 codes are two vectors of 64 bytes.
    let table = unsafe {
        [
            _mm512_loadu_si512(codes.as_ptr().cast()),
            _mm512_loadu_si512(codes[64..].as_ptr().cast()),
        ]
    };
    Some((table, exponent as u8))
}

/// Codes of 64 elements; false if one of them is subnormal in e4m3. `seen` gathers the largest |x|.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn by_table(
    chunk: &[u16; WIDE],
    table: &[__m512i; 2],
    exponent: u8,
    seen: &mut __m512i,
    codes: &mut [u8; WIDE],
) -> bool {
    let pointer = chunk.as_ptr();
    // SAFETY: 64 elements of 2 bytes are two vectors of 64 bytes.
    let (a, b) = unsafe {
        (_mm512_loadu_si512(pointer.cast()), _mm512_loadu_si512(pointer.add(CHUNK).cast()))
    };
    let abs = _mm512_set1_epi16(0x7fff);
    *seen = _mm512_max_epu16(*seen, _mm512_and_si512(a, abs));
    *seen = _mm512_max_epu16(*seen, _mm512_and_si512(b, abs));
    // Low bytes hold the exponent's last bit and the mantissa, high bytes sign and exponent.
    let low = _mm512_permutex2var_epi8(a, every_second(0), b);
    let high = _mm512_permutex2var_epi8(a, every_second(1), b);
    let twice = _mm512_add_epi8(high, high);
    let odd = _mm512_movepi8_mask(low);
    let e = _mm512_mask_add_epi8(twice, odd, twice, _mm512_set1_epi8(1));
    // At least 2^-6, the smallest normal; below 2^-10, which rounds to zero.
    let normal = _mm512_cmpge_epu8_mask(e, _mm512_set1_epi8((exponent - 6) as i8));
    let zero = _mm512_cmple_epu8_mask(e, _mm512_set1_epi8((exponent - 12) as i8));
    if normal | zero != u64::MAX {
        return false;
    }
    // The table's index is the mantissa: the instruction looks at 7 bits only.
    let at_one = _mm512_permutex2var_epi8(table[0], low, table[1]);
    let steps = _mm512_sub_epi8(e, _mm512_set1_epi8(exponent as i8));
    let field = _mm512_and_si512(_mm512_slli_epi16::<3>(steps), _mm512_set1_epi8(0xf8u8 as i8));
    let magnitude = _mm512_maskz_add_epi8(normal, at_one, field);
    // Where the mask has a bit, the sign, else the magnitude.
    let mask = _mm512_set1_epi8(0x80u8 as i8);
    let done = _mm512_ternarylogic_epi32::<0xca>(mask, high, magnitude);
    // SAFETY: 64 codes are one vector of 64 bytes.
    unsafe { _mm512_storeu_si512(codes.as_mut_ptr().cast(), done) };
    true
}

/// Byte positions `first`, `first + 2`, .. of two vectors.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn every_second(first: u8) -> __m512i {
    let positions: [u8; 64] = std::array::from_fn(|i| 2 * i as u8 + first);
    // SAFETY: 64 bytes are one vector.
    unsafe { _mm512_loadu_si512(positions.as_ptr().cast()) }
}
