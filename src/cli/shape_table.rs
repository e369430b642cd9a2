//! The shape table for people: equal ranks and equal layers folded, as text or as markdown.

mod layout;
mod names;
mod rows;
mod text;

use crate::compile::Compiled;
use crate::dtype::DType;
use crate::ir::Dims;
use crate::lower::RankProgram;
use crate::table::{RuleRow, ShapeTable};
use crate::topo::{Axis, RankId};

use super::human;
use layout::{Grid, Line, LineKind, Sourced};
use names::braced;
pub(super) use names::ranges;
use rows::{Kind, Row, Section};

/// Width of a table that is not for a terminal.
pub const PLAIN_WIDTH: u16 = 120;

/// How a table is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableStyle {
    /// Text without escape codes.
    Plain,
    /// Text with bold and dim, for a terminal.
    Styled,
    /// GitHub's markdown.
    Markdown,
}

/// The shape table of the given ranks, or of one of each class of equal ranks.
pub fn render_table(
    compiled: &Compiled,
    ranks: Option<&[RankId]>,
    style: TableStyle,
    width: u16,
) -> String {
    let programs = &compiled.program.ranks;
    let classes: Vec<Vec<&RankProgram>> = match ranks {
        None => rows::classes(programs),
        Some(wanted) => {
            programs.iter().filter(|r| wanted.contains(&r.rank)).map(|r| vec![r]).collect()
        }
    };
    let facts = ShapeTable::of(compiled, &[]);
    let mut out = layout::heading(&header(&facts), style, width);
    for class in &classes {
        let sections = rows::sections(compiled, class);
        out.push_str(&layout::title(&class_title(compiled, class), style));
        out.push_str(&layout::grid(&grid(&sections), style, width));
    }
    out.push_str(&layout::footer(&totals(compiled), &rules(&facts), style, width));
    out
}

/// Plan, model, topology, options, digest.
fn header(facts: &ShapeTable) -> Vec<String> {
    let mut parts = vec![facts.plan.clone()];
    parts.extend(facts.model.clone());
    parts.push(facts.infer.to_string());
    if facts.train.world() > 1 {
        parts.push(format!("trainer {}", facts.train));
    }
    let options: Vec<String> = facts.options.iter().map(|(k, v)| format!("{k}={v}")).collect();
    if !options.is_empty() {
        parts.push(options.join(" "));
    }
    parts.push(format!("digest {}", facts.plan_digest.get(..12).unwrap_or(&facts.plan_digest)));
    parts
}

/// `ranks 0..7 (tp 0..7)`.
fn class_title(compiled: &Compiled, class: &[&RankProgram]) -> String {
    let numbers: Vec<u64> = class.iter().map(|r| r.rank.0).collect();
    let word = if numbers.len() == 1 { "rank" } else { "ranks" };
    let axes = [Axis::Dp, Axis::Pp, Axis::Tp, Axis::Ep];
    let axes = axes.iter().filter(|a| compiled.mesh.size(**a) > 1);
    let places = axes.map(|axis| {
        let mut at: Vec<u64> = class.iter().map(|r| r.coords.index(*axis)).collect();
        at.sort_unstable();
        at.dedup();
        format!("{axis} {}", ranges(&at))
    });
    let places = places.collect::<Vec<_>>().join(" · ");
    let places = if places.is_empty() { places } else { format!(" ({places})") };
    format!("{word} {}{places}", ranges(&numbers))
}

/// The lines of one class's table.
fn grid(sections: &[Section]) -> Grid {
    let folded = sections.iter().any(|s| s.layers.len() > 1);
    let mut lines = Vec::new();
    let (mut params, mut bytes) = (0u64, 0u64);
    for section in sections {
        let all = section.bytes().saturating_mul(section.times());
        params += section.written();
        bytes = bytes.saturating_add(all);
        if !section.layers.is_empty() {
            lines.push(section_line(section, all, folded));
        }
        lines.extend(section.rows.iter().map(|row| row_line(section, row, folded)));
    }
    let mut total = Line::new(LineKind::Total, human::counted(params, "parameter"));
    *(if folded { &mut total.total } else { &mut total.bytes }) = human::bytes(bytes);
    lines.push(total);
    Grid { lines }
}

fn section_line(section: &Section, all: u64, folded: bool) -> Line {
    let prefix = &section.prefix;
    let mut line =
        Line::new(LineKind::Section, clean(&format!("{prefix}{}", braced(&section.layers))));
    line.bytes = human::bytes(section.bytes());
    if folded {
        line.total = human::bytes(all);
    }
    let word = prefix.trim_end_matches('.').rsplit('.').next().unwrap_or("");
    if section.layers.len() > 1 {
        // The plan's own plural: `layers`, `blocks`.
        line.full = clean(format!("{} {word}", section.layers.len()).trim_end());
    }
    line
}

