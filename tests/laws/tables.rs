//! Runs the CUDA backend's programs without a GPU: an interpreter of its jobs over host memory.

use std::collections::BTreeMap;

use bytemuck::{Pod, bytes_of_mut};
use kernelcast::backend::cuda::jobs::{self, Evaluation, Job, Operand, Segment};
use kernelcast::backend::cuda::{
    Build, Flag, Instruction, Room, SeatProgram, Seats, Staging, Table, Tensor, local_shape,
    staging_bytes, words_of,
};
use kernelcast::backend::reference::Stored;
use kernelcast::compile::Compiled;
use kernelcast::diag::Diagnostic;
use kernelcast::dtype::DType;
use kernelcast::exec::Schedule;
use kernelcast::fp8::codec::*;
use kernelcast::fp8::recipe::Step;
use kernelcast::fp8::{Recipe, RecipeKind, ScaleFormat};
use kernelcast::graph::{Bounds, Setup};
use kernelcast::lower::{Part, TargetKind};
use kernelcast::topo::{Cluster, RankId};

use crate::cpu::shards;
use crate::world::World;

/// How a case is laid out on GPUs.
#[derive(Clone, Copy, Debug)]
pub struct Gpus {
    pub count: usize,
    pub mapped: bool,
}

/// Memory of all GPUs: regions by their first address.
#[derive(Default)]
struct Host {
    regions: BTreeMap<u64, Vec<u8>>,
    next: u64,
}

impl Host {
    fn add(&mut self, bytes: Vec<u8>) -> u64 {
        let at = self.next.max(4096);
        self.next = at + (bytes.len() as u64).next_multiple_of(256) + 4096;
        self.regions.insert(at, bytes);
        at
    }

    fn bytes(&mut self, address: u64, count: u64) -> &mut [u8] {
        let (base, region) = self.regions.range_mut(..=address).next_back().expect("mapped");
        let at = (address - base) as usize;
        assert!(at + count as usize <= region.len(), "{address:#x} is outside of its region");
        &mut region[at..at + count as usize]
    }

    fn get<T: Pod>(&mut self, address: u64) -> T {
        assert!(address.is_multiple_of(size_of::<T>() as u64), "{address:#x} is not aligned");
        let mut value = T::zeroed();
        bytes_of_mut(&mut value).copy_from_slice(self.bytes(address, size_of::<T>() as u64));
        value
    }

    fn bits(&mut self, dtype: u8, address: u64) -> u32 {
        match size(dtype) {
            4 => self.get::<u32>(address),
            2 => self.get::<u16>(address).into(),
            _ => self.get::<u8>(address).into(),
        }
    }

    fn put(&mut self, dtype: u8, address: u64, bits: u32) {
        let size = size(dtype);
        assert!(address.is_multiple_of(size), "{address:#x} is not aligned");
        self.bytes(address, size).copy_from_slice(&bits.to_le_bytes()[..size as usize]);
    }
}

fn dtype(number: u8) -> DType {
    DType::ALL.into_iter().find(|d| jobs::number(*d) == number).expect("a type")
}

fn size(number: u8) -> u64 {
    dtype(number).size()
}

fn decode(number: u8, bits: u32) -> f32 {
    match dtype(number) {
        DType::Bf16 => bf16_to_f32(bits as u16),
        DType::F16 => f16_to_f32(bits as u16),
        DType::E4m3 => e4m3_decode(bits as u8),
        DType::E8m0 => e8m0_decode(bits as u8),
        _ => f32::from_bits(bits),
    }
}

fn encode(number: u8, x: f32) -> u32 {
    match dtype(number) {
        DType::Bf16 => f32_to_bf16(x).into(),
        DType::F16 => f32_to_f16(x).into(),
        DType::E8m0 => e8m0_encode(x).into(),
        _ => x.to_bits(),
    }
}

/// NaN as GPU arithmetic has it.
fn one_nan(x: f32) -> f32 {
    if x.is_nan() { f32::from_bits(GPU_NAN_BITS) } else { x }
}

fn recipe(number: u8) -> Recipe {
    let kind = RecipeKind::ALL.into_iter().find(|k| jobs::recipe_number(*k) == number);
    Recipe::new(kind.expect("a recipe"))
}

