//! One tile and one matrix: absolute maximum, scale, codes, and back.
//! Knows slices with a row stride; knows nothing of files, ranks or devices.
//!
//! Each function takes rows of `cols` elements that begin `stride` elements apart, and writes
//! codes in rows that begin `out_stride` bytes apart. Shapes are the caller's to check: a row
//! that lies outside its slice is a bug there and panics. The `*_scalar` functions are the
//! definition; the public ones give the same bits with the processor's vector instructions.

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use super::codec::{e4m3_decode, e4m3_satfinite, f16_to_f32};
use super::recipe::{Recipe, Step};
use super::simd::{self, Source};

/// What quantizing one tile found and chose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TileScale {
    /// The dequantization multiplier.
    pub scale: f32,
    /// f32 bits of the largest |x|; 0x7f800000 and above mean that an element is not finite.
    pub amax_bits: u32,
}

/// The elements of a row-major matrix.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    /// bf16 bits.
    Bf16(&'a [u16]),
    /// f16 bits.
    F16(&'a [u16]),
    /// f32 numbers.
    F32(&'a [f32]),
}

/// Rows of a matrix that lie `stride` elements apart.
#[derive(Clone, Copy)]
pub(crate) struct Tile<'a, T> {
    pub values: &'a [T],
    pub stride: usize,
    pub rows: usize,
    pub cols: usize,
}

impl<'a, T> Tile<'a, T> {
    #[inline(always)]
    pub fn row(&self, row: usize) -> &'a [T] {
        &self.values[row * self.stride..][..self.cols]
    }
}

/// Where rows lie in memory, in bytes, that the caller reads next: the encoder has them brought
/// into the cache meanwhile. Never read through; `bytes` is 0 for none.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Next {
    pub start: *const u8,
    pub stride: usize,
    pub bytes: usize,
}

impl Next {
    pub const NONE: Next = Next { start: std::ptr::null(), stride: 0, bytes: 0 };

    /// As many rows of `bytes` bytes as a tile has.
    fn new<T>(values: &[T], stride: usize, cols: usize) -> Next {
        let size = size_of::<T>();
        Next { start: values.as_ptr().cast(), stride: stride * size, bytes: cols * size }
    }

    #[inline(always)]
    pub fn row(&self, row: usize) -> *const u8 {
        self.start.wrapping_add(row * self.stride)
    }
}

/// f32 bits of the largest |x| of a bf16 tile, NaN above infinity above all numbers.
pub fn amax_bits_bf16(src: &[u16], stride: usize, rows: usize, cols: usize) -> u32 {
    let tile = Tile { values: src, stride, rows, cols };
    u32::from(simd::amax_u16(simd::level(), tile)) << 16
}

/// f32 bits of the largest |x| of an f16 tile, NaN above infinity above all numbers.
pub fn amax_bits_f16(src: &[u16], stride: usize, rows: usize, cols: usize) -> u32 {
    let tile = Tile { values: src, stride, rows, cols };
    f16_to_f32(simd::amax_u16(simd::level(), tile)).to_bits()
}

/// f32 bits of the largest |x| of an f32 tile, NaN above infinity above all numbers.
pub fn amax_bits_f32(src: &[f32], stride: usize, rows: usize, cols: usize) -> u32 {
    simd::amax_f32(simd::level(), Tile { values: src, stride, rows, cols })
}

/// Writes the codes of a bf16 tile whose scale is known.
#[expect(clippy::too_many_arguments, reason = "two strided matrices and how to go between")]
pub fn encode_tile_bf16(
    recipe: &Recipe,
    scale: f32,
    src: &[u16],
    stride: usize,
    rows: usize,
    cols: usize,
    out: &mut [u8],
    out_stride: usize,
) {
    let tile = Tile { values: src, stride, rows, cols };
    simd::encode(
        simd::level(),
        recipe.step(scale),
        Source::Bf16(tile),
        Next::NONE,
        out,
        out_stride,
    );
}

