//! Cuts over mesh axes: what divides.

use crate::topo::Axis;

use super::super::{Place, Type};
use super::{TypeError, bad, dim_of, hinted, in_matrix, resized};

/// Most experts in one tensor; each is a piece of its own.
const MOST_EXPERTS: u64 = 1 << 20;

pub(super) fn divide(size: u64, parts: u64, what: &str, dim: usize) -> Result<u64, TypeError> {
    if size.is_multiple_of(parts) {
        return Ok(size / parts);
    }
    hinted(
        "E0301",
        format!("{what} does not divide dimension {dim} of size {size}"),
        "choose an axis size that divides it; where the receiver pads, write .pad_to first",
    )
}

/// Rows a rank takes and how many ranks in a row share one head.
pub(super) fn head_rows(
    t: &Type,
    heads: u64,
    ranks: u64,
    axis: &str,
) -> Result<(u64, u64), TypeError> {
    let rows = dim_of(t, 0)?;
    if heads == 0 || !rows.is_multiple_of(heads) {
        return hinted(
            "E0302",
            format!("{rows} rows are not {heads} equal heads"),
            "count query heads for q, key-value heads for k and v",
        );
    }
    let head = rows / heads;
    if heads.is_multiple_of(ranks) {
        return Ok((heads / ranks * head, 1));
    }
    if ranks.is_multiple_of(heads) {
        return Ok((head, ranks / heads));
    }
    hinted(
        "E0302",
        format!("{heads} heads of {head} rows do not divide over {axis} = {ranks}"),
        format!(
            "use a {axis} that divides {heads}, or is a multiple of it (heads then repeat)"
        ),
    )
}

pub(super) fn experts(t: &Type, place: &Place, axis: Axis) -> Result<Type, TypeError> {
    let count = dim_of(t, 0)?;
    if count > MOST_EXPERTS {
        return bad("E0209", format!("{count} experts are more than {MOST_EXPERTS}"));
    }
    if t.quant.is_some() && in_matrix(t, 0) {
        return bad("E0208", "experts of a quantized matrix: dimension 0 must lead two others");
    }
    match place.expert_slots(axis, count) {
        Some((_, slots)) => Ok(resized(t, 0, slots)),
        None => {
            let (ranks, slots) = (place.size(axis), place.physical_experts(count));
            hinted(
                "E0303",
                format!(
                    "with load balancing {slots} physical experts do not divide over \
                     {axis} = {ranks}"
                ),
                format!(
                    "the smallest redundant_experts that divides is {}",
                    count.next_multiple_of(ranks) - count
                ),
            )
        }
    }
}