fn code(recipe: &Recipe, x: f32, scale: f32) -> u8 {
    e4m3_satfinite(match recipe.step(scale) {
        Step::Multiply(by) => x * by,
        Step::Divide(by) => x / by,
    })
}

fn put_scale(host: &mut Host, format: u8, address: u64, scale: f32) {
    let e8m0 = format == jobs::scales_number(ScaleFormat::E8m0);
    host.put(format, address, if e8m0 { encode(format, scale) } else { scale.to_bits() });
}

/// The values of a segment by row and column of its box.
fn segment(host: &mut Host, t: &Table, s: &Segment, values: &mut [Vec<u32>]) {
    let ops = &t.ops[s.ops as usize..][..s.op_count as usize];
    for r in 0..u64::from(s.rows) {
        for c in 0..u64::from(s.cols) {
            let (mut x, mut kept) = (0u32, Vec::new());
            for op in ops {
                let load = |host: &mut Host| {
                    let o: &Operand = &t.operands[s.operands as usize + op.arg as usize];
                    let at = |i: u64, phase: u32| {
                        (u64::from(phase) + i * u64::from(o.step)) / u64::from(o.block)
                    };
                    let off =
                        at(r, o.phase_row) as i64 * o.row + at(c, o.phase_col) as i64 * o.col;
                    let address = o.address.wrapping_add_signed(off);
                    (o.dtype as u8, host.bits(o.dtype as u8, address))
                };
                let number = f32::from_bits(x);
                x = match op.what {
                    jobs::RAW_LOAD => load(host).1,
                    jobs::RAW_FILL | jobs::FILL => op.arg,
                    jobs::LOAD => {
                        let (dtype, bits) = load(host);
                        decode(dtype, bits).to_bits()
                    }
                    jobs::LOAD_MULTIPLY => {
                        let (dtype, bits) = load(host);
                        one_nan(number * decode(dtype, bits)).to_bits()
                    }
                    jobs::ROUND => decode(op.arg as u8, encode(op.arg as u8, number)).to_bits(),
                    jobs::MULTIPLY => one_nan(number * f32::from_bits(op.arg)).to_bits(),
                    jobs::PUSH => {
                        kept.push(number);
                        x
                    }
                    jobs::ADD => one_nan(kept.pop().expect("pushed") + number).to_bits(),
                    other => panic!("operation {other}"),
                };
            }
            values[usize::from(s.row) + r as usize][usize::from(s.col) + c as usize] = x;
        }
    }
}

fn evaluation(host: &mut Host, t: &Table, b: &Evaluation) {
    assert!(u32::from(b.rows) * u32::from(b.cols) <= jobs::ELEMENTS as u32);
    assert!(u32::from(b.rows) * u32::from(b.cols | 1) * 4 <= jobs::SHARED_BYTES);
    let mut values = vec![vec![0u32; b.cols.into()]; b.rows.into()];
    let segments = &t.segments[b.segments as usize..][..b.segment_count as usize];
    for s in segments {
        segment(host, t, s, &mut values);
    }
    let high = |values: &[Vec<u32>]| {
        values.iter().flatten().map(|x| x & GPU_NAN_BITS).max().unwrap_or(0)
    };
    let store = |host: &mut Host, dtype: u8, bits: &dyn Fn(u32) -> u32| {
        for r in 0..b.store_rows {
            for c in 0..b.store_cols {
                let to = b
                    .dst
                    .wrapping_add_signed(i64::from(r) * b.dst_row + i64::from(c) * b.dst_col);
                let x = values[usize::from(b.store_row + r)][usize::from(b.store_col + c)];
                host.put(dtype, to, bits(x));
            }
        }
    };
    match b.mode {
        jobs::VALUES => {
            assert_eq!(segments.len(), 1, "raw and computed values are not mixed");
            let raw = segments[0].flags & jobs::RAW != 0;
            store(host, b.dtype, &|x| if raw { x } else { encode(b.dtype, f32::from_bits(x)) });
        }
        jobs::AMAX => {
            let amax = high(&values).max(host.get::<u32>(b.amax));
            host.put(jobs::number(DType::I32), b.amax, amax);
        }
        jobs::TILES => tile(host, b, &mut values, &high),
        other => panic!("mode {other}"),
    }
}

