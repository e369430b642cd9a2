//! Moves of many pieces at once: crop, permute, reshape.

use smallvec::smallvec;

use crate::ir::Dims;

use super::boxes::{Window, gcd, through_reshape};
use super::budget;
use super::piece::{Expr, Piece};

/// The parts of some pieces inside a window, with places relative to it.
pub(crate) fn crop_pieces(pieces: &[Piece], window: &Window) -> Vec<Piece> {
    let mut out = Vec::new();
    for piece in pieces {
        let Some(common) = piece.at.intersect(window) else { continue };
        let sub =
            |a: &[u64], b: &[u64]| -> Dims { a.iter().zip(b).map(|(x, y)| x - y).collect() };
        let expr = piece.expr.crop(&sub(&common.lo, &piece.at.lo), &common.len);
        let lo = sub(&common.lo, &window.lo);
        out.push(Piece { at: Window { lo, len: common.len }, expr });
    }
    out
}

/// The pieces of a tensor with its dimensions reordered; none where tiles cannot follow.
pub(super) fn permute_pieces(pieces: &[Piece], dims: &[usize]) -> Option<Vec<Piece>> {
    let pick = |v: &Dims| -> Dims { dims.iter().map(|d| v[*d]).collect() };
    pieces
        .iter()
        .map(|p| {
            let at = Window { lo: pick(&p.at.lo), len: pick(&p.at.len) };
            Some(Piece { at, expr: p.expr.permute(dims)? })
        })
        .collect()
}

/// Pieces of a tensor of shape `old` as pieces of the same elements in shape `new`; none where
/// a quantized value cannot follow.
pub(super) fn reshape_pieces(
    pieces: Vec<Piece>,
    old: &[u64],
    new: &[u64],
) -> Option<Vec<Piece>> {
    if old == new {
        return Some(pieces);
    }
    let mut out = Vec::new();
    for piece in &pieces {
        for pair in through_reshape(new, old, &piece.at) {
            let off: Dims = pair.new.lo.iter().zip(&piece.at.lo).map(|(a, b)| a - b).collect();
            let part = piece.expr.crop(&off, &pair.new.len);
            reshape_box(part, &pair.new.len, pair.old, &mut out)?;
        }
    }
    Some(out)
}

/// One box of known order; split where no strided box can say it.
fn reshape_box(expr: Expr, len: &[u64], to: Window, out: &mut Vec<Piece>) -> Option<()> {
    if let Some(expr) = expr.reshape(len, &to.len) {
        out.push(Piece { at: to, expr });
        return Some(());
    }
    if matches!(expr, Expr::Tiles(_)) {
        return None;
    }
    let (dim, step) = match expr.has_tiles() {
        true => tile_step(len, &to.len)?,
        false => (len.iter().position(|n| *n > 1)?, 1),
    };
    let mut slab: Dims = len.into();
    slab[dim] = step;
    for i in (0..len[dim]).step_by(step as usize) {
        if !budget::take(1) {
            return None;
        }
        let mut off: Dims = smallvec![0; len.len()];
        off[dim] = i;
        let part = Window { lo: off.clone(), len: slab.clone() };
        for pair in through_reshape(&to.len, len, &part) {
            let at = Window {
                lo: pair.old.lo.iter().zip(&to.lo).map(|(a, b)| a + b).collect(),
                len: pair.old.len,
            };
            let off: Dims = pair.new.lo;
            reshape_box(expr.crop(&off, &pair.new.len), &pair.new.len, at, out)?;
        }
    }
    Some(())
}

/// Where to split a box so that its parts keep their matrices in another shape: at the columns
/// and rows that both shapes have, else one index at a time.
///
/// `[3584, 512] → [8, 448, 512]`: 448 rows at a time.
fn tile_step(len: &[u64], to: &[u64]) -> Option<(usize, u64)> {
    let ([.., r0, c0], [.., r1, c1]) = (len, to) else { return None };
    let last = len.len() - 1;
    let (rows, cols) = (gcd(*r0, *r1), gcd(*c0, *c1));
    if cols < *c0 {
        return Some((last, cols));
    }
    if c0 == c1 && rows < *r0 {
        return Some((last - 1, rows));
    }
    len[..last].iter().position(|n| *n > 1).map(|dim| (dim, 1))
}
