//! A table as text: column widths, wrapping, what a terminal gets in bold. Knows nothing of plans.

use comfy_table::{
    Attribute, Cell, CellAlignment, ContentArrangement, Row, Table, TableStyle as Borders,
};

use super::TableStyle;
use super::layout::{
    COLUMNS, Grid, Line, LineKind, NAME, RIGHT, SAME, SCALE, SOURCE, Sourced, TITLES,
};

/// Spaces after a column; shapes have brackets that keep them apart.
const GAPS: [usize; COLUMNS] = [1, 1, 1, 2, 2, 2, 2, 0];
/// Names and sources are not wrapped below these widths.
const LEAST_NAME: usize = 20;
const LEAST_SOURCE: usize = 24;
/// Second line of the title over names with their sources below.
const BELOW: &str = "\n  ← source if other";

impl LineKind {
    fn attribute(self) -> Option<Attribute> {
        match self {
            LineKind::Section | LineKind::Total => Some(Attribute::Bold),
            LineKind::Derived { .. } => Some(Attribute::Dim),
            LineKind::Outer | LineKind::Inner => None,
        }
    }
}

/// Where the sources go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fit {
    /// In a column of their own, of this width.
    Beside(usize),
    /// On a line of their own below the name, which is wrapped at this width.
    Below {
        name: usize,
        /// True if the scales are too.
        scales: bool,
    },
    /// The width is too small for anything but squeezing every column.
    Squeezed,
}

impl Fit {
    fn of(grid: &Grid, columns: &[usize], width: usize) -> Fit {
        let length = |line: &Line, c: usize| match c {
            NAME => line.indent() + line.name.chars().count(),
            SOURCE => line.source.text().chars().count(),
            c => line.cells()[c].chars().count(),
        };
        let widest = |c: usize| {
            let lines = grid.lines.iter().map(|l| length(l, c));
            lines.max().unwrap_or(0).max(TITLES[c].len())
        };
        let inner = columns.iter().filter(|c| ![NAME, SOURCE].contains(c));
        let fixed: usize = inner.map(|c| widest(*c) + GAPS[*c]).sum();
        let (name, source) = (widest(NAME), widest(SOURCE));
        let left = width.saturating_sub(fixed + name + GAPS[NAME]);
        if left >= source || (left >= LEAST_SOURCE && 2 * left >= source) {
            return Fit::Beside(left.min(source));
        }
        // Nothing follows the last column, so that its gap is free.
        let last = columns.iter().rev().find(|c| **c != SOURCE).map_or(0, |c| GAPS[*c]);
        let scale = if columns.contains(&SCALE) { widest(SCALE) + GAPS[SCALE] } else { 0 };
        for (scales, fixed) in [(false, fixed), (true, fixed - scale)] {
            let left = (width + last).saturating_sub(fixed + GAPS[NAME]);
            if left >= LEAST_NAME.min(name) {
                return Fit::Below { name: left.min(name), scales };
            }
        }
        Fit::Squeezed
    }
}

