//! The vector paths of absolute maximum and encoding: AVX-512, AVX2, or the scalar definition.
//! Knows nothing of recipes and scales; every path gives the bits of `tile`'s scalar functions.
#![allow(unsafe_code)]

use super::codec::bf16_to_f32;
use super::recipe::Step;
use super::tile::{Tile, amax_f32_scalar, amax_u16_scalar, encode_scalar};

/// Elements that one call of a vector kernel takes; ragged tails are padded to it on the stack.
const CHUNK: usize = 32;

/// A set of instructions that this processor has: only `level` and `levels` make one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Level(Set);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Set {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// A tile of a type that the kernels widen themselves.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    Bf16(Tile<'a, u16>),
    F32(Tile<'a, f32>),
}

/// The best set of instructions of this processor (the look-up is cached by `std`).
#[inline]
pub(crate) fn level() -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
            return Level(Set::Avx512);
        }
        if is_x86_feature_detected!("avx2") {
            return Level(Set::Avx2);
        }
    }
    Level(Set::Scalar)
}

/// Every set of instructions of this processor, for tests that compare them.
#[cfg(test)]
pub(crate) fn levels() -> Vec<Level> {
    let mut levels = vec![Level(Set::Scalar)];
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2") {
            levels.push(Level(Set::Avx2));
        }
        if level() != Level(Set::Avx2) {
            levels.push(level());
        }
    }
    levels
}

