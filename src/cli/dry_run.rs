//! `engine dry-run`: compile, print, touch nothing.

use crate::compile::Compiled;
use crate::exec::{DEFAULT_STAGING, Schedule};
use crate::graph::{Bounds, Setup, print_graph};
use crate::lower::{print_program, print_shards};
use crate::table::ShapeTable;
use crate::topo::{Cluster, Peer, RankId};

use super::args::{DryRunArgs, Stage, TableFormat};
use super::inputs::{self, Weights};
use super::{Failure, PLAIN_WIDTH, TableStyle, print, render_table, report};

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
        Stage::Graph => {
            let replicas = compiled.mesh.replicas as u32;
            let bounds = Bounds::with_staging(DEFAULT_STAGING);
            let only = match wanted.as_deref() {
                Some([one]) => Some(Peer::Rank(*one)),
                _ => None,
            };
            let cluster = Cluster::default();
            let setup = Setup { only, ..Setup::new(replicas, &cluster, bounds) };
            let schedule = Schedule::of(compiled, &setup)
                .map_err(|error| Failure { error, files: compiled.files().clone() })?;
            print_graph(&compiled.program, &schedule.joined(), only)
        }
        Stage::Shapes => shapes(compiled, wanted.as_deref(), args.format),
    };
    print(&text)
}

fn shapes(compiled: &Compiled, wanted: Option<&[RankId]>, format: TableFormat) -> String {
    // None where standard output is no terminal.
    let width = comfy_table::Table::new().width().unwrap_or(PLAIN_WIDTH);
    match format {
        TableFormat::Json => {
            let all = || compiled.mesh.ranks().collect::<Vec<_>>();
            let table = ShapeTable::of(compiled, &wanted.map_or_else(all, <[RankId]>::to_vec));
            serde_json::to_string(&table).unwrap_or_default() + "\n"
        }
        TableFormat::Table if super::styled() => {
            render_table(compiled, wanted, TableStyle::Styled, width)
        }
        TableFormat::Table => render_table(compiled, wanted, TableStyle::Plain, width),
        TableFormat::Markdown => render_table(compiled, wanted, TableStyle::Markdown, width),
    }
}
