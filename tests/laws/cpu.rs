//! Runs a compiled plan on the CPU backend, from memory to memory.

use std::collections::BTreeSet;
use std::time::Duration;

use kernelcast::backend::cpu::{FiniteCheck, Options, Report, Rows, Sink};
use kernelcast::backend::reference::Stored;
use kernelcast::compile::Compiled;
use kernelcast::dtype::DType;
use kernelcast::lower::{Part, RankProgram, TargetKind};
use kernelcast::memory::{Sources, Targets, update, with_ends};
use kernelcast::topo::RankId;

use crate::world::World;

/// So little that most tensors need several buckets.
const STAGING: u64 = 64 << 10;

/// All targets of all ranks, in the plan's order; none for aliases, which store nothing.
pub fn evaluate(compiled: &Compiled, world: &World) -> Vec<Vec<Option<Stored>>> {
    updated(compiled, world, |trainers, targets| {
        let options = Options {
            finite: FiniteCheck::Allow,
            timeout: Duration::from_secs(20),
            progress: &|_| {},
        };
        let report = update(compiled, trainers, targets, STAGING, &options).expect("it runs");
        check_traffic(compiled, &report);
    })
}

/// The same after any update from memory to memory.
pub fn updated(
    compiled: &Compiled,
    world: &World,
    update: impl FnOnce(&[Sources<'_>], &mut Targets<'_>),
) -> Vec<Vec<Option<Stored>>> {
    let mut trainers = Vec::new();
    let local: Vec<Vec<Local>> =
        (0..compiled.program.trainers).map(|t| shards(compiled, world, t)).collect();
    for tensors in &local {
        let mut sources = Sources::default();
        for (name, dtype, shape, bytes) in tensors {
            sources.add(name, *dtype, shape, bytes).expect("a world is consistent");
        }
        trainers.push(sources);
    }
    let mut memory: Vec<_> = (0..compiled.mesh.replicas).flat_map(|_| room(compiled)).collect();
    let world_size = compiled.program.ranks.len();
    let mut bound = Targets::default();
    for (rank, targets) in memory.iter_mut().enumerate() {
        for (target, stored) in
            compiled.program.ranks[rank % world_size].targets.iter().zip(targets)
        {
            let Some(Stored { values, scales }) = stored else { continue };
            let mut slices = vec![(Part::Values, values)];
            slices.extend(scales.as_mut().map(|s| (Part::Scales, s)));
            for (part, bytes) in slices {
                let storage = target.storages.iter().find(|s| s.part == part);
                let name = &storage.expect("a slice was made for it").name;
                bound.bind(RankId(rank as u64), name, bytes);
            }
        }
    }
    update(&trainers, &mut bound);
    drop(bound);
    let rest = memory.split_off(world_size);
    for replica in rest.chunks(world_size) {
        assert_eq!(replica, memory, "a replica differs");
    }
    memory
}

/// The same with readers and writers.
pub fn bound(
    compiled: &Compiled,
    world: &World,
    update: impl FnOnce(&[&dyn Rows], &[Option<&dyn Sink>]),
) -> Vec<Vec<Option<Stored>>> {
    updated(compiled, world, |trainers, targets| {
        with_ends(compiled, trainers, targets, |rows, sinks| {
            update(rows, sinks);
            Ok(())
        })
        .expect("they fit");
    })
}

/// Memory for a rank's targets; what the update leaves unwritten stays 0xa5.
fn room(compiled: &Compiled) -> Vec<Vec<Option<Stored>>> {
    let rank = |rank: &RankProgram| {
        let targets = rank.targets.iter().map(|t| {
            let room = |part: Part| {
                let storage = t.storages.iter().find(|s| s.part == part);
                storage.map(|s| vec![0xa5; s.bytes() as usize])
            };
            let values = room(Part::Values)?;
            let stored = Stored { values, scales: room(Part::Scales) };
            (t.kind != TargetKind::Alias).then_some(stored)
        });
        targets.collect()
    };
    compiled.program.ranks.iter().map(rank).collect()
}

pub type Local = (String, DType, Vec<u64>, Vec<u8>);

/// What a trainer rank holds of a world, cut out element by element.
pub fn shards(compiled: &Compiled, world: &World, trainer: u32) -> Vec<Local> {
    let mut out = Vec::new();
    for source in &compiled.program.sources {
        let (dtype, shape, bytes) = &world.tensors[&source.name];
        let Some(held) = source.layout.held(trainer) else { continue };
        let size = dtype.size() as usize;
        let mut at = vec![0u64];
        for (ranges, n) in held.iter().zip(shape) {
            let own: Vec<u64> = ranges.iter().cloned().flatten().collect();
            at = at.iter().flat_map(|a| own.iter().map(move |i| a * n + i)).collect();
        }
        let local = held.iter().map(|r| r.iter().map(|r| r.end - r.start).sum()).collect();
        let cut =
            at.iter().flat_map(|i| &bytes[*i as usize * size..][..size]).copied().collect();
        out.push((source.name.clone(), *dtype, local, cut));
    }
    out
}

/// Law 5: a rank receives each distinct value that it holds once and nothing else.
fn check_traffic(compiled: &Compiled, report: &Report) {
    let program = &compiled.program;
    let distinct = |rank: usize| -> u64 {
        let places = program.ranks[rank].targets.iter().flat_map(|t| &t.places);
        let units: BTreeSet<u32> = places.map(|p| p.unit).collect();
        let units = units.iter().map(|u| &program.units[*u as usize]);
        units.filter(|u| !u.is_constant()).map(|u| u.bytes()).sum()
    };
    for (rank, received) in report.received_bytes.iter().enumerate() {
        assert_eq!(*received, distinct(rank % program.ranks.len()), "bytes of rank {rank}");
    }
    // Every byte leaves the trainers once.
    let all: u64 = program.units.iter().filter(|u| !u.is_constant()).map(|u| u.bytes()).sum();
    assert_eq!((report.sent_bytes, report.made_bytes), (all, all), "bytes of the trainers");
    assert_eq!(
        report.sent_bytes + report.relayed_bytes,
        report.received_bytes.iter().sum::<u64>()
    );
    if program.trainers == 1 {
        assert_eq!(report.amax_bytes, 0);
    }
}
