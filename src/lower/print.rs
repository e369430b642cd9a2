//! The text forms of shards and programs.

use std::fmt::Write;

use crate::ir::show_shape;
use crate::shard::{Expr, Storage, TilesFrom, View, Window};

use super::{Part, Program};

/// Each rank's targets with the boxes that fill them.
pub fn print_shards(program: &Program) -> String {
    let mut out = String::new();
    for rank in &program.ranks {
        let _ = writeln!(out, "rank {}", rank.rank);
        for target in &rank.targets {
            for s in &target.storages {
                let _ = writeln!(out, "  {} {} {}", s.name, s.dtype, show_shape(&s.shape));
            }
            for place in &target.places {
                let unit = &program.units[place.unit as usize];
                let at = Window { lo: place.lo.clone(), len: unit.shape.clone() };
                let _ = writeln!(out, "    {}", show_box(program, &at, &unit.expr));
            }
            for piece in &target.derived {
                let _ = writeln!(out, "    {}", show_box(program, &piece.at, &piece.expr));
            }
        }
    }
    out
}

/// Sources, units and their receivers.
pub fn print_program(program: &Program) -> String {
    let mut out = String::new();
    for (i, s) in program.sources.iter().enumerate() {
        let _ = writeln!(out, "source {i} {} {} {}", s.name, s.dtype, show_shape(&s.shape));
    }
    for (i, unit) in program.units.iter().enumerate() {
        let ranks: Vec<String> = (unit.receivers.iter())
            .map(|r| program.ranks[r.rank as usize].rank.to_string())
            .collect();
        let _ = writeln!(
            out,
            "unit {i} {} {} {} {} bytes -> ranks {}",
            unit.name,
            unit.dtype,
            show_shape(&unit.shape),
            unit.bytes(),
            ranks.join(" ")
        );
        let _ = writeln!(out, "  {}", show_expr(program, &unit.expr));
    }
    out
}

fn show_box(program: &Program, at: &Window, expr: &Expr) -> String {
    let ranges: Vec<String> =
        at.lo.iter().zip(&at.len).map(|(l, n)| format!("{l}..{}", l + n)).collect();
    format!("[{}] = {}", ranges.join(", "), show_expr(program, expr))
}

fn show_expr(program: &Program, expr: &Expr) -> String {
    match expr {
        Expr::Load(view) => show_view(program, view),
        Expr::Fill { bits, .. } => format!("{}", f64::from_bits(*bits)),
        Expr::Cast { dtype, value } => format!("{}.to({dtype})", show_expr(program, value)),
        Expr::Scale { factor, value } => {
            format!("({} * {})", show_expr(program, value), f64::from_bits(*factor))
        }
        Expr::Add { left, right } => {
            format!("({} + {})", show_expr(program, left), show_expr(program, right))
        }
        Expr::Tiles(tiles) => show_tiles(program, tiles),
        Expr::Dequantize { dtype, tiles } => {
            format!("{}.dequantize({dtype})", show_tiles(program, tiles))
        }
        Expr::Codes(tiles) => format!("{}.codes()", show_tiles(program, tiles)),
        Expr::Scales { tiles, .. } => format!("{}.scales()", show_tiles(program, tiles)),
    }
}

fn show_tiles(program: &Program, tiles: &crate::shard::Tiles) -> String {
    let refined = if tiles.refined == tiles.block() {
        String::new()
    } else {
        format!(".refine({}) from {:?}", tiles.refined, tiles.phase)
    };
    match &tiles.from {
        TilesFrom::Stored(s) => format!(
            "{}/{} by {}{refined}",
            show_view(program, &s.codes),
            s.scales.block,
            show_view(program, &s.scales.view)
        ),
        TilesFrom::Made(made) => {
            let input: Vec<String> =
                made.input.iter().map(|p| show_box(program, &p.at, &p.expr)).collect();
            format!(
                "{}/{}({}){refined}",
                made.recipe.kind.name(),
                made.recipe.block,
                input.join("; ")
            )
        }
    }
}

fn show_view(program: &Program, view: &View) -> String {
    let name = match view.storage {
        Storage::Source(i) => program.sources[i as usize].name.clone(),
        Storage::Landed(i) => format!("landed {i}"),
        Storage::LandedScale(i) => format!("landed scales {i}"),
    };
    let strides: Vec<String> = view.strides.iter().map(u64::to_string).collect();
    format!("{name}@{}:({})", view.start, strides.join(","))
}

impl Part {
    /// The word for messages.
    pub const fn name(self) -> &'static str {
        match self {
            Part::Values => "values",
            Part::Scales => "scales",
        }
    }
}
