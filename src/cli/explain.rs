//! `engine explain CODE`: what a code means and what to do.

use crate::diag::{Diagnostic, codes};

use super::inputs::misused;
use super::{Failure, print};

pub(super) fn run(code: &str) -> Result<(), Failure> {
    match codes::find(code) {
        Some(c) => print(&format!("{}: {}\n\n{}\n", c.code, c.title, c.text)),
        None => {
            let known: Vec<&str> = codes::CODES.iter().map(|c| c.code).collect();
            let d = Diagnostic::error("E0109", format!("there is no code `{code}`"))
                .hint(format!("codes are {}", known.join(" ")));
            Err(misused(d).into())
        }
    }
}