/// Writes the codes of an f16 tile whose scale is known.
#[expect(clippy::too_many_arguments, reason = "two strided matrices and how to go between")]
pub fn encode_tile_f16(
    recipe: &Recipe,
    scale: f32,
    src: &[u16],
    stride: usize,
    rows: usize,
    cols: usize,
    out: &mut [u8],
    out_stride: usize,
) {
    let step = recipe.step(scale);
    let tile = Tile { values: src, stride, rows, cols };
    let mut wide = [0.0; 128];
    for row in 0..rows {
        let narrow = tile.row(row).chunks(wide.len());
        let codes = out[row * out_stride..][..cols].chunks_mut(wide.len());
        for (narrow, codes) in narrow.zip(codes) {
            let wide = &mut wide[..narrow.len()];
            narrow.reinterpret_cast::<f16>().convert_to_f32_slice(wide);
            let tile = Tile { values: wide, stride: 0, rows: 1, cols: wide.len() };
            simd::encode(simd::level(), step, Source::F32(tile), Next::NONE, codes, 0);
        }
    }
}

/// Writes the codes of an f32 tile whose scale is known.
#[expect(clippy::too_many_arguments, reason = "two strided matrices and how to go between")]
pub fn encode_tile_f32(
    recipe: &Recipe,
    scale: f32,
    src: &[f32],
    stride: usize,
    rows: usize,
    cols: usize,
    out: &mut [u8],
    out_stride: usize,
) {
    let tile = Tile { values: src, stride, rows, cols };
    simd::encode(
        simd::level(),
        recipe.step(scale),
        Source::F32(tile),
        Next::NONE,
        out,
        out_stride,
    );
}

/// Quantizes one bf16 tile. A tile of 448.0 and 1.0 has scale 1 and codes 0x7e and 0x38.
pub fn quantize_tile_bf16(
    recipe: &Recipe,
    src: &[u16],
    stride: usize,
    rows: usize,
    cols: usize,
    out: &mut [u8],
    out_stride: usize,
) -> TileScale {
    let tile = Tile { values: src, stride, rows, cols };
    quantize_bf16(recipe, tile, Next::NONE, out, out_stride)
}

/// Quantizes one f16 tile.
pub fn quantize_tile_f16(
    recipe: &Recipe,
    src: &[u16],
    stride: usize,
    rows: usize,
    cols: usize,
    out: &mut [u8],
    out_stride: usize,
) -> TileScale {
    let amax_bits = amax_bits_f16(src, stride, rows, cols);
    let scale = recipe.scale_of(amax_bits);
    encode_tile_f16(recipe, scale, src, stride, rows, cols, out, out_stride);
    TileScale { scale, amax_bits }
}

/// Quantizes one f32 tile.
pub fn quantize_tile_f32(
    recipe: &Recipe,
    src: &[f32],
    stride: usize,
    rows: usize,
    cols: usize,
    out: &mut [u8],
    out_stride: usize,
) -> TileScale {
    let tile = Tile { values: src, stride, rows, cols };
    quantize_f32(recipe, tile, Next::NONE, out, out_stride)
}

/// Rows and columns of the scale grid: ceil(rows / block) x ceil(cols / block).
pub fn grid_of(recipe: &Recipe, rows: usize, cols: usize) -> (usize, usize) {
    let block = recipe.block as usize;
    (rows.div_ceil(block), cols.div_ceil(block))
}

/// Quantizes a row-major matrix of `rows` x `cols` elements on the calling thread.
///
/// `codes` takes rows * cols bytes, `scales` one f32 a tile in the order of `grid_of`. Returns
/// the largest `amax_bits` of all tiles, by which a caller refuses what is not finite.
pub fn quantize_matrix(
    recipe: &Recipe,
    input: Values<'_>,
    rows: usize,
    cols: usize,
    codes: &mut [u8],
    scales: &mut [f32],
) -> u32 {
    let block = recipe.block as usize;
    let (grid_rows, grid_cols) = grid_of(recipe, rows, cols);
    let mut amax_bits = 0;
    for grid_row in 0..grid_rows {
        let row = grid_row * block;
        let high = block.min(rows - row);
        for grid_col in 0..grid_cols {
            let col = grid_col * block;
            let wide = block.min(cols - col);
            let start = row * cols + col;
            let out = &mut codes[start..];
            // The tile to the right, or the first of the next row of tiles.
            let next =
                if grid_col + 1 < grid_cols { start + wide } else { start + high * cols - col };
            let tile = match input {
                Values::Bf16(src) => {
                    let next = Next::new(src.get(next..).unwrap_or_default(), cols, wide);
                    let values = &src[start..];
                    let tile = Tile { values, stride: cols, rows: high, cols: wide };
                    quantize_bf16(recipe, tile, next, out, cols)
                }
                Values::F16(src) => {
                    quantize_tile_f16(recipe, &src[start..], cols, high, wide, out, cols)
                }
                Values::F32(src) => {
                    let next = Next::new(src.get(next..).unwrap_or_default(), cols, wide);
                    let values = &src[start..];
                    let tile = Tile { values, stride: cols, rows: high, cols: wide };
                    quantize_f32(recipe, tile, next, out, cols)
                }
            };
            scales[grid_row * grid_cols + grid_col] = tile.scale;
            amax_bits = amax_bits.max(tile.amax_bits);
        }
    }
    amax_bits
}

