//! Groups repeats, so that one mistake in a loop over layers is one report.
//! Knows nothing of how a report looks.

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

/// What two diagnostics must share to be repeats; without a span the message is the place.
#[derive(PartialEq, Eq, Hash)]
struct Key<'a> {
    code: &'static str,
    severity: Severity,
    span: Option<Span>,
    message: Option<&'a str>,
}

impl<'a> Key<'a> {
    fn of(diagnostic: &'a Diagnostic) -> Self {
        let message = diagnostic.span.is_none().then_some(diagnostic.message.as_str());
        Key {
            code: diagnostic.code,
            severity: diagnostic.severity,
            span: diagnostic.span,
            message,
        }
    }
}

/// Groups diagnostics by code, severity and span (without one: by message), in order of first
/// occurrence. The same report of the same subject, from another rank for instance, counts once.
pub fn group(diagnostics: &[Diagnostic]) -> Vec<Grouped<'_>> {
    let mut groups: Vec<Grouped> = Vec::new();
    let mut index: HashMap<Key, usize> = HashMap::new();
    let mut seen: HashSet<(usize, &str)> = HashSet::with_capacity(diagnostics.len());
    for diagnostic in diagnostics {
        let at = *index.entry(Key::of(diagnostic)).or_insert(groups.len());
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
