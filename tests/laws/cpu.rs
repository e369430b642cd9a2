//! Runs a compiled plan on the CPU backend, from memory to memory.

use std::time::Duration;

use kernelcast::backend::cpu::{FiniteCheck, Options};
use kernelcast::backend::reference::Stored;
use kernelcast::compile::Compiled;
use kernelcast::lower::{Part, TargetKind};
use kernelcast::memory::{Sources, Targets, update};

use crate::world::World;

/// So little that most tensors need several buckets.
const STAGING: u64 = 64 << 10;

/// All targets of all ranks, in the plan's order; none for aliases, which store nothing.
pub fn evaluate(compiled: &Compiled, world: &World) -> Vec<Vec<Option<Stored>>> {
    let mut sources = Sources::default();
    for (name, (dtype, shape, bytes)) in &world.tensors {
        sources.add(name, *dtype, shape, bytes).expect("a world is consistent");
    }
    // What the update leaves unwritten stays 0xa5.
    let mut memory: Vec<Vec<Option<Stored>>> = Vec::new();
    for rank in &compiled.program.ranks {
        let targets = rank.targets.iter().map(|t| {
            let room = |part: Part| {
                let storage = t.storages.iter().find(|s| s.part == part);
                storage.map(|s| vec![0xa5; s.bytes() as usize])
            };
            let values = room(Part::Values)?;
            let stored = Stored { values, scales: room(Part::Scales) };
            (t.kind != TargetKind::Alias).then_some(stored)
        });
        memory.push(targets.collect());
    }
    let mut bound = Targets::default();
    for (rank, targets) in compiled.program.ranks.iter().zip(&mut memory) {
        for (target, stored) in rank.targets.iter().zip(targets) {
            let Some(Stored { values, scales }) = stored else { continue };
            let mut slices = vec![(Part::Values, values)];
            slices.extend(scales.as_mut().map(|s| (Part::Scales, s)));
            for (part, bytes) in slices {
                let storage = target.storages.iter().find(|s| s.part == part);
                let name = &storage.expect("a slice was made for it").name;
                bound.bind(rank.rank, name, bytes);
            }
        }
    }
    let options = Options {
        finite: FiniteCheck::Allow,
        timeout: Duration::from_secs(20),
        progress: &|_| {},
    };
    update(compiled, &sources, &mut bound, STAGING, &options).expect("the update runs");
    memory
}
