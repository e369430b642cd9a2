//! Lines of a table on paper: columns, widths, wrapping, markdown. Knows nothing of plans.

use comfy_table::{
    Attribute, Cell, CellAlignment, ContentArrangement, Row, Table, TableStyle as Borders,
};

use super::TableStyle;

/// What a line is, which decides how it looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LineKind {
    /// A parameter outside of layers.
    Outer,
    /// Header of equal layers.
    Section,
    /// A parameter of a layer.
    Inner,
    /// Nothing that an update writes.
    Derived {
        inside: bool,
    },
    Total,
}

/// One line; a field is a column.
#[derive(Clone, Debug)]
pub(super) struct Line {
    pub kind: LineKind,
    pub name: String,
    pub full: String,
    pub local: String,
    pub dtype: String,
    pub scale: String,
    pub bytes: String,
    pub total: String,
    pub source: String,
}

impl Line {
    pub fn new(kind: LineKind, name: String) -> Self {
        let empty = String::new;
        Line {
            kind,
            name,
            full: empty(),
            local: empty(),
            dtype: empty(),
            scale: empty(),
            bytes: empty(),
            total: empty(),
            source: empty(),
        }
    }

    fn cells(&self) -> [&str; COLUMNS] {
        [
            &self.name,
            &self.full,
            &self.local,
            &self.dtype,
            &self.scale,
            &self.bytes,
            &self.total,
            &self.source,
        ]
    }

    fn indent(&self) -> usize {
        match self.kind {
            LineKind::Inner | LineKind::Derived { inside: true } => 2,
            _ => 0,
        }
    }
}

/// The lines of one table.
pub(super) struct Grid {
    pub lines: Vec<Line>,
}

const COLUMNS: usize = 8;
const TITLES: [&str; COLUMNS] =
    ["parameter", "full shape", "per rank", "type", "scale", "bytes", "total", "source"];
const NAME: usize = 0;
const SOURCE: usize = COLUMNS - 1;
/// Columns that are left out where they say nothing.
const OPTIONAL: [usize; 2] = [4, 6];
/// Columns whose right ends line up.
const RIGHT: [usize; 4] = [1, 2, 5, 6];
/// Between columns.
const GAP: usize = 2;
/// Names and sources are not wrapped below these widths.
const LEAST_NAME: usize = 24;
const LEAST_SOURCE: usize = 24;
/// A source that needs no line of its own.
pub(super) const SAME: &str = "same name";
/// Second line of the title over names with their sources below.
const BELOW: &str = "\n  ← source unless same name";

impl Grid {
    fn columns(&self) -> Vec<usize> {
        let used = |c: &usize| {
            !OPTIONAL.contains(c) || self.lines.iter().any(|l| !l.cells()[*c].is_empty())
        };
        (0..COLUMNS).filter(used).collect()
    }
}

/// The line that says what the table is of.
pub(super) fn heading(parts: &[String], style: TableStyle, width: u16) -> String {
    match style {
        TableStyle::Markdown => {
            let [plan, rest @ ..] = parts else { return String::new() };
            let rest: Vec<String> = rest.iter().map(|p| escaped(p)).collect();
            format!("## {}\n\n{}\n", escaped(plan), rest.join(" · "))
        }
        TableStyle::Plain | TableStyle::Styled => {
            wrap(&parts.join(" · "), width.into(), 2).join("\n") + "\n"
        }
    }
}

/// The line over the table of a class of ranks.
pub(super) fn title(text: &str, style: TableStyle) -> String {
    match style {
        TableStyle::Markdown => format!("\n### {text}\n\n"),
        TableStyle::Plain => format!("\n{text}\n"),
        TableStyle::Styled => format!("\n\u{1b}[1m{text}\u{1b}[0m\n"),
    }
}

pub(super) fn grid(grid: &Grid, style: TableStyle, width: u16) -> String {
    match style {
        TableStyle::Markdown => markdown(grid),
        TableStyle::Plain | TableStyle::Styled => text(grid, style, width),
    }
}

/// Totals, and the rules for what is left alone.
pub(super) fn footer(totals: &[String], rules: &[[String; 3]], style: TableStyle) -> String {
    let mut out = format!("\n{}\n", totals.join(" · "));
    if rules.is_empty() {
        return out;
    }
    out.push('\n');
    if style == TableStyle::Markdown {
        for [word, pattern, place] in rules {
            out.push_str(&format!("- {word} {} at {}\n", code(pattern), code(place)));
        }
        return out;
    }
    let mut table = Table::new();
    table.load_style(Borders::new()).force_no_tty();
    table.add_rows(rules.iter().cloned());
    for column in table.column_iter_mut() {
        column.set_padding((0, GAP as u16));
    }
    out.push_str(&(table.trim_fmt() + "\n"));
    out
}

/// Where the sources go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fit {
    /// In a column of their own, of this width.
    Beside(usize),
    /// On a line of their own below the name, which is wrapped at this width.
    Below(usize),
    /// The width is too small for anything but squeezing every column.
    Squeezed,
}

impl Fit {
    fn of(grid: &Grid, columns: &[usize], width: usize) -> Fit {
        let widest = |c: usize| {
            let lines = grid.lines.iter().map(|l| {
                let indent = if c == NAME { l.indent() } else { 0 };
                indent + l.cells()[c].chars().count()
            });
            lines.max().unwrap_or(0).max(TITLES[c].len())
        };
        let fixed = columns.iter().filter(|c| ![NAME, SOURCE].contains(c));
        let fixed: usize = fixed.map(|c| widest(*c) + GAP).sum();
        let (name, source) = (widest(NAME), widest(SOURCE));
        let left = width.saturating_sub(fixed + name + GAP);
        if left >= source || (left >= LEAST_SOURCE && 2 * left >= source) {
            return Fit::Beside(left.min(source));
        }
        match width.checked_sub(fixed) {
            Some(left) if left >= LEAST_NAME => Fit::Below(left.min(name)),
            _ => Fit::Squeezed,
        }
    }
}

