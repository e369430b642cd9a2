//! Runs the script again with a trap on one event, to see through which calls it was reached.

use std::collections::HashSet;

use crate::diag::{Diagnostic, Sameness, Span};

use super::state::State;
use super::{Request, run, take};

/// At most this many distinct messages get a call chain; each costs one more evaluation.
const MAX_REPLAYS: usize = 12;

/// Takes the problems of an evaluation out of its state and adds their call chains.
pub(super) fn with_call_chains(request: &Request<'_>, state: &mut State) -> Vec<Diagnostic> {
    let problems = std::mem::take(&mut state.problems);
    chains(request, problems)
}

/// Adds to the first diagnostic of each kind the calls that led to its event.
pub(super) fn chains(
    request: &Request<'_>,
    problems: Vec<(Diagnostic, Option<u32>)>,
) -> Vec<Diagnostic> {
    let mut seen = HashSet::new();
    let mut out = Vec::with_capacity(problems.len());
    for (mut d, event) in problems {
        let first = seen.insert(Sameness::of(&d).into_owned());
        if let Some(event) = event.filter(|_| first && seen.len() <= MAX_REPLAYS) {
            d = super::errors::called(d, chain(request, event));
        }
        out.push(d);
    }
    out
}

/// The script functions that were entered when the event happened, innermost first.
fn chain(request: &Request<'_>, event: u32) -> Vec<(String, Span)> {
    let (state, failure) = run(request, Some(event));
    drop(take(state));
    failure.map_or_else(Vec::new, |f| f.calls)
}
