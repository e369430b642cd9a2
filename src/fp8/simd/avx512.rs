//! The AVX-512 kernels.
//! Knows nothing of dispatch: the caller has seen that the processor has the instructions.

use std::arch::x86_64::*;

use super::super::codec::bf16_to_f32;
use super::super::recipe::Step;
use super::super::tile::{Next, Tile};
use super::{CHUNK, Source, bits, encode_chunks, for_chunks};

#[target_feature(enable = "avx512f,avx512bw")]
pub fn amax_u16(tile: Tile<'_, u16>) -> u16 {
    let abs = _mm512_set1_epi16(0x7fff);
    let mut amax = _mm512_setzero_si512();
    for_chunks(tile, |chunk| {
        // SAFETY: 32 elements of 2 bytes are one vector of 64 bytes.
        let x = unsafe { _mm512_loadu_si512(chunk.as_ptr().cast()) };
        amax = _mm512_max_epu16(amax, _mm512_and_si512(x, abs));
    });
    max_u16(amax)
}

#[target_feature(enable = "avx512f,avx512bw")]
pub fn amax_f32(tile: Tile<'_, f32>) -> u32 {
    let abs = _mm512_set1_epi32(bits::ABS);
    let mut amax = _mm512_setzero_si512();
    for_chunks(tile, |chunk| {
        let [low, high] = halves(chunk);
        amax = _mm512_max_epu32(amax, _mm512_and_si512(_mm512_castps_si512(low), abs));
        amax = _mm512_max_epu32(amax, _mm512_and_si512(_mm512_castps_si512(high), abs));
    });
    _mm512_reduce_max_epu32(amax)
}

/// False if a quotient lies beyond 464 or is NaN: then the codes are not valid.
#[target_feature(enable = "avx512f,avx512bw")]
pub fn encode(
    step: Step,
    source: Source<'_>,
    next: Next,
    out: &mut [u8],
    out_stride: usize,
) -> bool {
    let mut seen = _mm512_setzero_si512();
    match (source, step) {
        (Source::Bf16(tile), Step::Multiply(by)) => {
            let splat = _mm512_set1_ps(by);
            encode_chunks(tile, next, out, out_stride, |chunk, codes| {
                *codes = bf16_codes(chunk, &mut seen, |x| _mm512_mul_ps(x, splat));
            });
            bf16_to_f32(max_u16(seen)) * by <= bits::LIMIT
        }
        (Source::Bf16(tile), Step::Divide(by)) => {
            let splat = _mm512_set1_ps(by);
            encode_chunks(tile, next, out, out_stride, |chunk, codes| {
                *codes = bf16_codes(chunk, &mut seen, |x| _mm512_div_ps(x, splat));
            });
            bf16_to_f32(max_u16(seen)) / by <= bits::LIMIT
        }
        (Source::F32(tile), Step::Multiply(by)) => {
            let splat = _mm512_set1_ps(by);
            encode_chunks(tile, next, out, out_stride, |chunk, codes| {
                *codes = f32_codes(chunk, &mut seen, |x| _mm512_mul_ps(x, splat));
            });
            f32::from_bits(_mm512_reduce_max_epu32(seen)) * by <= bits::LIMIT
        }
        (Source::F32(tile), Step::Divide(by)) => {
            let splat = _mm512_set1_ps(by);
            encode_chunks(tile, next, out, out_stride, |chunk, codes| {
                *codes = f32_codes(chunk, &mut seen, |x| _mm512_div_ps(x, splat));
            });
            f32::from_bits(_mm512_reduce_max_epu32(seen)) / by <= bits::LIMIT
        }
    }
}

/// Codes of 64 bf16 numbers whose quotients are known to be at most 464.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub fn encode_chunk(step: Step, chunk: &[u16; 2 * CHUNK], codes: &mut [u8; 2 * CHUNK]) {
    let mut seen = _mm512_setzero_si512();
    let (chunks, _) = chunk.as_chunks::<CHUNK>();
    let (codes, _) = codes.as_chunks_mut::<CHUNK>();
    for (chunk, codes) in chunks.iter().zip(codes) {
        *codes = match step {
            Step::Multiply(by) => {
                let splat = _mm512_set1_ps(by);
                bf16_codes(chunk, &mut seen, |x| _mm512_mul_ps(x, splat))
            }
            Step::Divide(by) => {
                let splat = _mm512_set1_ps(by);
                bf16_codes(chunk, &mut seen, |x| _mm512_div_ps(x, splat))
            }
        };
    }
}

