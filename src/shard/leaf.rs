//! What a trainer rank needs the whole tiles of, though it may hold only parts of them.

use crate::ir::Dims;

use super::boxes::Window;
use super::piece::{Expr, Made, Tiles, TilesFrom};

/// The innermost recipe of an expression: its input's absolute maxima decide everything above.
#[derive(Clone, Copy, Debug)]
pub struct Leaf<'a> {
    pub made: &'a Made,
    /// Row and column of the expression's first element inside its first tile.
    pub phase: [u64; 2],
    /// Elements of a side of a tile for each index of the expression: 1, or the tile's size where
    /// the expression is a number a tile.
    scale: u64,
    /// False if maxima of its tiles do not decide the expression: another recipe works on another
    /// grid, or several values are quantized.
    pub sole: bool,
}

impl Leaf<'_> {
    /// A window of the expression, in the coordinates of what is quantized.
    pub fn elements(&self, window: &Window) -> Window {
        let mut out = window.clone();
        let m = out.lo.len() - 2;
        for k in 0..2 {
            let d = m + k;
            out.lo[d] = window.lo[d] * self.scale + self.phase[k];
            let end = (window.lo[d] + window.len[d]) * self.scale + self.phase[k];
            out.len[d] = end.min(self.made.extent[d]) - out.lo[d];
        }
        out
    }

    /// The tiles that a window of elements touches.
    pub fn tiles(&self, elements: &Window) -> Window {
        let mut out = elements.clone();
        let block = u64::from(self.made.recipe.block);
        for d in out.lo.len() - 2..out.lo.len() {
            out.lo[d] = elements.lo[d] / block;
            out.len[d] = (elements.lo[d] + elements.len[d]).div_ceil(block) - out.lo[d];
        }
        out
    }

    /// The same, grown to whole tiles.
    pub fn region(&self, window: &Window) -> Window {
        let mut out = self.elements(window);
        let block = u64::from(self.made.recipe.block);
        for d in out.lo.len() - 2..out.lo.len() {
            let end = (out.lo[d] + out.len[d]).next_multiple_of(block);
            out.lo[d] = out.lo[d] / block * block;
            out.len[d] = end.min(self.made.extent[d]) - out.lo[d];
        }
        out
    }
}

impl Expr {
    /// The recipe whose tiles must be known whole; none if nothing is quantized.
    pub fn leaf(&self) -> Option<Leaf<'_>> {
        match self {
            Expr::Load(_) | Expr::Fill { .. } => None,
            Expr::Cast { value, .. } | Expr::Scale { value, .. } => value.leaf(),
            Expr::Add { left, right } => match (left.leaf(), right.leaf()) {
                (Some(leaf), Some(_)) => Some(Leaf { sole: false, ..leaf }),
                (left, right) => left.or(right),
            },
            Expr::Tiles(tiles) | Expr::Dequantize { tiles, .. } | Expr::Codes(tiles) => {
                tiles.leaf()
            }
            Expr::Scales { tiles, .. } => {
                tiles.leaf().map(|leaf| Leaf { scale: tiles.refined, ..leaf })
            }
        }
    }
}

impl Tiles {
    fn leaf(&self) -> Option<Leaf<'_>> {
        let TilesFrom::Made(made) = &self.from else { return None };
        let mut inner = made.input.iter().filter_map(|p| p.expr.leaf());
        let own = Leaf { made, phase: self.phase, scale: 1, sole: true };
        let Some(first) = inner.next() else { return Some(own) };
        match made.same_grid() {
            Some(_) => Some(Leaf { phase: self.phase, ..first }),
            None => Some(Leaf { sole: false, ..own }),
        }
    }
}

impl Expr {
    /// Calls `f` for every recipe of the expression, outermost first.
    pub fn recipes<'a>(&'a self, f: &mut dyn FnMut(&'a Made)) {
        match self {
            Expr::Load(_) | Expr::Fill { .. } => {}
            Expr::Cast { value, .. } | Expr::Scale { value, .. } => value.recipes(f),
            Expr::Add { left, right } => {
                left.recipes(f);
                right.recipes(f);
            }
            Expr::Tiles(tiles)
            | Expr::Dequantize { tiles, .. }
            | Expr::Codes(tiles)
            | Expr::Scales { tiles, .. } => {
                if let TilesFrom::Made(made) = &tiles.from {
                    f(made);
                    made.input.iter().for_each(|p| p.expr.recipes(f));
                }
            }
        }
    }
}

impl Made {
    /// The elements of a box of tiles.
    pub fn elements_of(&self, tiles: &Window) -> Window {
        let mut out = tiles.clone();
        let block = u64::from(self.recipe.block);
        for d in out.lo.len() - 2..out.lo.len() {
            out.lo[d] = tiles.lo[d] * block;
            let end = (tiles.lo[d] + tiles.len[d]) * block;
            out.len[d] = end.min(self.extent[d]) - out.lo[d];
        }
        out
    }

    /// The quantized value that a second step on the same grid works on, dequantized to `dtype`;
    /// its maxima decide this recipe's.
    pub fn same_grid(&self) -> Option<(&Tiles, crate::dtype::DType)> {
        let [piece] = &self.input[..] else { return None };
        let Expr::Dequantize { tiles, dtype } = &piece.expr else { return None };
        let TilesFrom::Made(inner) = &tiles.from else { return None };
        let origin: Dims = piece.at.lo.iter().map(|_| 0).collect();
        let same = piece.at.lo == origin
            && piece.at.len == self.extent
            && inner.extent == self.extent
            && tiles.phase == [0, 0]
            && inner.recipe.block == self.recipe.block;
        same.then_some((tiles, *dtype))
    }
}
