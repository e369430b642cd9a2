//! Runs a graph: a thread for each trainer rank and each inference rank, channels between.

use std::any::Any;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, unbounded};

use crate::diag::Diagnostic;
use crate::error::{Error, Result};
use crate::graph::Graph;
use crate::lower::{Program, ProgramSource};
use crate::shard::Storage;
use crate::topo::{Peer, RankId};

use super::finite::{NonFinite, scan};
use super::held::AnyHolder;
use super::rank::{Message, inference_rank};
use super::trainer::{Note, Wires, trainer_rank};
use super::{Rows, Sink, Strided};

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
    /// Bytes that left trainer ranks for inference ranks.
    pub sent_bytes: u64,
    /// Bytes that inference ranks passed on to others.
    pub relayed_bytes: u64,
    /// Bytes that trainer ranks exchanged to agree on maxima.
    pub amax_bytes: u64,
    /// Bytes that trainer ranks made.
    pub made_bytes: u64,
    /// Bytes that each inference rank received.
    pub received_bytes: Vec<u64>,
    /// What `FiniteCheck::Allow` let through.
    pub non_finite: Vec<NonFinite>,
}

/// What all threads of an update share.
pub(super) struct Shared<'a> {
    pub program: &'a Program,
    pub graph: &'a Graph,
    pub options: &'a Options<'a>,
    pub counts: Counts,
    stop: AtomicBool,
    /// Whom each trainer rank and then each inference rank waits for, as such a number.
    waits: Vec<AtomicU32>,
    /// Reads under way for each trainer rank: one that hangs may hold up threads of others.
    reads: &'a [AtomicU32],
    /// The first failure; later ones are its echoes.
    failure: Mutex<Option<Failure>>,
    /// Units in which something that is not finite was seen.
    suspects: Mutex<BTreeSet<usize>>,
}

/// Stand for no rank among those that are waited for: one that works, one that waits for memory
/// which some rank still reads, and one that has ended.
const NOBODY: u32 = u32::MAX;
const MEMORY: u32 = u32::MAX - 1;
const ENDED: u32 = u32::MAX - 2;

/// Bytes so far.
#[derive(Default)]
pub(super) struct Counts {
    pub sent: AtomicU64,
    pub relayed: AtomicU64,
    pub amax: AtomicU64,
    pub made: AtomicU64,
}

pub(super) enum Failure {
    Refused(Diagnostic),
    Device(Diagnostic),
    NonFinite,
}

/// Runs a graph to its end or to its first failure. `rows` gives each trainer rank what it holds,
/// in the coordinates of the whole tensors; `sinks` are the inference ranks of all replicas.
///
/// # Errors
/// Non-finite values (E0602, every tensor that has some), a failed read or write, a rank that
/// did not answer in time (E0604).
pub fn run(
    program: &Program,
    graph: &Graph,
    rows: &[&dyn Rows],
    sinks: &[&dyn Sink],
    options: &Options<'_>,
) -> Result<Report> {
    if rows.len() != graph.trainers as usize || sinks.len() != graph.ranks as usize {
        return Err(Diagnostic::error("E0502", "a graph for other numbers of ranks").into());
    }
    let reads: Vec<AtomicU32> = rows.iter().map(|_| AtomicU32::new(0)).collect();
    let named = rows.iter().zip(0..).map(|(rows, rank)| Named {
        rows: *rows,
        rank,
        reads: &reads[rank as usize],
        alone: graph.trainers == 1,
    });
    let named: Vec<Named<'_>> = named.collect();
    let rows: Vec<&dyn Rows> = named.iter().map(|r| r as &dyn Rows).collect();
    let whole = AnyHolder { program, rows: &rows };
    if options.finite == FiniteCheck::Before {
        refuse(scan(&whole, &all_sources(program)).map_err(failed)?)?;
    }
    let shared = Shared {
        program,
        graph,
        options,
        counts: Counts::default(),
        stop: AtomicBool::new(false),
        waits: (0..graph.trainers + graph.ranks).map(|_| AtomicU32::new(NOBODY)).collect(),
        reads: &reads,
        failure: Mutex::new(None),
        suspects: Mutex::new(BTreeSet::new()),
    };
    let (wires, inboxes): (Vec<_>, Vec<_>) =
        sinks.iter().map(|_| unbounded::<Message>()).unzip();
    let (notes, mailboxes): (Vec<_>, Vec<_>) = rows.iter().map(|_| unbounded::<Note>()).unzip();
    let wires = Wires { ranks: wires, trainers: notes };
    let mut received = vec![0; sinks.len()];
    std::thread::scope(|scope| {
        let (shared, wires) = (&shared, &wires);
        let ranks = sinks.iter().zip(&inboxes).zip(&mut received).enumerate();
        for (rank, ((sink, inbox), received)) in ranks {
            scope.spawn(move || {
                guarded(shared, &format!("rank {rank}"), || {
                    *received = inference_rank(shared, rank, *sink, inbox, &wires.ranks);
                });
            });
        }
        for (trainer, (rows, mailbox)) in rows.iter().zip(&mailboxes).enumerate() {
            scope.spawn(move || {
                guarded(shared, &format!("trainer {trainer}"), || {
                    trainer_rank(shared, trainer as u32, *rows, mailbox, wires);
                });
            });
        }
    });
    let counts = &shared.counts;
    let report = Report {
        sent_bytes: counts.sent.load(Ordering::Relaxed),
        relayed_bytes: counts.relayed.load(Ordering::Relaxed),
        amax_bytes: counts.amax.load(Ordering::Relaxed),
        made_bytes: counts.made.load(Ordering::Relaxed),
        received_bytes: received,
        non_finite: Vec::new(),
    };
    finish(shared, &whole, report)
}

