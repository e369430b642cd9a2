//! Groups repeats, so that one mistake in a loop over layers is one report.
//! Knows nothing of how a report looks.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use super::{Diagnostic, Severity, Span};

/// Diagnostics that say the same of several subjects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grouped<'a> {
    /// The first one; its message, labels, notes and hint stand for all.
    pub first: &'a Diagnostic,
    /// The first subject that any of them names.
    pub subject: Option<&'a str>,
    /// How many subjects differ; without a subject, how many messages. At least 1.
    pub count: usize,
}

/// What two diagnostics must share to be repeats. At one place messages may differ in their
/// numbers, as those of a loop over layers do; without a place they are the place.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Sameness<'a> {
    code: &'static str,
    severity: Severity,
    span: Option<Span>,
    message: Cow<'a, str>,
}

impl<'a> Sameness<'a> {
    pub fn of(diagnostic: &'a Diagnostic) -> Self {
        let message = diagnostic.message.as_str();
        Sameness {
            code: diagnostic.code,
            severity: diagnostic.severity,
            span: diagnostic.span,
            message: match diagnostic.span {
                Some(_) => without_numbers(message).into(),
                None => message.into(),
            },
        }
    }
}

impl Sameness<'_> {
    pub fn into_owned(self) -> Sameness<'static> {
        let Sameness { code, severity, span, message } = self;
        Sameness { code, severity, span, message: Cow::Owned(message.into_owned()) }
    }
}

/// The text with every run of digits as one `#`.
fn without_numbers(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_ascii_digit() {
            true if out.ends_with('#') => {}
            true => out.push('#'),
            false => out.push(c),
        }
    }
    out
}

/// Groups diagnostics by code, severity, span and kind of message, in order of first occurrence. The same report of the same subject, from another rank for instance, counts once.
pub fn group(diagnostics: &[Diagnostic]) -> Vec<Grouped<'_>> {
    let mut groups: Vec<Grouped> = Vec::new();
    let mut index: HashMap<Sameness, usize> = HashMap::new();
    let mut seen: HashSet<(usize, &str)> = HashSet::with_capacity(diagnostics.len());
    for diagnostic in diagnostics {
        let at = *index.entry(Sameness::of(diagnostic)).or_insert(groups.len());
        let subject = diagnostic.subject.as_deref();
        let is_new = seen.insert((at, subject.unwrap_or(&diagnostic.message)));
        match groups.get_mut(at) {
            None => groups.push(Grouped { first: diagnostic, subject, count: 1 }),
            Some(grouped) => {
                grouped.count += usize::from(is_new);
                grouped.subject = grouped.subject.or(subject);
            }
        }
    }
    groups
}
