//! Every source is used or dropped, and every rule matches something.

use std::collections::BTreeSet;

use crate::diag::Diagnostic;
use crate::ir::{Plan, show_shape};
use crate::script::Catalog;

/// Drop rules that match nothing.
pub(super) fn empty_drops(stages: &[Plan], catalog: &dyn Catalog) -> Vec<Diagnostic> {
    let names = catalog.names();
    let mut rules: Vec<_> = stages.iter().flat_map(|p| &p.drop).collect();
    rules.sort_by_key(|r| (r.span, r.pattern.text().to_owned()));
    rules.dedup_by_key(|r| (r.span, r.pattern.text().to_owned()));
    let empty = rules
        .into_iter()
        .filter(|r| !r.optional && !names.iter().any(|n| r.pattern.matches(n)));
    empty
        .map(|rule| {
            let text = rule.pattern.text();
            Diagnostic::error("E0405", format!("drop(\"{text}\") matches no source tensor"))
                .at(rule.span)
                .hint("where it may match nothing, write drop(pattern, optional)")
        })
        .collect()
}

/// Sources of the catalog that no rank reads and no rule drops.
pub(super) fn unused_sources(
    stages: &[Plan],
    catalog: &dyn Catalog,
    used: &BTreeSet<String>,
) -> Vec<Diagnostic> {
    let names = catalog.names();
    let mut problems = Vec::new();
    let rules: Vec<_> = stages.iter().flat_map(|p| &p.drop).collect();
    let dropped = |name: &str| rules.iter().any(|r| r.pattern.matches(name));
    let lost: Vec<&String> =
        names.iter().filter(|n| !used.contains(*n) && !dropped(n)).collect();
    if !lost.is_empty() {
        let name = |n: &String| match catalog.find(n) {
            Some(entry) => format!("{n} {}", show_shape(&entry.shape)),
            None => n.clone(),
        };
        let shown: Vec<String> = lost.iter().take(5).map(|n| name(n)).collect();
        let more = match lost.len() - shown.len() {
            0 => String::new(),
            n => format!(" and {n} more"),
        };
        let verb = if lost.len() == 1 { "tensor is" } else { "tensors are" };
        problems.push(
            Diagnostic::error(
                "E0404",
                format!("{} source {verb} neither used nor dropped", lost.len()),
            )
            .note(format!("{}{more}", shown.join(", ")))
            .hint("map it in the plan, or say drop(\"pattern\")"),
        );
    }
    problems
}
