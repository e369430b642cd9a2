//! One GPU's part of a run: its memory and its captured graphs.

mod issue;
mod update;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Fallible;
use super::arena::Arena;
use super::build::{Addresses, Build, Staging};
use super::driver::{Captured, Event, Gpu, Memory, Pinned, Stream};
use super::kernels::Kernels;
use super::maxima::staging_bytes;
use super::nccl::{self, Comm};
use super::neighbours::{Neighbour, Published};
use super::packed::Room;
use super::place::Tensor;
use super::program::{Lane, SeatProgram};
use super::seats::{Seat, Seats};
use super::table::Table;
use crate::diag::Diagnostic;
use crate::graph::Graph;
use crate::lower::{Part, Program};
use crate::rendezvous::Member;
use crate::topo::RankId;

/// How bytes travel between GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// Kernels store into the memory of the GPU that needs them.
    Peer,
    /// Messages, by NCCL.
    Nccl,
}

/// Blocks of a launch: as many as fit, or fewer so that others find room beside them.
#[derive(Clone, Copy, Debug)]
pub struct Blocks {
    pub make: u32,
    pub store: u32,
}

impl Blocks {
    /// One for each job.
    pub const ALL: Blocks = Blocks { make: u32::MAX, store: u32::MAX };

    /// What leaves NCCL's kernels their multiprocessors: with more, messages are slower than what
    /// is gained (H100, 128 MiB messages).
    pub const BESIDE_NCCL: Blocks = Blocks { make: 96, store: 64 };
}

/// Bytes of memory that a session takes beside the weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Beside {
    pub staging: u64,
    pub tables: u64,
    pub scratch: u64,
}

/// What an update was.
#[derive(Clone, Debug)]
pub struct Updated {
    /// Units in which something was not finite.
    pub suspects: Vec<u32>,
    /// Host time of the launches.
    pub launch: Duration,
}

/// What a session is opened with.
pub struct Setting {
    pub gpu: Arc<Gpu>,
    pub member: Arc<Member>,
    pub seats: Seats,
    pub path: Path,
    pub timeout: Duration,
    pub blocks: Option<Blocks>,
}

/// A GPU's tables in memory, and the graph that runs them.
struct Stage {
    // Dropped before what it uses.
    captured: Option<Captured>,
    program: SeatProgram,
    tables: Vec<Loaded>,
    events: Vec<Event>,
    scratch: Memory,
}

/// A table in a GPU's memory.
struct Loaded {
    memory: Memory,
    /// Jobs of each kernel.
    jobs: [usize; 3],
}

impl Stage {
    /// True if another program differs in nothing but what its tables say, and they fit.
    fn takes(&self, other: &SeatProgram) -> bool {
        let fits = |(new, old): (&Table, &Loaded)| {
            let mut jobs = new.lists().map(<[_]>::len).into_iter().zip(old.jobs);
            new.bytes() <= old.memory.bytes() && jobs.all(|(new, old)| (new == 0) == (old == 0))
        };
        other.instructions == self.program.instructions
            && other.scratch <= self.scratch.bytes()
            && other.tables.iter().zip(&self.tables).all(fits)
    }
}

/// A GPU at work. Fields are dropped in order: graphs before the communicator, that before memory.
pub struct Session {
    stages: Vec<Stage>,
    comm: Option<Arc<Comm>>,
    lanes: Vec<Stream>,
    control: Stream,
    kernels: Kernels,
    others: Vec<Option<Neighbour>>,
    arenas: Vec<Arena>,
    own: Memory,
    sources: BTreeMap<u32, Vec<Option<Tensor>>>,
    source_memory: Vec<Memory>,
    staging: Vec<Memory>,
    staged: Staging,
    /// A word for each unit, and one for what is derived, which nobody looks at.
    bad: Memory,
    units: usize,
    progress: Pinned,
    setting: Setting,
}

