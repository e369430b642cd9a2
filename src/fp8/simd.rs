//! The vector paths of absolute maximum and encoding: AVX-512, AVX2, or the scalar definition.
//! Knows nothing of recipes and scales; every path gives the bits of `tile`'s scalar functions.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod vbmi;

use super::codec::bf16_to_f32;
use super::recipe::Step;
use super::tile::{Next, Tile, amax_f32_scalar, amax_u16_scalar, encode_scalar};

/// Elements that one call of a vector kernel takes; ragged tails are padded to it on the stack.
const CHUNK: usize = 32;

/// How many rows of codes ahead of its writes the encoder asks for their cache lines.
const ROWS_AHEAD: usize = 8;

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
    #[cfg(target_arch = "x86_64")]
    Avx512Vbmi,
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
            let tables = is_x86_feature_detected!("avx512vbmi");
            return Level(if tables { Set::Avx512Vbmi } else { Set::Avx512 });
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
        if matches!(level().0, Set::Avx512 | Set::Avx512Vbmi) {
            levels.push(Level(Set::Avx512));
        }
        if level() == Level(Set::Avx512Vbmi) {
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
        Set::Avx512 | Set::Avx512Vbmi => unsafe { avx512::amax_u16(tile) },
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
        Set::Avx512 | Set::Avx512Vbmi => unsafe { avx512::amax_f32(tile) },
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
    next: Next,
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
        Set::Avx2 => unsafe { avx2::encode(step, source, next, out, out_stride) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Set::Avx512 => unsafe { avx512::encode(step, source, next, out, out_stride) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Set::Avx512Vbmi => match source {
            Source::Bf16(tile) => unsafe {
                vbmi::encode_bf16(step, tile, next, out, out_stride)
            },
            Source::F32(_) => unsafe { avx512::encode(step, source, next, out, out_stride) },
        },
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
    next: Next,
    out: &mut [u8],
    out_stride: usize,
    mut encode: impl FnMut(&[T; CHUNK], &mut [u8; CHUNK]),
) {
    for row in 0..tile.rows {
        prefetch(next.row(row), next.bytes);
        let codes_ahead = out.as_ptr().wrapping_add((row + ROWS_AHEAD) * out_stride);
        prefetch(codes_ahead, tile.cols);
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

/// Asks for bytes that will be needed soon; any address is fine, also one outside all buffers.
#[inline(always)]
fn prefetch(start: *const u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    for offset in (0..bytes).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing and faults on no address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(offset).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (start, bytes);
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
    pub const LIMIT: f32 = 464.0;
}
