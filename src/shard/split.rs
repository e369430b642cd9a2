//! Which trainer ranks can make which part of a box: cuts it where its sources are cut.

use std::sync::Arc;

use smallvec::SmallVec;

use crate::ir::Dims;
use crate::topo::Layout;

use super::boxes::{Window, row_major};
use super::piece::{Expr, Made, ScaleView, Storage, Stored, Tiles, TilesFrom, View};

/// A part of a box and the ranks that hold all that it is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    pub window: Window,
    /// None for a part made of constants alone: any rank can make it.
    pub holders: Option<Arc<[u32]>>,
}

/// A part whose operands lie on different ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Apart(pub Window);

type Shares = Result<Vec<Share>, Apart>;

/// Where each source's elements are, by storage number.
pub struct Layouts<'a> {
    pub of: &'a dyn Fn(u32) -> &'a Layout,
}

impl Layouts<'_> {
    /// Cuts a window of an expression's box into parts that each have the same holders. For
    /// quantized values a part need not hold whole tiles.
    ///
    /// # Errors
    /// A part for which no rank holds all operands.
    pub fn shares(&self, expr: &Expr, window: &Window) -> Shares {
        match expr {
            Expr::Load(view) => Ok(self.view(view, window)),
            Expr::Fill { .. } => Ok(vec![Share { window: window.clone(), holders: None }]),
            Expr::Cast { value, .. } | Expr::Scale { value, .. } => self.shares(value, window),
            Expr::Add { left, right } => {
                both(self.shares(left, window)?, |part| self.shares(right, part))
            }
            Expr::Codes(tiles) => match &tiles.from {
                TilesFrom::Stored(stored) => Ok(self.view(&stored.codes, window)),
                TilesFrom::Made(_) => self.tiles(tiles, window),
            },
            Expr::Tiles(tiles) | Expr::Dequantize { tiles, .. } => self.tiles(tiles, window),
            Expr::Scales { tiles, of, .. } => {
                if let TilesFrom::Stored(stored) = &tiles.from {
                    return Ok(self.stored_scales(tiles, &stored.scales, window));
                }
                let under = elements_under(window, tiles.refined, of);
                let shares = self.tiles(tiles, &under)?;
                Ok(shares
                    .into_iter()
                    .filter_map(|s| first_elements(s, tiles.refined))
                    .collect())
            }
        }
    }

    /// Shares of a window of what a recipe quantizes, in the coordinates of its extent.
    pub fn input_shares(&self, made: &Made, window: &Window) -> Shares {
        let mut out = Vec::new();
        for piece in &made.input {
            let Some(common) = piece.at.intersect(window) else { continue };
            let inside = moved(&common, |d| -(piece.at.lo[d] as i64));
            for share in self.shares(&piece.expr, &inside).map_err(|a| back(a, &piece.at.lo))? {
                let window = moved(&share.window, |d| piece.at.lo[d] as i64);
                out.push(Share { window, ..share });
            }
        }
        Ok(out)
    }

    fn tiles(&self, tiles: &Tiles, window: &Window) -> Shares {
        match &tiles.from {
            TilesFrom::Stored(stored) => self.stored(tiles, stored, window),
            TilesFrom::Made(made) => {
                let phase = phases(window.lo.len(), tiles.phase);
                let inside = moved(window, |d| phase[d] as i64);
                let shares = self.input_shares(made, &inside);
                let shares =
                    shares.map_err(|Apart(w)| Apart(moved(&w, |d| -(phase[d] as i64))))?;
                let back =
                    |s: Share| Share { window: moved(&s.window, |d| -(phase[d] as i64)), ..s };
                Ok(shares.into_iter().map(back).collect())
            }
        }
    }

    /// Scales alone, an entry for each refined tile of a window.
    fn stored_scales(&self, tiles: &Tiles, scales: &ScaleView, window: &Window) -> Vec<Share> {
        let (fine, block) = (tiles.refined, scales.block);
        let phase = phases(window.lo.len(), tiles.phase);
        let m = window.lo.len() - 2;
        let coarse = |d: usize, at: u64| (at * fine + phase[d]) / block;
        let mut touched = window.clone();
        for d in m..window.lo.len() {
            touched.lo[d] = coarse(d, window.lo[d]);
            touched.len[d] = coarse(d, window.lo[d] + window.len[d] - 1) + 1 - touched.lo[d];
        }
        let entries = |s: Share| {
            let mut own = s.window.clone();
            for d in m..window.lo.len() {
                let first = |tile: u64| (tile * block).saturating_sub(phase[d]).div_ceil(fine);
                own.lo[d] = first(s.window.lo[d]);
                own.len[d] = first(s.window.lo[d] + s.window.len[d]) - own.lo[d];
            }
            Some(Share { window: own.intersect(window)?, ..s })
        };
        self.view(&scales.view, &touched).into_iter().filter_map(entries).collect()
    }

    /// Codes, and with each of them the scale of its tile.
    fn stored(&self, tiles: &Tiles, stored: &Stored, window: &Window) -> Shares {
        let ScaleView { view, block } = &stored.scales;
        let phase = phases(window.lo.len(), tiles.phase);
        both(self.view(&stored.codes, window), |part| {
            let m = part.lo.len() - 2;
            let mut touched = part.clone();
            for d in m..part.lo.len() {
                touched.lo[d] = (part.lo[d] + phase[d]) / block;
                touched.len[d] =
                    (part.lo[d] + part.len[d] + phase[d]).div_ceil(*block) - touched.lo[d];
            }
            let over = |s: Share| {
                let mut elements = s.window.clone();
                for d in m..part.lo.len() {
                    elements.lo[d] = (s.window.lo[d] * block).saturating_sub(phase[d]);
                    let end = (s.window.lo[d] + s.window.len[d]) * block - phase[d];
                    elements.len[d] = end - elements.lo[d];
                }
                let window = elements.intersect(part)?;
                Some(Share { window, ..s })
            };
            Ok(self.view(view, &touched).into_iter().filter_map(over).collect())
        })
    }

    fn view(&self, view: &View, window: &Window) -> Vec<Share> {
        let Storage::Source(id) = view.storage else {
            return vec![Share { window: window.clone(), holders: None }];
        };
        let layout = (self.of)(id);
        let holders = |cell: &[usize]| Some(Arc::clone(layout.holders(cell)));
        if layout.cuts.iter().all(|c| c.len() <= 2) {
            let cell: SmallVec<[usize; 4]> = layout.cuts.iter().map(|_| 0).collect();
            return vec![Share { window: window.clone(), holders: holders(&cell) }];
        }
        let shape: Dims = layout.cuts.iter().map(|c| c.last().copied().unwrap_or(0)).collect();
        let parts = cut_by_grid(view, window, &layout.cuts, &shape);
        let strides = row_major(&shape);
        let share = |window: Window| {
            let first = first_element(view, &window);
            let cell: SmallVec<[usize; 4]> = (0..shape.len())
                .map(|k| {
                    let at = first / strides[k] % shape[k];
                    layout.cuts[k].partition_point(|c| *c <= at) - 1
                })
                .collect();
            Share { holders: holders(&cell), window }
        };
        parts.into_iter().map(share).collect()
    }
}

