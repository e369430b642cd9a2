//! Who can make what: the ranks that hold all of a unit's operands, and what nobody can make.

use crate::diag::Diagnostic;
use crate::lower::{Program, Unit};
use crate::shard::{Expr, Share, Window};
use crate::topo::RankId;

use super::shared::{Made, shared_tiles};

/// Units that no trainer rank can make from what it holds, each with the reason.
pub fn unmakeable(program: &Program) -> Vec<(u32, Diagnostic)> {
    let check = |unit: &Unit| {
        let leaf = unit.expr.leaf();
        if unit.shape.contains(&0) {
            return Ok(());
        }
        if has_operands(&unit.expr) {
            shares(program, unit)?;
        }
        match leaf {
            Some(leaf) if !leaf.sole => tiles_are_whole(program, unit),
            _ => Ok(()),
        }
    };
    let units = program.units.iter().enumerate();
    units.filter_map(|(i, u)| Some((i as u32, check(u).err()?))).collect()
}

/// Told of a value: bytes, holders, who needs it.
type EachValue<'a> = &'a mut dyn FnMut(u64, &[u32], &[RankId]);

/// Calls `f` for each distinct value that must reach inference ranks: bytes, the trainer ranks
/// that hold it, the ranks that need it; both ascending.
pub fn each_value(program: &Program, replicas: u32, f: EachValue<'_>) {
    for unit in &program.units {
        if unit.shape.contains(&0) || unit.is_constant() {
            continue;
        }
        let needed_by = receivers(program, replicas, &unit.ranks());
        for share in shares(program, unit).unwrap_or_default() {
            let (values, scales) = unit.bytes_of(&share.window);
            if let Some(holders) = &share.holders {
                f(values + scales, holders, &needed_by);
            }
        }
    }
}

/// The same ranks of every replica, ascending.
pub(super) fn receivers(program: &Program, replicas: u32, ranks: &[u32]) -> Vec<RankId> {
    let world = program.ranks.len() as u64;
    let replicas = 0..u64::from(replicas);
    replicas
        .flat_map(|r| ranks.iter().map(move |i| RankId(r * world + u64::from(*i))))
        .collect()
}

fn shares(program: &Program, unit: &Unit) -> Result<Vec<Share>, Diagnostic> {
    let all = Window::whole(&unit.shape);
    program.shares(&unit.expr, &all).map_err(|a| operands_apart(unit, &a.0))
}

/// True if an element of the result needs more than one element of what trainer ranks hold.
fn has_operands(expr: &Expr) -> bool {
    let mut views = 0;
    expr.views(&mut |_| views += 1);
    views > 1
}

/// Where several recipes make a unit, each rank must hold whole tiles of all of them.
pub(super) fn tiles_are_whole(program: &Program, unit: &Unit) -> Result<(), Diagnostic> {
    let mut recipes = Vec::new();
    unit.expr.recipes(&mut |made| recipes.push(made));
    for made in recipes {
        let all = Window::whole(&made.extent);
        let shares =
            program.input_shares(made, &all).map_err(|a| operands_apart(unit, &a.0))?;
        let parts: Vec<Made> = (owned(&shares, 0).into_iter())
            .map(|(owner, window)| Made { window, owner })
            .collect();
        let mut whole = true;
        let block = u64::from(made.recipe.block);
        shared_tiles(&parts, &made.extent, block, &mut |_, _| whole = false);
        if !whole {
            return Err(tiles_apart(unit));
        }
    }
    Ok(())
}

/// The owner of each share; constants go with what stands before them.
pub(super) fn owned(shares: &[Share], choice: usize) -> Vec<(u32, Window)> {
    let pick = |s: &Share| s.holders.as_deref().map(|h| h[choice % h.len()]);
    let mut last = shares.iter().find_map(pick).unwrap_or(0);
    let owner = |s: &Share| {
        last = pick(s).unwrap_or(last);
        (last, s.window.clone())
    };
    shares.iter().map(owner).collect()
}

pub(super) fn operands_apart(unit: &Unit, at: &Window) -> Diagnostic {
    let first = crate::ir::show_shape(&at.lo);
    Diagnostic::error(
        "E0308",
        format!("{}: no trainer rank holds all operands of element {first}", unit.name),
    )
    .at(unit.span)
    .note("operands of + and codes with their scales must have one placement")
    .about(&unit.name)
}

fn tiles_apart(unit: &Unit) -> Diagnostic {
    Diagnostic::error(
        "E0308",
        format!(
            "{}: tiles that lie on several trainer ranks are quantized twice on different grids",
            unit.name
        ),
    )
    .at(unit.span)
    .hint("quantize both times on one grid, or place whole tiles on a rank")
    .about(&unit.name)
}
