//! Backends run a graph; `reference` is the oracle that they are held against.

pub mod cpu;
pub mod cuda;
pub mod reference;
