//! Makes the bytes of a box from its expression: gather, cast, add, quantize, dequantize.

use std::cell::Cell;

use smallvec::smallvec;

use crate::diag::Diagnostic;
use crate::dtype::DType;
use crate::fp8::codec::{GPU_NAN_BITS, e4m3_decode, e4m3_satfinite, e8m0_encode};
use crate::fp8::tile::quantize_matrix;
use crate::fp8::{ScaleFormat, Values};
use crate::graph::tiles as tile_dims;
use crate::ir::Dims;
use crate::lower::Unit;
use crate::shard::{Expr, Made, Piece, Storage, Stored, Tiles, TilesFrom, Window};

use super::bits::Bits;
use super::boxes::{contiguous, gather, scatter};
use super::strided::load;
use super::{Rows, Strided};

pub(super) type Fallible<T> = Result<T, Diagnostic>;

/// What the evaluation of a chunk reads, and whether all of it was finite. The constants of a
/// plan do not count: padding with infinity is meant.
pub(super) struct Inputs<'a> {
    pub(super) rows: &'a dyn Rows,
    finite: Cell<bool>,
    /// False while a recipe's maximum will see what is read.
    pub(super) watched: Cell<bool>,
}

impl<'a> Inputs<'a> {
    pub(super) fn new(rows: &'a dyn Rows) -> Self {
        Inputs { rows, finite: Cell::new(true), watched: Cell::new(true) }
    }

    /// True if no number that was read or computed so far is NaN or infinite.
    pub(super) fn all_finite(&self) -> bool {
        self.finite.get()
    }

    pub(super) fn note(&self, finite: bool) {
        self.finite.set(self.finite.get() && finite);
    }
}

pub(super) fn count(len: &[u64]) -> usize {
    len.iter().product::<u64>() as usize
}

/// Makes a window of a unit: values (or codes), and the scales that come with it. All that its
/// tiles are made of is read.
pub(super) fn window(
    inputs: &Inputs<'_>,
    unit: &Unit,
    window: &Window,
    out: &mut [u8],
    scales: &mut [u8],
) -> Fallible<()> {
    let len = &window.len;
    let part = Piece { at: Window::whole(len), expr: unit.expr.crop(&window.lo, len) };
    match unit.quant {
        Some(q) => quantized(inputs, &[part], len, q.scales, out, scales),
        None => values(inputs, &[part], len, unit.dtype, out),
    }
}

/// Makes all of a unit that reads nothing.
pub(super) fn whole(unit: &Unit, out: &mut [u8], scales: &mut [u8]) -> Fallible<()> {
    let inputs = Inputs::new(&Nothing);
    window(&inputs, unit, &Window::whole(&unit.shape), out, scales)
}

struct Nothing;

impl Rows for Nothing {
    fn read(&self, _: Storage, _: Strided, _: &mut [u8]) -> Result<(), Diagnostic> {
        Err(Diagnostic::error("E0502", "a constant reads a source"))
    }
}

/// Makes values: the row-major bytes of a window that some pieces fill.
pub(super) fn values(
    inputs: &Inputs<'_>,
    pieces: &[Piece],
    len: &[u64],
    dtype: DType,
    out: &mut [u8],
) -> Fallible<()> {
    let size = dtype.size();
    for piece in pieces {
        match contiguous(&piece.at.lo, &piece.at.len, len) {
            Some(first) => {
                let first = (first * size) as usize;
                let part = &mut out[first..first + count(&piece.at.len) * size as usize];
                expr(inputs, &piece.expr, &piece.at.len, part)?;
            }
            None => {
                let mut part = Bits::zeros(dtype, count(&piece.at.len));
                expr(inputs, &piece.expr, &piece.at.len, part.bytes_mut())?;
                scatter(part.bytes(), &piece.at.lo, &piece.at.len, out, len, size);
            }
        }
    }
    Ok(())
}