/// Where this GPU finds what its jobs touch in one stage.
struct View<'a> {
    session: &'a Session,
    stage: usize,
    staging: Staging,
}

impl Addresses for View<'_> {
    fn sources(&self, trainer: u32) -> &[Option<Tensor>] {
        self.session.sources.get(&trainer).map_or(&[], Vec::as_slice)
    }

    fn target(&self, rank: RankId, target: u32, part: Part) -> Fallible<u64> {
        let seat = self.session.setting.seats.of_rank(rank);
        let offset = self.session.arenas[seat].target(rank.0, target, part);
        self.session.base(seat).and_then(|base| Ok(base + offset.ok_or_else(unknown)?))
    }

    fn maxima(&self, trainer: u32) -> Fallible<u64> {
        let seat = self.session.setting.seats.of_trainer(trainer);
        let offset = self.session.arenas[seat].maxima(self.stage, trainer);
        // On the NCCL path nobody looks at another GPU's words.
        let base = self.session.base(seat).unwrap_or(0);
        Ok(base + offset.ok_or_else(unknown)?)
    }

    fn staging(&self) -> Staging {
        self.staging
    }
}

fn unknown() -> Diagnostic {
    Diagnostic::error("E0502", "a rank has no such memory")
}

impl Session {
    /// Takes memory for what the inference ranks here hold, and lets the other GPUs see it.
    ///
    /// # Errors
    /// E0605 for a GPU, a library or memory that is missing; E0604 for a GPU that does not come.
    pub fn open(setting: Setting, program: &Program, graphs: &[&Graph]) -> Fallible<Session> {
        let (gpu, seats) = (&setting.gpu, &setting.seats);
        let kernels = Kernels::load(gpu)?;
        let arenas: Vec<Arena> =
            (0..seats.count).map(|seat| Arena::of(program, graphs, seats, seat)).collect();
        let me = setting.member.rank();
        let own = gpu.alloc_shared(arenas[me].bytes + arenas[me].spare())?;
        let lanes: Fallible<Vec<Stream>> = Lane::ALL.iter().map(|_| gpu.stream()).collect();
        let control = gpu.stream()?;
        let units = (program.units.len() as u64 + 1).next_multiple_of(64);
        let bad = gpu.alloc(4 * units)?;
        let mut session = Session {
            stages: Vec::new(),
            comm: None,
            lanes: lanes?,
            control,
            kernels,
            others: Vec::new(),
            arenas,
            own,
            sources: BTreeMap::new(),
            source_memory: Vec::new(),
            staging: Vec::new(),
            staged: Staging::default(),
            bad,
            units: program.units.len(),
            progress: Pinned::new(gpu, 64)?,
            setting,
        };
        session.meet()?;
        Ok(session)
    }

    fn meet(&mut self) -> Fallible<()> {
        let Setting { gpu, member, timeout, path, seats, .. } = &self.setting;
        if seats.count == 1 {
            self.others = vec![None];
            return Ok(());
        }
        match path {
            Path::Peer => {
                let own = Published::of(gpu, &self.own)?;
                let all = member.share("addresses", &own, *timeout)?;
                self.others = Neighbour::reach_all(gpu, member, &all)?;
            }
            Path::Nccl => self.comm = Some(join(&self.setting)?),
        }
        Ok(())
    }

    /// Gives a trainer rank here its shards.
    pub fn bind(&mut self, trainer: u32, tensors: Vec<Option<Tensor>>, memory: Vec<Memory>) {
        self.sources.insert(trainer, tensors);
        self.source_memory.extend(memory);
    }

