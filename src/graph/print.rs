//! The text form of a graph.

use std::fmt::Write;

use crate::ir::show_shape;
use crate::lower::Program;

use super::{Graph, Step};

/// Buckets with their chunks, then each rank's steps; the same on every machine.
pub fn print_graph(program: &Program, graph: &Graph) -> String {
    let mut out = String::new();
    for (i, bucket) in graph.buckets.iter().enumerate() {
        let _ = writeln!(out, "bucket {i} {} bytes", bucket.bytes);
        for c in &bucket.chunks {
            let _ = writeln!(
                out,
                "  {} {} + {} -> {} bytes at {}, {} bytes of scales at {}",
                program.units[c.unit].name,
                show_shape(&c.window.lo),
                show_shape(&c.window.len),
                c.value_bytes,
                c.value_at,
                c.scale_bytes,
                c.scale_at
            );
        }
    }
    let _ = writeln!(out, "trainer 0");
    for step in &graph.trainer {
        let _ = writeln!(out, "  {}", show_step(program, None, step));
    }
    for (i, (steps, rank)) in graph.ranks.iter().zip(&program.ranks).enumerate() {
        let _ = writeln!(out, "rank {}", rank.rank);
        for step in steps {
            let _ = writeln!(out, "  {}", show_step(program, Some(i), step));
        }
    }
    let _ = writeln!(out, "staging {} bytes", graph.staging_bytes);
    out
}

fn show_step(program: &Program, rank: Option<usize>, step: &Step) -> String {
    match *step {
        Step::Launch { bucket } => format!("launch {bucket}"),
        Step::Send { bucket, to } => {
            format!("send {bucket} to rank {}", program.ranks[to].rank)
        }
        Step::Recv { bucket } => format!("recv {bucket} from trainer 0"),
        Step::Store { bucket } => format!("store {bucket}"),
        Step::Derive { target } => {
            let name = rank.map_or("", |r| program.ranks[r].targets[target].name.as_str());
            format!("derive {name}")
        }
    }
}
