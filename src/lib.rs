//! kernelcast moves RL-trained weights from trainer ranks into the parameters that vLLM ranks
//! hold, in the layout that vLLM's kernels read.
//!
//! # Reading order
//! A plan script goes one way through the crate, and every stage is a plain value that
//! `engine dry-run --emit STAGE` prints:
//!
//! ```text
//! script ─► ir ─► shard ─► lower ─► graph ─► backend ─► verify
//! (Plan)   types  boxes   program  buckets  bytes      oracle
//! ```
//!
//! | module | what it owns |
//! | --- | --- |
//! | [`diag`], [`error`] | messages with a place in the plan, codes, exit statuses |
//! | [`dtype`], [`fp8`] | element types; e4m3 and e8m0 codecs, block-quantization recipes, bit for bit |
//! | [`topo`] | inference and trainer meshes, ranks |
//! | [`ir`] | the plan as data, and the one function that infers shapes |
//! | [`script`] | the plan language: the only home of rhai |
//! | [`shard`] | which boxes of which sources make up what a rank holds |
//! | [`lower`] | distinct units of work and their receivers |
//! | [`graph`] | chunks, buckets, and each rank's steps, with a verifier |
//! | [`mod@simulate`] | a schedule against the clock of each link of a cluster |
//! | [`io`] | safetensors in and out, JSON inputs |
//! | [`rendezvous`] | how the processes of a run meet, agree and hear of failures: all HTTP and JSON |
//! | [`backend`] | the CPU backend, and the reference interpreter that judges it |
//! | [`mod@compile`], [`table`], [`mod@check`], [`load`], [`exec`], [`memory`], [`verify`] | the library's calls |
//! | [`cli`] | the binary `engine` |
//!
//! # Invariants
//! `tests/tidy.rs` enforces the first five.
//! - A module uses only modules that stand before it in the table.
//! - rhai lives in [`script`], HTTP in [`rendezvous`], CUDA in [`backend::cuda`], the terminal
//!   in [`cli`].
//! - `unsafe` lives in `fp8/simd` and [`backend::cuda`], with a SAFETY line.
//! - Files are short and begin with what they own.
//! - Library code does not unwrap.
//! - Planning does no IO, reads no clock and iterates no hash map in an order that shows: the
//!   same inputs give the same program on every machine.
//! - Nothing is published before every name, shape, type and byte has been proved to fit.
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
pub mod rendezvous;
pub mod script;
pub mod shard;
pub mod simulate;
pub mod table;
pub mod topo;
pub mod verify;