    /// Builds and captures everything. Runs what uses NCCL once before, for its connections are
    /// made in the first use.
    ///
    /// # Errors
    /// E0501 for an expression that no job computes; E0605; E0604.
    pub fn prepare(&mut self, program: &Program, graphs: &[&Graph]) -> Fallible<()> {
        self.take_staging(program, graphs)?;
        for (stage, graph) in graphs.iter().enumerate() {
            let built = self.build(program, graph, stage, graphs.len())?;
            let stage = self.stage(built)?;
            self.stages.push(stage);
        }
        self.connect(0..self.stages.len())?;
        for stage in 0..self.stages.len() {
            self.capture(stage)?;
        }
        self.setting.member.barrier("prepared", self.setting.timeout)
    }

    /// Takes the schedule of another expert map: the last stage is built anew. Where it is the
    /// same but for what its tables say, they are replaced in memory and the graph stays.
    ///
    /// # Errors
    /// E0605 where it needs more memory than was taken; as [`Session::prepare`].
    pub fn remap(&mut self, program: &Program, graphs: &[&Graph]) -> Fallible<bool> {
        let Setting { member, seats, timeout, .. } = &self.setting;
        let (me, number, timeout) = (member.rank(), self.stages.len() - 1, *timeout);
        let arenas: Vec<Arena> =
            (0..seats.count).map(|seat| Arena::of(program, graphs, seats, seat)).collect();
        let units = 4 * (program.units.len() as u64 + 1);
        if arenas[me].bytes > self.own.bytes() || units > self.bad.bytes() {
            let text = "the schedule of this expert map needs more memory than was taken";
            return Err(Diagnostic::error("E0605", text).hint("open the update anew"));
        }
        (self.arenas, self.units) = (arenas, program.units.len());
        let built = self.build(program, graphs[number], number, graphs.len())?;
        let fits = self.stages[number].takes(&built);
        let all = self.setting.member.share("remap", &fits, timeout)?;
        if all.into_iter().all(|fits| fits) {
            let stage = &mut self.stages[number];
            let scratch = stage.scratch.address();
            for (mut table, old) in built.tables.into_iter().zip(&mut stage.tables) {
                table.bind_scratch(scratch);
                let at = old.memory.address();
                self.control.upload(at, &table.image(at))?;
                old.jobs = table.lists().map(<[_]>::len);
            }
            return Ok(false);
        }
        self.stages[number] = self.stage(built)?;
        self.connect(number..number + 1)?;
        self.capture(number)?;
        self.setting.member.barrier("remapped", timeout)?;
        Ok(true)
    }

    /// Runs what uses NCCL once, for its connections are made in the first use.
    fn connect(&self, mut stages: std::ops::Range<usize>) -> Fallible<()> {
        if self.comm.is_none() {
            return Ok(());
        }
        self.reset()?;
        self.setting.member.barrier("connect", self.setting.timeout)?;
        stages.try_for_each(|stage| self.issue(stage))?;
        self.watch(Instant::now() + self.setting.timeout)
    }

    fn take_staging(&mut self, program: &Program, graphs: &[&Graph]) -> Fallible<()> {
        if self.setting.path == Path::Peer {
            return Ok(());
        }
        let (mut room, mut maxima) = (Room::default(), 0);
        for (stage, graph) in graphs.iter().enumerate() {
            let seat = self.setting.member.rank();
            let all = Room::of(graph, &self.setting.seats);
            room.sent = room.sent.max(all[seat].sent);
            room.received = room.received.max(all[seat].received);
            let view = View { session: self, stage, staging: Staging::default() };
            let build = Build::new(program, graph, &self.setting.seats, seat, &view);
            maxima = maxima.max(staging_bytes(&build)?);
        }
        let mut staging = Staging::default();
        let mut take = |bytes| -> Fallible<u64> {
            let memory = self.setting.gpu.alloc(bytes)?;
            let address = memory.address();
            self.staging.push(memory);
            Ok(address)
        };
        for i in 0..2 {
            staging.sent[i] = take(room.sent)?;
            staging.received[i] = take(room.received)?;
        }
        staging.maxima = take(maxima)?;
        self.staged = staging;
        Ok(())
    }

