//! Makes parts of tiles whose other parts lie on other trainer ranks: with maxima agreed before.

use crate::diag::Diagnostic;
use crate::dtype::DType;
use crate::fp8::tile::{self, dequantize};
use crate::fp8::{Recipe, ScaleFormat};
use crate::ir::Dims;
use crate::lower::Unit;
use crate::shard::{Expr, Made, Tiles, TilesFrom, Window, crop_pieces, row_major};

use super::bits::Bits;
use super::eval::{self, Fallible, Inputs, count, one_nan, rounded};

/// Agreed maxima of a box of tiles, as f32 bits in row-major order.
#[derive(Clone, Debug)]
pub(super) struct Agreed {
    pub tiles: Window,
    pub amax: Vec<u32>,
}

impl Agreed {
    fn get(&self, tile: &[u64]) -> Option<u32> {
        let mut at = 0;
        for (d, i) in tile.iter().enumerate() {
            let off = i.checked_sub(self.tiles.lo[d]).filter(|o| *o < self.tiles.len[d])?;
            at = at * self.tiles.len[d] + off;
        }
        self.amax.get(at as usize).copied()
    }
}

/// Evaluates windows of one unit's expression.
pub(super) struct Partial<'a> {
    pub inputs: &'a Inputs<'a>,
    pub agreed: Vec<&'a Agreed>,
}

/// Codes of a window, and the scales of all tiles that it touches.
struct TileBox {
    codes: Vec<u8>,
    scales: Vec<f32>,
    /// The first tile that is touched, and how many are.
    first: Dims,
    grid: Dims,
}

impl TileBox {
    fn scale(&self, tile: &[u64]) -> f32 {
        let at = (0..tile.len()).fold(0, |at, d| at * self.grid[d] + tile[d] - self.first[d]);
        self.scales[at as usize]
    }
}

