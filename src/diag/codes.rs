//! The table of diagnostic codes and what `engine explain` says about each.
//! Codes by stage: E01 script, E02 types, E03 shards, E04 inputs and live tables, E05 lowering, E06 run.

/// One code: a title in a few words and a paragraph for `engine explain`.
#[derive(Clone, Copy, Debug)]
pub struct Code {
    pub code: &'static str,
    pub title: &'static str,
    pub text: &'static str,
}

/// Every code the engine can print, in order.
pub const CODES: &[Code] = &[Code {
    code: "E0601",
    title: "a file could not be read or written",
    text: "The operating system refused a read or a write. The message names the file and the reason. Nothing of the update was published.",
}];

/// Looks a code up, with or without regard to case.
pub fn find(code: &str) -> Option<&'static Code> {
    CODES.iter().find(|c| c.code.eq_ignore_ascii_case(code))
}