fn text(grid: &Grid, style: TableStyle, width: u16) -> String {
    let mut columns = grid.columns();
    let fit = Fit::of(grid, &columns, width.into());
    let mut titles = TITLES.map(str::to_owned);
    let mut name_width = usize::MAX;
    if let Fit::Below(width) = fit {
        columns.retain(|c| *c != SOURCE);
        titles[NAME].push_str(BELOW);
        name_width = width;
    }
    let mut table = Table::new();
    table.load_style(Borders::new()).force_no_tty();
    if fit == Fit::Squeezed {
        table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
    }
    if style == TableStyle::Styled {
        table.enforce_styling().style_text_only();
    }
    let heads = columns.iter().map(|c| bold(Cell::new(&titles[*c])));
    table.set_header(heads);
    // Two lines of titles where sources lie below.
    let mut at = 2;
    let mut below: Vec<(usize, String)> = Vec::new();
    for (i, line) in grid.lines.iter().enumerate() {
        let heads = matches!(line.kind, LineKind::Section | LineKind::Total);
        if heads && i > 0 {
            table.add_row(Row::new());
            at += 1;
        }
        let names = wrap(&line.name, name_width.saturating_sub(line.indent()), 2);
        at += names.len();
        if matches!(fit, Fit::Below(_)) && !line.source.is_empty() && line.source != SAME {
            below.push((at, arrow(line, style, width)));
        }
        let pad = " ".repeat(line.indent());
        let name = names.iter().map(|l| format!("{pad}{l}")).collect::<Vec<_>>().join("\n");
        let cells = line.cells();
        table.add_row(columns.iter().map(|c| {
            let cell = match (*c, fit) {
                (NAME, _) => Cell::new(&name),
                (SOURCE, Fit::Beside(width)) => {
                    Cell::new(wrap(cells[SOURCE], width, 2).join("\n"))
                }
                (c, _) => Cell::new(cells[c]),
            };
            match line.kind {
                LineKind::Section | LineKind::Total => bold(cell),
                LineKind::Derived { .. } => cell.add_attribute(Attribute::Dim),
                LineKind::Outer | LineKind::Inner => cell,
            }
        }));
    }
    for (at, column) in table.column_iter_mut().enumerate() {
        let last = at + 1 == columns.len();
        column.set_padding((0, if last { 0 } else { GAP as u16 }));
        if columns.get(at).is_some_and(|c| RIGHT.contains(c)) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let rule = rule(&table, fit, width);
    let titles = if matches!(fit, Fit::Below(_)) { 2 } else { 1 };
    let mut out = rule.clone();
    let mut below = below.iter().peekable();
    for (at, line) in table.lines().enumerate() {
        if at == titles {
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

/// A line as wide as the table.
fn rule(table: &Table, fit: Fit, width: u16) -> String {
    let widths = table.column_max_content_widths();
    let gaps = GAP * widths.len().saturating_sub(1);
    let natural = widths.iter().map(|w| usize::from(*w)).sum::<usize>() + gaps;
    let all = if fit == Fit::Squeezed { width.into() } else { natural };
    "─".repeat(all) + "\n"
}

fn bold(cell: Cell) -> Cell {
    cell.add_attribute(Attribute::Bold)
}

/// The line below a name that says where it is from.
fn arrow(line: &Line, style: TableStyle, width: u16) -> String {
    let pad = " ".repeat(line.indent() + 2);
    let room = usize::from(width).saturating_sub(pad.len());
    let lines = wrap(&format!("← {}", line.source), room, 2);
    let styled = lines.iter().map(|l| match style {
        TableStyle::Styled => format!("{pad}\u{1b}[2m{l}\u{1b}[0m\n"),
        _ => format!("{pad}{l}\n"),
    });
    styled.collect()
}

/// Breaks text after dots, commas and spaces; lines after the first are indented.
fn wrap(text: &str, width: usize, indent: usize) -> Vec<String> {
    let mut lines = Vec::new();
    let (mut line, mut used) = (String::new(), 0);
    for token in text.split_inclusive(['.', ',', ' ']) {
        let length = token.trim_end().chars().count();
        if used > 0 && used + length > width {
            lines.push(line.trim_end().to_owned());
            line = " ".repeat(indent);
            used = indent;
        }
        line.push_str(token);
        used += token.chars().count();
    }
    lines.push(line.trim_end().to_owned());
    lines
}

fn markdown(grid: &Grid) -> String {
    let columns = grid.columns();
    let mut out = String::new();
    let mut push = |cells: Vec<String>| out.push_str(&format!("| {} |\n", cells.join(" | ")));
    push(columns.iter().map(|c| TITLES[*c].to_owned()).collect());
    let rules = columns.iter().map(|c| if RIGHT.contains(c) { "---:" } else { "---" });
    push(rules.map(str::to_owned).collect());
    for line in &grid.lines {
        let cells = line.cells();
        let bold = matches!(line.kind, LineKind::Section | LineKind::Total);
        let shown = columns.iter().map(|c| {
            let name = *c == NAME && line.kind != LineKind::Total;
            let text = if name { code(cells[*c]) } else { escaped(cells[*c]) };
            if bold && !text.is_empty() { format!("**{text}**") } else { text }
        });
        push(shown.collect());
    }
    out
}

/// Text in which markdown sees no marks of its own.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if matches!(c, '|' | '*' | '_' | '`' | '<' | '\\') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

fn code(text: &str) -> String {
    format!("`{}`", text.replace('|', "\\|").replace('`', "'"))
}
