//! Kind and strides of parameters that the receiver derives from others.

use crate::ir::{Dims, Type};
use crate::lower::TargetKind;
use crate::shard::{Expr, Piece, TilesFrom, View, row_major};

/// Kind and strides of a derived parameter: a view of the parameter's memory where no value
/// changes, else the same view of a dequantized copy of it; row-major where no strides say it.
pub(super) fn derived_view(pieces: &[Piece], t: &Type) -> (TargetKind, Dims) {
    let viewed = |piece: &Piece| match &piece.expr {
        Expr::Load(view) => Some((TargetKind::Alias, view.clone())),
        Expr::Dequantize { tiles, .. } => match &tiles.from {
            TilesFrom::Stored(s) => Some((TargetKind::Derived, s.codes.clone())),
            TilesFrom::Made(_) => None,
        },
        _ => None,
    };
    let views: Option<Vec<(TargetKind, View)>> = pieces.iter().map(viewed).collect();
    let kind = views.as_ref().and_then(|v| v.first()).map(|(kind, _)| *kind);
    let even = |(k, v): &(TargetKind, View), first: &View| {
        Some(*k) == kind && v.storage == first.storage
    };
    let strides = views
        .filter(|v| v.first().is_some_and(|(_, first)| v.iter().all(|v| even(v, first))))
        .and_then(|v| {
            let boxes: Vec<(&Piece, View)> =
                pieces.iter().zip(v.into_iter().map(|(_, v)| v)).collect();
            strides_of(&boxes, t)
        });
    match (kind, strides) {
        (Some(kind), Some(strides)) => (kind, strides),
        _ => (TargetKind::Derived, row_major(&t.shape)),
    }
}

/// The strides with which all boxes are one view; none if there are no such.
fn strides_of(boxes: &[(&Piece, View)], t: &Type) -> Option<Dims> {
    let (first, first_view) = boxes.first()?;
    let mut strides = first_view.strides.clone();
    for d in 0..t.shape.len() {
        let along = boxes.iter().find(|(p, _)| p.at.len[d] > 1);
        let next = boxes.iter().find(|(p, _)| {
            (0..t.shape.len()).all(|k| (p.at.lo[k] != first.at.lo[k]) == (k == d))
        });
        if let Some((_, view)) = along {
            strides[d] = view.strides[d];
        } else if let Some((piece, view)) = next {
            let steps = piece.at.lo[d].checked_sub(first.at.lo[d])?;
            strides[d] = view.start.checked_sub(first_view.start)? / steps;
        }
    }
    let fits = |(piece, view): &(&Piece, View)| {
        let off = |p: &Piece| p.at.lo.iter().zip(&strides).map(|(i, s)| i * s).sum::<u64>();
        view.start + off(first) == first_view.start + off(piece)
            && (0..strides.len()).all(|d| piece.at.len[d] == 1 || view.strides[d] == strides[d])
    };
    boxes.iter().all(fits).then_some(strides)
}
