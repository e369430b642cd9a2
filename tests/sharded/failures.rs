//! A trainer rank whose reader hangs, fails or stops at a bug: in the amax exchange, or later.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kernelcast::backend::cpu::{FiniteCheck, Options, Rows, Shards, Sink, Strided, run};
use kernelcast::compile::Compiled;
use kernelcast::diag::Diagnostic;
use kernelcast::dtype::DType;
use kernelcast::error::Error;
use kernelcast::graph::{Bounds, Graph, Setup, build};
use kernelcast::lower::Part;
use kernelcast::memory::{Sources, Targets, update};
use kernelcast::shard::Storage;
use kernelcast::topo::Cluster;

use crate::world::{Case, Local, shards};

const RANKS: u32 = 4;
const COLUMNS: u64 = 128;
const TIMEOUT: Duration = Duration::from_millis(300);
/// Far longer than the time limit, and not for ever: the thread is joined.
const NAP: Duration = Duration::from_millis(900);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mood {
    Hangs,
    Fails,
    Panics,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum When {
    Exchange,
    Buckets,
}

/// Reads a shard, but for one row that goes wrong.
struct Moody<'a> {
    shards: Shards<'a>,
    mood: Mood,
    /// A row of the whole tensor.
    row: u64,
    hit: AtomicBool,
}

impl Rows for Moody<'_> {
    fn read(&self, storage: Storage, rows: Strided, buf: &mut [u8]) -> Result<(), Diagnostic> {
        let bytes = COLUMNS * 2;
        let last = rows.offset + (rows.rows - 1) * rows.stride + rows.row_bytes;
        if (rows.offset..last).contains(&(self.row * bytes)) {
            let first = !self.hit.swap(true, Ordering::Relaxed);
            match self.mood {
                Mood::Hangs if first => std::thread::sleep(NAP),
                Mood::Hangs => {}
                Mood::Fails => return Err(Diagnostic::error("E0414", "the shard is gone")),
                Mood::Panics => panic!("a reader with a bug"),
            }
        }
        self.shards.read(storage, rows, buf)
    }
}

pub struct Nowhere;

impl Sink for Nowhere {
    fn write(&self, _: usize, _: Part, _: Strided, _: &[u8]) -> Result<(), Diagnostic> {
        Ok(())
    }
}

/// Ranks of 300 rows: a tile with the next rank at each end, and one or two in between.
fn case() -> Case {
    let text = "b[\"p\"] = b.src(\"w\", [1200, 128]).quantize(fp8::vllm);";
    let train = format!("fsdp={RANKS}");
    let mut case = Case::new(text, &train, "tp=2").with("w", DType::Bf16, &[1200, COLUMNS]);
    case.staging = 256 << 10;
    case
}

fn graph(compiled: &Compiled, staging: u64) -> Graph {
    let bounds = Bounds::with_staging(staging);
    let graph = build(
        &compiled.program,
        compiled.program.all(),
        &Setup::for_threads(1, &Cluster::default(), bounds),
    );
    let graph = graph.expect("every tile has an owner");
    assert!(graph.buckets.len() > 1 && graph.shared.len() == 3);
    graph
}

pub fn own<'a>(compiled: &'a Compiled, local: &'a [Local], rank: u32) -> Shards<'a> {
    let program = &compiled.program;
    let held = program.sources.iter().map(|s| s.layout.held(rank)).collect();
    Shards { program, rank, tensors: local.iter().map(|l| &l.3[..]).collect(), held }
}

/// Runs an update in which `who` meets its bad row; gives the error and the time it took.
fn failed(who: u32, mood: Mood, when: When, finite: FiniteCheck) -> (Error, Duration) {
    let case = case();
    let compiled = case.compile().expect("the plan is right");
    let graph = graph(&compiled, case.staging);
    let local: Vec<Vec<Local>> =
        (0..RANKS).map(|t| shards(&compiled, &case.world, t)).collect();
    let row = match when {
        // Its first or last row, which lies in a tile of two ranks; or one of a tile of its own.
        When::Exchange if who == 0 => 299,
        When::Exchange => u64::from(who) * 300,
        When::Buckets => [10, 400, 700, 1100][who as usize],
    };
    let moody = (0..RANKS).map(|t| Moody {
        shards: own(&compiled, &local[t as usize], t),
        mood,
        row: if t == who { row } else { u64::MAX >> 16 },
        hit: AtomicBool::new(false),
    });
    let moody: Vec<Moody<'_>> = moody.collect();
    let rows: Vec<&dyn Rows> = moody.iter().map(|m| m as &dyn Rows).collect();
    let options = Options { finite, timeout: TIMEOUT, progress: &|_| {} };
    let started = Instant::now();
    let done = run(&compiled.program, &graph, &rows, &[&Nowhere, &Nowhere], &options);
    (done.expect_err("a rank went wrong"), started.elapsed())
}

