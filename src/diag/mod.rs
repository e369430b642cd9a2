//! What the engine says to a person: one `Diagnostic` struct for every stage.
//! Knows nothing of plans or tensors; `render` turns it into text or JSON.

pub mod codes;
mod group;
mod render;
mod span;

pub use group::{Grouped, Sameness, group};
pub use render::{Format, render, summary};
pub use span::{FileId, SourceMap, Span};

/// How much a diagnostic weighs. Only an error stops the pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    Note,
    Warning,
    Error,
}

/// A second place in the plan that the message speaks of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    pub span: Span,
    pub text: String,
}

/// One message: what is wrong, where, what was expected, what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// A code of [`codes::CODES`], shown in brackets and taken by `engine explain`.
    pub code: &'static str,
    pub severity: Severity,
    pub message: String,
    /// The place in a plan file; none for problems of folders, devices and the like.
    pub span: Option<Span>,
    /// Text under the caret of `span`.
    pub label: Option<String>,
    pub labels: Vec<Label>,
    pub notes: Vec<String>,
    pub hint: Option<String>,
    /// What the message is about (a parameter's full name); repeats are grouped over it.
    pub subject: Option<String>,
}

impl Diagnostic {
    /// A diagnostic of error severity.
    pub fn error(code: &'static str, message: impl Into<String>) -> Self {
        debug_assert!(codes::find(code).is_some(), "{code} is not in the table of codes");
        Diagnostic {
            code,
            severity: Severity::Error,
            message: message.into(),
            span: None,
            label: None,
            labels: Vec::new(),
            notes: Vec::new(),
            hint: None,
            subject: None,
        }
    }

    /// A diagnostic of warning severity.
    pub fn warning(code: &'static str, message: impl Into<String>) -> Self {
        Diagnostic { severity: Severity::Warning, ..Diagnostic::error(code, message) }
    }

    /// A diagnostic of note severity.
    pub fn info(code: &'static str, message: impl Into<String>) -> Self {
        Diagnostic { severity: Severity::Note, ..Diagnostic::error(code, message) }
    }

    /// Points at a place in a plan.
    pub fn at(mut self, span: Span) -> Self {
        self.span = Some(span);
        self
    }

    /// Points at a place if there is one; keeps the present place if not.
    pub fn maybe_at(mut self, span: Option<Span>) -> Self {
        self.span = span.or(self.span);
        self
    }

    /// Text under the caret.
    pub fn label(mut self, text: impl Into<String>) -> Self {
        self.label = Some(text.into());
        self
    }

    /// Marks a second place and says what it is.
    pub fn also(mut self, span: Span, text: impl Into<String>) -> Self {
        self.labels.push(Label { span, text: text.into() });
        self
    }

    /// Adds a line of context.
    pub fn note(mut self, text: impl Into<String>) -> Self {
        self.notes.push(text.into());
        self
    }

    /// Says what to do.
    pub fn hint(mut self, text: impl Into<String>) -> Self {
        self.hint = Some(text.into());
        self
    }

    /// Names what the message is about; repeats are grouped over it.
    pub fn about(mut self, subject: impl Into<String>) -> Self {
        self.subject = Some(subject.into());
        self
    }

    /// Whether this one stops the pipeline.
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }
}
