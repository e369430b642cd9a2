//! What can only be said at the end of an evaluation.

use std::collections::{BTreeSet, HashSet};

use crate::diag::Diagnostic;
use crate::ir::{NodeId, Op, Pattern};

use super::State;

impl State {
    /// The name under which a quantized value's scales are written.
    pub(super) fn scale_of(&self, name: &str, node: NodeId) -> Option<String> {
        let quant = self.type_of(node).quant?;
        Some(format!("{name}{}", quant.scale_name.suffix()))
    }

    /// A name that is kept is not written.
    fn check_kept(&mut self) {
        let mut clashes = Vec::new();
        for param in &self.params {
            let scale = self.scale_of(&param.name, param.node);
            for name in [Some(&param.name), scale.as_ref()].into_iter().flatten() {
                if let Some(rule) = self.keep.iter().find(|r| r.pattern.matches(name)) {
                    let d = Diagnostic::error(
                        "E0420",
                        format!("keep(\"{}\") names what the plan writes", rule.pattern.text()),
                    )
                    .at(rule.span)
                    .also(param.span, format!("{name} is written here"))
                    .hint("make the pattern narrower, or write nothing under this name")
                    .about(name);
                    clashes.push((d, Some(param.event)));
                }
            }
        }
        self.problems.extend(clashes);
    }

    /// What can only be said at the end: derived parameters, unknown options, empty entries.
    /// The last two only of a script that ran to its end.
    pub fn finish(&mut self, complete: bool) {
        self.mark_derived();
        self.check_kept();
        self.suggest_names();
        if complete {
            self.check_options();
            self.check_stages();
            self.check_ignore_list();
        }
    }

    /// A plan that never asks for its stage puts the whole model on each.
    fn check_stages(&mut self) {
        if self.mesh.pp == 1 || self.stage_asked.get() {
            return;
        }
        let d = Diagnostic::warning(
            "E0307",
            format!(
                "pp = {}, but every stage of this plan holds the whole model",
                self.mesh.pp
            ),
        );
        self.notes.push(
            d.hint("ask stage(i) for each layer, first_stage and last_stage for the ends"),
        );
    }

    /// A parameter is derived if every path to its sources passes `.dequantize` of a node that
    /// is itself a parameter, and it is not quantized itself.
    fn mark_derived(&mut self) {
        let targets: BTreeSet<NodeId> = self.params.iter().map(|p| p.node).collect();
        let mut some = vec![false; self.nodes.len()];
        let mut all = vec![false; self.nodes.len()];
        for (i, node) in self.nodes.iter().enumerate() {
            let landed = matches!(node.op, Op::Dequantize { .. })
                && node.inputs.iter().all(|n| targets.contains(n));
            let mut inputs = node.inputs.iter().map(|n| n.0 as usize).peekable();
            all[i] = landed || (inputs.peek().is_some() && inputs.clone().all(|n| all[n]));
            some[i] = landed || inputs.any(|n| some[n]);
        }
        let mut mixed = Vec::new();
        for param in &mut self.params {
            let i = param.node.0 as usize;
            // Receivers only dequantize: a value that is quantized again comes from the sources.
            param.derived = all[i] && self.types[i].quant.is_none();
            if some[i] && !all[i] {
                let d = Diagnostic::error(
                    "E0501",
                    format!(
                        "{} mixes a value that the receiver derives from another parameter \
                         with sources",
                        param.name
                    ),
                )
                .at(param.span)
                .hint("a derived parameter is made of parameters that have landed, and nothing else")
                .about(&param.name);
                mixed.push((d, Some(param.event)));
            }
        }
        self.problems.extend(mixed);
    }

    /// Names near a misspelt source; only for the first few, since each is a walk over all names.
    fn suggest_names(&mut self) {
        let missing =
            self.problems.iter_mut().filter(|(d, _)| d.code == "E0401" && d.hint.is_none());
        let mut names: Vec<&str> = self.catalog.keys().map(String::as_str).collect();
        names.sort_unstable();
        for (d, _) in missing.take(8) {
            let wanted = d.subject.clone().unwrap_or_default();
            d.hint = crate::script::nearest_name(&wanted, names.iter().copied())
                .map(|near| format!("the nearest name is {near}"))
                .or_else(|| held(&names));
        }
    }

    fn check_options(&mut self) {
        for name in self.options.keys() {
            if self.options_seen.contains_key(name) {
                continue;
            }
            let known: Vec<&str> = self.options_seen.keys().map(String::as_str).collect();
            let mut d = Diagnostic::error("E0109", format!("the plan has no option `{name}`"));
            d.hint = Some(match known.is_empty() {
                true => "the plan declares no options".to_owned(),
                false => format!("its options are {}", known.join(", ")),
            });
            self.problems.push((d, None));
        }
    }

    /// Entries of the model's ignore list that no source lies under.
    fn check_ignore_list(&mut self) {
        let Some(list) = self.ignore.clone() else { return };
        let names = self.sources.iter().map(|s| s.name.as_str());
        let names: Vec<&str> = names.chain(self.catalog.keys().map(String::as_str)).collect();
        let runs = SegmentRuns::of(&names, list.iter().map(Pattern::text));
        let lost: Vec<&str> = list
            .iter()
            .filter(|p| match runs.plain(p.text()) {
                true => !runs.found.contains(p.text()),
                false => !names.iter().any(|n| p.matches(n)),
            })
            .map(Pattern::text)
            .collect();
        if !lost.is_empty() {
            let shown = lost.iter().take(5).copied().collect::<Vec<_>>().join(", ");
            let more = match lost.len().saturating_sub(5) {
                0 => String::new(),
                n => format!(" and {n} more"),
            };
            self.notes.push(
                Diagnostic::warning(
                    "E0422",
                    "the model's list of modules to leave unquantized has entries that match no \
                     source of this plan",
                )
                .note(format!("{shown}{more}")),
            );
        }
    }
}

/// Which of the wanted runs of whole segments occur in a list of names.
struct SegmentRuns<'a> {
    found: BTreeSet<&'a str>,
}

impl<'a> SegmentRuns<'a> {
    fn of(names: &[&'a str], wanted: impl Iterator<Item = &'a str>) -> Self {
        let wanted: HashSet<&str> = wanted.collect();
        let heads: HashSet<&str> =
            wanted.iter().map(|w| w.split('.').next().unwrap_or_default()).collect();
        let mut found = BTreeSet::new();
        for name in names {
            let ends: Vec<usize> =
                name.match_indices('.').map(|(i, _)| i).chain([name.len()]).collect();
            let starts = [0].into_iter().chain(ends.iter().map(|e| e + 1));
            for (k, start) in starts.take(ends.len()).enumerate() {
                // Most segments begin no wanted run.
                if heads.contains(&name[start..ends[k]]) {
                    found.extend(ends[k..].iter().filter_map(|e| wanted.get(&name[start..*e])));
                }
            }
        }
        SegmentRuns { found }
    }

    fn plain(&self, pattern: &str) -> bool {
        !pattern.contains('*') && !pattern.starts_with("re:")
    }
}

/// What a source holds, in short: how its names are made is often the answer.
fn held(names: &[&str]) -> Option<String> {
    let shown = names.get(..3).unwrap_or(names).join(", ");
    match names.len() {
        0 => None,
        1..=3 => Some(format!("the source holds {shown}")),
        n => Some(format!("the source holds {shown} and {} more", n - 3)),
    }
}
