//! Runs a graph: one thread for the trainer rank, one for each inference rank, channels between.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, SendTimeoutError, Sender, bounded};
use rayon::prelude::*;

use crate::diag::Diagnostic;
use crate::error::{Error, Result};
use crate::graph::{Bucket, Chunk, Graph, Step};
use crate::lower::{Part, Program, ProgramSource};
use crate::shard::Storage;

use super::finite::{NonFinite, scan};
use super::{Rows, Sink, eval};

/// When NaN and infinity are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FiniteCheck {
    /// All sources are read first; nothing is written if one is not finite.
    Before,
    /// In the pass that reads them; the update fails, and what it wrote must not be used.
    During,
    /// They are let through and reported.
    Allow,
}

/// How an update is run.
pub struct Options<'a> {
    pub finite: FiniteCheck,
    /// Time limit of every wait for another rank.
    pub timeout: Duration,
    /// Called with the bytes of each bucket that has been made.
    pub progress: &'a (dyn Fn(u64) + Sync),
}

/// What an update did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Bytes that left the trainer rank, each counted once for each rank that took it.
    pub sent_bytes: u64,
    /// Bytes that the trainer rank made.
    pub made_bytes: u64,
    /// What `FiniteCheck::Allow` let through.
    pub non_finite: Vec<NonFinite>,
}

/// A bucket's bytes on their way; the last rank to let go hands the memory back.
struct Load {
    bytes: Vec<u8>,
    home: Sender<Vec<u8>>,
}

impl Drop for Load {
    fn drop(&mut self) {
        // The trainer may be gone already; the memory then just goes.
        let _ = self.home.try_send(std::mem::take(&mut self.bytes));
    }
}

type Message = (usize, Arc<Load>);

/// What all threads of an update share.
struct Shared<'a> {
    program: &'a Program,
    graph: &'a Graph,
    rows: &'a dyn Rows,
    options: &'a Options<'a>,
    stop: AtomicBool,
    /// The first failure; later ones are its echoes.
    failure: Mutex<Option<Failure>>,
    /// Units in which something that is not finite was seen.
    suspects: Mutex<BTreeSet<usize>>,
}

enum Failure {
    Refused(Diagnostic),
    Device(Diagnostic),
    NonFinite,
}

/// Runs a graph to its end or to its first failure.
///
/// # Errors
/// Non-finite values (E0602, every tensor that has some), a failed read or write, a rank that
/// did not answer in time (E0604).
pub fn run(
    program: &Program,
    graph: &Graph,
    rows: &dyn Rows,
    sinks: &[&dyn Sink],
    options: &Options<'_>,
) -> Result<Report> {
    if options.finite == FiniteCheck::Before {
        refuse(scan(rows, &all_sources(program))?)?;
    }
    let shared = Shared {
        program,
        graph,
        rows,
        options,
        stop: AtomicBool::new(false),
        failure: Mutex::new(None),
        suspects: Mutex::new(BTreeSet::new()),
    };
    let mut report = Report::default();
    std::thread::scope(|scope| {
        let mut wires = Vec::new();
        for (rank, sink) in sinks.iter().enumerate() {
            let (to, from) = bounded::<Message>(2);
            wires.push(to);
            let shared = &shared;
            scope.spawn(move || {
                let name = format!("rank {}", shared.program.ranks[rank].rank);
                guarded(shared, &name, || inference_rank(shared, rank, *sink, &from));
            });
        }
        guarded(&shared, "trainer 0", || report = trainer_rank(&shared, wires));
    });
    finish(shared, report)
}

/// A panic is a bug, of the engine or of a reader or sink that it was given: the update fails.
fn guarded(shared: &Shared<'_>, who: &str, work: impl FnOnce()) {
    let Err(panic) = catch_unwind(AssertUnwindSafe(work)) else { return };
    let said = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    let said = said.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
    let d = Diagnostic::error("E0502", format!("{who} stopped at a bug: {said}"));
    shared.fail(Failure::Device(d));
}

fn finish(shared: Shared<'_>, mut report: Report) -> Result<Report> {
    let failure = shared.failure.into_inner().unwrap_or_else(|e| e.into_inner());
    let suspects = shared.suspects.into_inner().unwrap_or_else(|e| e.into_inner());
    match failure {
        Some(Failure::Refused(d)) => return Err(d.into()),
        Some(Failure::Device(d)) => return Err(Error::device(d)),
        Some(Failure::NonFinite) => {
            refuse(scan(shared.rows, &all_sources(shared.program))?)?;
            let name = suspects.first().map_or("", |u| shared.program.units[*u].name.as_str());
            return Err(Diagnostic::error(
                "E0602",
                format!("{name} is not finite, though its sources are"),
            )
            .note("a cast or a sum left the range of its type")
            .about(name)
            .into());
        }
        None => {}
    }
    if !suspects.is_empty() {
        let sources = sources_of(shared.program, &suspects);
        report.non_finite = scan(shared.rows, &sources)?;
    }
    Ok(report)
}

