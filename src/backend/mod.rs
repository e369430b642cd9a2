//! What executes a program, and the oracle that judges the result.

pub mod reference;