/// Makes codes and scales: the row-major bytes of a tile-aligned window of a quantized value.
pub(super) fn quantized(
    inputs: &Inputs<'_>,
    pieces: &[Piece],
    len: &[u64],
    format: ScaleFormat,
    codes: &mut [u8],
    scales: &mut [u8],
) -> Fallible<()> {
    for piece in pieces {
        let Expr::Tiles(tiles) = &piece.expr else {
            return Err(Diagnostic::error(
                "E0502",
                "a quantized target has an unquantized piece",
            ));
        };
        let part_len = &piece.at.len;
        let grid = tile_dims(part_len, tiles.refined);
        let mut part_scales = vec![0f32; count(&grid)];
        match contiguous(&piece.at.lo, part_len, len) {
            Some(first) => {
                let part = &mut codes[first as usize..][..count(part_len)];
                tiles_into(inputs, tiles, part_len, part, &mut part_scales)?;
            }
            None => {
                let mut part = vec![0u8; count(part_len)];
                tiles_into(inputs, tiles, part_len, &mut part, &mut part_scales)?;
                scatter(&part, &piece.at.lo, part_len, codes, len, 1);
            }
        }
        let at = tile_dims(&piece.at.lo, tiles.refined);
        let whole = tile_dims(len, tiles.refined);
        let size = format.dtype().size();
        let mut bytes = vec![0; part_scales.len() * size as usize];
        store_scales(&part_scales, format, &mut bytes);
        scatter(&bytes, &at, &grid, scales, &whole, size);
    }
    Ok(())
}

/// The row-major bytes of one expression.
pub(super) fn expr(inputs: &Inputs<'_>, e: &Expr, len: &[u64], out: &mut [u8]) -> Fallible<()> {
    match e {
        Expr::Load(view) => load(inputs, view, len, out),
        Expr::Fill { dtype, bits } => {
            fill(*dtype, f64::from_bits(*bits), out);
            Ok(())
        }
        Expr::Codes(tiles) => {
            if let TilesFrom::Stored(stored) = &tiles.from {
                return load(inputs, &stored.codes, len, out);
            }
            let mut scales = vec![0f32; count(&tile_dims(len, tiles.refined))];
            tiles_into(inputs, tiles, len, out, &mut scales)
        }
        Expr::Scales { dtype, tiles, of } => {
            let mut scales = vec![0f32; count(len)];
            match &tiles.from {
                TilesFrom::Stored(stored) => {
                    let (coarse, grid) = stored_scales(inputs, tiles, stored, of)?;
                    refine(&coarse, &grid, tiles, of, &mut scales);
                }
                TilesFrom::Made(_) => {
                    tiles_into(inputs, tiles, of, &mut vec![0; count(of)], &mut scales)?;
                }
            }
            store_scales(&scales, ScaleFormat::of(*dtype), out);
            Ok(())
        }
        _ => {
            let numbers = numbers(inputs, e, len)?;
            inputs.note(e.is_constant() || numbers.iter().all(|x| x.is_finite()));
            out.copy_from_slice(Bits::from_f32(&numbers, e.dtype()).bytes());
            Ok(())
        }
    }
}

/// The value of an expression in f32, after the rounding that its own type asks for.
pub(super) fn numbers(inputs: &Inputs<'_>, e: &Expr, len: &[u64]) -> Fallible<Vec<f32>> {
    match e {
        Expr::Load(_) | Expr::Fill { .. } => {
            let mut bits = Bits::zeros(e.dtype(), count(len));
            expr(inputs, e, len, bits.bytes_mut())?;
            Ok(bits.to_f32(e.dtype()))
        }
        Expr::Cast { dtype, value } => Ok(rounded(numbers(inputs, value, len)?, *dtype)),
        Expr::Scale { factor, value } => {
            let factor = f64::from_bits(*factor) as f32;
            let mut x = numbers(inputs, value, len)?;
            x.iter_mut().for_each(|x| *x = one_nan(*x * factor));
            Ok(rounded(x, e.dtype()))
        }
        Expr::Add { left, right } => {
            let mut x = numbers(inputs, left, len)?;
            let y = numbers(inputs, right, len)?;
            x.iter_mut().zip(&y).for_each(|(x, y)| *x = one_nan(*x + y));
            Ok(rounded(x, e.dtype()))
        }
        Expr::Dequantize { dtype, tiles } => {
            Ok(rounded(dequantized(inputs, tiles, len)?, *dtype))
        }
        Expr::Tiles(_) | Expr::Codes(_) | Expr::Scales { .. } => {
            Err(Diagnostic::error("E0502", "a quantized value where numbers are wanted"))
        }
    }
}

/// The result of an f32 operation: a NaN is the one that GPUs give, whatever went in.
pub(super) fn one_nan(x: f32) -> f32 {
    if x.is_nan() { f32::from_bits(GPU_NAN_BITS) } else { x }
}

/// Rounds to the type and back.
pub(super) fn rounded(x: Vec<f32>, dtype: DType) -> Vec<f32> {
    match dtype {
        DType::F32 => x,
        _ => Bits::from_f32(&x, dtype).to_f32(dtype),
    }
}

