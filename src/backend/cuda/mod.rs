//! The CUDA backend: tables of jobs, one kernel, NVLink stores or NCCL, captured once. The only
//! home of the driver, NVRTC and NCCL, all found at run time.
#![allow(unsafe_code)]

mod arena;
pub mod bench;
mod build;
pub mod cache;
mod comm;
pub mod driver;
mod errors;
mod files;
mod graph;
pub mod jobs;
pub mod kernels;
mod land;
mod library;
pub mod live;
mod maxima;
mod memory;
mod module;
pub mod nccl;
mod neighbours;
pub mod nvrtc;
mod packed;
mod parts;
mod peer;
mod place;
mod program;
mod reader;
pub mod run;
mod seats;
mod segments;
pub mod session;
mod stream;
mod table;
#[cfg(test)]
mod tests;
mod tiles;
mod values;

pub use build::{Addresses, Build, Staging, words_of};
pub use maxima::staging_bytes;
pub use packed::Room;
pub use place::{Tensor, local_shape};
pub use program::{Flag, Instruction, Lane, SeatProgram};
pub use seats::{Seat, Seats};
pub use table::{SCRATCH, Table};

use crate::diag::Diagnostic;

/// What a call of this backend gives.
pub(crate) type Fallible<T> = Result<T, Diagnostic>;
