//! A compiled plan against what a receiver holds: names, kinds, shapes, strides, types, aliases.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::compile::Compiled;
use crate::diag::{Diagnostic, Span};
use crate::error::Result;
use crate::io::{ParamEntry, ReceiverManifest};
use crate::ir::{Rule, show_shape};
use crate::lower::{RankProgram, TargetKind, TargetStorage};
use crate::shard::row_major;
use crate::topo::RankId;

/// What matched.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CheckReport {
    pub ranks: Vec<u64>,
    pub parameters: u64,
    pub buffers: u64,
    pub kept: u64,
    /// Derived parameters that the receiver has as parameters of its own.
    pub derived: u64,
}

/// Compares the plan with receiver manifests, one a rank. All differences are returned, nothing
/// is written anywhere.
///
/// # Errors
/// A manifest of a rank that the topology does not have (E0307).
pub fn check(
    compiled: &Compiled,
    manifests: &[(String, ReceiverManifest)],
) -> Result<(CheckReport, Vec<Diagnostic>)> {
    let mut report = CheckReport::default();
    let mut problems = Vec::new();
    let mut kept: BTreeSet<usize> = BTreeSet::new();
    for (file, manifest) in manifests {
        let rank = manifest.topology.as_ref().map_or(0, |t| t.global_rank);
        let Some(program) = compiled.program.ranks.iter().find(|r| r.rank == RankId(rank))
        else {
            let d = Diagnostic::error(
                "E0307",
                format!("{file} is of rank {rank}, which {} does not have", compiled.mesh),
            );
            return Err(d.hint("give the receiver's topology with --infer").into());
        };
        report.ranks.push(rank);
        let before = problems.len();
        let mut one = Comparison { compiled, program, manifest, file, report: &mut report };
        one.run(&mut problems, &mut kept);
        if problems[before..].iter().any(Diagnostic::is_error) {
            problems.splice(before..before, other_topology(compiled, file, manifest));
        }
    }
    let rules = keep_rules(compiled);
    for (index, rule) in rules.iter().enumerate() {
        if !rule.optional && !kept.contains(&index) {
            let text = rule.pattern.text();
            let d = Diagnostic::error("E0405", format!("keep(\"{text}\") matches nothing"));
            problems.push(d.at(rule.span).hint("where it may match nothing, add `optional`"));
        }
    }
    Ok((report, problems))
}

/// Where a receiver's own topology is another, that is why its shapes are.
fn other_topology(
    compiled: &Compiled,
    file: &str,
    manifest: &ReceiverManifest,
) -> Option<Diagnostic> {
    let (theirs, ours) = (manifest.topology.as_ref()?, &compiled.mesh);
    let axes =
        [("tp", theirs.tp, ours.tp), ("dp", theirs.dp, ours.dp), ("pp", theirs.pp, ours.pp)];
    let known = axes.into_iter().filter_map(|(axis, its, own)| Some((axis, its?, own)));
    let (axis, its, own) = known.into_iter().find(|(_, its, own)| its != own)?;
    let d = Diagnostic::error(
        "E0307",
        format!("{file} is of {axis}={its}, the plan is compiled for {axis}={own}"),
    );
    Some(d.hint("give the receiver's topology with --infer"))
}

/// Keep rules of all stages, each place once.
fn keep_rules(compiled: &Compiled) -> Vec<&Rule> {
    let mut seen: BTreeSet<(Span, &str)> = BTreeSet::new();
    let rules = compiled.stages.iter().flat_map(|p| &p.keep);
    rules.filter(|r| seen.insert((r.span, r.pattern.text()))).collect()
}

struct Comparison<'a> {
    compiled: &'a Compiled,
    program: &'a RankProgram,
    manifest: &'a ReceiverManifest,
    file: &'a str,
    report: &'a mut CheckReport,
}

/// What the receiver holds under a name.
struct Held<'a> {
    entry: &'a ParamEntry,
    buffer: bool,
}