fn tile(
    host: &mut Host,
    b: &Evaluation,
    values: &mut [Vec<u32>],
    high: &dyn Fn(&[Vec<u32>]) -> u32,
) {
    let agreed = b.amax != 0;
    let mut amax = if agreed { host.get::<u32>(b.amax) } else { high(values) };
    for k in 0..usize::from(b.step_count) - 1 {
        let recipe = recipe(b.recipe[k]);
        let scale = recipe.scale_of(amax);
        let through = |bits: u32| {
            let code = code(&recipe, f32::from_bits(bits), scale);
            let x = one_nan(e4m3_decode(code) * scale);
            decode(b.between[k], encode(b.between[k], x)).to_bits()
        };
        values.iter_mut().flatten().for_each(|x| *x = through(*x));
        amax = if agreed { through(amax) & GPU_NAN_BITS } else { high(values) };
    }
    let recipe = recipe(b.recipe[usize::from(b.step_count) - 1]);
    let scale = recipe.scale_of(amax);
    for r in 0..i64::from(b.scale_rows) {
        for c in 0..i64::from(b.scale_cols) {
            let to = b.scale.wrapping_add_signed(r * b.scale_row + c * b.scale_col);
            put_scale(host, b.scales, to, scale);
        }
    }
    if b.dst == 0 {
        return;
    }
    for r in 0..b.store_rows {
        for c in 0..b.store_cols {
            let to =
                b.dst.wrapping_add_signed(i64::from(r) * b.dst_row + i64::from(c) * b.dst_col);
            let x = values[usize::from(b.store_row + r)][usize::from(b.store_col + c)];
            host.bytes(to, 1)[0] = code(&recipe, f32::from_bits(x), scale);
        }
    }
}

fn copy(host: &mut Host, job: &Job) {
    let bytes = u64::from(job.cols) * size(job.dtype);
    for r in 0..i64::from(job.rows) {
        let from = job.src.wrapping_add_signed(r * i64::from(job.src_row));
        let row = host.bytes(from, bytes).to_vec();
        host.bytes(job.dst.wrapping_add_signed(r * i64::from(job.dst_row)), bytes)
            .copy_from_slice(&row);
    }
}

fn quantize(host: &mut Host, job: &Job) {
    let at = |base: u64, row: u32, r: u64, c: u64| base + r * u64::from(row) + c;
    assert!(job.src.is_multiple_of(16) && job.cols.is_multiple_of(8));
    let (rows, cols) = (u64::from(job.rows), u64::from(job.cols));
    let (recipe, mut amax) = (recipe(job.recipe), 0);
    for r in 0..rows {
        for c in 0..cols {
            let x = host.get::<u16>(at(job.src, job.src_row, r, 2 * c));
            amax = amax.max(u32::from(x & 0x7fff) << 16);
        }
    }
    let scale = recipe.scale_of(amax);
    put_scale(host, job.scales, job.aux, scale);
    for r in 0..rows {
        for c in 0..cols {
            let x = bf16_to_f32(host.get::<u16>(at(job.src, job.src_row, r, 2 * c)));
            host.bytes(at(job.dst, job.dst_row, r, c), 1)[0] = code(&recipe, x, scale);
        }
    }
}

fn launch(host: &mut Host, t: &Table) {
    for job in t.lists().into_iter().flatten() {
        match job.kind {
            jobs::COPY => copy(host, job),
            jobs::QUANTIZE => quantize(host, job),
            jobs::MAXIMUM => {
                for i in 0..u64::from(job.cols) {
                    let other = host.get::<u32>(job.src + 4 * i);
                    let own = host.get::<u32>(job.dst + 4 * i);
                    host.put(jobs::number(DType::I32), job.dst + 4 * i, own.max(other));
                }
            }
            _ => evaluation(host, t, &t.evaluations[job.src as usize]),
        }
    }
}

