//! The library's error: diagnostics, and the kind that decides the exit status.

use crate::diag::Diagnostic;

/// What kind of failure ended a call; each has its exit status (design: 1 to 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The plan or an input was refused, or an I/O operation failed. Nothing was written.
    Refused,
    /// The command line makes no sense.
    Usage,
    /// A device or a peer failed, or a wait ran out of time.
    Device,
    /// Verification found bytes that differ.
    Mismatch,
}

/// An error of the library: every problem found, together.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{}", diagnostics.first().map_or("no message", |d| d.message.as_str()))]
pub struct Error {
    pub kind: ErrorKind,
    pub diagnostics: Vec<Diagnostic>,
}

/// The library's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A refusal that carries all problems.
    pub fn refused(diagnostics: Vec<Diagnostic>) -> Self {
        Error { kind: ErrorKind::Refused, diagnostics }
    }

    /// A device, peer or time-out failure.
    pub fn device(diagnostic: Diagnostic) -> Self {
        Error { kind: ErrorKind::Device, diagnostics: vec![diagnostic] }
    }

    /// The same error as a failure of devices or peers, if its codes are theirs.
    pub fn of_device(mut self) -> Self {
        let device = ["E0502", "E0604", "E0605", "E0610", "E0611"];
        if self.diagnostics.iter().any(|d| device.contains(&d.code)) {
            self.kind = ErrorKind::Device;
        }
        self
    }

    /// The exit status of a process that ends with this error.
    pub fn exit_code(&self) -> u8 {
        match self.kind {
            ErrorKind::Refused => 1,
            ErrorKind::Usage => 2,
            ErrorKind::Device => 3,
            ErrorKind::Mismatch => 4,
        }
    }
}

impl From<Diagnostic> for Error {
    fn from(diagnostic: Diagnostic) -> Self {
        Error::refused(vec![diagnostic])
    }
}
