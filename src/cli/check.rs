//! `engine check`: the plan against what a receiver holds.

use crate::check::check;
use crate::diag::Diagnostic;
use crate::error::Error;
use crate::io::ReceiverManifest;

use super::args::{CheckArgs, ReportFormat};
use super::inputs::{self, Weights};
use super::{Failure, print, report};

pub(super) fn run(args: &CheckArgs) -> Result<(), Failure> {
    let loaded = inputs::load(&args.inputs, Weights::Optional)?;
    let compiled = &loaded.compiled;
    let mut manifests = Vec::new();
    for path in &args.manifest {
        manifests.push((path.display().to_string(), ReceiverManifest::read(path)?));
    }
    let fail = |error: Error| Failure { error, files: compiled.files().clone() };
    let (found, problems) = check(compiled, &manifests).map_err(fail)?;
    let json = args.format == ReportFormat::Json;
    if problems.iter().any(Diagnostic::is_error) {
        return Err(fail(Error::refused(problems)));
    }
    let notes: Vec<Diagnostic> = compiled.notes.iter().cloned().chain(problems).collect();
    report(&notes, compiled.files(), json);
    let text = if json {
        serde_json::json!({
            "schema": 1,
            "plan_digest": compiled.digest,
            "matched": found,
        })
        .to_string()
    } else {
        let ranks: Vec<String> = found.ranks.iter().map(u64::to_string).collect();
        format!(
            "fits: {} parameters and {} buffers written, {} derived, {} kept (rank {})",
            found.parameters,
            found.buffers,
            found.derived,
            found.kept,
            ranks.join(", ")
        )
    };
    print(&(text + "\n"))
}
