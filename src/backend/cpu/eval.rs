//! Makes the bytes of a box from its expression: gather, cast, add, quantize, dequantize.

use std::cell::Cell;

use smallvec::smallvec;

use crate::diag::Diagnostic;
use crate::dtype::DType;
use crate::fp8::codec::{
    GPU_NAN_BITS, bf16_to_f32, e4m3_decode, e4m3_satfinite, e8m0_decode, e8m0_encode,
    f16_to_f32, f32_to_bf16, f32_to_f16,
};
use crate::fp8::tile::quantize_matrix;
use crate::fp8::{ScaleFormat, Values};
use crate::graph::tiles as tile_dims;
use crate::ir::Dims;
use crate::shard::{Expr, Made, Piece, Stored, Tiles, TilesFrom, View};

use super::boxes::{contiguous, gather, scatter, transpose};
use super::{Rows, Strided};

type Fallible<T> = Result<T, Diagnostic>;

/// Elements of a box in row-major order, as bits of their type's size.
enum Bits {
    B8(Vec<u8>),
    B16(Vec<u16>),
    B32(Vec<u32>),
}

impl Bits {
    fn zeros(dtype: DType, count: usize) -> Self {
        match dtype.size() {
            1 => Bits::B8(vec![0; count]),
            2 => Bits::B16(vec![0; count]),
            _ => Bits::B32(vec![0; count]),
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Bits::B8(v) => v,
            Bits::B16(v) => bytemuck::cast_slice(v),
            Bits::B32(v) => bytemuck::cast_slice(v),
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Bits::B8(v) => v,
            Bits::B16(v) => bytemuck::cast_slice_mut(v),
            Bits::B32(v) => bytemuck::cast_slice_mut(v),
        }
    }

    /// The numbers as f32; every float type of the engine widens exactly.
    fn to_f32(&self, dtype: DType) -> Vec<f32> {
        match (self, dtype) {
            (Bits::B16(v), DType::F16) => v.iter().map(|b| f16_to_f32(*b)).collect(),
            (Bits::B16(v), _) => v.iter().map(|b| bf16_to_f32(*b)).collect(),
            (Bits::B32(v), _) => v.iter().map(|b| f32::from_bits(*b)).collect(),
            (Bits::B8(v), DType::E8m0) => v.iter().map(|b| e8m0_decode(*b)).collect(),
            (Bits::B8(v), _) => v.iter().map(|b| e4m3_decode(*b)).collect(),
        }
    }

    /// Rounds to nearest even.
    fn from_f32(values: &[f32], dtype: DType) -> Self {
        match dtype {
            DType::Bf16 => Bits::B16(values.iter().map(|x| f32_to_bf16(*x)).collect()),
            DType::F16 => Bits::B16(values.iter().map(|x| f32_to_f16(*x)).collect()),
            _ => Bits::B32(values.iter().map(|x| x.to_bits()).collect()),
        }
    }
}

fn count(len: &[u64]) -> usize {
    len.iter().product::<u64>() as usize
}

/// Makes values: the row-major bytes of a window that some pieces fill.
pub(super) fn values(
    rows: &dyn Rows,
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
                expr(rows, &piece.expr, &piece.at.len, part)?;
            }
            None => {
                let mut part = Bits::zeros(dtype, count(&piece.at.len));
                expr(rows, &piece.expr, &piece.at.len, part.bytes_mut())?;
                scatter(part.bytes(), &piece.at.lo, &piece.at.len, out, len, size);
            }
        }
    }
    Ok(())
}

/// Makes codes and scales: the row-major bytes of a tile-aligned window of a quantized value.
/// Returns false if a number that went into a tile is not finite.
pub(super) fn quantized(
    rows: &dyn Rows,
    pieces: &[Piece],
    len: &[u64],
    format: ScaleFormat,
    codes: &mut [u8],
    scales: &mut [u8],
) -> Fallible<bool> {
    let mut finite = true;
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
                finite &= tiles_into(rows, tiles, part_len, part, &mut part_scales)?;
            }
            None => {
                let mut part = vec![0u8; count(part_len)];
                finite &= tiles_into(rows, tiles, part_len, &mut part, &mut part_scales)?;
                scatter(&part, &piece.at.lo, part_len, codes, len, 1);
            }
        }
        let at = tile_dims(&piece.at.lo, tiles.refined);
        let whole = tile_dims(len, tiles.refined);
        match format {
            ScaleFormat::F32 => {
                let bytes: &[u8] = bytemuck::cast_slice(&part_scales);
                scatter(bytes, &at, &grid, scales, &whole, 4);
            }
            ScaleFormat::E8m0 => {
                let bytes: Vec<u8> = part_scales.iter().map(|s| e8m0_encode(*s)).collect();
                scatter(&bytes, &at, &grid, scales, &whole, 1);
            }
        }
    }
    Ok(finite)
}

