//! A local tensor as pieces: a box of it, and the expression over strided boxes that fills it.

use smallvec::smallvec;

use crate::dtype::DType;
use crate::fp8::Recipe;
use crate::ir::Dims;

use super::boxes::Window;
use super::moves::{crop_pieces, permute_pieces, reshape_pieces};

/// Memory that a view points into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Storage {
    /// A trainer tensor, by index in the program's table of sources.
    Source(u32),
    /// The elements (or codes) of a target parameter that has landed, by index on the rank.
    Landed(u32),
    /// The scales of a target parameter that has landed.
    LandedScale(u32),
}

/// A strided box: element `i` of the piece lies at `start + Σ i[d] × strides[d]` elements.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct View {
    pub storage: Storage,
    pub dtype: DType,
    pub start: u64,
    pub strides: Dims,
}

/// The scales of a box of codes. The last two strides count a tile, the others an index.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ScaleView {
    pub view: View,
    /// Tile size of the stored scales.
    pub block: u64,
}

/// A quantized value over a box.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Tiles {
    pub from: TilesFrom,
    /// Tile size of the result's scales; at most the size on which the scales are computed.
    pub refined: u64,
    /// Row and column of the box's first element inside its first tile. Zero unless refined.
    pub phase: [u64; 2],
}

/// Where codes and scales come from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TilesFrom {
    Stored(Stored),
    Made(Made),
}

/// Codes and scales that exist already.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Stored {
    pub codes: View,
    pub scales: ScaleView,
}

/// Codes and scales that a recipe makes from `input`, which covers whole tiles of `extent`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Made {
    pub recipe: Recipe,
    pub extent: Dims,
    pub input: Vec<Piece>,
}

/// What fills a box. Every operand has the box's lengths.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Expr {
    Load(View),
    /// One value everywhere, as the bits of an f64.
    Fill {
        dtype: DType,
        bits: u64,
    },
    Cast {
        dtype: DType,
        value: Box<Expr>,
    },
    /// The factor as the bits of an f64; the product is made in f32.
    Scale {
        factor: u64,
        value: Box<Expr>,
    },
    Add {
        left: Box<Expr>,
        right: Box<Expr>,
    },
    Tiles(Box<Tiles>),
    Dequantize {
        dtype: DType,
        tiles: Box<Tiles>,
    },
    /// The codes alone.
    Codes(Box<Tiles>),
    /// The scales alone, a number for each tile of a quantized box of lengths `of`.
    Scales {
        dtype: DType,
        tiles: Box<Tiles>,
        of: Dims,
    },
}

/// A box of a local tensor (or of a window of it) and what fills it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Piece {
    pub at: Window,
    pub expr: Expr,
}

impl Expr {
    /// Element type of the result; e4m3 for a quantized value.
    pub fn dtype(&self) -> DType {
        match self {
            Expr::Load(view) => view.dtype,
            Expr::Fill { dtype, .. } | Expr::Cast { dtype, .. } => *dtype,
            Expr::Dequantize { dtype, .. } => *dtype,
            Expr::Scale { value, .. } => value.dtype(),
            Expr::Add { left, .. } => left.dtype(),
            Expr::Scales { dtype, .. } => *dtype,
            Expr::Tiles(_) | Expr::Codes(_) => DType::E4m3,
        }
    }

    /// Calls `f` for every view that the expression reads.
    pub fn views<'a>(&'a self, f: &mut dyn FnMut(&'a View)) {
        match self {
            Expr::Load(view) => f(view),
            Expr::Fill { .. } => {}
            Expr::Cast { value, .. } | Expr::Scale { value, .. } => value.views(f),
            Expr::Add { left, right } => {
                left.views(f);
                right.views(f);
            }
            Expr::Tiles(tiles)
            | Expr::Codes(tiles)
            | Expr::Scales { tiles, .. }
            | Expr::Dequantize { tiles, .. } => match &tiles.from {
                TilesFrom::Stored(stored) => {
                    f(&stored.codes);
                    f(&stored.scales.view);
                }
                TilesFrom::Made(made) => {
                    made.input.iter().for_each(|p| p.expr.views(f));
                }
            },
        }
    }