/// The largest 16-bit float of a tile with the sign bit off.
pub(crate) fn amax_u16(level: Level, tile: Tile<'_, u16>) -> u16 {
    match level.0 {
        Set::Scalar => amax_u16_scalar(tile),
        // SAFETY: a level exists only where the processor has its instructions.
        #[cfg(target_arch = "x86_64")]
        Set::Avx2 => unsafe { avx2::amax_u16(tile) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Set::Avx512 => unsafe { avx512::amax_u16(tile) },
    }
}

/// Bits of the largest |x| of an f32 tile.
pub(crate) fn amax_f32(level: Level, tile: Tile<'_, f32>) -> u32 {
    match level.0 {
        Set::Scalar => amax_f32_scalar(tile),
        // SAFETY: a level exists only where the processor has its instructions.
        #[cfg(target_arch = "x86_64")]
        Set::Avx2 => unsafe { avx2::amax_f32(tile) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Set::Avx512 => unsafe { avx512::amax_f32(tile) },
    }
}

/// Writes the codes of a tile.
///
/// The vector kernels handle quotients up to 464, which is every one whose scale comes from
/// the tile's own maximum. They report the others, and the definition writes those tiles.
pub(crate) fn encode(
    level: Level,
    step: Step,
    source: Source<'_>,
    out: &mut [u8],
    out_stride: usize,
) {
    let (Step::Multiply(by) | Step::Divide(by)) = step;
    let done = match level.0 {
        // The kernels take signs from the elements; no recipe has a negative scale.
        _ if by.is_sign_negative() => false,
        Set::Scalar => false,
        // SAFETY: a level exists only where the processor has its instructions.
        #[cfg(target_arch = "x86_64")]
        Set::Avx2 => unsafe { avx2::encode(step, source, out, out_stride) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Set::Avx512 => unsafe { avx512::encode(step, source, out, out_stride) },
    };
    match source {
        _ if done => {}
        Source::Bf16(tile) => encode_scalar(step, tile, bf16_to_f32, out, out_stride),
        Source::F32(tile) => encode_scalar(step, tile, |x| x, out, out_stride),
    }
}

/// Calls `visit` on every chunk of every row; the last of a row may be padded with zeros, which
/// change no maximum.
#[inline(always)]
fn for_chunks<T: Copy + Default>(tile: Tile<'_, T>, mut visit: impl FnMut(&[T; CHUNK])) {
    for row in 0..tile.rows {
        let (chunks, tail) = tile.row(row).as_chunks::<CHUNK>();
        for chunk in chunks {
            visit(chunk);
        }
        if !tail.is_empty() {
            visit(&padded(tail));
        }
    }
}

/// Calls `encode` on every chunk of every row and its codes.
#[inline(always)]
fn encode_chunks<T: Copy + Default>(
    tile: Tile<'_, T>,
    out: &mut [u8],
    out_stride: usize,
    mut encode: impl FnMut(&[T; CHUNK], &mut [u8; CHUNK]),
) {
    for row in 0..tile.rows {
        let (chunks, tail) = tile.row(row).as_chunks::<CHUNK>();
        let (codes, last) = out[row * out_stride..][..tile.cols].as_chunks_mut::<CHUNK>();
        for (chunk, codes) in chunks.iter().zip(codes) {
            encode(chunk, codes);
        }
        if !tail.is_empty() {
            let mut codes = [0; CHUNK];
            encode(&padded(tail), &mut codes);
            last.copy_from_slice(&codes[..last.len()]);
        }
    }
}

#[inline(always)]
fn padded<T: Copy + Default>(tail: &[T]) -> [T; CHUNK] {
    let mut chunk = [T::default(); CHUNK];
    chunk[..tail.len()].copy_from_slice(tail);
    chunk
}

/// What both vector widths round with.
///
/// To |y| is added 2^(e + 20), e being its exponent, not below -6 (the subnormals): the sum's
/// last bit is worth one e4m3fn step, so the f32 addition itself rounds, ties to even. Its low
/// bits then hold the steps above 2^e or, for subnormals, above zero; its exponent, shifted
/// down to bit 3, adds the codes below 2^e. An even constant in the low bits cancels what the
/// biases bring in, modulo 256.
#[cfg(target_arch = "x86_64")]
mod bits {
    pub const ABS: i32 = 0x7fff_ffff;
    pub const EXPONENT: i32 = 0x7f80_0000;
    /// 2^-6, the smallest normal e4m3fn.
    pub const MIN_NORMAL: i32 = 0x3c80_0000;
    /// 20 in the exponent field, and -(141 * 8) modulo 256.
    pub const MAGIC: i32 = (20 << 23) + 152;
    /// 464.0: above it the largest code no longer follows from rounding.
    pub const LIMIT: u32 = 0x43e8_0000;
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::super::recipe::Step;
    use super::super::tile::Tile;
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
        // Halves are zero-extended so that the 32-bit reduction compares them.
        let low = _mm512_and_si512(amax, _mm512_set1_epi32(0xffff));
        let high = _mm512_srli_epi32::<16>(amax);
        _mm512_reduce_max_epu32(_mm512_max_epu32(low, high)) as u16
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
    pub fn encode(step: Step, source: Source<'_>, out: &mut [u8], out_stride: usize) -> bool {
        let mut seen = _mm512_setzero_si512();
        match (source, step) {
            (Source::Bf16(tile), Step::Multiply(by)) => {
                let by = _mm512_set1_ps(by);
                encode_chunks(tile, out, out_stride, |chunk, codes| {
                    *codes = bf16_codes(chunk, &mut seen, |x| _mm512_mul_ps(x, by));
                });
            }
            (Source::Bf16(tile), Step::Divide(by)) => {
                let by = _mm512_set1_ps(by);
                encode_chunks(tile, out, out_stride, |chunk, codes| {
                    *codes = bf16_codes(chunk, &mut seen, |x| _mm512_div_ps(x, by));
                });
            }
            (Source::F32(tile), Step::Multiply(by)) => {
                let by = _mm512_set1_ps(by);
                encode_chunks(tile, out, out_stride, |chunk, codes| {
                    *codes = f32_codes(chunk, &mut seen, |x| _mm512_mul_ps(x, by));
                });
            }
            (Source::F32(tile), Step::Divide(by)) => {
                let by = _mm512_set1_ps(by);
                encode_chunks(tile, out, out_stride, |chunk, codes| {
                    *codes = f32_codes(chunk, &mut seen, |x| _mm512_div_ps(x, by));
                });
            }
        }
        _mm512_reduce_max_epu32(seen) <= bits::LIMIT
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn bf16_codes(
        chunk: &[u16; CHUNK],
        seen: &mut __m512i,
        step: impl Fn(__m512) -> __m512,
    ) -> [u8; CHUNK] {
        // SAFETY: 32 elements of 2 bytes are one vector of 64 bytes.
        let x = unsafe { _mm512_loadu_si512(chunk.as_ptr().cast()) };
        // A lane of 32 bits holds two elements; each becomes f32 in place, without a shuffle.
        let even = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(x));
        let odd = _mm512_and_si512(x, _mm512_set1_epi32(0xffff_0000_u32 as i32));
        let odd = _mm512_castsi512_ps(odd);
        let (even, odd) = (magnitude(step(even), seen), magnitude(step(odd), seen));
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
            let y = step(x);
            let code = magnitude(y, seen);
            let sign = _mm512_srli_epi32::<24>(_mm512_castps_si512(y));
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

    /// Codes without sign in the low 7 bits of each lane; the bits above are not zero.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn magnitude(y: __m512, seen: &mut __m512i) -> __m512i {
        let y = _mm512_castps_si512(y);
        let abs = _mm512_and_si512(y, _mm512_set1_epi32(bits::ABS));
        *seen = _mm512_max_epu32(*seen, abs);
        let exponent = _mm512_and_si512(y, _mm512_set1_epi32(bits::EXPONENT));
        let exponent = _mm512_max_epu32(exponent, _mm512_set1_epi32(bits::MIN_NORMAL));
        let magic = _mm512_add_epi32(exponent, _mm512_set1_epi32(bits::MAGIC));
        let sum = _mm512_add_ps(_mm512_castsi512_ps(abs), _mm512_castsi512_ps(magic));
        let sum = _mm512_castps_si512(sum);
        _mm512_add_epi32(sum, _mm512_srli_epi32::<20>(sum))
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::super::recipe::Step;
    use super::super::tile::Tile;
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
    pub fn encode(step: Step, source: Source<'_>, out: &mut [u8], out_stride: usize) -> bool {
        let mut seen = _mm256_setzero_si256();
        match (source, step) {
            (Source::Bf16(tile), Step::Multiply(by)) => {
                let by = _mm256_set1_ps(by);
                encode_chunks(tile, out, out_stride, |chunk, codes| {
                    *codes = bf16_codes(chunk, &mut seen, |x| _mm256_mul_ps(x, by));
                });
            }
            (Source::Bf16(tile), Step::Divide(by)) => {
                let by = _mm256_set1_ps(by);
                encode_chunks(tile, out, out_stride, |chunk, codes| {
                    *codes = bf16_codes(chunk, &mut seen, |x| _mm256_div_ps(x, by));
                });
            }
            (Source::F32(tile), Step::Multiply(by)) => {
                let by = _mm256_set1_ps(by);
                encode_chunks(tile, out, out_stride, |chunk, codes| {
                    *codes = f32_codes(chunk, &mut seen, |x| _mm256_mul_ps(x, by));
                });
            }
            (Source::F32(tile), Step::Divide(by)) => {
                let by = _mm256_set1_ps(by);
                encode_chunks(tile, out, out_stride, |chunk, codes| {
                    *codes = f32_codes(chunk, &mut seen, |x| _mm256_div_ps(x, by));
                });
            }
        }
        max_lane(seen) <= bits::LIMIT
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
        unsafe {
            [_mm256_loadu_si256(pointer.cast()), _mm256_loadu_si256(pointer.add(16).cast())]
        }
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
}

#[cfg(test)]
mod tests;
