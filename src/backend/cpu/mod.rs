//! The CPU backend: threads as ranks, channels as wires. Embedded default, and the oracle of
//! the GPU's results.

mod bits;
mod boxes;
mod eval;
mod finite;
mod held;
mod partial;
mod rank;
mod run;
mod strided;
mod trainer;

pub use finite::{NonFinite, scan};
pub use held::{Fenced, Shards};
pub use run::{FiniteCheck, Options, Report, judge, refuse_sources, run};

use crate::diag::Diagnostic;
use crate::lower::Part;

/// Computes a derived parameter from what has landed: its row-major bytes.
///
/// # Errors
/// What reading the landed parameters gives.
pub fn derive(
    landed: &dyn Rows,
    pieces: &[crate::shard::Piece],
    shape: &[u64],
    dtype: crate::dtype::DType,
    out: &mut [u8],
) -> Result<(), Diagnostic> {
    eval::values(&eval::Inputs::new(landed), pieces, shape, dtype, out)
}

/// Reads strided rows of a storage into consecutive places of `buf`.
pub trait Rows: Sync {
    /// Offsets and strides in bytes; `buf` holds `rows * row_bytes`.
    fn read(
        &self,
        storage: crate::shard::Storage,
        rows: Strided,
        buf: &mut [u8],
    ) -> Result<(), Diagnostic>;
}

/// Evenly spaced rows of a storage, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strided {
    pub offset: u64,
    pub row_bytes: u64,
    pub stride: u64,
    pub rows: u64,
}

/// What an inference rank's parameters are kept in: a file, or memory of the caller.
pub trait Sink: Sync {
    /// Puts consecutive rows of `bytes` at their places in one storage of a target (by index on
    /// the rank).
    fn write(
        &self,
        target: usize,
        part: Part,
        rows: Strided,
        bytes: &[u8],
    ) -> Result<(), Diagnostic>;
}