    /// True if it is made of the plan's constants alone.
    pub fn is_constant(&self) -> bool {
        let mut reads = false;
        self.views(&mut |_| reads = true);
        !reads
    }

    /// Calls `f` for every view, to change it.
    pub fn views_mut(&mut self, f: &mut dyn FnMut(&mut View)) {
        match self {
            Expr::Load(view) => f(view),
            Expr::Fill { .. } => {}
            Expr::Cast { value, .. } | Expr::Scale { value, .. } => value.views_mut(f),
            Expr::Add { left, right } => {
                left.views_mut(f);
                right.views_mut(f);
            }
            Expr::Tiles(tiles)
            | Expr::Codes(tiles)
            | Expr::Scales { tiles, .. }
            | Expr::Dequantize { tiles, .. } => match &mut tiles.from {
                TilesFrom::Stored(stored) => {
                    f(&mut stored.codes);
                    f(&mut stored.scales.view);
                }
                TilesFrom::Made(made) => {
                    made.input.iter_mut().for_each(|p| p.expr.views_mut(f));
                }
            },
        }
    }

    pub(super) fn has_tiles(&self) -> bool {
        match self {
            Expr::Load(_) | Expr::Fill { .. } => false,
            Expr::Cast { value, .. } | Expr::Scale { value, .. } => value.has_tiles(),
            Expr::Add { left, right } => left.has_tiles() || right.has_tiles(),
            Expr::Tiles(_) | Expr::Dequantize { .. } | Expr::Codes(_) | Expr::Scales { .. } => {
                true
            }
        }
    }

    /// The expression of a part: `off` and `len` inside the box.
    pub fn crop(&self, off: &[u64], len: &[u64]) -> Expr {
        match self {
            Expr::Load(view) => Expr::Load(view.crop(off)),
            Expr::Fill { .. } => self.clone(),
            Expr::Cast { dtype, value } => {
                Expr::Cast { dtype: *dtype, value: Box::new(value.crop(off, len)) }
            }
            Expr::Scale { factor, value } => {
                Expr::Scale { factor: *factor, value: Box::new(value.crop(off, len)) }
            }
            Expr::Add { left, right } => Expr::Add {
                left: Box::new(left.crop(off, len)),
                right: Box::new(right.crop(off, len)),
            },
            Expr::Tiles(tiles) => Expr::Tiles(Box::new(tiles.crop(off, len))),
            Expr::Dequantize { dtype, tiles } => {
                Expr::Dequantize { dtype: *dtype, tiles: Box::new(tiles.crop(off, len)) }
            }
            Expr::Codes(tiles) => Expr::Codes(Box::new(tiles.crop(off, len))),
            Expr::Scales { dtype, tiles, of } => {
                let (off, of) = elements_of(off, len, of, tiles.refined);
                Expr::Scales { dtype: *dtype, tiles: Box::new(tiles.crop(&off, &of)), of }
            }
        }
    }

    /// The expression with its dimensions reordered; none where a tile would not stay one.
    pub(super) fn permute(&self, dims: &[usize]) -> Option<Expr> {
        Some(match self {
            Expr::Load(view) => Expr::Load(view.permute(dims)),
            Expr::Fill { .. } => self.clone(),
            Expr::Cast { dtype, value } => {
                Expr::Cast { dtype: *dtype, value: Box::new(value.permute(dims)?) }
            }
            Expr::Scale { factor, value } => {
                Expr::Scale { factor: *factor, value: Box::new(value.permute(dims)?) }
            }
            Expr::Add { left, right } => Expr::Add {
                left: Box::new(left.permute(dims)?),
                right: Box::new(right.permute(dims)?),
            },
            Expr::Tiles(tiles) => Expr::Tiles(Box::new(tiles.permute(dims)?)),
            Expr::Dequantize { dtype, tiles } => {
                Expr::Dequantize { dtype: *dtype, tiles: Box::new(tiles.permute(dims)?) }
            }
            Expr::Codes(tiles) => Expr::Codes(Box::new(tiles.permute(dims)?)),
            Expr::Scales { dtype, tiles, of } => Expr::Scales {
                dtype: *dtype,
                tiles: Box::new(tiles.permute(dims)?),
                of: dims.iter().map(|d| of[*d]).collect(),
            },
        })
    }