impl Comparison<'_> {
    fn run(&mut self, problems: &mut Vec<Diagnostic>, kept: &mut BTreeSet<usize>) {
        let params = self.manifest.parameters.iter().map(|e| (e, false));
        let buffers = self.manifest.buffers.iter().map(|e| (e, true));
        let held: BTreeMap<&str, Held> = params
            .chain(buffers)
            .map(|(entry, buffer)| (entry.name.as_str(), Held { entry, buffer }))
            .collect();
        let aliases: BTreeMap<&str, &str> =
            self.manifest.aliases.iter().map(|a| (a.name.as_str(), a.of.as_str())).collect();
        let mut written: BTreeMap<&str, Span> = BTreeMap::new();
        for target in &self.program.targets {
            for s in &target.storages {
                written.insert(&s.name, target.span);
                problems.extend(self.target(target.kind, target.span, s, &held, &aliases));
            }
        }
        problems.extend(self.aliased_twice(&aliases, &written));
        problems.extend(self.unwritten(&held, &written, kept));
    }

    /// One storage that the plan writes, against the receiver's.
    fn target(
        &mut self,
        kind: TargetKind,
        span: Span,
        s: &TargetStorage,
        held: &BTreeMap<&str, Held<'_>>,
        aliases: &BTreeMap<&str, &str>,
    ) -> Option<Diagnostic> {
        let name = aliases.get(s.name.as_str()).copied().unwrap_or(&s.name);
        let Some(found) = held.get(name) else {
            // Derived parameters appear only after the receiver's post-load processing.
            if kind != TargetKind::Parameter {
                return None;
            }
            let mut d = Diagnostic::error("E0408", format!("the receiver has no {}", s.name))
                .at(span)
                .note(format!("rank {}, {}", self.program.rank, self.file));
            d.hint = crate::script::nearest_name(&s.name, held.keys().copied())
                .map(|near| format!("the nearest name that it has is {near}"));
            return Some(d.about(&s.name));
        };
        match (kind, found.buffer) {
            (TargetKind::Parameter, false) => self.report.parameters += 1,
            (TargetKind::Parameter, true) => self.report.buffers += 1,
            _ => self.report.derived += 1,
        }
        self.mismatch(span, s, found.entry)
    }

    fn mismatch(
        &self,
        span: Span,
        s: &TargetStorage,
        entry: &ParamEntry,
    ) -> Option<Diagnostic> {
        let at = |d: Diagnostic| {
            let d = d.at(span).about(&s.name);
            d.note(format!("rank {}, {}", self.program.rank, self.file))
        };
        if entry.shape[..] != s.shape[..] {
            let c = self.program.coords;
            let mut d = at(Diagnostic::error(
                "E0409",
                format!(
                    "{} is {} on the receiver, the plan makes {}",
                    s.name,
                    show_shape(&entry.shape),
                    show_shape(&s.shape)
                ),
            ))
            .note(format!(
                "tp {} of {}, dp {} of {}, ep {} of {}",
                c.tp,
                self.compiled.mesh.tp,
                c.dp,
                self.compiled.mesh.dp,
                c.ep,
                self.compiled.mesh.ep
            ));
            d.hint = self.likely_cause(s, entry);
            return Some(d);
        }
        if entry.dtype() != Some(s.dtype) {
            return Some(
                at(Diagnostic::error(
                    "E0410",
                    format!(
                        "{} is {} on the receiver, the plan makes {}",
                        s.name,
                        entry.dtype_name,
                        s.dtype.torch_name()
                    ),
                ))
                .hint(format!("write the conversion: {}", conversion(s, entry))),
            );
        }
        let own: Vec<u64> = row_major(&entry.shape).to_vec();
        let stride = entry.stride.clone().unwrap_or(own);
        if stride[..] != s.strides[..] && s.shape.iter().all(|n| *n > 1) {
            let d = at(Diagnostic::warning(
                "E0409",
                format!(
                    "{} has strides {} on the receiver, the plan's value has {}",
                    s.name,
                    show_shape(&stride),
                    show_shape(&s.strides)
                ),
            ));
            return Some(d.note("values are stored in the receiver's own strides"));
        }
        None
    }

    /// A guess at why a shape differs: another cut, an axis that is missing, more dimensions.
    fn likely_cause(&self, s: &TargetStorage, entry: &ParamEntry) -> Option<String> {
        if entry.shape.len() != s.shape.len() {
            return Some(format!(
                "{} dimensions against {}: the receiver keeps this weight in another layout; \
                 is the plan written for its backend?",
                entry.shape.len(),
                s.shape.len()
            ));
        }
        let differ: Vec<usize> =
            (0..s.shape.len()).filter(|d| entry.shape[*d] != s.shape[*d]).collect();
        let [d] = differ[..] else { return None };
        let (have, make) = (entry.shape[d], s.shape[d]);
        if have > 0 && make > have && make.is_multiple_of(have) {
            return Some(format!(
                "the receiver holds 1/{} of dimension {d}: is a .shard({d}, ..) missing, or the \
                 topology another?",
                make / have
            ));
        }
        if make > 0 && have > make && have.is_multiple_of(make) {
            return Some(format!(
                "the receiver holds {} times as much of dimension {d}: is it cut once too often, or \
                 the topology another?",
                have / make
            ));
        }
        None
    }

    /// Two names of one memory must not both be written.
    fn aliased_twice(
        &self,
        aliases: &BTreeMap<&str, &str>,
        written: &BTreeMap<&str, Span>,
    ) -> Vec<Diagnostic> {
        let both = aliases.iter().filter_map(|(name, of)| {
            let (first, second) = (written.get(of)?, written.get(name)?);
            let d = Diagnostic::error(
                "E0411",
                format!("{name} and {of} are the same memory on the receiver"),
            );
            Some(d.at(*second).also(*first, "written here too").about(*name))
        });
        both.collect()
    }

    /// What the receiver holds, the plan does not write and no rule keeps.
    fn unwritten(
        &mut self,
        held: &BTreeMap<&str, Held<'_>>,
        written: &BTreeMap<&str, Span>,
        kept: &mut BTreeSet<usize>,
    ) -> Vec<Diagnostic> {
        let rules = keep_rules(self.compiled);
        let mut problems = Vec::new();
        for (name, found) in held {
            let hits: Vec<usize> =
                (0..rules.len()).filter(|i| rules[*i].pattern.matches(name)).collect();
            kept.extend(&hits);
            if let (Some(first), Some(span)) = (hits.first(), written.get(name)) {
                problems.push(
                    Diagnostic::error("E0420", format!("{name} is kept, and written too"))
                        .at(*span)
                        .also(rules[*first].span, "kept here")
                        .about(*name),
                );
            }
            if !hits.is_empty() {
                self.report.kept += 1;
                continue;
            }
            let via_alias = self
                .manifest
                .aliases
                .iter()
                .any(|a| a.of == *name && written.contains_key(a.name.as_str()));
            if written.contains_key(name) || via_alias {
                continue;
            }
            let kind = if found.buffer { "buffer" } else { "parameter" };
            let mut d = Diagnostic::error(
                "E0407",
                format!(
                    "{name} ({kind}, {} {}) has no writer",
                    found.entry.dtype_name,
                    show_shape(&found.entry.shape)
                ),
            )
            .note(format!("rank {}, {}", self.program.rank, self.file))
            .about(*name);
            let near = crate::script::nearest_name(name, written.keys().copied());
            let near = near.map_or(String::new(), |n| format!("; the plan writes {n}"));
            d.hint = Some(format!("map it, or say keep(\"{name}\"){near}"));
            problems.push(d);
        }
        problems
    }
}

fn conversion(s: &TargetStorage, entry: &ParamEntry) -> String {
    use crate::dtype::DType;
    match (s.dtype, entry.dtype()) {
        (_, Some(DType::E4m3)) => ".quantize(fp8::vllm)".to_owned(),
        (DType::E4m3, Some(to)) => format!(".dequantize({to})"),
        (_, Some(to)) => format!(".to({to})"),
        (_, None) => format!("to {}", entry.dtype_name),
    }
}
