//! Runs a compiled plan on GPUs, from memory to memory. Without one the laws on GPUs are skipped,
//! or fail where `KERNELCAST_REQUIRE_GPU` is set.

use std::time::Duration;

use kernelcast::backend::cpu::FiniteCheck;
use kernelcast::backend::cuda::run::{Launch, Options};
use kernelcast::backend::reference::Stored;
use kernelcast::compile::Compiled;
use kernelcast::exec::GpuPath;
use kernelcast::memory::update_on_gpus;

use crate::cpu::updated;
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