    /// The expression over the same elements in another shape, where one strided box can say it.
    pub(super) fn reshape(&self, old: &[u64], new: &[u64]) -> Option<Expr> {
        Some(match self {
            Expr::Load(view) => Expr::Load(view.reshape(old, new)?),
            Expr::Fill { .. } => self.clone(),
            Expr::Cast { dtype, value } => {
                Expr::Cast { dtype: *dtype, value: Box::new(value.reshape(old, new)?) }
            }
            Expr::Scale { factor, value } => {
                Expr::Scale { factor: *factor, value: Box::new(value.reshape(old, new)?) }
            }
            Expr::Add { left, right } => Expr::Add {
                left: Box::new(left.reshape(old, new)?),
                right: Box::new(right.reshape(old, new)?),
            },
            Expr::Tiles(tiles) => Expr::Tiles(Box::new(tiles.reshape(old, new)?)),
            Expr::Dequantize { dtype, tiles } => {
                Expr::Dequantize { dtype: *dtype, tiles: Box::new(tiles.reshape(old, new)?) }
            }
            Expr::Codes(tiles) => Expr::Codes(Box::new(tiles.reshape(old, new)?)),
            // Only the dimensions before the grid may change; others are split by the caller.
            Expr::Scales { dtype, tiles, of } => {
                let (matrix, m) = (&of[of.len() - 2..], new.len().checked_sub(2)?);
                if old[old.len() - 2..] != new[m..] {
                    return None;
                }
                let to: Dims = new[..m].iter().chain(matrix).copied().collect();
                let tiles = Box::new(tiles.reshape(of, &to)?);
                Expr::Scales { dtype: *dtype, tiles, of: to }
            }
        })
    }
}

/// Where a part of a grid begins, and how long it is, in elements of the value under it.
fn elements_of(off: &[u64], len: &[u64], of: &[u64], tile: u64) -> (Dims, Dims) {
    let m = off.len() - 2;
    let (mut start, mut size): (Dims, Dims) = (off.into(), len.into());
    for d in m..off.len() {
        start[d] = off[d] * tile;
        size[d] = (len[d] * tile).min(of[d] - start[d]);
    }
    (start, size)
}

impl View {
    pub(super) fn crop(&self, off: &[u64]) -> View {
        let start = self.start + off.iter().zip(&self.strides).map(|(o, s)| o * s).sum::<u64>();
        View { start, ..self.clone() }
    }

    fn permute(&self, dims: &[usize]) -> View {
        View { strides: dims.iter().map(|d| self.strides[*d]).collect(), ..self.clone() }
    }

    /// New strides over the same elements, or none if a joined dimension is not evenly spaced.
    fn reshape(&self, old: &[u64], new: &[u64]) -> Option<View> {
        // Dimensions of length 1 carry no stride that matters.
        let kept: Vec<(u64, u64)> = old
            .iter()
            .zip(&self.strides)
            .filter(|(n, _)| **n != 1)
            .map(|(n, s)| (*n, *s))
            .collect();
        let mut strides: Dims = smallvec![0; new.len()];
        let (mut i, mut j) = (0, 0);
        while i < kept.len() {
            let (start_i, start_j) = (i, j);
            let (mut a, mut b) = (1u64, 1u64);
            while a != b || a == 1 {
                if a <= b {
                    a *= kept.get(i)?.0;
                    i += 1;
                } else {
                    b *= *new.get(j)?;
                    j += 1;
                }
            }
            let even = kept[start_i..i].windows(2).all(|w| w[0].1 == w[1].0 * w[1].1);
            if !even {
                return None;
            }
            let mut stride = kept[i - 1].1;
            for d in (start_j..j).rev() {
                strides[d] = stride;
                stride *= new[d];
            }
        }
        Some(View { strides, ..self.clone() })
    }
}

impl Tiles {
    /// Tile size on which the scales are computed or stored.
    pub fn block(&self) -> u64 {
        match &self.from {
            TilesFrom::Stored(stored) => stored.scales.block,
            TilesFrom::Made(made) => u64::from(made.recipe.block),
        }
    }

