//! `engine bench`: updates on the GPUs at hand, beside what plain copies take.

use crate::backend::cuda::bench::{self, Baseline, Quantized, Report, SeatReport};
use crate::backend::cuda::run::Options;
use crate::backend::cuda::session::Blocks;
use crate::error::Error;
use crate::exec::{GpuPath, measure};
use crate::fp8::RecipeKind;

use super::args::{
    BenchCommand, BenchQuantizeArgs, BenchTransferArgs, Path, PlanArgs, ReportFormat,
};
use super::inputs::{self, Weights};
use super::{Failure, human, print, report};

pub(super) fn run(what: &BenchCommand) -> Result<(), Failure> {
    match what {
        BenchCommand::Transfer(args) => transfer(args),
        BenchCommand::Quantize(args) => quantize(args),
    }
}

fn transfer(args: &BenchTransferArgs) -> Result<(), Failure> {
    let inputs = PlanArgs {
        plan: args.plan.clone(),
        model: args.model.clone(),
        infer: args.infer.clone(),
        train: args.train.clone(),
        set: args.set.clone(),
        target: Vec::new(),
        expert_map: None,
        source_manifest: None,
    };
    let loaded = inputs::load(&inputs, Weights::Optional)?;
    let compiled = &loaded.compiled;
    let json = args.format == ReportFormat::Json;
    report(&compiled.notes, compiled.files(), json);
    let options = Options {
        path: match args.path {
            Path::Auto => None,
            Path::Peer => Some(GpuPath::Peer),
            Path::Nccl => Some(GpuPath::Nccl),
        },
        timeout: args.timeout,
        staging: args.staging,
        derived: false,
        gpus: args.gpus,
    };
    let blocks = match args.blocks[..] {
        [make, store] => Some(Blocks { make, store }),
        _ => None,
    };
    let fail = |error: Error| Failure { error, files: compiled.files().clone() };
    let found = measure(compiled, options, args.updates, blocks, !args.skip_unfused);
    let found = found.map_err(fail)?;
    print(&match json {
        true => serde_json::to_string(&found).unwrap_or_default() + "\n",
        false => render(&found),
    })
}

fn render(r: &Report) -> String {
    let median = r.median();
    let rate = |bytes: u64, seconds: f64| bytes as f64 / seconds.max(1e-12) / 1e9;
    let mut out = format!("path {}, {} GPUs ({})\n", r.path, r.seats.len(), r.driver);
    // On one GPU nothing crosses a wire; what is made is the measure.
    let bytes = if r.wire_bytes > 0 { r.wire_bytes } else { r.made_bytes };
    let own = rate(bytes, median);
    let row = |what: &str, bytes: u64, seconds: f64| {
        let rate = rate(bytes, seconds);
        vec![
            what.to_owned(),
            human::bytes(bytes),
            format!("{:.2} ms", seconds * 1e3),
            format!("{rate:.1}"),
            format!("{:.1} %", 100.0 * own / rate),
        ]
    };
    let one = |pick: fn(&SeatReport) -> Option<Baseline>| r.seats.iter().find_map(pick);
    let unfused = r.seats.iter().filter_map(|s| s.unfused).fold(0.0, f64::max);
    let mut rows = vec![row("update", bytes, median)];
    rows.extend(one(|s| s.copy).map(|b| row("copy engine, one copy", b.bytes, b.seconds)));
    rows.extend(one(|s| s.nccl).map(|b| row("NCCL, one message", b.bytes, b.seconds)));
    rows.extend((unfused > 0.0).then(|| row("tensor by tensor", bytes, unfused)));
    out += &human::grid(&["what", "bytes", "median", "GB/s", "update is"], rows.into_iter());
    let seats = r.seats.iter().enumerate().map(|(seat, s)| {
        vec![
            format!("{seat} {}", s.card),
            format!("{:?} {:?}", s.trainers, s.ranks),
            human::bytes(s.weights),
            human::bytes(s.staging),
            human::bytes(s.tables),
            human::bytes(s.scratch),
            format!("{:.0} µs", bench::median(&s.launches) * 1e6),
        ]
    });
    let titles = ["GPU", "ranks", "weights", "staging", "tables", "scratch", "launch"];
    out += &human::grid(&titles, seats);
    for (seat, s) in r.seats.iter().enumerate() {
        if let Some(scan) = s.scan {
            out += &format!(
                "--finite-check before would read GPU {seat}'s sources in {:.2} ms\n",
                scan * 1e3
            );
        }
    }
    out
}

fn quantize(args: &BenchQuantizeArgs) -> Result<(), Failure> {
    let kind = RecipeKind::ALL.into_iter().find(|k| k.name() == args.recipe);
    let kind = kind.ok_or_else(|| {
        let names: Vec<&str> = RecipeKind::ALL.iter().map(|k| k.name()).collect();
        let text = format!("there is no recipe `{}`", args.recipe);
        let d = crate::diag::Diagnostic::error("E0109", text);
        inputs::misused(d.hint(format!("recipes are {}", names.join(", "))))
    })?;
    let found = bench::quantize(kind, args.rows, args.cols)?;
    print(&match args.format {
        ReportFormat::Json => serde_json::to_string(&found).unwrap_or_default() + "\n",
        ReportFormat::Table => sentence(&found),
    })
}

fn sentence(q: &Quantized) -> String {
    format!(
        "{} on {}: {} x {} bf16 in {:.3} ms, {:.0} GB/s read and written, {:.1} % of a copy's {:.0}\n",
        q.recipe,
        q.card,
        q.rows,
        q.cols,
        q.seconds * 1e3,
        q.rate / 1e9,
        100.0 * q.rate / q.copy_rate,
        q.copy_rate / 1e9,
    )
}
