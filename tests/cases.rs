//! Twelve situations from the field: input and right result are those of their reports.
//! Compile errors and shapes are asked of the library, bytes and exit statuses of the binary.

#[path = "cases/attention.rs"]
mod attention;
#[path = "cases/experts.rs"]
mod experts;
#[path = "cases/files.rs"]
mod files;
#[path = "cases/grids.rs"]
mod grids;
#[path = "cases/large.rs"]
mod large;
#[path = "cases/receivers.rs"]
mod receivers;
mod support;
#[path = "cases/values.rs"]
mod values;
#[path = "cases/world.rs"]
mod world;