impl Partial<'_> {
    /// Makes a window of the unit: values (or codes), and the scales that come with it.
    pub(super) fn window(
        &self,
        unit: &Unit,
        window: &Window,
        values: &mut [u8],
        scales: &mut [u8],
    ) -> Fallible<()> {
        match (unit.quant, unit.scales_of(window), &unit.expr) {
            (Some(q), Some(grid), Expr::Tiles(tiles)) => {
                self.quantized(tiles, window, &grid, q.scales, values, scales)
            }
            _ => self.values(&unit.expr, window, values),
        }
    }

    /// Codes and scales of a window: `grid` is the box of scales that comes with it.
    fn quantized(
        &self,
        tiles: &Tiles,
        window: &Window,
        grid: &Window,
        format: ScaleFormat,
        codes: &mut [u8],
        scales: &mut [u8],
    ) -> Fallible<()> {
        let made = self.tiles(tiles, window)?;
        codes.copy_from_slice(&made.codes);
        let found: Vec<f32> = indices(grid).map(|at| made.scale(&coarse(tiles, &at))).collect();
        eval::store_scales(&found, format, scales);
        Ok(())
    }

    /// Values of a window of a plain unit.
    fn values(&self, e: &Expr, window: &Window, out: &mut [u8]) -> Fallible<()> {
        match e {
            Expr::Codes(tiles) => {
                out.copy_from_slice(&self.tiles(tiles, window)?.codes);
                Ok(())
            }
            Expr::Scales { dtype, tiles, .. } => match &tiles.from {
                TilesFrom::Made(made) => {
                    let scale = |at: Dims| {
                        let bits = self.amax_of(made, &coarse(tiles, &at))?;
                        Ok(made.recipe.scale_of(bits))
                    };
                    let scales: Fallible<Vec<f32>> = indices(window).map(scale).collect();
                    eval::store_scales(&scales?, ScaleFormat::of(*dtype), out);
                    Ok(())
                }
                TilesFrom::Stored(_) => self.cropped(e, window, out),
            },
            Expr::Load(_) | Expr::Fill { .. } | Expr::Tiles(_) => self.cropped(e, window, out),
            _ => {
                let numbers = self.numbers(e, window)?;
                self.inputs.note(numbers.iter().all(|x| x.is_finite()));
                out.copy_from_slice(Bits::from_f32(&numbers, e.dtype()).bytes());
                Ok(())
            }
        }
    }

    /// What needs no tile whole.
    fn cropped(&self, e: &Expr, window: &Window, out: &mut [u8]) -> Fallible<()> {
        eval::expr(self.inputs, &e.crop(&window.lo, &window.len), &window.len, out)
    }

    fn numbers(&self, e: &Expr, window: &Window) -> Fallible<Vec<f32>> {
        match e {
            Expr::Cast { dtype, value } => Ok(rounded(self.numbers(value, window)?, *dtype)),
            Expr::Scale { factor, value } => {
                let factor = f64::from_bits(*factor) as f32;
                let x = self.numbers(value, window)?.into_iter();
                Ok(rounded(x.map(|x| one_nan(x * factor)).collect(), e.dtype()))
            }
            Expr::Add { left, right } => {
                let (x, y) = (self.numbers(left, window)?, self.numbers(right, window)?);
                let sum = x.iter().zip(&y).map(|(x, y)| one_nan(x + y));
                Ok(rounded(sum.collect(), e.dtype()))
            }
            Expr::Dequantize { dtype, tiles } => self.dequantized(tiles, *dtype, window),
            _ => eval::numbers(self.inputs, &e.crop(&window.lo, &window.len), &window.len),
        }
    }

    fn dequantized(&self, tiles: &Tiles, dtype: DType, window: &Window) -> Fallible<Vec<f32>> {
        let made = self.tiles(tiles, window)?;
        let block = tiles.block();
        let product = |(code, at): (&u8, Dims)| {
            let tile = tile_at(&at, tiles.phase, block);
            one_nan(dequantize(*code, made.scale(&tile)))
        };
        Ok(rounded(made.codes.iter().zip(indices(window)).map(product).collect(), dtype))
    }

    fn tiles(&self, tiles: &Tiles, window: &Window) -> Fallible<TileBox> {
        let block = tiles.block();
        let first = tile_at(&window.lo, tiles.phase, block);
        match &tiles.from {
            TilesFrom::Stored(_) => {
                let mut codes = vec![0; count(&window.len)];
                let part = tiles.crop(&window.lo, &window.len);
                let found = eval::coarse_tiles(self.inputs, &part, &window.len, &mut codes)?;
                Ok(TileBox { codes, scales: found.scales, first, grid: found.grid })
            }
            TilesFrom::Made(made) => {
                let mut inside = window.clone();
                let m = inside.lo.len() - 2;
                (inside.lo[m], inside.lo[m + 1]) =
                    (window.lo[m] + tiles.phase[0], window.lo[m + 1] + tiles.phase[1]);
                self.made(made, &inside, first)
            }
        }
    }

    /// Quantizes a window of what a recipe works on.
    fn made(&self, made: &Made, window: &Window, first: Dims) -> Fallible<TileBox> {
        let dtype = made.input.first().map_or(DType::F32, |p| p.expr.dtype());
        let len = &window.len;
        let input = match made.same_grid() {
            Some((inner, dtype)) => {
                Bits::from_f32(&self.dequantized(inner, dtype, window)?, dtype)
            }
            None => {
                let mut bits = Bits::zeros(dtype, count(len));
                let pieces = crop_pieces(&made.input, window);
                eval::unwatched(self.inputs, || {
                    eval::values(self.inputs, &pieces, len, dtype, bits.bytes_mut())
                })?;
                bits
            }
        };
        let (m, block) = (len.len() - 2, u64::from(made.recipe.block));
        let mut grid: Dims = len.clone();
        for d in m..len.len() {
            grid[d] = (window.lo[d] + len[d]).div_ceil(block) - first[d];
        }
        let mut out = TileBox { codes: vec![0; count(len)], scales: Vec::new(), first, grid };
        let boxes = Window { lo: out.first.clone(), len: out.grid.clone() };
        for tile in indices(&boxes) {
            let part = tile_part(&tile, window, block);
            let local = amax(&input, dtype, len, &part);
            self.inputs.note(f32::from_bits(local).is_finite());
            let whole = (m..len.len()).all(|d| {
                let (lo, hi) = (tile[d] * block, ((tile[d] + 1) * block).min(made.extent[d]));
                window.lo[d] <= lo && hi <= window.lo[d] + len[d]
            });
            let bits = if whole { local } else { self.amax_of(made, &tile)? };
            let scale = made.recipe.scale_of(bits);
            encode(&made.recipe, scale, &input, dtype, len, &part, &mut out.codes);
            out.scales.push(scale);
        }
        Ok(out)
    }

    /// The maximum of what a recipe sees in a tile: agreed, or of a tile that is all here. A second
    /// step on the same grid sees what the first makes of it, for every step in between is
    /// monotone.
    fn amax_of(&self, made: &Made, tile: &[u64]) -> Fallible<u32> {
        let Some((inner, dtype)) = made.same_grid() else {
            if let Some(bits) = self.agreed.iter().find_map(|a| a.get(tile)) {
                return Ok(bits);
            }
            let one = Window { lo: tile.into(), len: tile.iter().map(|_| 1).collect() };
            let region = made.elements_of(&one);
            return Ok(maxima(self.inputs, made, &one, &[region])?[0]);
        };
        let TilesFrom::Made(first) = &inner.from else {
            return Err(Diagnostic::error("E0502", "a second step works on stored codes"));
        };
        let amax = f32::from_bits(self.amax_of(first, tile)?);
        let scale = first.recipe.scale_of(amax.to_bits());
        let mut code = [0];
        tile::encode_tile_f32(&first.recipe, scale, &[amax], 1, 1, 1, &mut code, 1);
        let value = rounded(vec![one_nan(dequantize(code[0], scale))], dtype)[0];
        Ok(value.to_bits() & 0x7fff_ffff)
    }
}

