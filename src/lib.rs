//! kernelcast: from a per-model plan to kernel-format weights.
#![deny(unsafe_code)]

pub mod backend;
pub mod check;
pub mod cli;
pub mod compile;
pub mod diag;
pub mod dtype;
pub mod error;
pub mod exec;
pub mod fp8;
pub mod graph;
pub mod io;
pub mod ir;
pub mod load;
pub mod lower;
pub mod memory;
pub mod script;
pub mod shard;
pub mod table;
pub mod topo;
