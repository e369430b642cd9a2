//! The two kernels, compiled for a GPU, and how many blocks they are launched with.

use std::sync::Arc;

use super::Fallible;
use super::cache;
use super::driver::{Arg, Function, Gpu, Stream};
use super::jobs::{SHARED_BYTES, STAGED_BYTES};

/// The kernels, for all cards.
pub const SOURCE: &str = include_str!("../../../kernels/update.cu");

/// Threads of a block.
const THREADS: u32 = 256;

pub struct Kernels {
    update: Function,
    evaluate: Function,
    /// Blocks that run at a time.
    update_blocks: u32,
    evaluate_blocks: u32,
}

impl Kernels {
    /// # Errors
    /// E0605 if NVRTC is missing or refuses.
    pub fn load(gpu: &Arc<Gpu>) -> Fallible<Kernels> {
        let cubin = cache::kernels(SOURCE, "update.cu", gpu.capability(), &[])?;
        let module = gpu.module(&cubin)?;
        let (update, evaluate) = (module.function("update")?, module.function("evaluate")?);
        evaluate.set_shared(SHARED_BYTES)?;
        update.set_shared(STAGED_BYTES)?;
        let all = |f: &Function, shared| -> Fallible<u32> {
            Ok(f.blocks_per_multiprocessor(THREADS, shared)?.max(1) * gpu.multiprocessors())
        };
        let (update_blocks, evaluate_blocks) =
            (all(&update, STAGED_BYTES)?, all(&evaluate, SHARED_BYTES)?);
        Ok(Kernels { update, evaluate, update_blocks, evaluate_blocks })
    }

    /// Runs the jobs that copy and quantize, with at most `most` blocks.
    ///
    /// # Errors
    /// E0605 from the driver.
    pub fn update(
        &self,
        stream: &Stream,
        args: [Arg; 2],
        jobs: usize,
        most: u32,
    ) -> Fallible<()> {
        let grid = self.update_blocks.min(most).min(jobs as u32);
        stream.launch(&self.update, grid, THREADS, STAGED_BYTES, &args)
    }

    /// Runs the jobs of any expression, with at most `most` blocks.
    ///
    /// # Errors
    /// E0605 from the driver.
    pub fn evaluate(
        &self,
        stream: &Stream,
        args: [Arg; 2],
        jobs: usize,
        most: u32,
    ) -> Fallible<()> {
        let grid = self.evaluate_blocks.min(most).min(jobs as u32);
        stream.launch(&self.evaluate, grid, THREADS, SHARED_BYTES, &args)
    }
}