/// The table, closed by a rule.
pub(super) fn text(grid: &Grid, style: TableStyle, width: u16) -> String {
    let mut columns = grid.columns();
    let fit = Fit::of(grid, &columns, width.into());
    let mut titles = TITLES.map(str::to_owned);
    let mut titles_height = 1;
    if let Fit::Below { scales, .. } = fit {
        columns.retain(|c| *c != SOURCE && !(scales && *c == SCALE));
        titles[NAME].push_str(BELOW);
        titles_height = 2;
    }
    let mut table = Table::new();
    table.load_style(Borders::new()).force_no_tty();
    if fit == Fit::Squeezed {
        table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
    }
    if style == TableStyle::Styled {
        table.enforce_styling().style_text_only();
    }
    table.set_header(columns.iter().map(|c| cell(&titles[*c], Some(Attribute::Bold))));
    let mut height = titles_height;
    let mut below: Vec<(usize, String)> = Vec::new();
    for (i, line) in grid.lines.iter().enumerate() {
        if i > 0 && matches!(line.kind, LineKind::Section | LineKind::Total) {
            table.add_row(Row::new());
            height += 1;
        }
        let name = name_cell(line, fit);
        height += name.lines().count();
        below.extend(arrow(line, fit, style, width).map(|text| (height, text)));
        table.add_row(columns.iter().map(|c| {
            let text = match (*c, fit) {
                (NAME, _) => name.clone(),
                (SOURCE, Fit::Beside(width)) => wrap(&line.source.text(), width).join("\n"),
                (SOURCE, _) => line.source.text(),
                (c, _) => line.cells()[c].to_owned(),
            };
            cell(&text, line.kind.attribute())
        }));
    }
    let gaps: Vec<usize> = columns.iter().map(|c| GAPS[*c]).collect();
    let last = columns.len().saturating_sub(1);
    for (at, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, if at == last { 0 } else { gaps[at] as u16 }));
        if RIGHT.contains(&columns[at]) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let widths = table.column_max_content_widths();
    let natural = widths.iter().map(|w| usize::from(*w)).sum::<usize>()
        + gaps[..last].iter().sum::<usize>();
    let rule = "─".repeat(if fit == Fit::Squeezed { width.into() } else { natural }) + "\n";
    let mut out = rule.clone();
    let mut below = below.iter().peekable();
    for (at, line) in table.lines().enumerate() {
        // Squeezed titles have as many lines as it takes.
        if at == titles_height && fit != Fit::Squeezed {
            out.push_str(&rule);
        }
        while let Some((_, arrow)) = below.next_if(|b| b.0 == at) {
            out.push_str(arrow);
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out + rule.as_str()
}

/// A name with its indent, wrapped where the width asks for it.
fn name_cell(line: &Line, fit: Fit) -> String {
    let indent = line.indent();
    let width = match fit {
        Fit::Below { name, .. } => name.saturating_sub(indent),
        Fit::Beside(_) | Fit::Squeezed => usize::MAX,
    };
    let pad = " ".repeat(indent);
    let lines = wrap(&line.name, width).into_iter().map(|l| format!("{pad}{l}"));
    lines.collect::<Vec<_>>().join("\n")
}

/// An empty cell stays without escape codes.
fn cell(text: &str, attribute: Option<Attribute>) -> Cell {
    let cell = Cell::new(text);
    match attribute.filter(|_| !text.is_empty()) {
        Some(attribute) => cell.add_attribute(attribute),
        None => cell,
    }
}

/// What goes below a name: where it is from, if that is not its own name, and its scales.
fn arrow(line: &Line, fit: Fit, style: TableStyle, width: u16) -> Option<String> {
    let Fit::Below { scales, .. } = fit else { return None };
    let mut source = line.source.clone();
    if scales && !line.scale.is_empty() {
        source.notes.push(line.scale.clone());
    }
    if source == Sourced::default() || (source.names == SAME && source.notes.is_empty()) {
        return None;
    }
    let pad = " ".repeat(line.indent() + 2);
    let room = usize::from(width).saturating_sub(pad.len());
    let lines = wrap(&format!("← {}", source.text()), room);
    let styled = lines.iter().map(|l| match style {
        TableStyle::Styled => format!("{pad}\u{1b}[2m{l}\u{1b}[0m\n"),
        _ => format!("{pad}{l}\n"),
    });
    Some(styled.collect())
}

/// Parts with dots between them, on as many lines as the width asks for.
pub(super) fn pack(parts: &[String], width: usize) -> String {
    let mut out = String::new();
    let mut used = 0;
    for part in parts {
        let length = part.chars().count();
        let gap = match used {
            0 => "",
            _ if used + 3 + length > width => "\n  ",
            _ => " · ",
        };
        used = if gap.starts_with('\n') { 0 } else { used } + gap.chars().count() + length;
        out.push_str(gap);
        out.push_str(part);
    }
    out + "\n"
}

/// Breaks text after dots, commas and spaces; lines after the first are indented.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    let (mut line, mut used) = (String::new(), 0);
    for token in tokens(text) {
        let length = token.trim_end().chars().count();
        if used > 0 && used + length > width {
            lines.push(line.trim_end().to_owned());
            line = "  ".to_owned();
            used = 2;
        }
        line.push_str(token);
        used += token.chars().count();
    }
    lines.push(line.trim_end().to_owned());
    lines
}

/// What a line may not break inside of. The dots of `0..7` are no place to break.
fn tokens(text: &str) -> Vec<&str> {
    let (bytes, mut start) = (text.as_bytes(), 0);
    let mut out = Vec::new();
    for (at, byte) in bytes.iter().enumerate() {
        let near_dot = bytes.get(at + 1) == Some(&b'.') || (at > 0 && bytes[at - 1] == b'.');
        if matches!(byte, b',' | b' ') || (*byte == b'.' && !near_dot) {
            out.push(&text[start..=at]);
            start = at + 1;
        }
    }
    out.push(&text[start..]);
    out
}
