//! The CUDA backend: tables of jobs, one kernel, NVLink stores or NCCL, captured once.

mod build;
pub mod jobs;
mod land;
mod maxima;
mod packed;
mod parts;
mod peer;
mod place;
mod program;
mod reader;
mod seats;
mod segments;
mod table;
mod tiles;
mod values;

pub use build::{Build, Memory, Staging, words_of};
pub use maxima::staging_bytes;
pub use packed::Room;
pub use place::{Tensor, local_shape};
pub use program::{Flag, Instruction, Lane, SeatProgram};
pub use seats::{Seat, Seats};
pub use table::{SCRATCH, Table};

use crate::diag::Diagnostic;

type Fallible<T> = Result<T, Diagnostic>;
