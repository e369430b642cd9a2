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
pub(crate) fn encode(
    level: Level,
    step: Step,
    source: Source<'_>,
    out: &mut [u8],
    out_stride: usize,
) {
    match (level.0, source) {
        (Set::Scalar, Source::Bf16(tile)) => {
            encode_scalar(step, tile, bf16_to_f32, out, out_stride);
        }
        (Set::Scalar, Source::F32(tile)) => {
            encode_scalar(step, tile, |x| x, out, out_stride);
        }
        // SAFETY: a level exists only where the processor has its instructions.
        #[cfg(target_arch = "x86_64")]
        (Set::Avx2, _) => unsafe { avx2::encode(step, source, out, out_stride) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        (Set::Avx512, _) => unsafe { avx512::encode(step, source, out, out_stride) },
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
    encode: impl Fn(&[T; CHUNK], &mut [u8; CHUNK]),
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

/// Numbers that both vector widths round with; `codec` explains them.
#[cfg(target_arch = "x86_64")]
mod bits {
    pub const ABS: i32 = 0x7fff_ffff;
    pub const INFINITY: i32 = 0x7f80_0000;
    pub const MAX: i32 = 0x43e0_0000;
    pub const MIN_NORMAL: i32 = 0x3c80_0000;
    pub const MAGIC: f32 = 16_384.0;
    pub const MAGIC_BITS: i32 = 0x4680_0000;
    /// Half a step less one, less the difference of the exponent biases.
    pub const ROUND: i32 = 0x7_ffff - (120 << 23);
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
            let [low, high] = halves_f32(chunk);
            amax = _mm512_max_epu32(amax, _mm512_and_si512(_mm512_castps_si512(low), abs));
            amax = _mm512_max_epu32(amax, _mm512_and_si512(_mm512_castps_si512(high), abs));
        });
        _mm512_reduce_max_epu32(amax)
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    pub fn encode(step: Step, source: Source<'_>, out: &mut [u8], out_stride: usize) {
        match source {
            Source::Bf16(tile) => encode_tile(step, tile, out, out_stride, |c| halves_bf16(c)),
            Source::F32(tile) => encode_tile(step, tile, out, out_stride, |c| halves_f32(c)),
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn encode_tile<T: Copy + Default>(
        step: Step,
        tile: Tile<'_, T>,
        out: &mut [u8],
        out_stride: usize,
        widen: impl Fn(&[T; CHUNK]) -> [__m512; 2],
    ) {
        match step {
            Step::Multiply(by) => {
                let by = _mm512_set1_ps(by);
                encode_chunks(tile, out, out_stride, |chunk, codes| {
                    *codes = codes_of(widen(chunk).map(|x| _mm512_mul_ps(x, by)));
                });
            }
            Step::Divide(by) => {
                let by = _mm512_set1_ps(by);
                encode_chunks(tile, out, out_stride, |chunk, codes| {
                    *codes = codes_of(widen(chunk).map(|x| _mm512_div_ps(x, by)));
                });
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn halves_bf16(chunk: &[u16; CHUNK]) -> [__m512; 2] {
        // SAFETY: 32 elements of 2 bytes are one vector of 64 bytes.
        let x = unsafe { _mm512_loadu_si512(chunk.as_ptr().cast()) };
        [_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64::<1>(x)]
            .map(|x| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x))))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn halves_f32(chunk: &[f32; CHUNK]) -> [__m512; 2] {
        let pointer = chunk.as_ptr();
        // SAFETY: 32 elements of 4 bytes are two vectors of 64 bytes.
        unsafe { [_mm512_loadu_ps(pointer), _mm512_loadu_ps(pointer.add(16))] }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn codes_of(halves: [__m512; 2]) -> [u8; CHUNK] {
        let [low, high] = halves.map(|y| code_of(y));
        let mut codes = [0; CHUNK];
        // SAFETY: 32 bytes are two vectors of 16 bytes.
        unsafe {
            _mm_storeu_si128(codes.as_mut_ptr().cast(), low);
            _mm_storeu_si128(codes.as_mut_ptr().add(16).cast(), high);
        }
        codes
    }

    /// e4m3fn codes of 16 numbers, as `codec::e4m3_satfinite`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn code_of(y: __m512) -> __m128i {
        let y = _mm512_castps_si512(y);
        let abs = _mm512_and_si512(y, _mm512_set1_epi32(bits::ABS));
        let nan = _mm512_cmpgt_epu32_mask(abs, _mm512_set1_epi32(bits::INFINITY));
        let abs = _mm512_min_epu32(abs, _mm512_set1_epi32(bits::MAX));
        let odd = _mm512_and_si512(_mm512_srli_epi32::<20>(abs), _mm512_set1_epi32(1));
        let normal = _mm512_add_epi32(abs, _mm512_set1_epi32(bits::ROUND));
        let normal = _mm512_srli_epi32::<20>(_mm512_add_epi32(normal, odd));
        let small = _mm512_add_ps(_mm512_castsi512_ps(abs), _mm512_set1_ps(bits::MAGIC));
        let small = _mm512_castps_si512(small);
        let is_small = _mm512_cmplt_epu32_mask(abs, _mm512_set1_epi32(bits::MIN_NORMAL));
        let magic = _mm512_set1_epi32(bits::MAGIC_BITS);
        let code = _mm512_mask_sub_epi32(normal, is_small, small, magic);
        let sign = _mm512_and_si512(_mm512_srli_epi32::<24>(y), _mm512_set1_epi32(0x80));
        let code = _mm512_or_si512(code, sign);
        _mm512_cvtepi32_epi8(_mm512_mask_mov_epi32(code, nan, _mm512_set1_epi32(0x7f)))
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
        // SAFETY: a vector of 32 bytes is 16 elements of 2 bytes, any bits being valid.
        let lanes: [u16; 16] = unsafe { std::mem::transmute(amax) };
        lanes.into_iter().max().unwrap_or(0)
    }

    #[target_feature(enable = "avx2")]
    pub fn amax_f32(tile: Tile<'_, f32>) -> u32 {
        let abs = _mm256_set1_epi32(bits::ABS);
        let mut amax = _mm256_setzero_si256();
        for_chunks(tile, |chunk| {
            for x in quarters_f32(chunk) {
                amax = _mm256_max_epu32(amax, _mm256_and_si256(_mm256_castps_si256(x), abs));
            }
        });
        // SAFETY: a vector of 32 bytes is 8 elements of 4 bytes, any bits being valid.
        let lanes: [u32; 8] = unsafe { std::mem::transmute(amax) };
        lanes.into_iter().max().unwrap_or(0)
    }

    #[target_feature(enable = "avx2")]
    pub fn encode(step: Step, source: Source<'_>, out: &mut [u8], out_stride: usize) {
        match source {
            Source::Bf16(tile) => {
                encode_tile(step, tile, out, out_stride, |c| quarters_bf16(c))
            }
            Source::F32(tile) => encode_tile(step, tile, out, out_stride, |c| quarters_f32(c)),
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn encode_tile<T: Copy + Default>(
        step: Step,
        tile: Tile<'_, T>,
        out: &mut [u8],
        out_stride: usize,
        widen: impl Fn(&[T; CHUNK]) -> [__m256; 4],
    ) {
        match step {
            Step::Multiply(by) => {
                let by = _mm256_set1_ps(by);
                encode_chunks(tile, out, out_stride, |chunk, codes| {
                    *codes = codes_of(widen(chunk).map(|x| _mm256_mul_ps(x, by)));
                });
            }
            Step::Divide(by) => {
                let by = _mm256_set1_ps(by);
                encode_chunks(tile, out, out_stride, |chunk, codes| {
                    *codes = codes_of(widen(chunk).map(|x| _mm256_div_ps(x, by)));
                });
            }
        }
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
    fn quarters_bf16(chunk: &[u16; CHUNK]) -> [__m256; 4] {
        let [a, b] = loads(chunk);
        [
            _mm256_castsi256_si128(a),
            _mm256_extracti128_si256::<1>(a),
            _mm256_castsi256_si128(b),
            _mm256_extracti128_si256::<1>(b),
        ]
        .map(|x| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(x))))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn quarters_f32(chunk: &[f32; CHUNK]) -> [__m256; 4] {
        let pointer = chunk.as_ptr();
        // SAFETY: 32 elements of 4 bytes are four vectors of 32 bytes.
        [0, 8, 16, 24].map(|start| unsafe { _mm256_loadu_ps(pointer.add(start)) })
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn codes_of(quarters: [__m256; 4]) -> [u8; CHUNK] {
        let [a, b, c, d] = quarters.map(|y| code_of(y));
        // The packs work in halves of a vector, so the quarters come out interleaved.
        let packed = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
        let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        let packed = _mm256_permutevar8x32_epi32(packed, order);
        // SAFETY: a vector of 32 bytes is 32 codes.
        unsafe { std::mem::transmute(packed) }
    }

    /// e4m3fn codes of 8 numbers in 32 bits each, as `codec::e4m3_satfinite`.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn code_of(y: __m256) -> __m256i {
        let y = _mm256_castps_si256(y);
        let abs = _mm256_and_si256(y, _mm256_set1_epi32(bits::ABS));
        // Absolute bits are positive, so the signed comparisons order them.
        let nan = _mm256_cmpgt_epi32(abs, _mm256_set1_epi32(bits::INFINITY));
        let abs = _mm256_min_epu32(abs, _mm256_set1_epi32(bits::MAX));
        let odd = _mm256_and_si256(_mm256_srli_epi32::<20>(abs), _mm256_set1_epi32(1));
        let normal = _mm256_add_epi32(abs, _mm256_set1_epi32(bits::ROUND));
        let normal = _mm256_srli_epi32::<20>(_mm256_add_epi32(normal, odd));
        let small = _mm256_add_ps(_mm256_castsi256_ps(abs), _mm256_set1_ps(bits::MAGIC));
        let magic = _mm256_set1_epi32(bits::MAGIC_BITS);
        let small = _mm256_sub_epi32(_mm256_castps_si256(small), magic);
        let is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(bits::MIN_NORMAL), abs);
        let code = _mm256_blendv_epi8(normal, small, is_small);
        let sign = _mm256_and_si256(_mm256_srli_epi32::<24>(y), _mm256_set1_epi32(0x80));
        let code = _mm256_or_si256(code, sign);
        _mm256_blendv_epi8(code, _mm256_set1_epi32(0x7f), nan)
    }
}