    fn build(
        &self,
        program: &Program,
        graph: &Graph,
        stage: usize,
        stages: usize,
    ) -> Fallible<SeatProgram> {
        let seat = self.setting.member.rank();
        let view = View { session: self, stage, staging: self.staged };
        let mut build = Build::new(program, graph, &self.setting.seats, seat, &view);
        build.constants = stage == 0;
        build.derived = stage + 1 == stages;
        match self.setting.path {
            Path::Peer => build.peer(),
            Path::Nccl => build.nccl(),
        }
    }

    /// Puts a program's tables into memory.
    fn stage(&self, mut program: SeatProgram) -> Fallible<Stage> {
        let gpu = &self.setting.gpu;
        let scratch = gpu.alloc(program.scratch)?;
        let mut tables = Vec::with_capacity(program.tables.len());
        for mut table in program.tables.drain(..) {
            table.bind_scratch(scratch.address());
            // Room for the table of another expert map.
            let memory = gpu.alloc(table.bytes() + table.bytes() / 8)?;
            self.control.upload(memory.address(), &table.image(memory.address()))?;
            tables.push(Loaded { memory, jobs: table.lists().map(<[_]>::len) });
        }
        let events: Fallible<Vec<Event>> =
            (0..program.events + 2 * Lane::ALL.len()).map(|_| gpu.event(false)).collect();
        let events = events?;
        Ok(Stage { captured: None, program, tables, events, scratch })
    }

    /// The start of a GPU's arena as this one sees it.
    fn base(&self, seat: Seat) -> Fallible<u64> {
        if seat == self.setting.member.rank() {
            return Ok(self.own.address());
        }
        match self.others.get(seat) {
            Some(Some(other)) => Ok(other.address),
            _ => Err(Diagnostic::error("E0502", format!("GPU {seat} is not mapped"))),
        }
    }

    /// The shards of a trainer rank here, by source.
    pub(super) fn sources(&self, trainer: u32) -> &[Option<Tensor>] {
        self.sources.get(&trainer).map_or(&[], Vec::as_slice)
    }

    /// Bytes beside the weights.
    pub fn memory(&self) -> Beside {
        let sum = |memory: &[Memory]| memory.iter().map(Memory::bytes).sum::<u64>();
        let tables = self.stages.iter().flat_map(|s| &s.tables);
        Beside {
            staging: sum(&self.staging),
            tables: tables.map(|t| t.memory.bytes()).sum(),
            scratch: self.stages.iter().map(|s| s.scratch.bytes()).sum(),
        }
    }

    /// Address and bytes of what is lent to other GPUs.
    pub(super) fn arena(&self) -> (u64, u64) {
        (self.own.address(), self.own.bytes())
    }

    pub(super) fn arena_memory(&self) -> &Memory {
        &self.own
    }

    /// Address of a target that lies on this GPU.
    pub fn target(&self, rank: RankId, target: u32, part: Part) -> Fallible<u64> {
        View { session: self, stage: 0, staging: self.staged }.target(rank, target, part)
    }

    pub fn control(&self) -> &Stream {
        &self.control
    }

    pub fn setting(&self) -> &Setting {
        &self.setting
    }
}

pub(in crate::backend::cuda) fn join(setting: &Setting) -> Fallible<Arc<Comm>> {
    let nccl = nccl::load()?;
    let Setting { gpu, member, timeout, .. } = setting;
    let id = if member.rank() == 0 { nccl.unique_id()?.to_vec() } else { Vec::new() };
    let ids = member.share("communicator", &id, *timeout)?;
    let id = ids.first().and_then(|id| <[u8; 128]>::try_from(&id[..]).ok());
    let id = id.ok_or_else(|| Diagnostic::error("E0611", "process 0 gave no NCCL id"))?;
    gpu.bind()?;
    let deadline = Instant::now() + *timeout;
    Ok(Arc::new(Comm::join(nccl, id, member.size(), member.rank(), deadline)?))
}