/// The number that a code stands for: f32(code) * f32(scale), rounded to nearest even.
#[inline]
pub fn dequantize(code: u8, scale: f32) -> f32 {
    e4m3_decode(code) * scale
}

/// Dequantizes a row-major matrix to f32: the inverse of `quantize_matrix` up to rounding.
pub fn dequantize_matrix(
    recipe: &Recipe,
    codes: &[u8],
    scales: &[f32],
    rows: usize,
    cols: usize,
    out: &mut [f32],
) {
    let block = recipe.block as usize;
    let (_, grid_cols) = grid_of(recipe, rows, cols);
    for row in 0..rows {
        let codes = &codes[row * cols..][..cols];
        let scales = &scales[row / block * grid_cols..][..grid_cols];
        let out = &mut out[row * cols..][..cols];
        let tiles = codes.chunks(block).zip(out.chunks_mut(block)).zip(scales);
        for ((codes, out), &scale) in tiles {
            for (x, &code) in out.iter_mut().zip(codes) {
                *x = dequantize(code, scale);
            }
        }
    }
}

fn quantize_bf16(
    recipe: &Recipe,
    tile: Tile<'_, u16>,
    next: Next,
    out: &mut [u8],
    out_stride: usize,
) -> TileScale {
    let amax_bits = amax_bits_bf16(tile.values, tile.stride, tile.rows, tile.cols);
    let scale = recipe.scale_of(amax_bits);
    let source = Source::Bf16(tile);
    simd::encode(simd::level(), recipe.step(scale), source, next, out, out_stride);
    TileScale { scale, amax_bits }
}

fn quantize_f32(
    recipe: &Recipe,
    tile: Tile<'_, f32>,
    next: Next,
    out: &mut [u8],
    out_stride: usize,
) -> TileScale {
    let amax_bits = amax_bits_f32(tile.values, tile.stride, tile.rows, tile.cols);
    let scale = recipe.scale_of(amax_bits);
    let source = Source::F32(tile);
    simd::encode(simd::level(), recipe.step(scale), source, next, out, out_stride);
    TileScale { scale, amax_bits }
}

/// The largest value of 16-bit floats with the sign bit off: for bf16 and f16 alike the order
/// of those bits is the order of magnitudes, with NaN on top.
pub(crate) fn amax_u16_scalar(tile: Tile<'_, u16>) -> u16 {
    let rows = (0..tile.rows).flat_map(|row| tile.row(row));
    rows.map(|bits| bits & 0x7fff).max().unwrap_or(0)
}

/// The same of f32.
pub(crate) fn amax_f32_scalar(tile: Tile<'_, f32>) -> u32 {
    let rows = (0..tile.rows).flat_map(|row| tile.row(row));
    rows.map(|x| x.to_bits() & 0x7fff_ffff).max().unwrap_or(0)
}

/// Codes of a tile, `widen` being its type's exact conversion to f32.
pub(crate) fn encode_scalar<T: Copy>(
    step: Step,
    tile: Tile<'_, T>,
    widen: impl Fn(T) -> f32,
    out: &mut [u8],
    out_stride: usize,
) {
    for row in 0..tile.rows {
        let out = &mut out[row * out_stride..][..tile.cols];
        for (code, &x) in out.iter_mut().zip(tile.row(row)) {
            *code = e4m3_satfinite(match step {
                Step::Multiply(by) => widen(x) * by,
                Step::Divide(by) => widen(x) / by,
            });
        }
    }
}
