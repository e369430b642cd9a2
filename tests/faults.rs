//! What goes wrong during an update: a clear error in bounded time, and the next update works.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kernelcast::backend::cpu::{FiniteCheck, Options, Rows, Sink, Strided, run};
use kernelcast::compile::{CompileInputs, Compiled, ModelInput, compile};
use kernelcast::diag::Diagnostic;
use kernelcast::dtype::DType;
use kernelcast::error::ErrorKind;
use kernelcast::graph::{Bounds, Graph, Setup, build, check};
use kernelcast::lower::Part;
use kernelcast::memory::Sources;
use kernelcast::script::{Limits, NoModules};
use kernelcast::shard::Storage;
use kernelcast::topo::{Cluster, InferMesh, TrainMesh};

/// A matrix of 4096 x 1024, cut over two ranks and quantized.
fn compiled(bytes: &[u8]) -> Compiled {
    let mut sources = Sources::default();
    sources.add("w", DType::Bf16, &[4096, 1024], bytes).unwrap();
    let compiled = compile(CompileInputs {
        name: "plan",
        text: r#"at("")["w"] = at("").src("w", [4096, 1024]).shard(0, tp).quantize(fp8::vllm);"#,
        modules: Rc::new(NoModules),
        model: Some(ModelInput {
            config: serde_json::json!({}),
            catalog: Some(sources.catalog()),
        }),
        open_model: &|_| Err(Diagnostic::error("E0417", "no input").into()),
        mesh: Some(InferMesh::parse("tp=2").unwrap()),
        train: TrainMesh::single(),
        placements: None,
        options: BTreeMap::new(),
        target: BTreeMap::new(),
        experts: BTreeMap::new(),
        limits: Limits::default(),
    });
    compiled.map_err(|e| e.error.diagnostics).unwrap()
}

fn ones() -> Vec<u8> {
    0x3F80u16.to_le_bytes().repeat(4096 * 1024)
}

fn graph(compiled: &Compiled) -> Graph {
    // Small buckets, so that several are in flight.
    let cluster = Cluster::default();
    let setup = Setup::new(1, &cluster, Bounds::with_staging(1 << 20));
    let graph = build(&compiled.program, compiled.program.all(), &setup);
    let graph = graph.unwrap();
    check(&compiled.program, compiled.program.all(), &graph).unwrap();
    assert!(graph.buckets.len() > 2);
    graph
}

struct Memory<'a> {
    bytes: &'a [u8],
    fails: AtomicBool,
}

/// A reader with a bug.
struct Panics;

impl Rows for Panics {
    fn read(&self, _: Storage, _: Strided, _: &mut [u8]) -> Result<(), Diagnostic> {
        panic!("a reader with a bug")
    }
}

impl Rows for Memory<'_> {
    fn read(&self, _: Storage, rows: Strided, buf: &mut [u8]) -> Result<(), Diagnostic> {
        if self.fails.load(Ordering::Relaxed) {
            return Err(Diagnostic::error("E0414", "the file ends early"));
        }
        for (i, row) in buf.chunks_exact_mut(rows.row_bytes as usize).enumerate() {
            let at = (rows.offset + i as u64 * rows.stride) as usize;
            row.copy_from_slice(&self.bytes[at..at + rows.row_bytes as usize]);
        }
        Ok(())
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Fine,
    Fails,
    Hangs,
    Panics,
}

struct Rank {
    mood: Mood,
    written: Mutex<u64>,
}

impl Sink for Rank {
    fn write(&self, _: usize, _: Part, _: Strided, bytes: &[u8]) -> Result<(), Diagnostic> {
        match self.mood {
            Mood::Fails => return Err(Diagnostic::error("E0601", "the disk is full")),
            // Far longer than the time limit below, and not for ever: the thread is joined.
            Mood::Hangs => std::thread::sleep(Duration::from_millis(1500)),
            Mood::Panics => panic!("a sink with a bug"),
            Mood::Fine => {}
        }
        *self.written.lock().unwrap() += bytes.len() as u64;
        Ok(())
    }
}

/// Runs one update; gives the error, or the bytes that each rank took.
fn update(
    bytes: &[u8],
    moods: [Mood; 2],
    finite: FiniteCheck,
    reads_fail: bool,
) -> Result<[u64; 2], kernelcast::error::Error> {
    let compiled = compiled(bytes);
    let graph = graph(&compiled);
    let rows = Memory { bytes, fails: AtomicBool::new(reads_fail) };
    let ranks = moods.map(|mood| Rank { mood, written: Mutex::new(0) });
    let sinks: Vec<&dyn Sink> = ranks.iter().map(|r| r as &dyn Sink).collect();
    let options = Options { finite, timeout: Duration::from_millis(300), progress: &|_| {} };
    run(&compiled.program, &graph, &[&rows], &sinks, &options)?;
    Ok(ranks.map(|r| *r.written.lock().unwrap()))
}