fn row_line(section: &Section, row: &Row, folded: bool) -> Line {
    let facts = &row.facts;
    let inside = !section.layers.is_empty();
    let kind = match (facts.kind, inside) {
        (Kind::Parameter, true) => LineKind::Inner,
        (Kind::Parameter, false) => LineKind::Outer,
        (Kind::Derived | Kind::Alias, _) => LineKind::Derived { inside },
    };
    let mut line = Line::new(kind, clean(&row.name()));
    line.full = facts.full.as_ref().map_or_else(String::new, shape);
    line.local = shape(&facts.shape);
    line.dtype = facts.dtype.short_name().to_owned();
    if let Some(s) = &facts.scale {
        line.scale = format!("{} {} /{}", s.dtype, shape(&s.shape), s.block);
    }
    match facts.kind {
        Kind::Parameter => {
            line.bytes = match row.count {
                1 => human::bytes(row.bytes),
                // They are equal, or they would not share a row.
                count => format!("{count} × {}", human::bytes(row.bytes / count.max(1))),
            };
            if folded {
                line.total = human::bytes(row.bytes.saturating_mul(section.times()));
            }
        }
        Kind::Derived | Kind::Alias => line.bytes = "–".to_owned(),
    }
    line.source = source(section, row);
    line
}

/// Where a row's value is from, and what is done to it on the way.
fn source(section: &Section, row: &Row) -> Sourced {
    let only = match section.layers[..] {
        [one] => Some(one),
        _ => None,
    };
    let facts = &row.facts;
    let (names, remark) = match row.sources.is_empty() {
        true => ("no source".to_owned(), true),
        false if facts.origin.same_name => (layout::SAME.to_owned(), true),
        false => (clean(&row.sources.show(only)), false),
    };
    let (lead, notes) = match facts.kind {
        Kind::Parameter => ("", changes(row)),
        Kind::Alias => ("view of", strides(row)),
        Kind::Derived => ("derived from", strides(row)),
    };
    Sourced { lead, names, remark, notes }
}

fn strides(row: &Row) -> Vec<String> {
    row.facts.strides.iter().map(|s| format!("strides {}", shape(s))).collect()
}

/// Changes of the element type between the source and the target.
fn changes(row: &Row) -> Vec<String> {
    let facts = &row.facts;
    let stored = facts.origin.from.filter(|_| !row.sources.is_empty());
    let change = match (stored, &facts.scale, facts.origin.recipe) {
        (Some(DType::E4m3), Some(_), None) => Some("passes through".to_owned()),
        (Some(DType::E4m3), _, _) => Some("dequantized".to_owned()),
        (Some(from), None, _) if from != facts.dtype => Some(format!("from {from}")),
        _ => None,
    };
    change.into_iter().chain(facts.origin.recipe.map(str::to_owned)).collect()
}

/// Ranks, bytes, sources.
fn totals(compiled: &Compiled) -> Vec<String> {
    let ranks = &compiled.program.ranks;
    let each: Vec<u64> = ranks.iter().map(RankProgram::bytes).collect();
    let counts: Vec<u64> = ranks.iter().map(written).collect();
    let replicas = compiled.mesh.replicas;
    let mut parts = vec![human::counted(ranks.len() as u64, "rank")];
    if replicas > 1 {
        parts[0].push_str(&format!(" in each of {replicas} replicas"));
    }
    let all = each.iter().fold(0u64, |all, b| all.saturating_add(*b)).saturating_mul(replicas);
    let noun = if counts.iter().all(|n| *n == 1) { "parameter" } else { "parameters" };
    parts.push(format!("{} {noun} a rank", between(&counts, human::count)));
    parts.push(format!("{} a rank", between(&each, human::bytes)));
    if each.len() > 1 || replicas > 1 {
        parts.push(format!("{} in all", human::bytes(all)));
    }
    let sources = human::counted(compiled.program.sources.len() as u64, "source tensor");
    let read = human::bytes(compiled.program.source_bytes());
    parts.push(format!("from {sources}, {read}"));
    parts
}

/// Parameters that an update writes on a rank; a quantized one counts once.
fn written(rank: &RankProgram) -> u64 {
    let targets = rank.targets.iter();
    targets.filter(|t| t.kind == crate::lower::TargetKind::Parameter).count() as u64
}

/// One value, or the least and the most.
fn between(values: &[u64], show: impl Fn(u64) -> String) -> String {
    let least = values.iter().min().copied().unwrap_or(0);
    let most = values.iter().max().copied().unwrap_or(0);
    let (least, most) = (show(least), show(most));
    if least == most { least } else { format!("{least} to {most}") }
}

/// Rules with the place that made them: word, pattern, file and line.
fn rules(facts: &ShapeTable) -> Vec<[String; 3]> {
    let line = |word: &'static str| {
        move |rule: &RuleRow| {
            let place = rule.at.rsplit_once(':').map_or(rule.at.as_str(), |(line, _)| line);
            [word.to_owned(), clean(&rule.pattern), place.to_owned()]
        }
    };
    let kept = facts.kept.iter().map(line("kept"));
    kept.chain(facts.dropped.iter().map(line("dropped"))).collect()
}

fn shape(dims: &Dims) -> String {
    let dims: Vec<String> = dims.iter().map(u64::to_string).collect();
    format!("[{}]", dims.join(","))
}

/// Names come from files: a control character must not reach a terminal.
fn clean(text: &str) -> String {
    if !text.contains(char::is_control) {
        return text.to_owned();
    }
    let shown = |c: char| match c.is_control() {
        true => c.escape_default().to_string(),
        false => c.to_string(),
    };
    text.chars().map(shown).collect()
}
