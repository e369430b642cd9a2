//! Lines and columns of a table, what goes around it, and its markdown. Knows nothing of plans.

use comfy_table::{Table, TableStyle as Borders};

use super::TableStyle;
use super::text::{pack, text};

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

/// Where a value is from, in words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sourced {
    /// `view of`, or nothing.
    pub lead: &'static str,
    pub names: String,
    /// True if `names` is a remark and no names.
    pub remark: bool,
    pub notes: Vec<String>,
}

impl Sourced {
    pub fn text(&self) -> String {
        self.written(|names| names.to_owned())
    }

    fn written(&self, names: impl Fn(&str) -> String) -> String {
        let space = if self.lead.is_empty() { "" } else { " " };
        let mut parts = vec![format!("{}{space}{}", self.lead, names(&self.names))];
        parts.extend(self.notes.iter().cloned());
        parts.join(" · ")
    }
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
    pub source: Sourced,
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
            source: Sourced::default(),
        }
    }

    /// Every column but the last, which is made of parts.
    pub fn cells(&self) -> [&str; SOURCE] {
        [
            &self.name,
            &self.full,
            &self.local,
            &self.dtype,
            &self.scale,
            &self.bytes,
            &self.total,
        ]
    }

    pub fn indent(&self) -> usize {
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

pub(super) const COLUMNS: usize = 8;
pub(super) const TITLES: [&str; COLUMNS] =
    ["parameter", "full shape", "per rank", "dtype", "scale", "bytes", "total", "source"];
pub(super) const NAME: usize = 0;
pub(super) const SCALE: usize = 4;
pub(super) const SOURCE: usize = COLUMNS - 1;
/// Columns that are left out where they say nothing.
const OPTIONAL: [usize; 2] = [SCALE, 6];
/// Columns whose right ends line up.
pub(super) const RIGHT: [usize; 4] = [1, 2, 5, 6];
/// A source that needs no line of its own.
pub(super) const SAME: &str = "same name";

impl Grid {
    pub fn columns(&self) -> Vec<usize> {
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
            let rest: Vec<String> = rest.iter().map(|p| code(p)).collect();
            format!("## {}\n\n{}\n", code(plan), rest.join(" · "))
        }
        TableStyle::Plain | TableStyle::Styled => pack(parts, width.into()),
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
pub(super) fn footer(
    totals: &[String],
    rules: &[[String; 3]],
    style: TableStyle,
    width: u16,
) -> String {
    let width = if style == TableStyle::Markdown { usize::MAX } else { width.into() };
    let mut out = format!("\n{}", pack(totals, width));
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
        column.set_padding((0, 2));
    }
    out.push_str(&(table.trim_fmt() + "\n"));
    out
}

fn markdown(grid: &Grid) -> String {
    let columns = grid.columns();
    let mut out = String::new();
    let mut push = |cells: Vec<String>| out.push_str(&format!("| {} |\n", cells.join(" | ")));
    push(columns.iter().map(|c| TITLES[*c].to_owned()).collect());
    let rules = columns.iter().map(|c| if RIGHT.contains(c) { "---:" } else { "---" });
    push(rules.map(str::to_owned).collect());
    for line in &grid.lines {
        let bold = matches!(line.kind, LineKind::Section | LineKind::Total);
        let shown = columns.iter().map(|c| {
            let text = match *c {
                NAME if line.kind != LineKind::Total => code(&line.name),
                SOURCE if line.source.remark => line.source.text(),
                SOURCE if line.source.names.is_empty() => String::new(),
                SOURCE => line.source.written(code),
                c => escaped(line.cells()[c]),
            };
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
        if matches!(c, '|' | '*' | '`' | '<' | '\\') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

fn code(text: &str) -> String {
    format!("`{}`", text.replace('|', "\\|").replace('`', "'"))
}
