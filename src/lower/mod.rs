//! From resolved pieces to a program: distinct units of work, and who receives each.

mod print;
mod program;

pub use print::{print_program, print_shards};
pub(crate) use program::recipe_of;
pub use program::{
    Part, Placed, Program, ProgramSource, RankProgram, Receiver, Target, TargetKind,
    TargetStorage, Unit,
};
