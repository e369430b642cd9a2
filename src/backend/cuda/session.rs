//! One GPU's part of a run: its memory, its captured graphs, and updates under a watchdog.

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
use super::program::{Instruction, Lane, SeatProgram};
use super::seats::{Seat, Seats};
use crate::diag::Diagnostic;
use crate::graph::Graph;
use crate::lower::{Part, Program};
use crate::rendezvous::Member;
use crate::topo::RankId;

/// How long a stream may take to end once it has been let go.
const LET_GO: Duration = Duration::from_secs(5);

/// How long a wait polls without sleeping.
const AWAKE: Duration = Duration::from_millis(500);

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
    tables: Vec<Memory>,
    events: Vec<Event>,
    scratch: Memory,
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
    bad: Memory,
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
        let own = gpu.alloc_shared(arenas[me].bytes)?;
        let lanes: Fallible<Vec<Stream>> = Lane::ALL.iter().map(|_| gpu.stream()).collect();
        let control = gpu.stream()?;
        let bad = gpu.alloc(4 * (program.units.len() as u64 + 1))?;
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
        if self.comm.is_some() {
            self.reset()?;
            for stage in 0..self.stages.len() {
                self.issue(stage)?;
            }
            self.watch(Instant::now() + self.setting.timeout)?;
        }
        for stage in 0..self.stages.len() {
            self.capture(stage)?;
        }
        self.setting.member.barrier("prepared", self.setting.timeout)
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
        for table in &mut program.tables {
            table.bind_scratch(scratch.address());
            let memory = gpu.alloc(table.bytes())?;
            self.control.upload(memory.address(), &table.image(memory.address()))?;
            tables.push(memory);
        }
        let events: Fallible<Vec<Event>> =
            (0..program.events + 2 * Lane::ALL.len()).map(|_| gpu.event(false)).collect();
        let events = events?;
        Ok(Stage { captured: None, program, tables, events, scratch })
    }

    fn capture(&mut self, stage: usize) -> Fallible<()> {
        self.lane(Lane::Make).begin_capture()?;
        if let Err(problem) = self.issue(stage) {
            self.lane(Lane::Make).cancel_capture();
            return Err(problem);
        }
        let mut captured = self.lane(Lane::Make).end_capture()?;
        if let Some(comm) = &self.comm {
            captured.keep(Arc::clone(comm));
        }
        captured.upload(self.lane(Lane::Make))?;
        self.lane(Lane::Make).synchronize()?;
        self.stages[stage].captured = Some(captured);
        Ok(())
    }

    fn lane(&self, lane: Lane) -> &Stream {
        &self.lanes[lane as usize]
    }

    /// Puts a stage's instructions into the lanes: forked from the first, and joined to it.
    fn issue(&self, number: usize) -> Fallible<()> {
        let stage = &self.stages[number];
        let extra = &stage.events[stage.program.events..];
        let make = self.lane(Lane::Make);
        make.record(&extra[0])?;
        for lane in [Lane::Move, Lane::Store] {
            self.lane(lane).wait(&extra[0])?;
        }
        let mut group = Vec::new();
        for instruction in &stage.program.instructions {
            self.step(number, instruction, &mut group)?;
        }
        for (lane, event) in [Lane::Move, Lane::Store].into_iter().zip(&extra[1..]) {
            self.lane(lane).record(event)?;
            make.wait(event)?;
        }
        Ok(())
    }

    fn step(
        &self,
        number: usize,
        instruction: &Instruction,
        group: &mut Vec<Instruction>,
    ) -> Fallible<()> {
        let stage = &self.stages[number];
        match *instruction {
            Instruction::Launch { lane, table } => self.launch(stage, lane, table),
            Instruction::Clear { lane, address, bytes } => {
                self.lane(lane).fill(address, 0, bytes)
            }
            Instruction::GroupStart => {
                group.clear();
                Ok(())
            }
            Instruction::Send { .. } | Instruction::Receive { .. } => {
                group.push(*instruction);
                Ok(())
            }
            Instruction::GroupEnd => self.messages(group),
            Instruction::Record { lane, event } => self.lane(lane).record(&stage.events[event]),
            Instruction::Wait { lane, event } => self.lane(lane).wait(&stage.events[event]),
            Instruction::Signal { lane, to, flag, value } => {
                let at = self.arenas[to].flag(number, self.setting.member.rank(), flag);
                self.lane(lane).write_flag(self.base(to)? + at, value)
            }
            Instruction::Await { lane, from, flag, value } => {
                let me = self.setting.member.rank();
                let at = self.arenas[me].flag(number, from, flag);
                self.lane(lane).wait_flag(self.own.address() + at, value)
            }
            Instruction::Step { number: step } => {
                let at = self.progress.device_address() + 4 * number as u64;
                match self.setting.seats.count {
                    1 => Ok(()),
                    _ => self.lane(Lane::Make).write_flag(at, step + 1),
                }
            }
        }
    }

    fn launch(&self, stage: &Stage, lane: Lane, table: usize) -> Fallible<()> {
        let (tables, at) = (&stage.program.tables[table], stage.tables[table].address());
        let blocks = self.setting.blocks.unwrap_or(match &self.comm {
            Some(_) => Blocks::BESIDE_NCCL,
            None => Blocks::ALL,
        });
        let most = if lane == Lane::Make { blocks.make } else { blocks.store };
        self.kernels.launch(self.lane(lane), tables, at, self.bad.address(), most)
    }

    fn messages(&self, group: &[Instruction]) -> Fallible<()> {
        if group.is_empty() {
            return Ok(());
        }
        let Some(comm) = &self.comm else {
            return Err(Diagnostic::error("E0502", "a message, and no communicator"));
        };
        let stream = self.lane(Lane::Move);
        comm.group(Instant::now() + self.setting.timeout, |open| {
            for message in group {
                match *message {
                    Instruction::Send { to, address, bytes } => {
                        open.send(address, bytes, to, stream)?;
                    }
                    Instruction::Receive { from, address, bytes } => {
                        open.recv(address, bytes, from, stream)?;
                    }
                    _ => {}
                }
            }
            Ok(())
        })
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

    /// Clears what an update reports and waits for.
    fn reset(&self) -> Fallible<()> {
        let flags = self.arenas[self.setting.member.rank()].flag_bytes(self.stages.len());
        self.control.fill(self.own.address(), 0, flags)?;
        self.control.fill(self.bad.address(), 0, self.bad.bytes())?;
        self.control.synchronize()?;
        for word in 0..self.progress.slice().len() / 4 {
            self.progress.write_u32(word, 0);
        }
        Ok(())
    }

    /// Runs one update. Gives the units in which something was not finite.
    ///
    /// # Errors
    /// E0604 naming the GPU and the step that did not come in time, or another GPU's failure;
    /// E0605 for an error of the device. Receivers are then part old, part new.
    pub fn update(&self) -> Fallible<Vec<u32>> {
        Ok(self.update_timed()?.suspects)
    }

    /// The same, with times.
    ///
    /// # Errors
    /// As [`Session::update`].
    pub fn update_timed(&self) -> Fallible<Updated> {
        let Setting { member, timeout, .. } = &self.setting;
        let done = self.run();
        if let Err(problem) = &done {
            member.fail(problem);
        }
        let launch = done?;
        let mut words = vec![0u8; self.bad.bytes() as usize];
        self.control.download(self.bad.address(), &mut words)?;
        let words: &[u32] = bytemuck::cast_slice(&words);
        let units = words.len() - 1;
        let bad = (0..).zip(&words[..units]).filter(|(_, word)| **word != 0);
        let bad: Vec<u32> = bad.map(|(unit, _)| unit).collect();
        let mut all: Vec<u32> = match self.setting.seats.count {
            1 => bad,
            _ => member.share("done", &bad, *timeout)?.into_iter().flatten().collect(),
        };
        all.sort_unstable();
        all.dedup();
        Ok(Updated { suspects: all, launch })
    }

    /// Gives the time that the launches took.
    fn run(&self) -> Fallible<Duration> {
        self.reset()?;
        if self.setting.seats.count > 1 {
            self.setting.member.barrier("ready", self.setting.timeout)?;
        }
        let started = Instant::now();
        for stage in &self.stages {
            if let Some(captured) = &stage.captured {
                captured.launch(self.lane(Lane::Make))?;
            }
        }
        let launch = started.elapsed();
        self.watch(Instant::now() + self.setting.timeout)?;
        Ok(launch)
    }

    /// One update by graphs that are not captured, on the NCCL path: what fusing saves.
    ///
    /// # Errors
    /// As [`Session::update`].
    pub(super) fn unfused(
        &mut self,
        program: &Program,
        graphs: &[Graph],
    ) -> Fallible<Duration> {
        let before = self.stages.len();
        if self.comm.is_none() {
            self.comm = Some(join(&self.setting)?);
        }
        self.setting.path = Path::Nccl;
        self.take_staging(program, &graphs.iter().collect::<Vec<_>>())?;
        for (stage, graph) in graphs.iter().enumerate() {
            let built = self.build(program, graph, stage, graphs.len())?;
            let stage = self.stage(built)?;
            self.stages.push(stage);
        }
        let mut took = Duration::ZERO;
        // The first round makes NCCL's connections.
        for _ in 0..2 {
            self.setting.member.barrier("tensor by tensor", self.setting.timeout)?;
            let started = Instant::now();
            (before..self.stages.len()).try_for_each(|stage| self.issue(stage))?;
            self.watch(started + self.setting.timeout)?;
            took = started.elapsed();
        }
        Ok(took)
    }

    /// The shards of a trainer rank here, by source.
    pub(super) fn sources(&self, trainer: u32) -> &[Option<Tensor>] {
        self.sources.get(&trainer).map_or(&[], Vec::as_slice)
    }

    /// Bytes beside the weights.
    pub fn memory(&self) -> Beside {
        let sum = |memory: &[Memory]| memory.iter().map(Memory::bytes).sum::<u64>();
        Beside {
            staging: sum(&self.staging),
            tables: self.stages.iter().map(|s| sum(&s.tables)).sum(),
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

    /// Waits for all lanes, at most until a time or until another GPU fails.
    fn watch(&self, deadline: Instant) -> Fallible<()> {
        let waited = Instant::now();
        loop {
            let done = self
                .lanes
                .iter()
                .try_fold(true, |all, lane| Ok::<bool, Diagnostic>(all && lane.finished()?))?;
            if done {
                return Ok(());
            }
            if let Some(failure) = self.setting.member.failure() {
                self.let_go();
                return Err(failure);
            }
            if let Some(comm) = &self.comm
                && let Err(problem) = comm.async_error()
            {
                self.let_go();
                return Err(problem);
            }
            if Instant::now() > deadline {
                let problem = self.late();
                self.let_go();
                return Err(problem);
            }
            // Awake while an update usually lasts: a thread that has slept launches slowly.
            match waited.elapsed() < AWAKE {
                true => std::thread::yield_now(),
                false => std::thread::sleep(Duration::from_micros(200)),
            }
        }
    }

    /// Who is waited for, and in which step.
    fn late(&self) -> Diagnostic {
        let step =
            (0..self.stages.len()).map(|s| self.progress.read_u32(s)).collect::<Vec<_>>();
        let stage = step.iter().rposition(|s| *s > 0).unwrap_or(0);
        let now = step.get(stage).copied().unwrap_or(0).saturating_sub(1);
        let mut at = 0;
        let mut from: Vec<Seat> = Vec::new();
        for instruction in self.stages.get(stage).map_or(&[][..], |s| &s.program.instructions) {
            match instruction {
                Instruction::Step { number } => at = *number,
                Instruction::Await { from: seat, .. }
                | Instruction::Receive { from: seat, .. }
                    if at >= now =>
                {
                    from.push(*seat);
                }
                Instruction::Send { to, .. } if at >= now => from.push(*to),
                _ => {}
            }
        }
        from.sort_unstable();
        from.dedup();
        let names: Vec<String> = from.iter().map(|s| self.name(*s)).collect();
        let who = if names.is_empty() { "the GPU".to_owned() } else { names.join(", ") };
        let seconds = self.setting.timeout.as_secs_f64();
        Diagnostic::error("E0604", format!("{who} did not do step {now} within {seconds} s"))
            .note(format!("{} waited", self.name(self.setting.member.rank())))
            .hint("--timeout sets the limit of every wait")
    }

    /// A GPU and the ranks on it.
    fn name(&self, seat: Seat) -> String {
        let seats = &self.setting.seats;
        let trainers: Vec<u32> = seats.trainers_on(seat).collect();
        let ranks: Vec<u64> = seats.ranks_on(seat).map(|r| r.0).collect();
        format!("GPU {seat} (trainer ranks {trainers:?}, inference ranks {ranks:?})")
    }

    /// Ends all waits of this GPU's streams: flags are raised, the communicator is given up.
    fn let_go(&self) {
        if let Some(comm) = &self.comm {
            comm.abort();
        }
        let flags = self.arenas[self.setting.member.rank()].flag_bytes(self.stages.len());
        // A failure here changes nothing: the update has failed already.
        let _ = self.control.fill(self.own.address(), 0x7f, flags);
        let _ = self.control.synchronize();
        let deadline = Instant::now() + LET_GO;
        while Instant::now() < deadline
            && self.lanes.iter().any(|lane| lane.finished().is_ok_and(|done| !done))
        {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// After a failed update: meets the others again, so that the next one can run.
    ///
    /// # Errors
    /// E0604 for a GPU that does not come.
    pub fn retry(&mut self) -> Fallible<()> {
        self.setting.member.retry(self.setting.timeout)?;
        if self.comm.is_none() {
            return Ok(());
        }
        for stage in &mut self.stages {
            stage.captured = None;
        }
        self.comm = None;
        self.comm = Some(join(&self.setting)?);
        self.reset()?;
        for stage in 0..self.stages.len() {
            self.issue(stage)?;
        }
        self.watch(Instant::now() + self.setting.timeout)?;
        (0..self.stages.len()).try_for_each(|stage| self.capture(stage))
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

pub(super) fn join(setting: &Setting) -> Fallible<Arc<Comm>> {
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
