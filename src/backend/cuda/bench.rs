//! How fast updates are on the GPUs at hand: random weights of a model's real shapes, and in the
//! same run what a plain copy, one NCCL message and an update tensor by tensor take.

mod quantize;

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::Fallible;
use super::driver::{self, Gpu, Memory, Stream};
use super::kernels::Kernels;
use super::nccl;
use super::neighbours::{Neighbour, Published};
use super::place::{Tensor, local_shape};
use super::run::{Options, Schedules, plan};
use super::seats::{Seat, Seats};
use super::session::{Blocks, Path, Session, Setting, join};
use super::table::Table;
use crate::diag::Diagnostic;
use crate::error::{Error, Result};
use crate::graph::{Bucket, Flow, Graph};
use crate::lower::Program;
use crate::rendezvous::{Hall, Member};

pub use quantize::{Quantized, quantize};

/// Repetitions of each baseline.
const ROUNDS: usize = 7;

/// Bytes of noise that are made on the host; the rest repeats them.
const NOISE: u64 = 64 << 20;

/// What a measured transfer is.
pub struct Transfer<'a> {
    pub program: &'a Program,
    pub schedules: Schedules<'a>,
    pub trainers: u32,
    pub ranks: u32,
    pub options: Options,
    pub updates: usize,
    pub blocks: Option<Blocks>,
    /// Whether the update tensor by tensor is measured as well.
    pub unfused: bool,
}

/// Rate of a baseline in bytes a second, and its time for the bytes of the update.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Baseline {
    pub bytes: u64,
    pub seconds: f64,
}

impl Baseline {
    pub fn rate(&self) -> f64 {
        self.bytes as f64 / self.seconds.max(1e-12)
    }
}

/// What one GPU measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SeatReport {
    pub card: String,
    pub trainers: Vec<u32>,
    pub ranks: Vec<u64>,
    /// Bytes of sources and targets, of staging memory, and of tables and scratch memory.
    pub weights: u64,
    pub staging: u64,
    pub tables: u64,
    pub scratch: u64,
    /// Seconds of each update from the start of all to the end of all, and of the launch alone.
    pub updates: Vec<f64>,
    pub launches: Vec<f64>,
    /// Seconds in which all sources here are looked at for NaN.
    pub scan: Option<f64>,
    pub copy: Option<Baseline>,
    pub nccl: Option<Baseline>,
    pub unfused: Option<f64>,
}

/// A measured transfer.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub schema: u32,
    pub path: &'static str,
    pub driver: String,
    /// Bytes that leave a GPU for another, each hop counted.
    pub wire_bytes: u64,
    /// Bytes that trainer ranks make.
    pub made_bytes: u64,
    pub seats: Vec<SeatReport>,
}

impl Report {
    /// Median seconds of an update, as the slowest GPU saw it.
    pub fn median(&self) -> f64 {
        self.seats.iter().map(|s| median(&s.updates)).fold(0.0, f64::max)
    }
}

/// Measures updates on the GPUs of this process.
///
/// # Errors
/// E0605 and E0604 as in a run.
pub fn transfer(work: &Transfer<'_>) -> Result<Report> {
    let measure = || -> Result<Report> {
        driver::load()?;
        let all = driver::device_count()?;
        let most = (work.trainers + work.ranks) as usize;
        let count = work.options.gpus.unwrap_or(all).min(all).min(most).max(1);
        let gpus: Fallible<Vec<Arc<Gpu>>> = (0..count).map(Gpu::open).collect();
        let (gpus, hall) = (gpus?, Hall::new(count));
        let results: Vec<Result<(SeatReport, Totals)>> = std::thread::scope(|scope| {
            let threads = gpus.into_iter().enumerate().map(|(seat, gpu)| {
                let member = Arc::new(hall.member(seat));
                scope.spawn(move || {
                    let result = work.seat(gpu, Arc::clone(&member));
                    if let Err(e) = &result
                        && let Some(first) = e.diagnostics.first()
                    {
                        member.fail(first);
                    }
                    result
                })
            });
            let threads: Vec<_> = threads.collect();
            let joined =
                threads.into_iter().map(|t| t.join().unwrap_or_else(|_| Err(stopped().into())));
            joined.collect()
        });
        let mut seats = Vec::new();
        let mut totals = Totals::default();
        for result in results {
            let (seat, all) = result?;
            seats.push(seat);
            totals = all;
        }
        let (major, minor) = driver::version()?;
        let driver = format!("CUDA {major}.{minor}");
        let path = if totals.peer { "peer" } else { "nccl" };
        let (wire_bytes, made_bytes) = (totals.wire, totals.made);
        Ok(Report { schema: 1, path, driver, wire_bytes, made_bytes, seats })
    };
    measure().map_err(Error::of_device)
}