fn all_sources(program: &Program) -> Vec<(u32, &ProgramSource)> {
    program.sources.iter().enumerate().map(|(i, s)| (i as u32, s)).collect()
}

fn sources_of<'a>(
    program: &'a Program,
    units: &BTreeSet<usize>,
) -> Vec<(u32, &'a ProgramSource)> {
    let mut ids = BTreeSet::new();
    for unit in units {
        for piece in &program.units[*unit].pieces {
            piece.expr.views(&mut |view| {
                if let Storage::Source(id) = view.storage {
                    ids.insert(id);
                }
            });
        }
    }
    ids.into_iter().map(|i| (i, &program.sources[i as usize])).collect()
}

fn refuse(found: Vec<NonFinite>) -> Result<()> {
    if found.is_empty() {
        return Ok(());
    }
    let list = found.iter().map(|n| {
        Diagnostic::error("E0602", n.message())
            .about(&n.tensor)
            .hint("--finite-check allow lets such values through, and reports them")
    });
    Err(Error::refused(list.collect()))
}

impl Shared<'_> {
    fn fail(&self, failure: Failure) {
        let mut slot = self.failure.lock().unwrap_or_else(|e| e.into_inner());
        slot.get_or_insert(failure);
        self.stop.store(true, Ordering::Release);
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn late(&self, who: &str, step: &str) -> Failure {
        Failure::Device(
            Diagnostic::error(
                "E0604",
                format!("{who} did not {step} within {} s", self.options.timeout.as_secs_f64()),
            )
            .hint("--timeout sets the limit of every wait"),
        )
    }
}

fn trainer_rank(shared: &Shared<'_>, wires: Vec<Sender<Message>>) -> Report {
    let largest = shared.graph.buckets.iter().map(|b| b.bytes).max().unwrap_or(0) as usize;
    let slots = (shared.graph.staging_bytes / largest.max(1) as u64).max(1) as usize;
    let (home, free) = bounded::<Vec<u8>>(slots);
    for _ in 0..slots {
        let _ = home.try_send(Vec::new());
    }
    let mut report = Report::default();
    let mut load: Option<Arc<Load>> = None;
    for step in &shared.graph.trainer {
        if shared.stopped() {
            break;
        }
        let done = match *step {
            Step::Launch { bucket } => {
                drop(load.take());
                launch(shared, bucket, &free, &home).map(|l| {
                    report.made_bytes += shared.graph.buckets[bucket].bytes;
                    (shared.options.progress)(shared.graph.buckets[bucket].bytes);
                    load = Some(l);
                })
            }
            Step::Send { bucket, to } => match &load {
                Some(l) => send(shared, &wires[to], bucket, to, Arc::clone(l)).map(|()| {
                    report.sent_bytes += bytes_for(shared, bucket, to);
                }),
                None => Ok(()),
            },
            _ => Ok(()),
        };
        if let Err(failure) = done {
            shared.fail(failure);
            break;
        }
    }
    report
}

/// Bytes of a bucket's chunks that a rank takes.
fn bytes_for(shared: &Shared<'_>, bucket: usize, rank: usize) -> u64 {
    let units = &shared.program.units;
    shared.graph.buckets[bucket]
        .chunks
        .iter()
        .map(|c| {
            c.bytes() * units[c.unit].receivers.iter().filter(|r| r.0 == rank).count() as u64
        })
        .sum()
}

/// Makes a bucket's chunks, in parallel, in staging memory that no rank still reads.
fn launch(
    shared: &Shared<'_>,
    index: usize,
    free: &Receiver<Vec<u8>>,
    home: &Sender<Vec<u8>>,
) -> std::result::Result<Arc<Load>, Failure> {
    let bucket = &shared.graph.buckets[index];
    let mut bytes = match wait(shared, free) {
        Ok(bytes) => bytes,
        Err(RecvTimeoutError::Timeout) => {
            return Err(shared.late("an inference rank", &format!("let go of bucket {index}")));
        }
        Err(RecvTimeoutError::Disconnected) => return Err(shared.late("a rank", "answer")),
    };
    bytes.resize(bucket.bytes as usize, 0);
    let mut jobs: Vec<(&Chunk, &mut [u8])> = Vec::with_capacity(bucket.chunks.len());
    let mut rest = bytes.as_mut_slice();
    for chunk in &bucket.chunks {
        let (mine, others) = rest.split_at_mut(chunk.bytes() as usize);
        jobs.push((chunk, mine));
        rest = others;
    }
    let made: std::result::Result<Vec<bool>, Diagnostic> =
        jobs.into_par_iter().map(|(chunk, out)| make(shared, chunk, out)).collect();
    let finite = made.map_err(Failure::Refused)?;
    note_suspects(shared, bucket, &finite)?;
    Ok(Arc::new(Load { bytes, home: home.clone() }))
}