fn dequantized(inputs: &Inputs<'_>, tiles: &Tiles, len: &[u64]) -> Fallible<Vec<f32>> {
    let mut codes = vec![0u8; count(len)];
    let Coarse { scales, grid } = coarse_tiles(inputs, tiles, len, &mut codes)?;
    let m = len.len() - 2;
    let (r, c) = (len[m] as usize, len[m + 1] as usize);
    let (gr, gc) = (grid[m] as usize, grid[m + 1] as usize);
    let block = tiles.block() as usize;
    let phase = tiles.phase.map(|p| p as usize);
    // The box may begin inside a tile.
    let first = (block - phase[1]).min(c);
    let mut out = Vec::with_capacity(codes.len());
    for (i, row) in codes.chunks_exact(c.max(1)).enumerate() {
        let (matrix, row_index) = (i / r, i % r + phase[0]);
        let scales = &scales[(matrix * gr + row_index / block) * gc..][..gc];
        let (head, rest) = row.split_at(first);
        for (codes, scale) in std::iter::once(head).chain(rest.chunks(block)).zip(scales) {
            out.extend(codes.iter().map(|code| one_nan(e4m3_decode(*code) * scale)));
        }
    }
    Ok(out)
}

/// Codes of a box and its scales on the grid of `refined`.
fn tiles_into(
    inputs: &Inputs<'_>,
    tiles: &Tiles,
    len: &[u64],
    codes: &mut [u8],
    scales: &mut [f32],
) -> Fallible<()> {
    if let TilesFrom::Made(made) = &tiles.from
        && made.extent[..] == *len
        && tiles.refined == tiles.block()
    {
        return with_input(inputs, made, |input, dtype| {
            quantize_all(made, input, dtype, codes, scales)
        });
    }
    let coarse = coarse_tiles(inputs, tiles, len, codes)?;
    refine(&coarse.scales, &coarse.grid, tiles, len, scales);
    Ok(())
}

/// Scales of all tiles that a box touches, on the grid on which they are computed or stored.
pub(super) struct Coarse {
    pub scales: Vec<f32>,
    pub grid: Dims,
}

/// Codes of a box, and its coarse scales.
pub(super) fn coarse_tiles(
    inputs: &Inputs<'_>,
    tiles: &Tiles,
    len: &[u64],
    codes: &mut [u8],
) -> Fallible<Coarse> {
    match &tiles.from {
        TilesFrom::Stored(stored) => {
            load(inputs, &stored.codes, len, codes)?;
            let (scales, grid) = stored_scales(inputs, tiles, stored, len)?;
            Ok(Coarse { scales, grid })
        }
        TilesFrom::Made(made) => {
            let grid = tile_dims(&made.extent, tiles.block());
            let mut all_codes = vec![0u8; count(&made.extent)];
            let mut scales = vec![0f32; count(&grid)];
            with_input(inputs, made, |input, dtype| {
                quantize_all(made, input, dtype, &mut all_codes, &mut scales)
            })?;
            let mut off: Dims = smallvec![0; len.len()];
            let m = len.len() - 2;
            (off[m], off[m + 1]) = (tiles.phase[0], tiles.phase[1]);
            gather(&all_codes, &made.extent, &off, len, codes);
            Ok(Coarse { scales, grid })
        }
    }
}

thread_local! {
    /// Kept between chunks: clearing it for each would cost as much as quantizing what it holds.
    static INPUT: Cell<Vec<u16>> = const { Cell::new(Vec::new()) };
}

/// Reads what a recipe quantizes and hands it to `quantize` with its type, which says whether
/// all of it was finite.
fn with_input(
    inputs: &Inputs<'_>,
    made: &Made,
    quantize: impl FnOnce(&Bits, DType) -> bool,
) -> Fallible<()> {
    let dtype = made.input.first().map_or(DType::F32, |p| p.expr.dtype());
    let size = count(&made.extent);
    let mut input = match dtype.size() {
        2 => {
            let mut kept = INPUT.take();
            // The pieces cover every element, so what an earlier chunk left is never seen.
            kept.resize(size, 0);
            Bits::B16(kept)
        }
        _ => Bits::zeros(dtype, size),
    };
    unwatched(inputs, || values(inputs, &made.input, &made.extent, dtype, input.bytes_mut()))?;
    inputs.note(quantize(&input, dtype));
    if let Bits::B16(kept) = input {
        INPUT.set(kept);
    }
    Ok(())
}