#[derive(Clone, Copy, Default)]
struct Totals {
    peer: bool,
    wire: u64,
    made: u64,
}

fn stopped() -> Diagnostic {
    Diagnostic::error("E0502", "a GPU's thread stopped at a bug")
}

impl Transfer<'_> {
    fn seat(&self, gpu: Arc<Gpu>, member: Arc<Member>) -> Result<(SeatReport, Totals)> {
        let (program, me, timeout) = (self.program, member.rank(), self.options.timeout);
        let seats = Seats::even(self.trainers, self.ranks, member.size());
        let planned = plan(&gpu, &member, &seats, self.schedules, &self.options)?;
        let graphs: Vec<&Graph> = planned.graphs.iter().collect();
        let setting = Setting {
            gpu: Arc::clone(&gpu),
            member: Arc::clone(&member),
            seats: seats.clone(),
            path: planned.path,
            timeout,
            blocks: self.blocks,
        };
        let mut session = Session::open(setting, program, &graphs)?;
        let trainers: Vec<u32> = seats.trainers_on(me).collect();
        let mut sources = Vec::new();
        for trainer in &trainers {
            let (tensors, memory, bytes) = noise(program, *trainer, &gpu, session.control())?;
            sources.push((memory.address(), bytes));
            session.bind(*trainer, tensors, vec![memory]);
        }
        session.prepare(program, &graphs)?;
        let (mut updates, mut launches) = (Vec::new(), Vec::new());
        for round in 0..self.updates + 2 {
            member.barrier("lap", timeout)?;
            let started = Instant::now();
            let times = session.update_timed()?;
            if round >= 2 {
                updates.push(started.elapsed().as_secs_f64());
                launches.push(times.launch.as_secs_f64());
            }
        }
        let wire = planned.graphs.iter().map(|g| wire_bytes(g, &seats)).sum();
        let made = planned.graphs.iter().flat_map(|g| &g.flows).map(|f| f.bytes).sum();
        let totals = Totals { peer: planned.path == Path::Peer, wire, made };
        let memory = session.memory();
        let source_bytes: u64 = sources.iter().map(|(_, bytes)| bytes).sum();
        let mut report = SeatReport {
            card: gpu.name().to_owned(),
            trainers,
            ranks: seats.ranks_on(me).map(|r| r.0).collect(),
            weights: source_bytes + session.arena().1,
            staging: memory.staging,
            tables: memory.tables,
            scratch: memory.scratch,
            updates,
            launches,
            scan: self.scan(&gpu, &session, me, &seats)?,
            copy: None,
            nccl: None,
            unfused: None,
        };
        if member.size() > 1 && wire > 0 {
            let ends =
                Ends { session: &session, source: sources.first().copied(), seats: &seats };
            report.copy = ends.copy(wire, timeout)?;
            report.nccl = ends.nccl(wire, timeout)?;
        }
        if self.unfused && member.size() > 1 {
            let apart: Vec<Graph> = planned.graphs.iter().map(tensor_by_tensor).collect();
            report.unfused = Some(session.unfused(program, &apart)?.as_secs_f64());
        }
        member.barrier("measured", timeout)?;
        Ok((report, totals))
    }

    /// Seconds of looking at all sources of a GPU.
    fn scan(
        &self,
        gpu: &Arc<Gpu>,
        session: &Session,
        me: Seat,
        seats: &Seats,
    ) -> Fallible<Option<f64>> {
        let mut table = Table::default();
        for trainer in seats.trainers_on(me) {
            let held = self.program.sources.iter().map(|s| s.layout.held(trainer));
            for ((source, tensor), held) in
                self.program.sources.iter().zip(session.sources(trainer)).zip(held)
            {
                if let (Some(tensor), Some(held)) = (tensor, held) {
                    let count = local_shape(&held).iter().product();
                    table.scan(0, source.dtype, tensor.address, count);
                }
            }
        }
        if table.is_empty() {
            return Ok(None);
        }
        let kernels = Kernels::load(gpu)?;
        let stream = gpu.stream()?;
        let memory = gpu.alloc(table.bytes())?;
        stream.upload(memory.address(), &table.image(memory.address()))?;
        let words = gpu.alloc(4)?;
        let (at, bad, jobs) =
            (memory.address(), words.address(), table.lists().map(<[_]>::len));
        let seconds = timed(gpu, &stream, || kernels.launch(&stream, jobs, at, bad, u32::MAX))?;
        Ok(Some(seconds))
    }
}

