//! The binary `engine`.
fn main() {}