/// A panic is a bug, of the engine or of a reader or sink that it was given: the update fails.
fn guarded(shared: &Shared<'_>, who: &str, work: impl FnOnce()) {
    let Err(panic) = catch_unwind(AssertUnwindSafe(work)) else { return };
    shared.fail(Failure::Device(stopped_at_a_bug(who, &*panic)));
}

fn stopped_at_a_bug(who: &str, panic: &(dyn Any + Send)) -> Diagnostic {
    let said = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    let said = said.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
    Diagnostic::error("E0502", format!("{who} stopped at a bug: {said}"))
}

/// A trainer rank's reader: what goes wrong in it says whose it is.
struct Named<'a> {
    rows: &'a dyn Rows,
    rank: u32,
    reads: &'a AtomicU32,
    alone: bool,
}

impl Rows for Named<'_> {
    fn read(
        &self,
        storage: Storage,
        rows: Strided,
        buf: &mut [u8],
    ) -> std::result::Result<(), Diagnostic> {
        let name = Peer::Trainer(self.rank);
        self.reads.fetch_add(1, Ordering::Relaxed);
        let done = catch_unwind(AssertUnwindSafe(|| self.rows.read(storage, rows, buf)));
        self.reads.fetch_sub(1, Ordering::Relaxed);
        match done {
            Ok(Err(d)) if !self.alone => Err(d.note(format!("it was read for {name}"))),
            Ok(done) => done,
            Err(panic) => Err(stopped_at_a_bug(&name.to_string(), &*panic)),
        }
    }
}

/// A bug is a failure of a rank, anything else a refusal.
fn failed(d: Diagnostic) -> Error {
    if d.code == "E0502" { Error::device(d) } else { d.into() }
}

fn finish(shared: Shared<'_>, rows: &dyn Rows, mut report: Report) -> Result<Report> {
    let failure = shared.failure.into_inner().unwrap_or_else(|e| e.into_inner());
    let suspects = shared.suspects.into_inner().unwrap_or_else(|e| e.into_inner());
    match failure {
        Some(Failure::Refused(d)) => return Err(failed(d)),
        Some(Failure::Device(d)) => return Err(Error::device(d)),
        Some(Failure::NonFinite) => {
            found(shared.program, rows, &suspects, false)?;
        }
        None => report.non_finite = found(shared.program, rows, &suspects, true)?,
    }
    Ok(report)
}

/// What is not finite in the sources of some units: let through, or refused.
fn found(
    program: &Program,
    rows: &dyn Rows,
    suspects: &BTreeSet<usize>,
    allow: bool,
) -> Result<Vec<NonFinite>> {
    let Some(first) = suspects.first() else { return Ok(Vec::new()) };
    if allow {
        return scan(rows, &sources_of(program, suspects)).map_err(failed);
    }
    refuse(scan(rows, &all_sources(program)).map_err(failed)?)?;
    let name = program.units.get(*first).map_or("", |u| u.name.as_str());
    let text = format!("{name} is not finite, though its sources are");
    Err(Diagnostic::error("E0602", text)
        .note("a cast or a sum left the range of its type")
        .about(name)
        .into())
}

