//! Where units land: a rank's own parameters, or a box packed in staging memory.

use crate::diag::Diagnostic;
use crate::graph::Part as GraphPart;
use crate::lower::{Part, Program, Target, TargetKind, Unit};
use crate::shard::Window;

use super::Fallible;
use super::parts::{Destination, Lowering};
use super::place::{Plane, Strides};
use super::reader::AddressOf;
use super::table::Table;

/// Bytes to which packed values and scales are aligned.
const PACKED: u64 = 16;

/// Bytes of a part in staging memory: values, then scales, each on a boundary of 16.
pub fn packed_bytes(part: &GraphPart) -> u64 {
    part.value_bytes.next_multiple_of(PACKED) + part.scale_bytes.next_multiple_of(PACKED)
}

/// A part packed at an address.
pub fn packed(unit: &Unit, part: &GraphPart, address: u64) -> Destination {
    let values = Plane::packed(address, &part.window, unit.dtype.size());
    let scales = unit.scales_of(&part.window).zip(unit.value_type().scale_dtype());
    let after = address + part.value_bytes.next_multiple_of(PACKED);
    let scales = scales.map(|(window, dtype)| Plane::packed(after, &window, dtype.size()));
    Destination { values, scales }
}

/// Where a unit lies in one of a rank's targets.
///
/// # Errors
/// What `address` gives.
pub fn placed(
    unit: &Unit,
    target: &Target,
    index: u32,
    place: u32,
    address: AddressOf<'_>,
) -> Fallible<Destination> {
    let lo = &target.places[place as usize].lo;
    let plane = |storage: usize, part: Part| -> Fallible<Option<Plane>> {
        let Some(s) = target.storages.get(storage) else { return Ok(None) };
        let size = s.dtype.size();
        let strides: Strides = s.strides.iter().map(|n| (n * size) as i64).collect();
        let whole = Plane { address: address(index, part)?, strides };
        let mut at = lo.clone();
        if let (Part::Scales, Some(quant)) = (part, unit.quant) {
            let m = at.len().saturating_sub(2);
            at.iter_mut().skip(m).for_each(|i| *i /= quant.block);
        }
        Ok(Some(whole.moved(&at)))
    };
    let lost = || Diagnostic::error("E0502", "a target stores nothing");
    let values = plane(0, Part::Values)?.ok_or_else(lost)?;
    let scales = match unit.quant {
        Some(_) => plane(1, Part::Scales)?,
        None => None,
    };
    Ok(Destination { values, scales })
}

/// Every place that a unit has on a rank.
///
/// # Errors
/// What `address` gives.
pub fn places(
    program: &Program,
    unit: &Unit,
    rank: usize,
    address: AddressOf<'_>,
) -> Fallible<Vec<Destination>> {
    let own = unit.receivers.iter().filter(|r| r.rank as usize == rank);
    own.map(|r| {
        let target = &program.ranks[rank].targets[r.target as usize];
        placed(unit, target, r.target, r.place, address)
    })
    .collect()
}

/// Adds the copy of a part from one place to another.
pub fn copy_part(
    table: &mut Table,
    id: u32,
    unit: &Unit,
    window: &Window,
    from: &Destination,
    to: &Destination,
) {
    let values = |d: &Destination| d.values.moved(&window.lo);
    table.copy(id, unit.dtype, &window.len, &values(from), &values(to));
    let scales = unit.scales_of(window).filter(|w| !w.is_empty());
    let dtype = unit.value_type().scale_dtype();
    if let (Some(w), Some(dtype), Some(a), Some(b)) = (scales, dtype, &from.scales, &to.scales)
    {
        table.copy(id, dtype, &w.len, &a.moved(&w.lo), &b.moved(&w.lo));
    }
}

/// Jobs that fill what is made of the plan's constants alone, which no trainer rank sends.
///
/// # Errors
/// What `address` gives.
pub fn constants(
    program: &Program,
    rank: usize,
    address: AddressOf<'_>,
    lowering: &mut Lowering<'_>,
) -> Fallible<()> {
    for (index, target) in (0..).zip(&program.ranks[rank].targets) {
        for (place, placed_unit) in (0..).zip(&target.places) {
            let unit = &program.units[placed_unit.unit as usize];
            if !unit.is_constant() || unit.shape.contains(&0) {
                continue;
            }
            let to = placed(unit, target, index, place, address)?;
            let all = Window::whole(&unit.shape);
            lowering.part(placed_unit.unit, unit, &all, &to, &[])?;
        }
    }
    Ok(())
}

/// Jobs that compute the derived parameters of a rank from what has landed on it.
///
/// # Errors
/// E0501 for an expression that no job computes; what `address` gives.
pub fn derived(
    program: &Program,
    rank: usize,
    address: AddressOf<'_>,
    lowering: &mut Lowering<'_>,
) -> Fallible<()> {
    // What they are made of was looked at when it was sent.
    let unwatched = program.units.len() as u32;
    for (index, target) in (0..).zip(&program.ranks[rank].targets) {
        if target.kind == TargetKind::Derived {
            let s = &target.storages[0];
            let size = s.dtype.size();
            let strides = s.strides.iter().map(|n| (n * size) as i64).collect();
            let to = Plane { address: address(index, Part::Values)?, strides };
            lowering.pieces(unwatched, &target.derived, s.dtype, &to)?;
        }
    }
    Ok(())
}
