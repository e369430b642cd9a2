//! Turns diagnostics into text with carets, or into one JSON object a line.
//! The only place that formats diagnostics; knows nothing of plans or tensors.

use std::ops::Range;

use annotate_snippets::{
    Annotation, AnnotationKind, Group, Level, Renderer, Snippet, normalize_untrusted_str,
};
use serde_json::json;

use super::group::{Grouped, group};
use super::{Diagnostic, FileId, Severity, SourceMap, Span};

/// The form in which diagnostics are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For a person; `color` adds ANSI styles.
    Text { color: bool },
    /// One JSON object a line: code, severity, message, file, line, column, label, notes, hint,
    /// subject, count; null where there is nothing. Labels are notes that end in their place.
    Json,
}

/// Renders diagnostics in order, repeats grouped. Every report ends in a newline; in text form
/// an empty line stands between two reports.
pub fn render(diagnostics: &[Diagnostic], sources: &SourceMap, format: Format) -> String {
    let groups = group(diagnostics);
    match format {
        Format::Json => groups.iter().map(|g| json_line(g, sources) + "\n").collect(),
        Format::Text { color } => {
            let renderer = if color { Renderer::styled() } else { Renderer::plain() };
            let reports: Vec<String> =
                groups.iter().map(|g| text_report(g, sources, &renderer) + "\n").collect();
            reports.join("\n")
        }
    }
}

/// The last line of a failed command: `error: 3 problems in the plan, nothing was written`.
/// Repeats count once; with warnings only it counts those; empty when there is neither.
pub fn summary(diagnostics: &[Diagnostic]) -> String {
    let groups = group(diagnostics);
    let number = |severity| groups.iter().filter(|g| g.first.severity == severity).count();
    let (errors, warnings) = (number(Severity::Error), number(Severity::Warning));
    match (errors, warnings) {
        (0, 0) => String::new(),
        (0, _) => format!("warning: {}", plural(warnings, "warning")),
        (_, 0) => format!("error: {}{}", plural(errors, "problem"), scope(&groups)),
        _ => format!(
            "error: {}{} ({})",
            plural(errors, "problem"),
            scope(&groups),
            plural(warnings, "warning")
        ),
    }
}

/// Where the errors lie. Once a run has begun (E06), only its own reports say what was written.
fn scope(groups: &[Grouped]) -> &'static str {
    let stage = groups.iter().filter(|g| g.first.is_error()).map(|g| stage(g.first.code)).max();
    match stage {
        Some("E06") | None => "",
        Some("E04" | "E05") => " in the plan or its inputs, nothing was written",
        Some(_) => " in the plan, nothing was written",
    }
}

/// The part of a code that names the stage: `E03` of `E0304`.
fn stage(code: &str) -> &str {
    code.get(..3).unwrap_or(code)
}

fn plural(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// `for NAME and 45 more`; nothing for a single report without a subject.
fn subject_line(grouped: &Grouped) -> Option<String> {
    let more = grouped.count - 1;
    match (grouped.subject, more) {
        (Some(subject), 0) => Some(format!("for {subject}")),
        (Some(subject), _) => Some(format!("for {subject} and {more} more")),
        (None, 0) => None,
        (None, _) => Some(format!("and {more} more like this")),
    }
}

fn json_line(grouped: &Grouped, sources: &SourceMap) -> String {
    let Diagnostic { code, severity, message, span, label, labels, notes, hint, subject: _ } =
        grouped.first;
    let labels = labels.iter().map(|l| format!("{}: {}", l.text, sources.show(l.span)));
    let notes: Vec<String> = labels.chain(notes.iter().cloned()).collect();
    json!({
        "code": code,
        "severity": severity_name(*severity),
        "message": message,
        "file": span.map(|s| sources.name(s.file)),
        "line": span.map(|s| s.line),
        "column": span.map(|s| s.column),
        "label": label,
        "notes": notes,
        "hint": hint,
        "subject": grouped.subject,
        "count": grouped.count,
    })
    .to_string()
}

fn severity_name(severity: Severity) -> &'static str {
    match severity {
        Severity::Error => "error",
        Severity::Warning => "warning",
        Severity::Note => "note",
    }
}

fn severity_level(severity: Severity) -> Level<'static> {
    match severity {
        Severity::Error => Level::ERROR,
        Severity::Warning => Level::WARNING,
        Severity::Note => Level::NOTE,
    }
}

/// One place to mark in a file.
struct Mark<'a> {
    span: Span,
    kind: AnnotationKind,
    text: Option<&'a str>,
}

