//! Kind and strides of parameters that the receiver derives from others.

use crate::ir::{Dims, Type};
use crate::lower::TargetKind;
use crate::shard::{Expr, Piece, Storage, TilesFrom, row_major};

/// Kind and strides of a derived parameter: a view of the parameter's memory where no value
/// changes, else the same view of a dequantized copy of it.
pub(super) fn derived_view(pieces: &[Piece], t: &Type) -> (TargetKind, Dims) {
    let views = |expr: &Expr| match expr {
        Expr::Load(view) => Some((TargetKind::Alias, view.strides.clone())),
        Expr::Dequantize { tiles, .. } => match &tiles.from {
            TilesFrom::Stored(s) => Some((TargetKind::Derived, s.codes.strides.clone())),
            TilesFrom::Made(_) => None,
        },
        _ => None,
    };
    let first = pieces.first().and_then(|p| views(&p.expr));
    let even = pieces.iter().all(|p| views(&p.expr) == first);
    match first.filter(|_| even) {
        Some((kind, strides)) if pieces.len() == 1 => (kind, strides),
        Some((kind, strides)) => (kind, leading_strides(pieces, strides, t)),
        None => (TargetKind::Derived, row_major(&t.shape)),
    }
}

/// Strides where the pieces are one for each leading index.
fn leading_strides(pieces: &[Piece], mut strides: Dims, t: &Type) -> Dims {
    let start = |p: &Piece| {
        let mut found = 0;
        p.expr.views(&mut |v| {
            if !matches!(v.storage, Storage::LandedScale(_)) {
                found = v.start;
            }
        });
        found
    };
    if let [a, b, ..] = pieces
        && t.shape.len() == strides.len()
        && let Some(d) = (0..strides.len()).find(|d| a.at.lo[*d] != b.at.lo[*d])
    {
        strides[d] = start(b).saturating_sub(start(a)) / (b.at.lo[d] - a.at.lo[d]).max(1);
    }
    strides
}