/// Addresses of a case's tensors on the GPU of one seat.
struct Addresses<'a> {
    sources: &'a [Vec<Option<Tensor>>],
    targets: &'a BTreeMap<(u64, u32, Part), u64>,
    maxima: &'a BTreeMap<u32, u64>,
    staging: Staging,
}

impl kernelcast::backend::cuda::Addresses for Addresses<'_> {
    fn sources(&self, trainer: u32) -> &[Option<Tensor>] {
        &self.sources[trainer as usize]
    }

    fn target(&self, rank: RankId, target: u32, part: Part) -> Result<u64, Diagnostic> {
        Ok(self.targets[&(rank.0, target, part)])
    }

    fn maxima(&self, trainer: u32) -> Result<u64, Diagnostic> {
        Ok(self.maxima[&trainer])
    }

    fn staging(&self) -> Staging {
        self.staging
    }
}

/// All targets of all ranks of replica 0; the other replicas must hold the same.
pub fn evaluate(compiled: &Compiled, world: &World, gpus: Gpus) -> Vec<Vec<Option<Stored>>> {
    let program = &compiled.program;
    let bounds = Bounds { staging: 64 << 10, in_flight: 2, bucket: 1 << 20 };
    let replicas = compiled.mesh.replicas as u32;
    let cluster = Cluster::default();
    let schedule = Schedule::of(compiled, &Setup::for_threads(replicas, &cluster, bounds));
    let graph = schedule.expect("a schedule").joined().into_owned();
    let seats = Seats::even(graph.trainers, graph.ranks, gpus.count);
    let mut host = Host::default();
    let mut sources = Vec::new();
    for trainer in 0..program.trainers {
        let mut own: Vec<Option<Tensor>> = vec![None; program.sources.len()];
        for (name, dtype, _, bytes) in shards(compiled, world, trainer) {
            let at = program.sources.iter().position(|s| s.name == name).expect("known");
            let source = &program.sources[at];
            let held = source.layout.held(trainer).expect("it is held");
            assert_eq!(
                local_shape(&held).iter().product::<u64>() * dtype.size(),
                bytes.len() as u64
            );
            let address = host.add(bytes);
            own[at] = Some(Tensor::shard(address, &source.shape, dtype.size(), held));
        }
        sources.push(own);
    }
    let mut targets = BTreeMap::new();
    let size = program.ranks.len() as u64;
    for rank in 0..u64::from(graph.ranks) {
        for (i, target) in (0..).zip(&program.ranks[(rank % size) as usize].targets) {
            for s in &target.storages {
                let bytes = if target.kind == TargetKind::Alias { 0 } else { s.span() };
                targets.insert((rank, i, s.part), host.add(vec![0xa5; bytes as usize]));
            }
        }
    }
    let words = words_of(&graph);
    let maxima = (0..program.trainers).map(|t| {
        let bytes = 4 * words.get(&t).copied().unwrap_or(0);
        (t, host.add(vec![0xee; bytes as usize]))
    });
    let maxima: BTreeMap<u32, u64> = maxima.collect();
    let mut programs = Vec::new();
    for (seat, room) in Room::of(&graph, &seats).iter().enumerate() {
        let mut staging = Staging::default();
        for i in 0..2 {
            staging.sent[i] = host.add(vec![0x5a; room.sent as usize]);
            staging.received[i] = host.add(vec![0x5a; room.received as usize]);
        }
        let mut memory =
            Addresses { sources: &sources, targets: &targets, maxima: &maxima, staging };
        let bytes = staging_bytes(&Build::new(program, &graph, &seats, seat, &memory));
        memory.staging.maxima = host.add(vec![0x5a; bytes.expect("sized") as usize]);
        let build = Build::new(program, &graph, &seats, seat, &memory);
        let mut built =
            if gpus.mapped { build.peer() } else { build.nccl() }.expect("it lowers");
        let scratch = host.add(vec![0x5a; built.scratch as usize]);
        built.tables.iter_mut().for_each(|t| t.bind_scratch(scratch));
        programs.push(built);
    }
    run(&mut host, &programs);
    collect(&mut host, compiled, &targets)
}

