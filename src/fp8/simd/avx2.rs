//! The AVX2 kernels.
//! Knows nothing of dispatch: the caller has seen that the processor has the instructions.

use std::arch::x86_64::*;

use super::super::recipe::Step;
use super::super::tile::{Next, Tile};
use super::{CHUNK, Source, bits, encode_chunks, for_chunks};

#[target_feature(enable = "avx2")]
pub fn amax_u16(tile: Tile<'_, u16>) -> u16 {
    let abs = _mm256_set1_epi16(0x7fff);
    let mut amax = _mm256_setzero_si256();
    for_chunks(tile, |chunk| {
        for x in loads(chunk) {
            amax = _mm256_max_epu16(amax, _mm256_and_si256(x, abs));
        }
    });
    // Halves are zero-extended so that the 32-bit maximum compares them.
    let low = _mm256_and_si256(amax, _mm256_set1_epi32(0xffff));
    max_lane(_mm256_max_epu32(low, _mm256_srli_epi32::<16>(amax))) as u16
}

#[target_feature(enable = "avx2")]
pub fn amax_f32(tile: Tile<'_, f32>) -> u32 {
    let abs = _mm256_set1_epi32(bits::ABS);
    let mut amax = _mm256_setzero_si256();
    for_chunks(tile, |chunk| {
        for x in quarters(chunk) {
            amax = _mm256_max_epu32(amax, _mm256_and_si256(_mm256_castps_si256(x), abs));
        }
    });
    max_lane(amax)
}

/// False if a quotient lies beyond 464 or is NaN: then the codes are not valid.
#[target_feature(enable = "avx2")]
pub fn encode(
    step: Step,
    source: Source<'_>,
    next: Next,
    out: &mut [u8],
    out_stride: usize,
) -> bool {
    let mut seen = _mm256_setzero_si256();
    match (source, step) {
        (Source::Bf16(tile), Step::Multiply(by)) => {
            let by = _mm256_set1_ps(by);
            encode_chunks(tile, next, out, out_stride, |chunk, codes| {
                *codes = bf16_codes(chunk, &mut seen, |x| _mm256_mul_ps(x, by));
            });
        }
        (Source::Bf16(tile), Step::Divide(by)) => {
            let by = _mm256_set1_ps(by);
            encode_chunks(tile, next, out, out_stride, |chunk, codes| {
                *codes = bf16_codes(chunk, &mut seen, |x| _mm256_div_ps(x, by));
            });
        }
        (Source::F32(tile), Step::Multiply(by)) => {
            let by = _mm256_set1_ps(by);
            encode_chunks(tile, next, out, out_stride, |chunk, codes| {
                *codes = f32_codes(chunk, &mut seen, |x| _mm256_mul_ps(x, by));
            });
        }
        (Source::F32(tile), Step::Divide(by)) => {
            let by = _mm256_set1_ps(by);
            encode_chunks(tile, next, out, out_stride, |chunk, codes| {
                *codes = f32_codes(chunk, &mut seen, |x| _mm256_div_ps(x, by));
            });
        }
    }
    max_lane(seen) <= bits::LIMIT.to_bits()
}

#[inline]
#[target_feature(enable = "avx2")]
fn bf16_codes(
    chunk: &[u16; CHUNK],
    seen: &mut __m256i,
    step: impl Fn(__m256) -> __m256,
) -> [u8; CHUNK] {
    let [a, b] = loads(chunk).map(|x| {
        let even = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x));
        let odd = _mm256_and_si256(x, _mm256_set1_epi32(0xffff_0000_u32 as i32));
        let odd = _mm256_castsi256_ps(odd);
        let (even, odd) = (magnitude(step(even), seen), magnitude(step(odd), seen));
        let codes = _mm256_blend_epi16::<0xaa>(even, _mm256_slli_epi32::<16>(odd));
        let codes = _mm256_and_si256(codes, _mm256_set1_epi16(0x7f));
        let sign = _mm256_and_si256(_mm256_srli_epi16::<8>(x), _mm256_set1_epi16(0x80));
        _mm256_or_si256(codes, sign)
    });
    // The pack works in halves of a vector, so the quarters come out interleaved.
    let codes = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi16(a, b));
    // SAFETY: a vector of 32 bytes is 32 codes.
    unsafe { std::mem::transmute(codes) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn f32_codes(
    chunk: &[f32; CHUNK],
    seen: &mut __m256i,
    step: impl Fn(__m256) -> __m256,
) -> [u8; CHUNK] {
    let [a, b, c, d] = quarters(chunk).map(|x| {
        let y = step(x);
        let code = _mm256_and_si256(magnitude(y, seen), _mm256_set1_epi32(0x7f));
        let sign = _mm256_srli_epi32::<24>(_mm256_castps_si256(y));
        _mm256_or_si256(code, _mm256_and_si256(sign, _mm256_set1_epi32(0x80)))
    });
    let codes = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    // SAFETY: a vector of 32 bytes is 32 codes.
    unsafe { std::mem::transmute(_mm256_permutevar8x32_epi32(codes, order)) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn loads(chunk: &[u16; CHUNK]) -> [__m256i; 2] {
    let pointer = chunk.as_ptr();
    // SAFETY: 32 elements of 2 bytes are two vectors of 32 bytes.
    unsafe { [_mm256_loadu_si256(pointer.cast()), _mm256_loadu_si256(pointer.add(16).cast())] }
}

#[inline]
#[target_feature(enable = "avx2")]
fn quarters(chunk: &[f32; CHUNK]) -> [__m256; 4] {
    let pointer = chunk.as_ptr();
    // SAFETY: 32 elements of 4 bytes are four vectors of 32 bytes.
    [0, 8, 16, 24].map(|start| unsafe { _mm256_loadu_ps(pointer.add(start)) })
}

#[inline]
#[target_feature(enable = "avx2")]
fn max_lane(lanes: __m256i) -> u32 {
    // SAFETY: a vector of 32 bytes is 8 elements of 4 bytes, any bits being valid.
    let lanes: [u32; 8] = unsafe { std::mem::transmute(lanes) };
    lanes.into_iter().max().unwrap_or(0)
}

/// Codes without sign in the low 7 bits of each lane; the bits above are not zero.
#[inline]
#[target_feature(enable = "avx2")]
fn magnitude(y: __m256, seen: &mut __m256i) -> __m256i {
    let y = _mm256_castps_si256(y);
    let abs = _mm256_and_si256(y, _mm256_set1_epi32(bits::ABS));
    *seen = _mm256_max_epu32(*seen, abs);
    let exponent = _mm256_and_si256(y, _mm256_set1_epi32(bits::EXPONENT));
    let exponent = _mm256_max_epu32(exponent, _mm256_set1_epi32(bits::MIN_NORMAL));
    let magic = _mm256_add_epi32(exponent, _mm256_set1_epi32(bits::MAGIC));
    let sum = _mm256_add_ps(_mm256_castsi256_ps(abs), _mm256_castsi256_ps(magic));
    let sum = _mm256_castps_si256(sum);
    _mm256_add_epi32(sum, _mm256_srli_epi32::<20>(sum))
}
