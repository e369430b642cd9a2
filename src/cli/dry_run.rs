//! `engine dry-run`: compile, print, touch nothing.

use crate::lower::{print_program, print_shards};
use crate::table::ShapeTable;

use super::args::{DryRunArgs, Stage, TableFormat};
use super::inputs::{self, Weights};
use super::{Failure, print, report};

pub(super) fn run(args: &DryRunArgs) -> Result<(), Failure> {
    let loaded = inputs::load(&args.inputs, Weights::Optional)?;
    let compiled = &loaded.compiled;
    let wanted = inputs::ranks(args.rank.as_deref(), &compiled.mesh)?;
    let json = args.format == TableFormat::Json;
    report(&compiled.notes, compiled.files(), json);
    let text = match args.emit {
        Stage::Plan => compiled.stages.iter().map(crate::ir::print_plan).collect(),
        Stage::Shards => print_shards(&compiled.program),
        Stage::Program => print_program(&compiled.program),
        Stage::Graph => String::new(),
        Stage::Shapes => {
            let all = || compiled.mesh.ranks().collect::<Vec<_>>();
            let table = ShapeTable::of(compiled, &wanted.clone().unwrap_or_else(all));
            serde_json::to_string(&table).unwrap_or_default() + "\n"
        }
    };
    print(&text);
    Ok(())
}
