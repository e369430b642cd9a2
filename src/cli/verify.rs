//! `engine verify`: recompute a run's output with the oracle.

use crate::verify::verify_output;

use super::args::{ReportFormat, VerifyArgs};
use super::{Failure, human, print};

pub(super) fn run(args: &VerifyArgs) -> Result<(), Failure> {
    let found = verify_output(&args.out, args.model.as_deref())?;
    let text = match args.format {
        ReportFormat::Json => {
            serde_json::json!({ "schema": 1, "verified": found, "mismatches": [] }).to_string()
        }
        ReportFormat::Table => format!(
            "verified: {} of {}, {}, every byte as the oracle makes it",
            human::counted(found.tensors, "tensor"),
            human::counted(found.ranks, "rank"),
            human::bytes(found.bytes)
        ),
    };
    print(&(text + "\n"))
}
