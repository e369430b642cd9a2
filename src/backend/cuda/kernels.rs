//! The kernels, compiled for a GPU, and their launches.

use std::sync::Arc;

use super::Fallible;
use super::cache;
use super::driver::{Arg, Function, Gpu, Stream};
use super::jobs::SHARED_BYTES;
use super::table::Table;

/// The kernels, for all cards.
pub const SOURCE: &str = include_str!("../../../kernels/update.cu");

/// Their names, in the order of a table's lists, and bytes of shared memory.
const KERNELS: [(&str, u32); 3] = [("quantize", 0), ("copy", 0), ("evaluate", SHARED_BYTES)];

/// Threads of a block.
const THREADS: u32 = 256;

pub struct Kernels([Function; 3]);

impl Kernels {
    /// # Errors
    /// E0605 if NVRTC is missing or refuses.
    pub fn load(gpu: &Arc<Gpu>) -> Fallible<Kernels> {
        let cubin = cache::kernels(SOURCE, "update.cu", gpu.capability(), &[])?;
        let module = gpu.module(&cubin)?;
        let load = |(name, shared): (&str, u32)| -> Fallible<Function> {
            let function = module.function(name)?;
            if shared > 0 {
                function.set_shared(shared)?;
            }
            Ok(function)
        };
        let [a, b, c] = KERNELS.map(load);
        Ok(Kernels([a?, b?, c?]))
    }

    /// Runs a table of so many jobs a kernel, whose image lies at an address, with at most `most`
    /// blocks a kernel. `bad` has a word for each unit.
    ///
    /// # Errors
    /// E0605 from the driver.
    pub fn launch(
        &self,
        stream: &Stream,
        jobs: [usize; 3],
        at: u64,
        bad: u64,
        most: u32,
    ) -> Fallible<()> {
        for (kernel, jobs) in jobs.into_iter().enumerate() {
            let args = [Arg::U64(Table::header_at(at, kernel)), Arg::U64(bad)];
            let (blocks, shared) = (most.min(jobs as u32), KERNELS[kernel].1);
            stream.launch(&self.0[kernel], blocks, THREADS, shared, &args)?;
        }
        Ok(())
    }
}
