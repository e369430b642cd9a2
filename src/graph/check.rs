//! The verifier: every byte of every target is stored once, every receive has its send.

use std::collections::{BTreeMap, BTreeSet};

use crate::diag::Diagnostic;
use crate::lower::{Program, TargetKind};

use super::{Graph, Step};

/// Proves a graph against its program.
///
/// # Errors
/// E0502 with the first contradiction: a bug of the compiler, never of a plan.
pub fn check(program: &Program, graph: &Graph) -> Result<(), Diagnostic> {
    let bad = |what: String| Err(Diagnostic::error("E0502", what));
    let mut sends: BTreeSet<(usize, usize)> = BTreeSet::new();
    let mut launched: BTreeSet<usize> = BTreeSet::new();
    for step in &graph.trainer {
        match *step {
            Step::Launch { bucket } => {
                launched.insert(bucket);
            }
            Step::Send { bucket, to } => {
                if !launched.contains(&bucket) || !sends.insert((bucket, to)) {
                    return bad(format!("bucket {bucket} is sent to {to} early or twice"));
                }
            }
            _ => return bad("a trainer rank has an inference step".to_owned()),
        }
    }
    for (rank, steps) in graph.ranks.iter().enumerate() {
        for step in steps {
            if let Step::Recv { bucket } = *step
                && !sends.remove(&(bucket, rank))
            {
                return bad(format!(
                    "rank {rank} waits for bucket {bucket}, which nobody sends"
                ));
            }
        }
    }
    if let Some((bucket, rank)) = sends.first() {
        return bad(format!("bucket {bucket} is sent to rank {rank}, which does not take it"));
    }
    stored_once(program, graph)
}

/// Every storage of every written target is covered by its chunks, without overlap.
fn stored_once(program: &Program, graph: &Graph) -> Result<(), Diagnostic> {
    let mut parts: BTreeMap<usize, (u64, u64)> = BTreeMap::new();
    for chunk in graph.buckets.iter().flat_map(|b| &b.chunks) {
        let (values, scales) = parts.entry(chunk.unit).or_default();
        // Chunks of a unit are in order, so the next one begins where the last one ended.
        if chunk.value_at != *values || chunk.scale_at != *scales {
            let name = &program.units[chunk.unit].name;
            return Err(Diagnostic::error("E0502", format!("{name} has a gap or an overlap")));
        }
        *values += chunk.value_bytes;
        *scales += chunk.scale_bytes;
    }
    for rank in &program.ranks {
        for target in rank.targets.iter().filter(|t| t.kind == TargetKind::Parameter) {
            let stored = target.unit.and_then(|u| parts.get(&u)).copied().unwrap_or_default();
            let wanted: u64 = target.storages.iter().map(|s| s.bytes()).sum();
            if stored.0 + stored.1 != wanted {
                return Err(Diagnostic::error(
                    "E0502",
                    format!("{} on rank {} is not covered", target.name, rank.rank),
                ));
            }
        }
    }
    Ok(())
}