/// The row-major bytes of one expression.
fn expr(rows: &dyn Rows, e: &Expr, len: &[u64], out: &mut [u8]) -> Fallible<()> {
    match e {
        Expr::Load(view) => load(rows, view, len, out),
        Expr::Fill { dtype, bits } => {
            fill(*dtype, f64::from_bits(*bits), out);
            Ok(())
        }
        Expr::Codes(tiles) => {
            let mut scales = vec![0f32; count(&tile_dims(len, tiles.refined))];
            tiles_into(rows, tiles, len, out, &mut scales).map(|_| ())
        }
        Expr::Scales { dtype, tiles, of } => {
            let mut scales = vec![0f32; count(len)];
            tiles_into(rows, tiles, of, &mut vec![0; count(of)], &mut scales)?;
            match dtype {
                DType::E8m0 => {
                    out.iter_mut().zip(scales).for_each(|(o, s)| *o = e8m0_encode(s));
                }
                _ => out.copy_from_slice(bytemuck::cast_slice(&scales)),
            }
            Ok(())
        }
        _ => {
            let numbers = numbers(rows, e, len)?;
            out.copy_from_slice(Bits::from_f32(&numbers, e.dtype()).bytes());
            Ok(())
        }
    }
}

/// The value of an expression in f32, after the rounding that its own type asks for.
fn numbers(rows: &dyn Rows, e: &Expr, len: &[u64]) -> Fallible<Vec<f32>> {
    match e {
        Expr::Load(_) | Expr::Fill { .. } => {
            let mut bits = Bits::zeros(e.dtype(), count(len));
            expr(rows, e, len, bits.bytes_mut())?;
            Ok(bits.to_f32(e.dtype()))
        }
        Expr::Cast { dtype, value } => Ok(rounded(numbers(rows, value, len)?, *dtype)),
        Expr::Scale { factor, value } => {
            let factor = f64::from_bits(*factor) as f32;
            let mut x = numbers(rows, value, len)?;
            x.iter_mut().for_each(|x| *x = one_nan(*x * factor));
            Ok(rounded(x, e.dtype()))
        }
        Expr::Add { left, right } => {
            let mut x = numbers(rows, left, len)?;
            let y = numbers(rows, right, len)?;
            x.iter_mut().zip(&y).for_each(|(x, y)| *x = one_nan(*x + y));
            Ok(rounded(x, e.dtype()))
        }
        Expr::Dequantize { dtype, tiles } => {
            Ok(rounded(dequantized(rows, tiles, len)?, *dtype))
        }
        Expr::Tiles(_) | Expr::Codes(_) | Expr::Scales { .. } => {
            Err(Diagnostic::error("E0502", "a quantized value where numbers are wanted"))
        }
    }
}

/// The result of an f32 operation: a NaN is the one that GPUs give, whatever went in.
fn one_nan(x: f32) -> f32 {
    if x.is_nan() { f32::from_bits(GPU_NAN_BITS) } else { x }
}

/// Rounds to the type and back.
fn rounded(x: Vec<f32>, dtype: DType) -> Vec<f32> {
    match dtype {
        DType::F32 => x,
        _ => Bits::from_f32(&x, dtype).to_f32(dtype),
    }
}