#[test]
fn a_trainer_that_hangs_is_named_within_the_time_limit() {
    for when in [When::Exchange, When::Buckets] {
        for who in 0..RANKS {
            let (e, took) = failed(who, Mood::Hangs, when, FiniteCheck::During);
            let found = &e.diagnostics[0];
            assert_eq!((e.exit_code(), found.code), (3, "E0604"), "{when:?} {who}");
            let name = format!("trainer {who} did not");
            assert!(found.message.starts_with(&name), "{when:?} {who}: {}", found.message);
            // The error waits for the thread alone.
            assert!(took < NAP + 2 * TIMEOUT, "{took:?}");
        }
    }
}

#[test]
fn a_shard_that_cannot_be_read_fails_the_update_with_its_reason() {
    for when in [When::Exchange, When::Buckets] {
        for who in 0..RANKS {
            for finite in [FiniteCheck::During, FiniteCheck::Before, FiniteCheck::Allow] {
                let (e, took) = failed(who, Mood::Fails, when, finite);
                let found = &e.diagnostics[0];
                let told = (found.code, found.message.as_str());
                assert_eq!(told, ("E0414", "the shard is gone"), "{when:?} {who}");
                assert_eq!(e.exit_code(), 1);
                assert_eq!(found.notes, [format!("it was read for trainer {who}")]);
                assert!(took < 10 * TIMEOUT, "{took:?}");
            }
        }
    }
}

#[test]
fn a_reader_with_a_bug_is_an_error_that_names_its_rank() {
    for when in [When::Exchange, When::Buckets] {
        for who in 0..RANKS {
            for finite in [FiniteCheck::During, FiniteCheck::Before, FiniteCheck::Allow] {
                let (e, took) = failed(who, Mood::Panics, when, finite);
                let found = &e.diagnostics[0];
                assert_eq!((e.exit_code(), found.code), (3, "E0502"), "{when:?} {who}");
                let said = format!("trainer {who} stopped at a bug: a reader with a bug");
                assert_eq!(found.message, said, "{when:?} {finite:?}");
                assert!(took < 10 * TIMEOUT, "{took:?}");
            }
        }
    }
}

#[test]
fn the_update_after_a_failure_works() {
    failed(1, Mood::Fails, When::Exchange, FiniteCheck::During);
    case().check();
}

#[test]
fn shards_of_other_shapes_are_refused_together_with_their_ranks() {
    let case = case();
    let compiled = case.compile().expect("the plan is right");
    let local: Vec<Vec<Local>> =
        (0..RANKS).map(|t| shards(&compiled, &case.world, t)).collect();
    let sources = |rank: usize| {
        let (name, dtype, shape, bytes) = &local[rank][0];
        let mut sources = Sources::default();
        match rank {
            1 => {}
            2 => sources.add(name, *dtype, &[COLUMNS, shape[0]], bytes).expect("it fits"),
            3 => sources.add(name, DType::F16, shape, bytes).expect("it fits"),
            _ => sources.add(name, *dtype, shape, bytes).expect("it fits"),
        }
        sources
    };
    let trainers: Vec<Sources<'_>> = (0..RANKS as usize).map(sources).collect();
    let options = Options { finite: FiniteCheck::During, timeout: TIMEOUT, progress: &|_| {} };
    let refused = |trainers: &[Sources<'_>]| -> Vec<String> {
        let done = update(&compiled, trainers, &mut Targets::default(), 1 << 20, &options);
        let e = done.expect_err("sources are missing");
        assert!(e.diagnostics.iter().all(|d| d.code == "E0401"));
        e.diagnostics.into_iter().map(|d| d.message).collect()
    };
    let missing =
        |rank: u32| format!("w bf16 [300, 128] is not among the sources of trainer {rank}");
    assert_eq!(refused(&trainers), [missing(1), missing(2), missing(3)]);
    assert_eq!(refused(&trainers[..1]), ["1 trainer ranks, the plan has 4"]);
}