/// Cuts the parts of one operand by those of another; the holders of a part hold both.
fn both(left: Vec<Share>, mut right: impl FnMut(&Window) -> Shares) -> Shares {
    let mut out = Vec::with_capacity(left.len());
    for l in left {
        for r in right(&l.window)? {
            let holders = match (&l.holders, &r.holders) {
                (Some(a), Some(b)) if Arc::ptr_eq(a, b) || a == b => Some(Arc::clone(a)),
                (Some(a), Some(b)) => {
                    let common: Vec<u32> =
                        a.iter().copied().filter(|t| b.binary_search(t).is_ok()).collect();
                    if common.is_empty() {
                        return Err(Apart(r.window));
                    }
                    Some(common.into())
                }
                (a, b) => a.as_ref().or(b.as_ref()).map(Arc::clone),
            };
            out.push(Share { window: r.window, holders });
        }
    }
    Ok(out)
}

fn back(Apart(window): Apart, by: &[u64]) -> Apart {
    Apart(moved(&window, |d| by[d] as i64))
}

fn moved(window: &Window, by: impl Fn(usize) -> i64) -> Window {
    let lo = window.lo.iter().enumerate();
    Window {
        lo: lo.map(|(d, x)| x.wrapping_add_signed(by(d))).collect(),
        len: window.len.clone(),
    }
}

