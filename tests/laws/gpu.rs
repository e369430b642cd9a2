//! Runs a compiled plan on GPUs, from memory to memory. Without one the laws on GPUs are skipped,
//! or fail where `KERNELCAST_REQUIRE_GPU` is set.

use std::time::Duration;

use kernelcast::backend::cpu::FiniteCheck;
use kernelcast::backend::cuda::live::{Live, Sides};
use kernelcast::backend::cuda::run::{Launch, Options};
use kernelcast::backend::reference::Stored;
use kernelcast::compile::Compiled;
use kernelcast::diag::Diagnostic;
use kernelcast::exec::GpuPath;
use kernelcast::graph::{Bounds, Graph, Setup, build};
use kernelcast::lower::Program;
use kernelcast::memory::update_on_gpus;

use kernelcast::topo::Cluster;

use crate::cpu::{bound, updated};
use crate::world::World;

const TIMEOUT: Duration = Duration::from_secs(30);

/// The GPUs of this machine, if it has some.
pub fn find() -> Option<Launch> {
    match Launch::find(TIMEOUT) {
        Ok(launch) => Some(launch),
        Err(why) if std::env::var_os("KERNELCAST_REQUIRE_GPU").is_some() => {
            panic!("a GPU is required: {}", why.message)
        }
        Err(why) => {
            eprintln!("skipped: no GPU can be used here ({})", why.message);
            None
        }
    }
}

pub fn evaluate(
    compiled: &Compiled,
    world: &World,
    launch: &Launch,
    path: GpuPath,
) -> Vec<Vec<Option<Stored>>> {
    let options = Options {
        path: Some(path),
        timeout: TIMEOUT,
        // So little that most cases need several buckets.
        staging: 1 << 20,
        derived: true,
        gpus: None,
    };
    updated(compiled, world, |trainers, targets| {
        let finite = FiniteCheck::Allow;
        update_on_gpus(compiled, launch, trainers, targets, finite, &options).expect("it runs");
    })
}

/// Runs two worlds of one plan through GPUs that stay open, and then the plan for another expert
/// map: what each update left.
pub fn replays(
    compiled: &Compiled,
    worlds: [&World; 2],
    remapped: Option<&Compiled>,
    launch: &Launch,
    path: GpuPath,
) -> Vec<Vec<Vec<Option<Stored>>>> {
    let options = Options {
        path: Some(path),
        timeout: TIMEOUT,
        staging: 1 << 20,
        derived: true,
        gpus: None,
    };
    let sides = Sides {
        trainers: compiled.program.trainers,
        ranks: (compiled.program.ranks.len() as u64 * compiled.mesh.replicas) as u32,
    };
    let mut live: Option<Live> = None;
    let mut left = Vec::new();
    let plans = [(compiled, worlds[0]), (compiled, worlds[1])];
    let plans = plans.into_iter().chain(remapped.map(|plan| (plan, worlds[0])));
    for (round, (plan, world)) in plans.enumerate() {
        let program = &plan.program;
        let replicas = plan.mesh.replicas;
        let schedules = |bounds: Bounds| schedule(program, replicas, bounds);
        left.push(bound(plan, world, |rows, sinks| {
            let live = live.get_or_insert_with(|| {
                let digest = &plan.digest;
                Live::open(launch, program, digest, &schedules, rows, sides, &options)
                    .expect("it opens")
            });
            if round == 2 {
                live.remap(program, &schedules).expect("it takes another map");
            }
            live.reload(program, rows).expect("sources are read");
            live.update().expect("it runs");
            live.store(program, sinks, true).expect("it is stored");
        }));
    }
    left
}

fn schedule(
    program: &Program,
    replicas: u64,
    bounds: Bounds,
) -> Result<Vec<Graph>, Vec<Diagnostic>> {
    let cluster = Cluster::default();
    let setup = Setup::for_threads(replicas as u32, &cluster, bounds);
    let mapped = program.mapped();
    let fixed = build(program, 0..mapped.start, &setup)?;
    let mapped = build(program, mapped, &setup)?;
    Ok(vec![fixed, mapped])
}
