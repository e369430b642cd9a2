//! The command line: text to arguments, arguments to library calls, results to the terminal.

mod args;
mod bench;
mod check;
mod dry_run;
mod explain;
mod human;
mod inputs;
mod run;
mod shape_table;
mod signals;
mod simulate;
mod verify;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use clap::Parser;

use crate::backend::cuda::nccl::without_graph_mixing;
use crate::diag::{Diagnostic, Format, SourceMap, render, summary};
use crate::error::{Error, ErrorKind};

pub use args::Args;
use args::Command;
pub use shape_table::{PLAIN_WIDTH, TableStyle, render_table};

/// What a command gives back: an error with the plan files that it points into.
pub(crate) struct Failure {
    pub error: Error,
    pub files: SourceMap,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure { error, files: SourceMap::default() }
    }
}

impl From<Diagnostic> for Failure {
    fn from(d: Diagnostic) -> Self {
        Error::from(d).into()
    }
}

impl From<crate::compile::CompileError> for Failure {
    fn from(e: crate::compile::CompileError) -> Self {
        Failure { error: e.error, files: e.files }
    }
}

/// Parses the command line and runs it; the exit status says how it ended.
pub fn main() -> ExitCode {
    without_graph_mixing();
    let args = Args::parse();
    signals::report_large_files();
    let json = args.command.json();
    if !json {
        show_prints();
    }
    let result = match &args.command {
        Command::DryRun(a) => dry_run::run(a),
        Command::Run(a) => run::run(a),
        Command::Check(a) => check::run(a),
        Command::Verify(a) => verify::run(a),
        Command::Simulate(a) => simulate::run(a),
        Command::Bench { what } => bench::run(what),
        Command::Explain { code } => explain::run(code),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let line = last_line(&failure.error);
            report_with(&failure.error.diagnostics, &failure.files, json, &line);
            ExitCode::from(failure.error.exit_code())
        }
    }
}

/// True if standard output is a terminal that wants escape codes.
pub(crate) fn styled() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none()
}

/// Shows what a plan prints, on standard error; `RUST_LOG` asks for more.
fn show_prints() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("plan=info"));
    let lines = tracing_subscriber::fmt().with_writer(std::io::stderr).with_env_filter(filter);
    // A host program may have set its own.
    let _ = lines.without_time().with_level(false).with_target(false).try_init();
}

/// How a failed command ends: a command line that makes no sense is not the plan's fault.
fn last_line(error: &Error) -> String {
    match error.kind {
        ErrorKind::Usage => {
            "error: nothing was done; `--help` lists what is accepted".to_owned()
        }
        _ => summary(&error.diagnostics),
    }
}

/// Prints diagnostics on standard error.
pub(crate) fn report(diagnostics: &[Diagnostic], files: &SourceMap, json: bool) {
    report_with(diagnostics, files, json, &summary(diagnostics));
}

fn report_with(diagnostics: &[Diagnostic], files: &SourceMap, json: bool, line: &str) {
    let mut err = std::io::stderr().lock();
    let color = err.is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let format = if json { Format::Json } else { Format::Text { color } };
    // Nobody is left to tell if standard error is closed.
    let _ = write!(err, "{}", render(diagnostics, files, format));
    if !json && !line.is_empty() {
        let _ = writeln!(err, "\n{line}");
    }
}

/// Prints a result on standard output; a closed pipe is not an error, a full disk is.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            let why = format!("cannot write to standard output: {e}");
            Err(Diagnostic::error("E0601", why).into())
        }
        _ => Ok(()),
    }
}