    pub(crate) fn crop(&self, off: &[u64], len: &[u64]) -> Tiles {
        let block = self.block();
        let m = off.len() - 2;
        let first = [self.phase[0] + off[m], self.phase[1] + off[m + 1]];
        let from = match &self.from {
            TilesFrom::Stored(stored) => {
                let mut tile: Dims = off.into();
                (tile[m], tile[m + 1]) = (first[0] / block, first[1] / block);
                TilesFrom::Stored(Stored {
                    codes: stored.codes.crop(off),
                    scales: ScaleView { view: stored.scales.view.crop(&tile), block },
                })
            }
            TilesFrom::Made(made) => {
                let mut lo: Dims = off.into();
                let mut extent: Dims = len.into();
                for k in 0..2 {
                    lo[m + k] = first[k] / block * block;
                    let end = (first[k] + len[m + k]).next_multiple_of(block);
                    extent[m + k] = end.min(made.extent[m + k]) - lo[m + k];
                }
                let window = Window { lo, len: extent.clone() };
                let input = crop_pieces(&made.input, &window);
                TilesFrom::Made(Made { recipe: made.recipe, extent, input })
            }
        };
        Tiles { from, refined: self.refined, phase: first.map(|f| f % block) }
    }

    /// Only leading dimensions, and the two of the matrix, may change places among themselves.
    fn permute(&self, dims: &[usize]) -> Option<Tiles> {
        let m = dims.len() - 2;
        if dims[m..].iter().any(|d| *d < m) {
            return None;
        }
        let swapped = dims[m] > dims[m + 1];
        let phase = if swapped { [self.phase[1], self.phase[0]] } else { self.phase };
        let from = match &self.from {
            TilesFrom::Stored(stored) => TilesFrom::Stored(Stored {
                codes: stored.codes.permute(dims),
                scales: ScaleView {
                    view: stored.scales.view.permute(dims),
                    block: stored.scales.block,
                },
            }),
            TilesFrom::Made(made) => TilesFrom::Made(Made {
                recipe: made.recipe,
                extent: dims.iter().map(|d| made.extent[*d]).collect(),
                input: permute_pieces(&made.input, dims)?,
            }),
        };
        Some(Tiles { from, refined: self.refined, phase })
    }

    /// Splits or joins rows on the tile grid, or the dimensions before rows and columns; anything
    /// else has no single box.
    fn reshape(&self, old: &[u64], new: &[u64]) -> Option<Tiles> {
        let ([leading @ .., r0, c0], [.., r1, c1]) = (old, new) else { return None };
        let matrix = [*r0, *c0];
        let block = self.block();
        let same_matrix = (r0, c0) == (r1, c1);
        let rows_on_grid = c0 == c1
            && r0.max(r1).is_multiple_of(*r0.min(r1))
            && r0.min(r1).is_multiple_of(block);
        if !same_matrix && (self.phase != [0, 0] || !rows_on_grid) {
            return None;
        }
        let grid = |shape: &[u64]| -> Dims {
            let m = shape.len() - 2;
            let tiles = (0..2).map(|k| (self.phase[k] + shape[m + k]).div_ceil(block));
            shape[..m].iter().copied().chain(tiles).collect()
        };
        let from = match &self.from {
            TilesFrom::Stored(stored) => TilesFrom::Stored(Stored {
                codes: stored.codes.reshape(old, new)?,
                scales: ScaleView {
                    view: stored.scales.view.reshape(&grid(old), &grid(new))?,
                    block,
                },
            }),
            TilesFrom::Made(made) => {
                // Whole tiles may reach beyond the box, but in rows and columns only.
                let (lead, tiles) = made.extent.split_at(leading.len());
                if lead != leading || !same_matrix && tiles != matrix {
                    return None;
                }
                let mut extent: Dims = new.into();
                if same_matrix {
                    extent[new.len() - 2..].copy_from_slice(tiles);
                }
                let input = reshape_pieces(made.input.clone(), &made.extent, &extent)?;
                TilesFrom::Made(Made { recipe: made.recipe, extent, input })
            }
        };
        Some(Tiles { from, refined: self.refined, phase: self.phase })
    }
}