fn text_report(grouped: &Grouped, sources: &SourceMap, renderer: &Renderer) -> String {
    let diagnostic = grouped.first;
    let primary = diagnostic.span.map(|span| Mark {
        span,
        kind: AnnotationKind::Primary,
        text: diagnostic.label.as_deref(),
    });
    let context = diagnostic.labels.iter().map(|label| Mark {
        span: label.span,
        kind: AnnotationKind::Context,
        text: Some(&label.text),
    });
    let (inside, outside): (Vec<Mark>, Vec<Mark>) = primary
        .into_iter()
        .chain(context)
        .partition(|mark| bytes_in_line(sources, mark.span).is_some());

    let title = severity_level(diagnostic.severity)
        .primary_title(diagnostic.message.as_str())
        .id(diagnostic.code);
    let mut report = Group::with_title(title).elements(snippets(&inside, sources));
    // A label without a place to point at still has something to say.
    if let (None, Some(label)) = (diagnostic.span, &diagnostic.label) {
        report = report.element(Level::NOTE.message(normalize_untrusted_str(label)));
    }
    if let Some(line) = subject_line(grouped) {
        report = report.element(Level::NOTE.no_name().message(normalize_untrusted_str(&line)));
    }
    let places = outside.iter().map(|mark| missing_place(mark, sources));
    for note in places.chain(diagnostic.notes.iter().cloned()) {
        report = report.element(Level::NOTE.message(normalize_untrusted_str(&note)));
    }
    if let Some(hint) = &diagnostic.hint {
        let level = Level::HELP.with_name("hint");
        report = report.element(level.message(normalize_untrusted_str(hint)));
    }
    renderer.render(&[report])
}

/// Says in words what a caret cannot show, because the file has no such place.
fn missing_place(mark: &Mark, sources: &SourceMap) -> String {
    let place = sources.show(mark.span);
    match mark.text {
        Some(text) => format!("at {place}, which is not in the file: {text}"),
        None => format!("at {place}, which is not in the file"),
    }
}

/// One snippet a file, in order of first mention.
fn snippets(marks: &[Mark], sources: &SourceMap) -> Vec<Snippet<'static, Annotation<'static>>> {
    let mut files: Vec<FileId> = Vec::new();
    for mark in marks {
        if !files.contains(&mark.span.file) {
            files.push(mark.span.file);
        }
    }
    let of_file = |file| marks.iter().filter(move |m| m.span.file == file);
    files.into_iter().map(|file| snippet(file, of_file(file), sources)).collect()
}

/// The lines from the first to the last mark of one file, and the marks in them.
fn snippet<'m>(
    file: FileId,
    marks: impl Iterator<Item = &'m Mark<'m>> + Clone,
    sources: &SourceMap,
) -> Snippet<'static, Annotation<'static>> {
    let lines = marks.clone().map(|m| m.span.line);
    let first = lines.clone().min().unwrap_or(1);
    let last = lines.max().unwrap_or(first);
    // Only these lines are handed over: a whole file a report would cost 100 000 times as much.
    let mut source = String::new();
    let mut starts = Vec::new();
    for line in first..=last {
        starts.push(source.len());
        source.push_str(sources.line(file, line).unwrap_or(""));
        source.push('\n');
    }
    let annotations = marks.filter_map(|mark| {
        let start = *starts.get((mark.span.line - first) as usize)?;
        let bytes = bytes_in_line(sources, mark.span)?;
        let label = mark.text.map(|text| normalize_untrusted_str(&text.replace('\n', " ")));
        Some(mark.kind.span(start + bytes.start..start + bytes.end).label(label))
    });
    let annotations: Vec<Annotation> = annotations.collect();
    Snippet::source(source)
        .line_start(first as usize)
        .path(normalize_untrusted_str(sources.name(file)))
        .annotations(annotations)
}

/// The bytes of a span within its line, cut at the line's end. None if the file has no such
/// line, or the column lies beyond the place just after the line's last character.
fn bytes_in_line(sources: &SourceMap, span: Span) -> Option<Range<usize>> {
    let line = sources.line(span.file, span.line)?;
    // Rhai puts the beginning of a line at column 0.
    let skip = span.column.saturating_sub(1) as usize;
    let mut ends = line.char_indices().map(|(at, _)| at).chain(std::iter::once(line.len()));
    let start = ends.nth(skip)?;
    let end = match span.len {
        0 => start,
        len => ends.nth(len as usize - 1).unwrap_or(line.len()),
    };
    Some(start..end)
}