/// The same for a run on GPUs, which saw it in these units; `rows` gives each trainer rank what
/// it holds.
///
/// # Errors
/// E0602 with every tensor that has non-finite values, unless they are let through.
pub fn judge(
    program: &Program,
    rows: &[&dyn Rows],
    suspects: &BTreeSet<usize>,
    allow: bool,
) -> Result<Vec<NonFinite>> {
    found(program, &AnyHolder { program, rows }, suspects, allow)
}

/// Reads all sources and refuses them if a value is not finite.
///
/// # Errors
/// E0602 with every such tensor; reads that fail.
pub fn refuse_sources(program: &Program, rows: &[&dyn Rows]) -> Result<()> {
    let whole = AnyHolder { program, rows };
    refuse(scan(&whole, &all_sources(program)).map_err(failed)?)
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
        program.units[*unit].expr.views(&mut |view| {
            if let Storage::Source(id) = view.storage {
                ids.insert(id);
            }
        });
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
    pub(super) fn fail(&self, failure: Failure) {
        let mut slot = self.failure.lock().unwrap_or_else(|e| e.into_inner());
        slot.get_or_insert(failure);
        self.stop.store(true, Ordering::Release);
    }

    pub(super) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn number(&self, peer: Peer) -> u32 {
        match peer {
            Peer::Trainer(t) => t,
            Peer::Rank(r) => self.graph.trainers + r.0 as u32,
        }
    }

    /// Notes whom a rank waits for.
    pub(super) fn waits_for(&self, rank: Peer, other: Option<Peer>) {
        let other = other.map_or(NOBODY, |o| self.number(o));
        self.waits[self.number(rank) as usize].store(other, Ordering::Relaxed);
    }

    pub(super) fn waits_for_memory(&self, trainer: u32) {
        self.waits[trainer as usize].store(MEMORY, Ordering::Relaxed);
    }

    pub(super) fn ended(&self, rank: Peer) {
        self.waits[self.number(rank) as usize].store(ENDED, Ordering::Relaxed);
    }

    /// Who is behind a rank that is late: itself, unless it waits for another in turn; for
    /// memory, an inference rank that waits for nobody and has not ended.
    pub(super) fn behind(&self, late: Peer) -> Peer {
        let state = |number: u32| self.waits[number as usize].load(Ordering::Relaxed);
        let mut number = self.number(late);
        for _ in 0..self.waits.len() {
            let mut ranks = self.graph.trainers..self.waits.len() as u32;
            match state(number) {
                NOBODY | ENDED => break,
                MEMORY => match ranks.find(|r| state(*r) == NOBODY) {
                    Some(rank) => number = rank,
                    None => break,
                },
                next => number = next,
            }
        }
        let reads = |t: u32| self.reads[t as usize].load(Ordering::Relaxed) > 0;
        if number < self.graph.trainers && !reads(number) {
            number = (0..self.graph.trainers).find(|t| reads(*t)).unwrap_or(number);
        }
        match number.checked_sub(self.graph.trainers) {
            Some(rank) => Peer::Rank(RankId(u64::from(rank))),
            None => Peer::Trainer(number),
        }
    }

    pub(super) fn late(&self, who: &str, step: &str) -> Failure {
        Failure::Device(
            Diagnostic::error(
                "E0604",
                format!("{who} did not {step} within {} s", self.options.timeout.as_secs_f64()),
            )
            .hint("--timeout sets the limit of every wait"),
        )
    }

    /// Remembers units in which something was not finite.
    ///
    /// # Errors
    /// The update's failure, unless such values are let through.
    pub(super) fn suspect(
        &self,
        units: impl Iterator<Item = usize>,
    ) -> std::result::Result<(), Failure> {
        let mut suspects = self.suspects.lock().unwrap_or_else(|e| e.into_inner());
        suspects.extend(units);
        if suspects.is_empty() || self.options.finite == FiniteCheck::Allow {
            return Ok(());
        }
        Err(Failure::NonFinite)
    }
}

/// Waits in short turns, so that a failure elsewhere ends the wait.
pub(super) fn wait<T>(
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