/// Waits in short turns, so that a failure elsewhere ends the wait.
fn wait<T>(
    shared: &Shared<'_>,
    from: &Receiver<T>,
) -> std::result::Result<T, RecvTimeoutError> {
    let deadline = Instant::now() + shared.options.timeout;
    loop {
        match from.recv_timeout(Duration::from_millis(50)) {
            Err(RecvTimeoutError::Timeout) if shared.stopped() => {
                return Err(RecvTimeoutError::Disconnected);
            }
            Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => {}
            other => return other,
        }
    }
}

fn note_suspects(
    shared: &Shared<'_>,
    bucket: &Bucket,
    finite: &[bool],
) -> std::result::Result<(), Failure> {
    let bad = bucket.chunks.iter().zip(finite).filter(|(_, fine)| !**fine).map(|(c, _)| c.unit);
    let mut suspects = shared.suspects.lock().unwrap_or_else(|e| e.into_inner());
    suspects.extend(bad);
    if suspects.is_empty() || shared.options.finite == FiniteCheck::Allow {
        return Ok(());
    }
    Err(Failure::NonFinite)
}

/// Makes one chunk: values (or codes), then scales. False if something read is not finite.
fn make(
    shared: &Shared<'_>,
    chunk: &Chunk,
    out: &mut [u8],
) -> std::result::Result<bool, Diagnostic> {
    let unit = &shared.program.units[chunk.unit];
    let pieces = crate::shard::crop_pieces(&unit.pieces, &chunk.window);
    let len = &chunk.window.len;
    let inputs = eval::Inputs::new(shared.rows);
    let (values, scales) = out.split_at_mut(chunk.value_bytes as usize);
    match unit.quant {
        Some(q) => eval::quantized(&inputs, &pieces, len, q.scales, values, scales)?,
        None => eval::values(&inputs, &pieces, len, unit.dtype, values)?,
    }
    Ok(inputs.all_finite())
}

fn send(
    shared: &Shared<'_>,
    wire: &Sender<Message>,
    bucket: usize,
    to: usize,
    load: Arc<Load>,
) -> std::result::Result<(), Failure> {
    let rank = shared.program.ranks[to].rank;
    let deadline = Instant::now() + shared.options.timeout;
    let mut message = (bucket, load);
    loop {
        match wire.send_timeout(message, Duration::from_millis(50)) {
            Ok(()) => return Ok(()),
            Err(SendTimeoutError::Timeout(back)) => {
                if shared.stopped() || Instant::now() > deadline {
                    return Err(
                        shared.late(&format!("rank {rank}"), &format!("take bucket {bucket}"))
                    );
                }
                message = back;
            }
            Err(SendTimeoutError::Disconnected(_)) => {
                return Err(
                    shared.late(&format!("rank {rank}"), &format!("take bucket {bucket}"))
                );
            }
        }
    }
}

fn inference_rank(shared: &Shared<'_>, rank: usize, sink: &dyn Sink, from: &Receiver<Message>) {
    let mut load: Option<Arc<Load>> = None;
    for step in &shared.graph.ranks[rank] {
        let done = match *step {
            Step::Recv { bucket } => match wait(shared, from) {
                Ok((got, l)) if got == bucket => {
                    load = Some(l);
                    Ok(())
                }
                Ok((got, _)) => Err(Failure::Device(Diagnostic::error(
                    "E0502",
                    format!("bucket {got} came where {bucket} was due"),
                ))),
                // The trainer has failed and said why, or it is late.
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {
                    Err(shared.late("trainer 0", &format!("send bucket {bucket}")))
                }
            },
            Step::Store { bucket } => match load.take() {
                Some(l) => {
                    store(shared, rank, bucket, sink, &l.bytes).map_err(Failure::Refused)
                }
                None => Ok(()),
            },
            // Memory targets are derived by the caller once all has landed; files store none.
            Step::Derive { .. } | Step::Launch { .. } | Step::Send { .. } => Ok(()),
        };
        if let Err(failure) = done {
            return shared.fail(failure);
        }
    }
}

/// Writes a bucket's chunks into the parameters of this rank that hold them.
fn store(
    shared: &Shared<'_>,
    rank: usize,
    bucket: usize,
    sink: &dyn Sink,
    bytes: &[u8],
) -> std::result::Result<(), Diagnostic> {
    let mut start = 0;
    for chunk in &shared.graph.buckets[bucket].chunks {
        let (values, end) =
            (start + chunk.value_bytes as usize, start + chunk.bytes() as usize);
        for (_, target) in
            shared.program.units[chunk.unit].receivers.iter().filter(|r| r.0 == rank)
        {
            sink.write(*target, Part::Values, chunk.value_at, &bytes[start..values])?;
            if values < end {
                sink.write(*target, Part::Scales, chunk.scale_at, &bytes[values..end])?;
            }
        }
        start = end;
    }
    Ok(())
}
