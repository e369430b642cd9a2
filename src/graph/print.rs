//! The text and DOT forms of a graph.

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

/// The graph for Graphviz: one cluster a rank, an edge for each message.
pub fn print_dot(program: &Program, graph: &Graph) -> String {
    let mut out = String::from("digraph update {\n  rankdir=LR;\n  node [shape=box];\n");
    let _ = writeln!(out, "  subgraph cluster_t0 {{ label=\"trainer 0\";");
    for (i, bucket) in graph.buckets.iter().enumerate() {
        let _ = writeln!(out, "    t0_b{i} [label=\"launch {i}\\n{} bytes\"];", bucket.bytes);
    }
    let _ = writeln!(out, "  }}");
    for (steps, rank) in graph.ranks.iter().zip(&program.ranks) {
        let r = rank.rank;
        let _ = writeln!(out, "  subgraph cluster_r{r} {{ label=\"rank {r}\";");
        for step in steps {
            if let Step::Store { bucket } = step {
                let _ = writeln!(out, "    r{r}_b{bucket} [label=\"store {bucket}\"];");
            }
        }
        let _ = writeln!(out, "  }}");
    }
    for step in &graph.trainer {
        if let Step::Send { bucket, to } = *step {
            let r = program.ranks[to].rank;
            let _ = writeln!(out, "  t0_b{bucket} -> r{r}_b{bucket};");
        }
    }
    out.push_str("}\n");
    out
}
