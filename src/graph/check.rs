//! The verifier: every element of every unit is made once and reaches each rank that holds it
//! once, and nobody else.

use std::collections::{BTreeSet, HashMap};

use crate::diag::Diagnostic;
use crate::lower::Program;
use crate::shard::Window;
use crate::topo::RankId;

use super::owners::receivers;
use super::{Graph, Part, Route};

/// Proves a graph against the units of its program that it is for.
///
/// # Errors
/// E0502 with the first contradiction: a bug of the compiler, never of a plan.
pub fn check(
    program: &Program,
    units: std::ops::Range<u32>,
    graph: &Graph,
) -> Result<(), Diagnostic> {
    let bad = |what: String| Diagnostic::error("E0502", what);
    let replicas = graph.ranks / (program.ranks.len() as u32).max(1);
    let routes: Result<Vec<Vec<RankId>>, String> = graph.routes.iter().map(reached).collect();
    let routes = routes.map_err(bad)?;
    let mut made: Vec<u64> = vec![0; program.units.len()];
    let mut windows: Vec<Vec<&Window>> = vec![Vec::new(); program.units.len()];
    let mut wanted: HashMap<u32, Vec<RankId>> = HashMap::new();
    for flow in graph.buckets.iter().flat_map(|b| &graph.flows[range(&b.flows)]) {
        let reached = &routes[flow.route as usize];
        let parts = &graph.parts[range(&flow.parts)];
        if flow.bytes != parts.iter().map(Part::bytes).sum::<u64>() {
            return Err(bad(format!("trainer {} sends more or less than it makes", flow.from)));
        }
        for part in parts {
            let unit = &program.units[part.unit as usize];
            let inside = (0..unit.shape.len())
                .all(|d| part.window.lo[d] + part.window.len[d] <= unit.shape[d]);
            if !inside || (part.value_bytes, part.scale_bytes) != unit.bytes_of(&part.window) {
                return Err(bad(format!("a part of {} is not of its size", unit.name)));
            }
            windows[part.unit as usize].push(&part.window);
            made[part.unit as usize] += part.bytes();
            let wanted = wanted
                .entry(part.unit)
                .or_insert_with(|| receivers(program, replicas, &unit.ranks()));
            if wanted != reached {
                return Err(bad(format!("{} goes to ranks that do not hold it", unit.name)));
            }
        }
    }
    for (unit, windows) in program.units.iter().zip(&mut windows) {
        if !apart(windows) {
            return Err(bad(format!("a part of {} is made twice", unit.name)));
        }
    }
    for (id, (unit, made)) in (0..).zip(program.units.iter().zip(made)) {
        let ours = units.contains(&id) && !unit.is_constant();
        let wanted = if ours { unit.bytes() } else { 0 };
        if made != wanted {
            return Err(bad(format!("{}: {made} of {wanted} bytes are made", unit.name)));
        }
    }
    Ok(())
}

/// True if no two windows of a tensor have an element in common.
fn apart(windows: &mut [&Window]) -> bool {
    windows.sort_unstable_by(|a, b| a.lo.cmp(&b.lo));
    // Those that reach to the present place on the first dimension.
    let mut open: Vec<&Window> = Vec::new();
    windows.iter().all(|w| {
        let from = w.lo.first().copied().unwrap_or(0);
        open.retain(|o| o.lo.is_empty() || o.lo[0] + o.len[0] > from);
        let alone = open.iter().all(|o| o.intersect(w).is_none());
        open.push(w);
        alone
    })
}

pub(super) fn range(r: &std::ops::Range<u32>) -> std::ops::Range<usize> {
    r.start as usize..r.end as usize
}

/// Ranks that a route reaches, ascending; each once, and relays only from ranks that have it.
fn reached(route: &Route) -> Result<Vec<RankId>, String> {
    let mut has: BTreeSet<RankId> = BTreeSet::new();
    for entry in &route.entries {
        if !has.insert(*entry) {
            return Err(format!("rank {entry} is sent the same bytes twice"));
        }
    }
    for (from, to) in &route.relays {
        if !has.contains(from) || !has.insert(*to) {
            return Err(format!("the relay from rank {from} to rank {to} is early or double"));
        }
    }
    Ok(has.into_iter().collect())
}