/// The two GPUs between which baselines are measured: the first trainer's and the last rank's.
struct Ends<'a> {
    session: &'a Session,
    source: Option<(u64, u64)>,
    seats: &'a Seats,
}

impl Ends<'_> {
    fn seats(&self) -> (Seat, Seat) {
        let last = crate::topo::RankId(self.seats.rank_count() as u64 - 1);
        (self.seats.of_trainer(0), self.seats.of_rank(last))
    }

    /// The copy engine, from the sources to the targets.
    fn copy(&self, wire: u64, timeout: Duration) -> Fallible<Option<Baseline>> {
        let Setting { gpu, member, .. } = self.session.setting();
        let (from, to) = self.seats();
        let own = Published::of(gpu, self.session.arena_memory())?;
        let all = member.share("baseline", &(own, self.session.arena().1), timeout)?;
        let mut found = None;
        if let (true, Some((address, bytes))) = (member.rank() == from, self.source)
            && from != to
            && let Ok(other) = Neighbour::reach(gpu, &all[to].0)
        {
            let bytes = wire.min(bytes).min(all[to].1);
            let stream = gpu.stream()?;
            let seconds = timed(gpu, &stream, || stream.copy(other.address, address, bytes))?;
            found = Some(Baseline { bytes, seconds });
        }
        member.barrier("copied", timeout)?;
        Ok(found)
    }

    /// One NCCL message of the same bytes.
    fn nccl(&self, wire: u64, timeout: Duration) -> Fallible<Option<Baseline>> {
        let Setting { gpu, member, .. } = self.session.setting();
        let (from, to) = self.seats();
        let usable = member.share("nccl", &nccl::load().is_ok(), timeout)?;
        if from == to || usable.contains(&false) {
            return Ok(None);
        }
        let room = match self.source.filter(|_| member.rank() == from) {
            Some((_, bytes)) => bytes,
            None => self.session.arena().1,
        };
        let rooms = member.share("room", &room, timeout)?;
        let bytes = wire.min(rooms[from]).min(rooms[to]);
        let comm = join(self.session.setting())?;
        let stream = gpu.stream()?;
        let me = member.rank();
        let seconds = match self.source.filter(|_| me == from) {
            _ if me != from && me != to => None,
            Some((address, _)) => Some(timed(gpu, &stream, || {
                comm.group(Instant::now() + timeout, |m| m.send(address, bytes, to, &stream))
            })?),
            None => Some(timed(gpu, &stream, || {
                let into = self.session.arena().0;
                comm.group(Instant::now() + timeout, |m| m.recv(into, bytes, from, &stream))
            })?),
        };
        member.barrier("sent", timeout)?;
        Ok(seconds.filter(|_| me == to).map(|seconds| Baseline { bytes, seconds }))
    }
}