const RANK_BYTES: u64 = 2048 * 1024 + 16 * 8 * 4;

#[test]
fn an_update_reaches_both_ranks() {
    let got = update(&ones(), [Mood::Fine; 2], FiniteCheck::During, false).unwrap();
    assert_eq!(got, [RANK_BYTES; 2]);
}

#[test]
fn a_rank_that_hangs_is_named_within_the_time_limit() {
    let e = update(&ones(), [Mood::Fine, Mood::Hangs], FiniteCheck::During, false).unwrap_err();
    assert_eq!((e.kind, e.exit_code()), (ErrorKind::Device, 3));
    assert_eq!(e.diagnostics[0].code, "E0604");
    let message = &e.diagnostics[0].message;
    assert!(message.starts_with("rank 1 did not"), "{message}");
    an_update_reaches_both_ranks();
}

#[test]
fn a_rank_that_cannot_write_fails_the_update_with_its_reason() {
    let e = update(&ones(), [Mood::Fails, Mood::Fine], FiniteCheck::During, false).unwrap_err();
    assert_eq!((e.exit_code(), e.diagnostics[0].message.as_str()), (1, "the disk is full"));
    an_update_reaches_both_ranks();
}

#[test]
fn a_read_that_fails_ends_the_update_with_its_reason() {
    let e = update(&ones(), [Mood::Fine; 2], FiniteCheck::During, true).unwrap_err();
    assert_eq!((e.exit_code(), e.diagnostics[0].code), (1, "E0414"));
}

/// NaN at [130, 5] and -inf at [1000, 0].
fn poisoned() -> Vec<u8> {
    let mut bytes = ones();
    for (at, bits) in [((130 * 1024 + 5) * 2, 0x7FC0u16), (1000 * 1024 * 2, 0xFF80)] {
        bytes[at..at + 2].copy_from_slice(&bits.to_le_bytes());
    }
    bytes
}

#[test]
fn non_finite_weights_are_refused_with_count_index_and_kind() {
    for finite in [FiniteCheck::Before, FiniteCheck::During] {
        let e = update(&poisoned(), [Mood::Fine; 2], finite, false).unwrap_err();
        assert_eq!((e.exit_code(), e.diagnostics.len()), (1, 1));
        assert_eq!(e.diagnostics[0].code, "E0602");
        assert_eq!(
            e.diagnostics[0].message,
            "w has 2 non-finite values, the first NaN at [130, 5]"
        );
    }
}

#[test]
fn non_finite_weights_are_let_through_when_asked_and_reported() {
    let bytes = poisoned();
    let compiled = compiled(&bytes);
    let graph = graph(&compiled);
    let rows = Memory { bytes: &bytes, fails: AtomicBool::new(false) };
    let ranks = [Mood::Fine; 2].map(|mood| Rank { mood, written: Mutex::new(0) });
    let sinks: Vec<&dyn Sink> = ranks.iter().map(|r| r as &dyn Sink).collect();
    let options = Options {
        finite: FiniteCheck::Allow,
        timeout: Duration::from_secs(10),
        progress: &|_| {},
    };
    let report = run(&compiled.program, &graph, &[&rows], &sinks, &options).unwrap();
    assert_eq!(report.non_finite.len(), 1);
    assert_eq!((report.non_finite[0].count, report.non_finite[0].kind), (2, "NaN"));
    assert_eq!(*ranks[1].written.lock().unwrap(), RANK_BYTES);
}

#[test]
fn a_panic_in_either_side_is_an_error_and_never_success() {
    let bytes = ones();
    let compiled = compiled(&bytes);
    let graph = graph(&compiled);
    let options = Options {
        finite: FiniteCheck::During,
        timeout: Duration::from_secs(10),
        progress: &|_| {},
    };
    let memory = Memory { bytes: &bytes, fails: AtomicBool::new(false) };
    for (rows, mood) in [(&Panics as &dyn Rows, Mood::Fine), (&memory, Mood::Panics)] {
        let ranks = [mood; 2].map(|mood| Rank { mood, written: Mutex::new(0) });
        let sinks: Vec<&dyn Sink> = ranks.iter().map(|r| r as &dyn Sink).collect();
        let e = run(&compiled.program, &graph, &[rows], &sinks, &options).unwrap_err();
        assert_eq!((e.exit_code(), e.diagnostics[0].code), (3, "E0502"));
    }
}
