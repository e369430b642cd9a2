//! `engine run`: an update from files to files, with a progress bar.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::backend::cpu::FiniteCheck;
use crate::backend::cuda::run::Launch;
use crate::compile::Compiled;
use crate::diag::Diagnostic;
use crate::error::Error;
use crate::exec::{Engine, GpuPath, Recorded, RunOptions, RunSummary, run_to_files};
use crate::load::beside;

use super::args::{Backend, Finite, Path, PlanArgs, RunArgs};
use super::inputs::{self, Loaded, Weights};
use super::signals::Signals;
use super::{Failure, human, print, report};

pub(super) fn run(args: &RunArgs) -> Result<(), Failure> {
    let loaded = inputs::load(&args.inputs, Weights::Needed)?;
    let compiled = &loaded.compiled;
    report(&compiled.notes, compiled.files(), false);
    let out = output(args, compiled)?;
    let model = loaded.model.as_ref().and_then(|m| m.checkpoint.as_ref());
    let Some(checkpoint) = model else {
        return Err(Diagnostic::error("E0413", "a run needs the model's weights")
            .hint("give --model a folder with config.json and safetensors files")
            .into());
    };
    report(checkpoint.notes(), compiled.files(), false);
    // Before signals are watched: it may wait for other processes.
    let engine = engine(args)?;
    let signals = Signals::watch()
        .map_err(|e| Diagnostic::error("E0601", format!("signals cannot be watched: {e}")))?;
    let options = RunOptions {
        engine,
        // A file run publishes nothing before its end, so one pass finds and refuses alike.
        finite: match args.finite_check {
            Finite::Before => FiniteCheck::Before,
            Finite::Auto | Finite::During => FiniteCheck::During,
            Finite::Allow => FiniteCheck::Allow,
        },
        timeout: args.timeout,
        staging: args.staging,
        force: args.force,
        stop: signals.asked(),
    };
    let bar = progress_bar(compiled.program.units.iter().map(|u| u.bytes()).sum());
    let recorded = recorded(&args.inputs, &loaded)?;
    let done = run_to_files(compiled, checkpoint, &recorded, &out, &options, &|n| bar.inc(n));
    bar.finish_and_clear();
    drop(signals);
    let fail = |error: Error| Failure { error, files: compiled.files().clone() };
    let summary = done.map_err(fail)?;
    report(&summary.notes, compiled.files(), false);
    print(&sentence(&summary))?;
    if args.verify {
        let found = crate::verify::verify_output(&out, None)?;
        let tensors = human::counted(found.tensors, "tensor");
        print(&format!("verified {tensors} with the oracle\n"))?;
    }
    Ok(())
}

/// The backend that was asked for, or the GPUs where they can be used.
fn engine(args: &RunArgs) -> Result<Engine, Failure> {
    let path = match args.path {
        Path::Auto => None,
        Path::Peer => Some(GpuPath::Peer),
        Path::Nccl => Some(GpuPath::Nccl),
    };
    let found = match args.backend {
        Backend::Cpu => None,
        Backend::Auto | Backend::Cuda => Some(Launch::find(args.timeout)),
    };
    match found {
        Some(Ok(launch)) => return Ok(Engine::Cuda { launch, path }),
        Some(Err(why)) if args.backend == Backend::Cuda || why.code != "E0605" => {
            return Err(Error::device(why).into());
        }
        Some(Err(why)) => tracing::info!(why = why.message, "no GPU is used"),
        None => {}
    }
    if path.is_some() {
        let d =
            Diagnostic::error("E0605", "--path chooses between GPUs, and this run has none");
        return Err(Error::device(d).into());
    }
    Ok(Engine::Cpu)
}

fn output(args: &RunArgs, compiled: &Compiled) -> Result<PathBuf, Failure> {
    let declared = compiled.declared.output.as_ref();
    let declared = declared.map(|p| beside(&args.inputs.plan, p));
    args.out.clone().or(declared).ok_or_else(|| {
        let d = Diagnostic::error("E0603", "no output folder is named")
            .hint("give --out DIR, or call output(path) in the plan");
        inputs::misused(d).into()
    })
}

fn recorded(args: &PlanArgs, loaded: &Loaded) -> Result<Recorded, Failure> {
    let compiled = &loaded.compiled;
    let files = compiled.files().files();
    let model = loaded.model.as_ref().map(|m| m.path.clone()).unwrap_or_default();
    Ok(Recorded {
        plan: args.plan.display().to_string(),
        files: files.map(|(name, text)| (name.to_owned(), text.to_owned())).collect(),
        model: model.canonicalize().unwrap_or(model),
        options: compiled.stages[0].options.clone(),
        target: inputs::facts(&args.target)?,
        expert_map: inputs::expert_map(args)?,
    })
}

/// Bytes, rate and time left; silent when not on a terminal.
fn progress_bar(bytes: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(bytes);
    let line = "{bar:32} {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left";
    if let Ok(style) = ProgressStyle::with_template(line) {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

fn sentence(s: &RunSummary) -> String {
    let seconds = s.elapsed.as_secs_f64();
    format!(
        "wrote {}, {} for {} to {} in {seconds:.2} s ({}/s read, staging {})\n",
        human::counted(s.params, "tensor"),
        human::bytes(s.written_bytes),
        human::counted(s.ranks as u64, "rank"),
        s.out.display(),
        human::bytes((s.read_bytes as f64 / seconds.max(1e-9)) as u64),
        human::bytes(s.staging_bytes),
    )
}
