//! Jobs that quantize: a tile each, fast where it lies well and correct where it does not.

use smallvec::{SmallVec, smallvec};

use crate::diag::Diagnostic;
use crate::dtype::DType;
use crate::fp8::{Recipe, ScaleFormat};
use crate::ir::Dims;
use crate::shard::{Made, TilesFrom, Window};

use super::Fallible;
use super::jobs::{self, Evaluation, Job};
use super::parts::{Agreed, Lowering, depth_of};
use super::place::Plane;
use super::segments::{Part, Read};

/// A window of a recipe's result, less the phase, and where it goes.
pub(super) struct TileWork<'a> {
    pub made: &'a Made,
    pub phase: [u64; 2],
    pub window: Window,
    /// By the window's own indices.
    pub codes: Option<Plane>,
    pub scales: Option<ScalesTo>,
}

/// Where scales go: entry `i` is that of tile `(i × fine + phase) / block`.
pub(super) struct ScalesTo {
    pub plane: Plane,
    pub entries: Window,
    pub fine: u64,
    pub phase: [u64; 2],
    pub format: ScaleFormat,
}

/// Recipes that follow one another on one grid.
struct Chain<'a> {
    /// The first one, whose input is read.
    first: &'a Made,
    recipes: Vec<Recipe>,
    between: Vec<DType>,
}

/// Rows and columns of a rectangle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rect {
    lo: [u64; 2],
    len: [u64; 2],
}

impl Rect {
    fn intersect(&self, other: &Rect) -> Option<Rect> {
        let mut out = *self;
        for k in 0..2 {
            let lo = self.lo[k].max(other.lo[k]);
            let hi = (self.lo[k] + self.len[k]).min(other.lo[k] + other.len[k]);
            out.len[k] = hi.checked_sub(lo).filter(|n| *n > 0)?;
            out.lo[k] = lo;
        }
        Some(out)
    }

    fn of(window: &Window) -> Rect {
        let m = window.lo.len() - 2;
        Rect { lo: [window.lo[m], window.lo[m + 1]], len: [window.len[m], window.len[m + 1]] }
    }

    fn count(&self) -> u64 {
        self.len[0] * self.len[1]
    }
}

/// One tile of one matrix.
struct Tile<'a> {
    chain: &'a Chain<'a>,
    work: &'a TileWork<'a>,
    /// Indices of the leading dimensions, then the tile's.
    index: Dims,
    /// In the coordinates of the recipe's extent: what is evaluated, and what of it is stored.
    seen: Rect,
    stored: Rect,
    agreed: Option<u64>,
}

