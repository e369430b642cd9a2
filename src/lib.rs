//! kernelcast: from a per-model plan to kernel-format weights.
#![deny(unsafe_code)]

pub mod diag;
pub mod dtype;
pub mod error;
pub mod fp8;
pub mod io;
