//! What goes over HTTP: every call and every answer is one JSON object with a schema number.

use std::time::Duration;

use axum::body::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::diag::{Diagnostic, codes};

/// The version of these messages.
pub(super) const SCHEMA: u32 = 1;

/// The engine's version; processes of one run have the same.
pub(super) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The longest call, in bytes.
pub(super) const LIMIT: usize = 64 << 20;

/// How long the server holds a call for news.
pub(super) const HELD: Duration = Duration::from_secs(5);

/// How long a process whose connection broke may take to connect anew before it counts as gone.
pub(super) const GRACE: Duration = Duration::from_secs(3);

/// The same for one that only does not ask again: its host may be busy.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// The part of a call that is the same in all.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Head {
    pub schema: u32,
    pub version: String,
    pub token: String,
    pub member: usize,
    pub size: usize,
    /// Tells this process from another with the same number.
    pub instance: String,
}

/// A call, of which the head is read first.
#[derive(Serialize)]
pub(super) struct Call<'a, T> {
    #[serde(flatten)]
    pub head: &'a Head,
    pub body: &'a T,
}

/// The other half of a call.
#[derive(Deserialize)]
pub(super) struct Body<T> {
    pub body: T,
}

#[derive(Serialize, Deserialize)]
pub(super) struct Join {
    /// Where the process runs, for messages.
    pub place: String,
}

#[derive(Serialize, Deserialize)]
pub(super) struct Exchange {
    pub attempt: u64,
    pub round: String,
    pub timeout_ms: u64,
    pub payload: Value,
}

#[derive(Serialize, Deserialize)]
pub(super) struct Again {
    pub attempt: u64,
    pub timeout_ms: u64,
}

#[derive(Serialize, Deserialize)]
pub(super) struct Fail {
    pub attempt: u64,
    pub failure: Told,
}

/// Asks for what the process does not know.
#[derive(Serialize, Deserialize)]
pub(super) struct Watch {
    pub attempt: u64,
    pub failed: bool,
}

#[derive(Serialize, Deserialize)]
pub(super) struct Leave {}

/// An answer: the field that fits, or the reason why there is none.
#[derive(Serialize, Deserialize)]
pub(super) struct Answer<T> {
    pub schema: u32,
    #[serde(flatten)]
    pub is: Outcome<T>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Outcome<T> {
    Ok(T),
    Error(Told),
}

#[derive(Serialize, Deserialize)]
pub(super) struct Payloads {
    pub payloads: Vec<Value>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct Renewed {
    pub attempt: u64,
}

#[derive(Serialize, Deserialize)]
pub(super) struct Done {}

#[derive(Serialize, Deserialize)]
pub(super) struct Heard {
    pub attempt: u64,
    pub failure: Option<Told>,
    pub closed: bool,
}

/// A diagnostic without its place, which means nothing in another process.
#[derive(Serialize, Deserialize)]
pub(super) struct Told {
    pub code: String,
    pub message: String,
    pub notes: Vec<String>,
    pub hint: Option<String>,
    pub subject: Option<String>,
}

impl From<&Diagnostic> for Told {
    fn from(diagnostic: &Diagnostic) -> Told {
        Told {
            code: diagnostic.code.into(),
            message: diagnostic.message.clone(),
            notes: diagnostic.label.iter().chain(&diagnostic.notes).cloned().collect(),
            hint: diagnostic.hint.clone(),
            subject: diagnostic.subject.clone(),
        }
    }
}

impl From<Told> for Diagnostic {
    fn from(told: Told) -> Diagnostic {
        let code = codes::find(&told.code).map_or("E0604", |code| code.code);
        let mut diagnostic = Diagnostic::error(code, told.message);
        diagnostic.notes = told.notes;
        diagnostic.hint = told.hint;
        diagnostic.subject = told.subject;
        diagnostic
    }
}

/// An answer's bytes.
pub(super) fn answer<T: Serialize>(is: Outcome<T>) -> Bytes {
    let answer = Answer { schema: SCHEMA, is };
    serde_json::to_vec(&answer).expect("messages are plain JSON").into()
}

/// A call that is over the limit, in words.
pub(super) fn too_long(round: &str, bytes: usize) -> Diagnostic {
    let (mib, limit) = (bytes >> 20, LIMIT >> 20);
    let text =
        format!("the payload of `{round}` has {mib} MiB, more than the {limit} MiB allowed");
    Diagnostic::error("E0502", text)
}
