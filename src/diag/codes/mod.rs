//! The table of diagnostic codes and what `engine explain` says about each.
//! Codes by stage: E01 script, E02 types, E03 shards, E04 inputs and live tables, E05 lowering,
//! E06 run.

mod inputs;
mod run;
mod script;
mod shards;
mod types;

/// One code: a title in a few words and a paragraph for `engine explain`.
#[derive(Clone, Copy, Debug)]
pub struct Code {
    /// `E` and four digits; the first two name the stage.
    pub code: &'static str,
    /// What is wrong, in a few words, without a full stop.
    pub title: &'static str,
    /// What it means and what to do; lines of at most 88 columns, no newline at the end.
    pub text: &'static str,
}

const STAGES: [&[Code]; 5] =
    [script::CODES, types::CODES, shards::CODES, inputs::CODES, run::CODES];

/// Every code the engine can print, in order.
pub const CODES: &[Code] = &join();

const COUNT: usize = {
    let (mut count, mut stage) = (0, 0);
    while stage < STAGES.len() {
        count += STAGES[stage].len();
        stage += 1;
    }
    count
};

/// The stages' tables one after the other, at compile time.
const fn join() -> [Code; COUNT] {
    let mut codes = [Code { code: "", title: "", text: "" }; COUNT];
    let (mut filled, mut stage) = (0, 0);
    while stage < STAGES.len() {
        let mut index = 0;
        while index < STAGES[stage].len() {
            codes[filled] = STAGES[stage][index];
            filled += 1;
            index += 1;
        }
        stage += 1;
    }
    codes
}

/// Looks a code up, with or without regard to case.
pub fn find(code: &str) -> Option<&'static Code> {
    CODES.iter().find(|c| c.code.eq_ignore_ascii_case(code))
}