/// Runs all GPUs' instructions, each in its order, until all are through.
fn run(host: &mut Host, programs: &[SeatProgram]) {
    let mut next = vec![0; programs.len()];
    let mut flags: BTreeMap<(usize, usize, Flag), u32> = BTreeMap::new();
    let mut wires: BTreeMap<(usize, usize), std::collections::VecDeque<Vec<u8>>> =
        BTreeMap::new();
    let mut recorded = vec![std::collections::BTreeSet::new(); programs.len()];
    loop {
        let mut moved = false;
        for (seat, program) in programs.iter().enumerate() {
            while let Some(instruction) = program.instructions.get(next[seat]) {
                match *instruction {
                    Instruction::Launch { table, .. } => launch(host, &program.tables[table]),
                    Instruction::Clear { address, bytes, .. } => {
                        host.bytes(address, bytes).fill(0);
                    }
                    Instruction::Send { to, address, bytes } => {
                        let message = host.bytes(address, bytes).to_vec();
                        wires.entry((seat, to)).or_default().push_back(message);
                    }
                    Instruction::Receive { from, address, bytes } => {
                        let wire = wires.entry((from, seat)).or_default();
                        let Some(message) = wire.pop_front() else { break };
                        assert_eq!(message.len() as u64, bytes, "both sides agree on a size");
                        host.bytes(address, bytes).copy_from_slice(&message);
                    }
                    Instruction::Signal { to, flag, value, .. } => {
                        flags.insert((seat, to, flag), value);
                    }
                    Instruction::Await { from, flag, value, .. } => {
                        if flags.get(&(from, seat, flag)).copied().unwrap_or(0) < value {
                            break;
                        }
                    }
                    Instruction::Record { event, .. } => {
                        assert!(recorded[seat].insert(event), "an event is recorded once");
                    }
                    Instruction::Wait { event, .. } => assert!(recorded[seat].contains(&event)),
                    Instruction::GroupStart
                    | Instruction::GroupEnd
                    | Instruction::Step { .. } => {}
                }
                next[seat] += 1;
                moved = true;
            }
        }
        if !moved {
            break;
        }
    }
    for (seat, program) in programs.iter().enumerate() {
        let left = &program.instructions[next[seat]..];
        assert!(left.is_empty(), "GPU {seat} waits for ever at {:?}", left[0]);
    }
    assert!(wires.values().all(|w| w.is_empty()), "a message is never received");
}

fn collect(
    host: &mut Host,
    compiled: &Compiled,
    targets: &BTreeMap<(u64, u32, Part), u64>,
) -> Vec<Vec<Option<Stored>>> {
    let ranks = &compiled.program.ranks;
    let mut all: Vec<Vec<Option<Stored>>> = Vec::new();
    for id in 0..ranks.len() as u64 * compiled.mesh.replicas {
        let rank = &ranks[(id % ranks.len() as u64) as usize];
        let stored = (0..).zip(&rank.targets).map(|(i, target)| {
            let mut part = |part: Part| {
                let s = target.storages.iter().find(|s| s.part == part)?;
                Some(host.bytes(targets[&(id, i, part)], s.span()).to_vec())
            };
            if target.kind == TargetKind::Alias {
                return None;
            }
            let values = part(Part::Values)?;
            // Derived views are compared in their own order.
            let s = &target.storages[0];
            let values = match s.strides == kernelcast::shard::row_major(&s.shape) {
                true => values,
                false => in_order(&values, &s.shape, &s.strides, s.dtype.size() as usize),
            };
            Some(Stored { values, scales: part(Part::Scales) })
        });
        all.push(stored.collect());
    }
    let rest = all.split_off(ranks.len());
    for replica in rest.chunks(ranks.len()) {
        assert_eq!(replica, all, "a replica differs");
    }
    all
}

/// Elements of a strided tensor in row-major order.
fn in_order(bytes: &[u8], shape: &[u64], strides: &[u64], size: usize) -> Vec<u8> {
    let count: u64 = shape.iter().product();
    let own = kernelcast::shard::row_major(shape);
    let mut out = Vec::with_capacity(bytes.len());
    for i in 0..count {
        let at: u64 = (0..shape.len()).map(|d| i / own[d] % shape[d] * strides[d]).sum();
        out.extend(&bytes[at as usize * size..][..size]);
    }
    out
}