fn dequantized(rows: &dyn Rows, tiles: &Tiles, len: &[u64]) -> Fallible<Vec<f32>> {
    let mut codes = vec![0u8; count(len)];
    let Coarse { scales, grid, .. } = coarse_tiles(rows, tiles, len, &mut codes)?;
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

/// Codes of a box and its scales on the grid of `refined`. False if an input is not finite.
fn tiles_into(
    rows: &dyn Rows,
    tiles: &Tiles,
    len: &[u64],
    codes: &mut [u8],
    scales: &mut [f32],
) -> Fallible<bool> {
    if let TilesFrom::Made(made) = &tiles.from
        && made.extent[..] == *len
        && tiles.refined == tiles.block()
    {
        return with_input(rows, made, |input, dtype| {
            quantize_all(made, input, dtype, codes, scales)
        });
    }
    let coarse = coarse_tiles(rows, tiles, len, codes)?;
    refine(&coarse.scales, &coarse.grid, tiles, len, scales);
    Ok(coarse.finite)
}

/// Scales of all tiles that a box touches, on the grid on which they are computed or stored.
struct Coarse {
    scales: Vec<f32>,
    grid: Dims,
    finite: bool,
}

/// Codes of a box, and its coarse scales.
fn coarse_tiles(
    rows: &dyn Rows,
    tiles: &Tiles,
    len: &[u64],
    codes: &mut [u8],
) -> Fallible<Coarse> {
    match &tiles.from {
        TilesFrom::Stored(stored) => {
            load(rows, &stored.codes, len, codes)?;
            let (scales, grid) = stored_scales(rows, tiles, stored, len)?;
            Ok(Coarse { scales, grid, finite: true })
        }
        TilesFrom::Made(made) => {
            let grid = tile_dims(&made.extent, tiles.block());
            let mut all_codes = vec![0u8; count(&made.extent)];
            let mut scales = vec![0f32; count(&grid)];
            let finite = with_input(rows, made, |input, dtype| {
                quantize_all(made, input, dtype, &mut all_codes, &mut scales)
            })?;
            let mut off: Dims = smallvec![0; len.len()];
            let m = len.len() - 2;
            (off[m], off[m + 1]) = (tiles.phase[0], tiles.phase[1]);
            gather(&all_codes, &made.extent, &off, len, codes);
            Ok(Coarse { scales, grid, finite })
        }
    }
}

thread_local! {
    /// Kept between chunks: clearing it for each would cost as much as quantizing what it holds.
    static INPUT: Cell<Vec<u16>> = const { Cell::new(Vec::new()) };
}

/// Reads what a recipe quantizes, and hands it to `f` with its type.
fn with_input<T>(
    rows: &dyn Rows,
    made: &Made,
    f: impl FnOnce(&Bits, DType) -> T,
) -> Fallible<T> {
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
    values(rows, &made.input, &made.extent, dtype, input.bytes_mut())?;
    let done = f(&input, dtype);
    if let Bits::B16(kept) = input {
        INPUT.set(kept);
    }
    Ok(done)
}

/// The stored scales of the tiles that a box touches, and their grid.
fn stored_scales(
    rows: &dyn Rows,
    tiles: &Tiles,
    stored: &Stored,
    len: &[u64],
) -> Fallible<(Vec<f32>, Dims)> {
    let grid = touched(tiles, len);
    let view = &stored.scales.view;
    let mut bits = Bits::zeros(view.dtype, count(&grid));
    load(rows, view, &grid, bits.bytes_mut())?;
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

/// Reads a strided box in the order in which it lies in storage, then puts it in its own order.
fn load(rows: &dyn Rows, view: &View, len: &[u64], out: &mut [u8]) -> Fallible<()> {
    if len.contains(&0) {
        return Ok(());
    }
    let mut order: Vec<usize> = (0..len.len()).filter(|d| len[*d] > 1).collect();
    order.sort_by_key(|d| std::cmp::Reverse(view.strides[*d]));
    if order.is_sorted() {
        return load_ordered(rows, view, len, &order, out);
    }
    let mut bytes = vec![0u8; out.len()];
    load_ordered(rows, view, len, &order, &mut bytes)?;
    transpose(&bytes, len, &order, view.dtype.size() as usize, out);
    Ok(())
}

/// Reads a box whose dimensions of more than one index are `order`, outermost first.
fn load_ordered(
    rows: &dyn Rows,
    view: &View,
    len: &[u64],
    order: &[usize],
    out: &mut [u8],
) -> Fallible<()> {
    let size = view.dtype.size();
    // Dimensions that lie back to back are one: (length, stride) from the inside out.
    let mut dims: Vec<(u64, u64)> = vec![(1, 1)];
    for d in order.iter().rev() {
        let (n, stride) = (len[*d], view.strides[*d]);
        let last = dims.len() - 1;
        if stride == dims[last].0 * dims[last].1 {
            dims[last].0 *= n;
        } else {
            dims.push((n, stride));
        }
    }
    let row_bytes = dims[0].0 * size;
    let (count, stride) = dims.get(1).map_or((1, 0), |d| (d.0, d.1 * size));
    let outer = dims.get(2..).unwrap_or(&[]);
    let block = (row_bytes * count) as usize;
    for (i, part) in out.chunks_exact_mut(block).enumerate() {
        let mut left = i as u64;
        let mut start = view.start;
        for (n, stride) in outer {
            start += left % n * stride;
            left /= n;
        }
        let strided = Strided { offset: start * size, row_bytes, stride, rows: count };
        rows.read(view.storage, strided, part)?;
    }
    Ok(())
}