/// Reads what a recipe's maximum will see.
pub(super) fn unwatched<T>(inputs: &Inputs<'_>, read: impl FnOnce() -> T) -> T {
    let outer = inputs.watched.replace(false);
    let result = read();
    inputs.watched.set(outer);
    result
}

/// Scales in their stored form.
pub(super) fn store_scales(scales: &[f32], format: ScaleFormat, out: &mut [u8]) {
    match format {
        ScaleFormat::F32 => out.copy_from_slice(bytemuck::cast_slice(scales)),
        ScaleFormat::E8m0 => {
            out.iter_mut().zip(scales).for_each(|(o, s)| *o = e8m0_encode(*s));
        }
    }
}

/// The stored scales of the tiles that a box touches, and their grid.
fn stored_scales(
    inputs: &Inputs<'_>,
    tiles: &Tiles,
    stored: &Stored,
    len: &[u64],
) -> Fallible<(Vec<f32>, Dims)> {
    let grid = touched(tiles, len);
    let view = &stored.scales.view;
    let mut bits = Bits::zeros(view.dtype, count(&grid));
    load(inputs, view, &grid, bits.bytes_mut())?;
    Ok((bits.to_f32(view.dtype), grid))
}

/// Grid of the coarse tiles that a box with this phase touches.
fn touched(tiles: &Tiles, len: &[u64]) -> Dims {
    let m = len.len() - 2;
    let mut grid: Dims = len.into();
    for k in 0..2 {
        grid[m + k] = (tiles.phase[k] + len[m + k]).div_ceil(tiles.block());
    }
    grid
}

/// Repeats coarse scales onto the finer grid.
fn refine(coarse: &[f32], grid: &[u64], tiles: &Tiles, len: &[u64], out: &mut [f32]) {
    let m = len.len() - 2;
    let fine = tile_dims(len, tiles.refined);
    let block = tiles.block();
    let at = |k: usize, i: u64| (tiles.phase[k] + i * tiles.refined) / block;
    let matrices: u64 = fine[..m].iter().product();
    let mut next = out.iter_mut();
    for matrix in 0..matrices {
        for i in 0..fine[m] {
            let row = (matrix * grid[m] + at(0, i)) * grid[m + 1];
            for j in 0..fine[m + 1] {
                if let Some(scale) = next.next() {
                    *scale = coarse[(row + at(1, j)) as usize];
                }
            }
        }
    }
}

/// Quantizes every matrix of a box.
fn quantize_all(
    made: &Made,
    input: &Bits,
    dtype: DType,
    codes: &mut [u8],
    scales: &mut [f32],
) -> bool {
    let m = made.extent.len() - 2;
    let (r, c) = (made.extent[m] as usize, made.extent[m + 1] as usize);
    let block = made.recipe.block as usize;
    let tiles = r.div_ceil(block) * c.div_ceil(block);
    let mut amax = 0;
    let matrices = codes.chunks_exact_mut(r * c).zip(scales.chunks_exact_mut(tiles));
    for (i, (codes, scales)) in matrices.enumerate() {
        let part = i * r * c..(i + 1) * r * c;
        let values = match input {
            Bits::B16(v) if dtype == DType::F16 => Values::F16(&v[part]),
            Bits::B16(v) => Values::Bf16(&v[part]),
            Bits::B32(v) => Values::F32(bytemuck::cast_slice(&v[part])),
            Bits::B8(_) => return false,
        };
        amax = amax.max(quantize_matrix(&made.recipe, values, r, c, codes, scales));
    }
    f32::from_bits(amax).is_finite()
}

fn fill(dtype: DType, value: f64, out: &mut [u8]) {
    if value.to_bits() == 0 {
        out.fill(0);
        return;
    }
    match dtype {
        DType::I32 => {
            out.chunks_exact_mut(4)
                .for_each(|b| b.copy_from_slice(&(value as i32).to_le_bytes()));
        }
        DType::U8 => out.fill(value as u8),
        DType::E4m3 => out.fill(e4m3_satfinite(value as f32)),
        DType::E8m0 => out.fill(e8m0_encode(value as f32)),
        _ => {
            let one = Bits::from_f32(&[value as f32], dtype);
            let bytes = one.bytes();
            out.chunks_exact_mut(bytes.len()).for_each(|b| b.copy_from_slice(bytes));
        }
    }
}