/// Codes of 32 elements; `seen` gathers the largest |x|, whose quotient is the largest too.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn bf16_codes(
    chunk: &[u16; CHUNK],
    seen: &mut __m512i,
    step: impl Fn(__m512) -> __m512,
) -> [u8; CHUNK] {
    // SAFETY: 32 elements of 2 bytes are one vector of 64 bytes.
    let x = unsafe { _mm512_loadu_si512(chunk.as_ptr().cast()) };
    let abs = _mm512_and_si512(x, _mm512_set1_epi16(0x7fff));
    *seen = _mm512_max_epu16(*seen, abs);
    // A lane of 32 bits holds two elements; each becomes f32 in place, without a shuffle.
    let even = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(abs));
    let odd = _mm512_and_si512(abs, _mm512_set1_epi32(0xffff_0000_u32 as i32));
    let odd = _mm512_castsi512_ps(odd);
    let (even, odd) = (magnitude(step(even)), magnitude(step(odd)));
    let codes = _mm512_mask_mov_epi16(even, 0xaaaa_aaaa, _mm512_slli_epi32::<16>(odd));
    // Where the mask has a bit, the sign, else the magnitude.
    let sign = _mm512_srli_epi16::<8>(x);
    let mask = _mm512_set1_epi16(0x80);
    let codes = _mm512_cvtepi16_epi8(_mm512_ternarylogic_epi32::<0xca>(mask, sign, codes));
    // SAFETY: a vector of 32 bytes is 32 codes.
    unsafe { std::mem::transmute(codes) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn f32_codes(
    chunk: &[f32; CHUNK],
    seen: &mut __m512i,
    step: impl Fn(__m512) -> __m512,
) -> [u8; CHUNK] {
    let halves = halves(chunk).map(|x| {
        let x = _mm512_castps_si512(x);
        let abs = _mm512_and_si512(x, _mm512_set1_epi32(bits::ABS));
        *seen = _mm512_max_epu32(*seen, abs);
        let code = magnitude(step(_mm512_castsi512_ps(abs)));
        let sign = _mm512_srli_epi32::<24>(x);
        let mask = _mm512_set1_epi32(0x80);
        _mm512_cvtepi32_epi8(_mm512_ternarylogic_epi32::<0xca>(mask, sign, code))
    });
    // SAFETY: two vectors of 16 bytes are 32 codes.
    unsafe { std::mem::transmute(halves) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn halves(chunk: &[f32; CHUNK]) -> [__m512; 2] {
    let pointer = chunk.as_ptr();
    // SAFETY: 32 elements of 4 bytes are two vectors of 64 bytes.
    unsafe { [_mm512_loadu_ps(pointer), _mm512_loadu_ps(pointer.add(16))] }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub fn max_u16(lanes: __m512i) -> u16 {
    // Halves are zero-extended so that the 32-bit maximum compares them.
    let low = _mm512_and_si512(lanes, _mm512_set1_epi32(0xffff));
    _mm512_reduce_max_epu32(_mm512_max_epu32(low, _mm512_srli_epi32::<16>(lanes))) as u16
}

/// Codes of numbers without sign in the low 7 bits of each lane; the bits above are not zero.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn magnitude(y: __m512) -> __m512i {
    let exponent = _mm512_and_si512(_mm512_castps_si512(y), _mm512_set1_epi32(bits::EXPONENT));
    let exponent = _mm512_max_epu32(exponent, _mm512_set1_epi32(bits::MIN_NORMAL));
    let magic = _mm512_add_epi32(exponent, _mm512_set1_epi32(bits::MAGIC));
    let sum = _mm512_castps_si512(_mm512_add_ps(y, _mm512_castsi512_ps(magic)));
    _mm512_add_epi32(sum, _mm512_srli_epi32::<20>(sum))
}