/// Median seconds of some work in a stream, once warm.
fn timed(
    gpu: &Arc<Gpu>,
    stream: &Stream,
    mut work: impl FnMut() -> Fallible<()>,
) -> Fallible<f64> {
    let (start, end) = (gpu.event(true)?, gpu.event(true)?);
    let mut seconds = Vec::new();
    for round in 0..=ROUNDS {
        stream.record(&start)?;
        work()?;
        stream.record(&end)?;
        stream.synchronize()?;
        if round > 0 {
            seconds.push(f64::from(end.elapsed_ms(&start)?) / 1e3);
        }
    }
    Ok(median(&seconds))
}

pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

/// Bytes that cross from one GPU to another.
fn wire_bytes(graph: &Graph, seats: &Seats) -> u64 {
    graph.flows.iter().map(|f| f.bytes * seats.hops(graph, f)).sum()
}

/// Random finite weights for what a trainer rank holds.
fn noise(
    program: &Program,
    trainer: u32,
    gpu: &Arc<Gpu>,
    stream: &Stream,
) -> Fallible<(Vec<Option<Tensor>>, Memory, u64)> {
    let mut at = 0u64;
    let mut places = Vec::new();
    for source in &program.sources {
        let held = source.layout.held(trainer);
        let count = held.as_ref().map_or(0, |h| local_shape(h).iter().product());
        places.push((at, held));
        at = (at + count * source.dtype.size()).next_multiple_of(256);
    }
    let memory = gpu.alloc(at)?;
    let first = NOISE.min(at);
    stream.upload(memory.address(), &noise_bytes(first, u64::from(trainer)))?;
    let mut filled = first;
    while filled < at {
        let bytes = filled.min(at - filled);
        stream.copy(memory.address() + filled, memory.address(), bytes)?;
        filled += bytes;
    }
    stream.synchronize()?;
    let tensors = program.sources.iter().zip(places).map(|(source, (offset, held))| {
        let address = memory.address() + offset;
        held.map(|h| Tensor::shard(address, &source.shape, source.dtype.size(), h))
    });
    Ok((tensors.collect(), memory, at))
}

/// Words whose halves are bf16 numbers between 2^-17 and 2^-1, of either sign: finite as f32,
/// f16 and e4m3 as well.
fn noise_bytes(count: u64, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x2545_f491_4f6c_dd1d;
    let mut out = Vec::with_capacity(count as usize + 8);
    while (out.len() as u64) < count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        for half in [state, state >> 16, state >> 32, state >> 48] {
            let (sign, exponent) = (half & 0x8000, 110 + (half >> 7 & 15));
            out.extend((((sign | exponent << 7) | half & 0x7f) as u16).to_le_bytes());
        }
    }
    out.truncate(count as usize);
    out
}

/// The same graph with a bucket for each piece of a parameter: how tools send that know nothing
/// of packing.
fn tensor_by_tensor(graph: &Graph) -> Graph {
    let mut out = Graph { flows: Vec::new(), buckets: Vec::new(), ..graph.clone() };
    for flow in &graph.flows {
        let mut start = flow.parts.start;
        while start < flow.parts.end {
            let unit = graph.parts[start as usize].unit;
            let rest = start..flow.parts.end;
            let end = rest.clone().find(|i| graph.parts[*i as usize].unit != unit);
            let end = end.unwrap_or(flow.parts.end);
            let own = start as usize..end as usize;
            let bytes = graph.parts[own].iter().map(|p| p.bytes()).sum();
            let first = out.flows.len() as u32;
            out.flows.push(Flow { parts: start..end, bytes, ..flow.clone() });
            out.buckets.push(Bucket { flows: first..first + 1 });
            start = end;
        }
    }
    out
}
