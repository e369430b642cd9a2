//! From resolved pieces to a program: distinct units of work, and who receives each.

mod program;
mod print;

pub use print::{print_program, print_shards};
pub(crate) use program::{recipe_of, scale_size};
pub use program::{
    Part, Program, ProgramSource, RankProgram, Target, TargetKind, TargetStorage, Unit,
};