/// Maxima of the tiles of a box, over the elements of some windows of what a recipe works on.
pub(super) fn maxima(
    inputs: &Inputs<'_>,
    made: &Made,
    tiles: &Window,
    windows: &[Window],
) -> Fallible<Vec<u32>> {
    let dtype = made.input.first().map_or(DType::F32, |p| p.expr.dtype());
    let block = u64::from(made.recipe.block);
    let strides = row_major(&tiles.len);
    let mut out = vec![0; count(&tiles.len)];
    for window in windows {
        let mut bits = Bits::zeros(dtype, count(&window.len));
        let pieces = crop_pieces(&made.input, window);
        eval::values(inputs, &pieces, &window.len, dtype, bits.bytes_mut())?;
        let first = tile_at(&window.lo, [0, 0], block);
        let mut touched = Window { lo: first, len: window.len.clone() };
        for d in window.lo.len() - 2..window.lo.len() {
            touched.len[d] = (window.lo[d] + window.len[d]).div_ceil(block) - touched.lo[d];
        }
        for tile in indices(&touched) {
            let part = tile_part(&tile, window, block);
            let at: u64 = (0..tile.len()).map(|d| (tile[d] - tiles.lo[d]) * strides[d]).sum();
            let slot = &mut out[at as usize];
            *slot = (*slot).max(amax(&bits, dtype, &window.len, &part));
        }
    }
    Ok(out)
}

/// The part of a tile inside a window, with places relative to the window.
fn tile_part(tile: &[u64], window: &Window, block: u64) -> Window {
    let m = tile.len() - 2;
    let mut part = Window { lo: tile.into(), len: tile.iter().map(|_| 1).collect() };
    for (d, index) in tile.iter().enumerate() {
        let size = if d >= m { block } else { 1 };
        let lo = (index * size).max(window.lo[d]);
        let hi = ((index + 1) * size).min(window.lo[d] + window.len[d]);
        (part.lo[d], part.len[d]) = (lo - window.lo[d], hi - lo);
    }
    part
}

/// First element and row stride of a part of a row-major box, and its rows and columns.
fn placed(len: &[u64], part: &Window) -> (usize, usize, usize, usize) {
    let m = len.len() - 2;
    let start: u64 = part.lo.iter().zip(row_major(len)).map(|(i, s)| i * s).sum();
    (start as usize, len[m + 1] as usize, part.len[m] as usize, part.len[m + 1] as usize)
}

fn amax(input: &Bits, dtype: DType, len: &[u64], part: &Window) -> u32 {
    let (start, stride, rows, cols) = placed(len, part);
    match input {
        Bits::B16(v) if dtype == DType::F16 => {
            tile::amax_bits_f16(&v[start..], stride, rows, cols)
        }
        Bits::B16(v) => tile::amax_bits_bf16(&v[start..], stride, rows, cols),
        Bits::B32(v) => {
            tile::amax_bits_f32(bytemuck::cast_slice(&v[start..]), stride, rows, cols)
        }
        Bits::B8(_) => 0,
    }
}

fn encode(
    recipe: &Recipe,
    scale: f32,
    input: &Bits,
    dtype: DType,
    len: &[u64],
    part: &Window,
    codes: &mut [u8],
) {
    let (start, stride, rows, cols) = placed(len, part);
    let out = &mut codes[start..];
    match input {
        Bits::B16(v) if dtype == DType::F16 => {
            tile::encode_tile_f16(recipe, scale, &v[start..], stride, rows, cols, out, stride);
        }
        Bits::B16(v) => {
            tile::encode_tile_bf16(recipe, scale, &v[start..], stride, rows, cols, out, stride);
        }
        Bits::B32(v) => {
            let v = bytemuck::cast_slice(&v[start..]);
            tile::encode_tile_f32(recipe, scale, v, stride, rows, cols, out, stride);
        }
        Bits::B8(_) => {}
    }
}

/// The coarse tile of an entry of the refined grid.
fn coarse(tiles: &Tiles, at: &[u64]) -> Dims {
    let mut first: Dims = at.into();
    let m = at.len() - 2;
    for d in m..at.len() {
        first[d] = at[d] * tiles.refined;
    }
    tile_at(&first, tiles.phase, tiles.block())
}

/// The tile of an element.
fn tile_at(at: &[u64], phase: [u64; 2], block: u64) -> Dims {
    let m = at.len() - 2;
    let mut tile: Dims = at.into();
    for k in 0..2 {
        tile[m + k] = (at[m + k] + phase[k]) / block;
    }
    tile
}

/// Every index of a window in row-major order.
fn indices(window: &Window) -> impl Iterator<Item = Dims> + '_ {
    let all: u64 = window.len.iter().product();
    (0..all).map(move |mut n| {
        let mut at = window.lo.clone();
        for d in (0..at.len()).rev() {
            at[d] += n % window.len[d];
            n /= window.len[d];
        }
        at
    })
}