/// Where a box begins inside its first tile, by dimension.
fn phases(dims: usize, phase: [u64; 2]) -> Dims {
    let mut out: Dims = SmallVec::from_elem(0, dims);
    (out[dims - 2], out[dims - 1]) = (phase[0], phase[1]);
    out
}

/// The elements of a window of tiles.
fn elements_under(window: &Window, tile: u64, of: &[u64]) -> Window {
    let mut under = window.clone();
    for (d, size) in of.iter().enumerate().skip(of.len() - 2) {
        under.lo[d] = window.lo[d] * tile;
        under.len[d] = (window.len[d] * tile).min(size - under.lo[d]);
    }
    under
}

/// The tiles whose first element lies in a share of elements; none if there is no such tile.
fn first_elements(share: Share, tile: u64) -> Option<Share> {
    let mut window = share.window;
    for d in window.lo.len() - 2..window.lo.len() {
        let end = (window.lo[d] + window.len[d]).div_ceil(tile);
        window.lo[d] = window.lo[d].div_ceil(tile);
        window.len[d] = end.checked_sub(window.lo[d]).filter(|n| *n > 0)?;
    }
    Some(Share { window, holders: share.holders })
}

fn first_element(view: &View, window: &Window) -> u64 {
    view.start + window.lo.iter().zip(&view.strides).map(|(i, s)| i * s).sum::<u64>()
}

/// Cuts a window of a view so that each part lies in one cell of a grid over the source.
fn cut_by_grid(view: &View, window: &Window, cuts: &[Vec<u64>], shape: &[u64]) -> Vec<Window> {
    let strides = row_major(shape);
    let mut parts = vec![window.clone()];
    for (k, cuts) in cuts.iter().enumerate().filter(|(_, c)| c.len() > 2) {
        let (stride, period) = (strides[k], strides[k] * shape[k]);
        let moves = |d: usize| !view.strides[d].is_multiple_of(period);
        let mut next = Vec::new();
        for part in parts {
            let from = first_element(view, &part) % period;
            let reach: u64 = (0..part.len.len())
                .filter(|d| moves(*d))
                .map(|d| (part.len[d] - 1) * view.strides[d])
                .sum();
            // A box that runs over the end of this dimension comes to its cuts again.
            let limits: Vec<u64> = (0..=(from + reach) / period)
                .flat_map(|j| cuts[1..].iter().map(move |c| j * period + c * stride))
                .collect();
            cut_at(part, from, &view.strides, &moves, &limits, &mut next);
        }
        parts = next;
    }
    parts
}

/// Cuts a box so that no limit lies between the positions of a part's elements. The position of
/// element `i` is `from` + the sum of `i[d] × strides[d]` over the dimensions that move it.
fn cut_at(
    mut part: Window,
    mut from: u64,
    strides: &[u64],
    moves: &impl Fn(usize) -> bool,
    mut limits: &[u64],
    out: &mut Vec<Window>,
) {
    loop {
        let reach = |d: usize| if moves(d) { (part.len[d] - 1) * strides[d] } else { 0 };
        let all: u64 = (0..part.len.len()).map(reach).sum();
        limits = &limits[limits.partition_point(|t| *t <= from)..];
        let Some(limit) = limits.first().filter(|t| **t <= from + all) else {
            return out.push(part);
        };
        let widest = (0..part.len.len()).filter(|d| moves(*d) && part.len[*d] > 1);
        let Some(d) = widest.max_by_key(|d| strides[*d]) else { return out.push(part) };
        let (stride, count, rest) = (strides[d], part.len[d], all - reach(d));
        let piece = |lo: u64, len: u64| {
            let mut sub = part.clone();
            (sub.lo[d], sub.len[d]) = (part.lo[d] + lo, len);
            sub
        };
        // Indices wholly below the limit, those that straddle it one by one, and the rest.
        let below = limit.saturating_sub(from + rest).div_ceil(stride).min(count);
        let above = (limit - from).div_ceil(stride).min(count);
        if below > 0 {
            out.push(piece(0, below));
        }
        for i in below..above {
            cut_at(piece(i, 1), from + i * stride, strides, moves, limits, out);
        }
        if above == count {
            return;
        }
        // As many turns as there are cuts: too many to be calls in one another.
        part = piece(above, count - above);
        from += above * stride;
    }
}
