//! The CUDA backend: the only home of the driver, NVRTC and NCCL, all found at run time.
#![allow(unsafe_code)]

pub mod cache;
mod comm;
pub mod driver;
mod errors;
mod graph;
mod library;
mod memory;
mod module;
pub mod nccl;
pub mod nvrtc;
mod stream;
#[cfg(test)]
mod tests;

use crate::diag::Diagnostic;

/// What a call of this backend gives.
pub(crate) type Fallible<T> = Result<T, Diagnostic>;