impl Lowering<'_> {
    /// Adds the jobs of all tiles that a window touches.
    pub(super) fn tiles(&mut self, work: &TileWork<'_>) -> Fallible<()> {
        let chain = chain(work.made)?;
        let made = chain.first;
        let (block, m) = (u64::from(made.recipe.block), work.window.lo.len() - 2);
        let mut inside = work.window.clone();
        for k in 0..2 {
            inside.lo[m + k] += work.phase[k];
        }
        let mut tiles = inside.clone();
        for d in m..m + 2 {
            tiles.lo[d] = inside.lo[d] / block;
            tiles.len[d] = (inside.lo[d] + inside.len[d]).div_ceil(block) - tiles.lo[d];
        }
        let parts = self.input(made, &made.elements_of(&tiles))?;
        let stored = Rect::of(&inside);
        let level = depth_of(work.made);
        for lead in leads(&inside) {
            let own: Vec<&Part> = parts.iter().filter(|p| holds(&p.window, &lead)).collect();
            for row in tiles.lo[m]..tiles.lo[m] + tiles.len[m] {
                for col in tiles.lo[m + 1]..tiles.lo[m + 1] + tiles.len[m + 1] {
                    let mut index = lead.clone();
                    index.extend([row, col]);
                    let size = |k: usize, i: u64| {
                        ((i + 1) * block).min(made.extent[m + k]) - i * block
                    };
                    let whole = Rect {
                        lo: [row * block, col * block],
                        len: [size(0, row), size(1, col)],
                    };
                    let Some(stored) = whole.intersect(&stored) else { continue };
                    let agreed = self.agreed.iter().find_map(|a| a.address_of(&index));
                    let seen = if agreed.is_some() { stored } else { whole };
                    let tile = Tile { chain: &chain, work, index, seen, stored, agreed };
                    self.tile(level, &tile, &own)?;
                }
            }
        }
        Ok(())
    }

    /// Adds jobs that raise a rank's own maxima of a box of tiles by some windows of them.
    ///
    /// # Errors
    /// As [`Lowering::part`].
    pub fn maxima(
        &mut self,
        id: u32,
        made: &Made,
        tiles: &Agreed,
        windows: &[Window],
    ) -> Fallible<()> {
        self.unit = id;
        self.agreed.clear();
        let (block, level) = (u64::from(made.recipe.block), depth_of(made));
        for window in windows {
            let m = window.lo.len() - 2;
            let parts = self.input(made, window)?;
            let inside = Rect::of(window);
            for lead in leads(window) {
                let own: Vec<&Part> =
                    parts.iter().filter(|p| holds(&p.window, &lead)).collect();
                let last = |k: usize| (inside.lo[k] + inside.len[k]).div_ceil(block);
                for row in inside.lo[0] / block..last(0) {
                    for col in inside.lo[1] / block..last(1) {
                        let mut index = lead.clone();
                        index.extend([row, col]);
                        let one = Rect { lo: [row * block, col * block], len: [block, block] };
                        let (Some(seen), Some(amax)) =
                            (one.intersect(&inside), tiles.address_of(&index))
                        else {
                            return Err(lost());
                        };
                        let (unit, mode) = (self.unit, jobs::AMAX);
                        let b = Evaluation { amax, unit, mode, ..seen_evaluation(&seen) };
                        self.push(level, b, &seen, &index[..m], &own)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Parts of what a recipe quantizes, in the coordinates of its extent.
    fn input(&mut self, made: &Made, region: &Window) -> Fallible<Vec<Part>> {
        let mut parts = Vec::new();
        for piece in &made.input {
            let Some(mut common) = piece.at.intersect(region) else { continue };
            for (lo, by) in common.lo.iter_mut().zip(&piece.at.lo) {
                *lo -= by;
            }
            for mut part in self.segments(&piece.expr, &common, true)? {
                for (lo, by) in part.window.lo.iter_mut().zip(&piece.at.lo) {
                    *lo += by;
                }
                parts.push(part);
            }
        }
        Ok(parts)
    }

    fn tile(&mut self, level: usize, tile: &Tile<'_>, parts: &[&Part]) -> Fallible<()> {
        let meets = |p: &&&Part| Rect::of(&p.window).intersect(&tile.seen).is_some();
        let parts: SmallVec<[&Part; 4]> = parts.iter().filter(meets).copied().collect();
        let parts = &parts[..];
        if let Some(job) = self.fast(tile, parts) {
            self.level(level).quantizations.push(job);
            return Ok(());
        }
        let (unit, chain) = (self.unit, tile.chain);
        let mut b = Evaluation { unit, mode: jobs::TILES, ..seen_evaluation(&tile.seen) };
        b.amax = tile.agreed.unwrap_or(0);
        b.step_count = chain.recipes.len() as u8;
        for (i, recipe) in chain.recipes.iter().enumerate() {
            b.recipe[i] = jobs::recipe_number(recipe.kind);
        }
        for (i, dtype) in chain.between.iter().enumerate() {
            b.between[i] = jobs::number(*dtype);
        }
        if let Some(codes) = &tile.work.codes {
            tile.store_codes(codes, &mut b);
        }
        if let Some(scales) = &tile.work.scales {
            tile.store_scales(scales, u64::from(chain.first.recipe.block), &mut b);
        }
        if tile.work.codes.is_none() && b.scale_rows == 0 {
            return Ok(());
        }
        let m = tile.index.len() - 2;
        if tile.work.codes.is_none() && tile.agreed.is_some() {
            // The scale of an agreed maximum needs no element.
            (b.rows, b.cols) = (0, 0);
            let table = self.level(level);
            let first = table.segments.len();
            table.push_evaluation(b, first);
            return Ok(());
        }
        self.push(level, b, &tile.seen, &tile.index[..m], parts)
    }

    /// A tile that is quantized from registers: bf16 rows, evenly aligned, one scale.
    fn fast(&self, tile: &Tile<'_>, parts: &[&Part]) -> Option<Job> {
        let (work, chain) = (tile.work, tile.chain);
        let ([part], [recipe]) = (parts, &chain.recipes[..]) else { return None };
        let (codes, scales) = (work.codes.as_ref()?, work.scales.as_ref()?);
        let read = part.copied().filter(|r| r.dtype == DType::Bf16)?;
        let m = tile.index.len() - 2;
        let plain = tile.agreed.is_none() && tile.seen == tile.stored;
        let one_scale = scales.fine == u64::from(recipe.block) && scales.phase == [0, 0];
        if !plain || !one_scale || !holds(&scales.entries, &tile.index) {
            return None;
        }
        if Rect::of(&part.window).intersect(&tile.seen) != Some(tile.seen) {
            return None;
        }
        let from = read.moved(&off(&part.window, &tile.index[..m], &tile.seen));
        let dst = codes.at(&tile.first());
        let [rows, cols] = tile.seen.len;
        let (src_row, dst_row) = (from.strides[m], codes.strides[m]);
        let full = rows == jobs::TILE && cols == jobs::TILE;
        let store = if full { 16 } else { 8 };
        let even = |at: i64, to: i64| rows == 1 || at % to == 0;
        let fits = from.strides[m + 1] == 2
            && codes.strides[m + 1] == 1
            && cols % 8 == 0
            && from.address.is_multiple_of(16)
            && even(src_row, 16)
            && dst.is_multiple_of(store)
            && even(dst_row, store as i64);
        if !fits {
            return None;
        }
        Some(Job {
            src: from.address,
            dst,
            aux: scales.plane.at(&tile.index),
            src_row: u32::try_from(src_row).ok()?,
            dst_row: u32::try_from(dst_row).ok()?,
            unit: self.unit,
            rows: rows as u16,
            cols: cols as u16,
            kind: jobs::QUANTIZE,
            dtype: jobs::number(DType::Bf16),
            recipe: jobs::recipe_number(recipe.kind),
            scales: jobs::scales_number(scales.format),
            pad: 0,
        })
    }

    /// Adds a box and the segments that fill it.
    fn push(
        &mut self,
        level: usize,
        b: Evaluation,
        seen: &Rect,
        lead: &[u64],
        parts: &[&Part],
    ) -> Fallible<()> {
        let table = self.level(level);
        let first = table.segments.len();
        let mut covered = 0;
        for part in parts {
            let Some(common) = Rect::of(&part.window).intersect(seen) else { continue };
            covered += common.count();
            let by = off(&part.window, lead, &common);
            let reads: Vec<Read> = part.reads.iter().map(|r| r.moved(&by)).collect();
            let at = [common.lo[0] - seen.lo[0], common.lo[1] - seen.lo[1]];
            table.push_segment(part, &reads, at, common.len);
        }
        if covered != seen.count() {
            return Err(lost());
        }
        table.push_evaluation(b, first);
        Ok(())
    }
}

impl Tile<'_> {
    /// Index of the first stored element by the work's own indices.
    fn first(&self) -> Dims {
        let m = self.index.len() - 2;
        let mut at: Dims = self.index[..m].into();
        at.extend((0..2).map(|k| self.stored.lo[k] - self.work.phase[k]));
        at
    }

    fn store_codes(&self, codes: &Plane, b: &mut Evaluation) {
        let m = self.index.len() - 2;
        b.dst = codes.at(&self.first());
        (b.dst_row, b.dst_col) = (codes.strides[m], codes.strides[m + 1]);
        (b.store_row, b.store_col) = (
            (self.stored.lo[0] - self.seen.lo[0]) as u16,
            (self.stored.lo[1] - self.seen.lo[1]) as u16,
        );
        (b.store_rows, b.store_cols) = (self.stored.len[0] as u16, self.stored.len[1] as u16);
    }

    /// The entries of a finer grid that are this tile's.
    fn store_scales(&self, to: &ScalesTo, block: u64, b: &mut Evaluation) {
        let m = self.index.len() - 2;
        let mut first: Dims = self.index[..m].into();
        let mut count = [0; 2];
        for (k, count) in count.iter_mut().enumerate() {
            let edge = |tile: u64| (tile * block).saturating_sub(to.phase[k]).div_ceil(to.fine);
            let (d, tile) = (m + k, self.index[m + k]);
            let lo = edge(tile).max(to.entries.lo[d]);
            let hi = edge(tile + 1).min(to.entries.lo[d] + to.entries.len[d]);
            *count = hi.saturating_sub(lo);
            first.push(lo);
        }
        if count.contains(&0) {
            return;
        }
        b.scale = to.plane.at(&first);
        (b.scale_row, b.scale_col) = (to.plane.strides[m], to.plane.strides[m + 1]);
        (b.scale_rows, b.scale_cols) = (count[0] as u16, count[1] as u16);
        b.scales = jobs::scales_number(to.format);
    }
}

impl Agreed {
    /// Where the maximum of a tile lies; none if it is not of this box.
    fn address_of(&self, tile: &[u64]) -> Option<u64> {
        let mut at = 0;
        for (d, i) in tile.iter().enumerate() {
            let off = i.checked_sub(self.tiles.lo[d]).filter(|o| *o < self.tiles.len[d])?;
            at = at * self.tiles.len[d] + off;
        }
        Some(self.address + 4 * at)
    }
}

fn chain(made: &Made) -> Fallible<Chain<'_>> {
    let mut out = Chain { first: made, recipes: vec![made.recipe], between: Vec::new() };
    while let Some((inner, dtype)) = out.first.same_grid() {
        let TilesFrom::Made(first) = &inner.from else { return Err(lost()) };
        out.first = first;
        out.recipes.insert(0, first.recipe);
        out.between.insert(0, dtype);
    }
    if out.recipes.len() > jobs::STEPS {
        return Err(Diagnostic::error("E0501", "too many quantizations follow one another")
            .note(format!("at most {} on one grid", jobs::STEPS)));
    }
    Ok(out)
}

fn seen_evaluation(seen: &Rect) -> Evaluation {
    Evaluation { rows: seen.len[0] as u16, cols: seen.len[1] as u16, ..Evaluation::default() }
}

fn lost() -> Diagnostic {
    Diagnostic::error("E0502", "a tile has elements that its rank does not hold")
}

/// Every index of the dimensions before the matrix.
fn leads(window: &Window) -> Vec<Dims> {
    let m = window.lo.len() - 2;
    let mut out: Vec<Dims> = vec![smallvec![]];
    for d in 0..m {
        let range = window.lo[d]..window.lo[d] + window.len[d];
        out = out
            .iter()
            .flat_map(|lead| {
                range.clone().map(move |i| {
                    let mut next = lead.clone();
                    next.push(i);
                    next
                })
            })
            .collect();
    }
    out
}

/// True if a window has elements of a matrix.
fn holds(window: &Window, lead: &[u64]) -> bool {
    lead.iter()
        .enumerate()
        .all(|(d, i)| (window.lo[d]..window.lo[d] + window.len[d]).contains(i))
}

/// From a window's first element to the first of a rectangle in one of its matrices.
fn off(window: &Window, lead: &[u64], to: &Rect) -> Dims {
    let m = lead.len();
    let mut by: Dims = lead.iter().zip(&window.lo).map(|(i, lo)| i - lo).collect();
    by.extend((0..2).map(|k| to.lo[k] - window.lo[m + k]));
    by
}
