//! The memory of other GPUs: of this process as it is, of other processes by CUDA IPC.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Fallible;
use super::driver::{Gpu, Imported, Memory};
use crate::diag::Diagnostic;
use crate::rendezvous::Member;

/// What a GPU tells the others of an allocation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Published {
    /// Names the machine while it runs.
    boot: String,
    process: u32,
    ordinal: usize,
    card: String,
    address: u64,
    handle: Vec<u8>,
}

impl Published {
    /// # Errors
    /// E0605 if the driver gives no handle.
    pub fn of(gpu: &Gpu, memory: &Memory) -> Fallible<Published> {
        Ok(Published {
            boot: boot(),
            process: std::process::id(),
            ordinal: gpu.ordinal(),
            card: format!("{} {}", gpu.name(), gpu.uuid()),
            address: memory.address(),
            handle: memory.ipc_handle()?.to_vec(),
        })
    }

    fn is_here(&self) -> bool {
        self.process == std::process::id() && self.boot == boot()
    }
}

/// Another GPU's allocation as this one sees it.
pub struct Neighbour {
    pub address: u64,
    _mapping: Option<Imported>,
    _gpu: Option<Arc<Gpu>>,
}

impl Neighbour {
    /// Maps what another GPU has published.
    ///
    /// # Errors
    /// E0605 with the reason why this GPU cannot reach it.
    pub fn reach(gpu: &Arc<Gpu>, other: &Published) -> Fallible<Neighbour> {
        if other.boot != boot() {
            let text = format!("{} is on another machine", other.card);
            return Err(Diagnostic::error("E0605", text));
        }
        if other.is_here() {
            let own = Gpu::open(other.ordinal)?;
            if !gpu.can_reach(&own)? {
                let text =
                    format!("{} does not reach the memory of {}", gpu.name(), other.card);
                return Err(Diagnostic::error("E0605", text));
            }
            gpu.enable_peer(&own)?;
            return Ok(Neighbour { address: other.address, _mapping: None, _gpu: Some(own) });
        }
        let handle = <[u8; 64]>::try_from(&other.handle[..]).map_err(|_| {
            Diagnostic::error("E0611", "a memory handle does not have 64 bytes")
        })?;
        let mapping = Imported::open(gpu, handle)?;
        Ok(Neighbour { address: mapping.address(), _mapping: Some(mapping), _gpu: None })
    }

    /// Maps an allocation of every other GPU; none for this one.
    ///
    /// # Errors
    /// E0605 for the first that this GPU cannot reach.
    pub fn reach_all(
        gpu: &Arc<Gpu>,
        member: &Member,
        all: &[Published],
    ) -> Fallible<Vec<Option<Neighbour>>> {
        let others = all.iter().enumerate();
        others
            .map(|(seat, other)| match seat == member.rank() {
                true => Ok(None),
                false => Neighbour::reach(gpu, other).map(Some),
            })
            .collect()
    }
}

/// Changes with each start of the machine.
fn boot() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_or_else(|_| "unknown".to_owned(), |id| id.trim().to_owned())
}
