//! The graph as DOT: what each rank does in each bucket, and the messages between.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use crate::lower::{Program, TargetKind};
use crate::topo::{Peer, RankId};

use super::{Graph, Message};

/// A `digraph` with a cluster for each rank that does something, a node for each bucket in it,
/// and an edge for each message; relays are dashed. The same on every machine.
///
/// With `only`, just the messages of one process, and the others that it hears from or feeds.
pub fn print_graph(program: &Program, graph: &Graph, only: Option<Peer>) -> String {
    let messages: Vec<Vec<Message>> =
        (0..graph.buckets.len()).map(|bucket| messages(graph, bucket, only)).collect();
    let steps = steps(program, graph, &messages, only);
    let mut out = String::from("digraph update {\n  rankdir=LR;\n  node [shape=box];\n");
    let _ = writeln!(
        out,
        "  label=\"buckets {}, staging {} bytes, schedule {:032x}\";",
        graph.buckets.len(),
        graph.staging_bytes,
        graph.digest
    );
    for (peer, steps) in &steps {
        let _ = writeln!(out, "  subgraph \"cluster_{}\" {{\n    label=\"{peer}\";", id(*peer));
        for (step, text) in steps {
            let _ = writeln!(out, "    {} [label=\"{text}\"];", node(*peer, *step));
        }
        let chain: Vec<String> = steps.keys().map(|s| node(*peer, *s)).collect();
        if chain.len() > 1 {
            let _ = writeln!(out, "    {} [color=gray];", chain.join(" -> "));
        }
        out.push_str("  }\n");
    }
    for (bucket, messages) in messages.iter().enumerate() {
        for m in messages {
            let style = if matches!(m.from, Peer::Rank(_)) { ", style=dashed" } else { "" };
            let (from, to) = (node(m.from, bucket), node(Peer::Rank(m.to), bucket));
            let _ = writeln!(out, "  {from} -> {to} [label=\"{} bytes\"{style}];", m.bytes);
        }
    }
    out + "}\n"
}

fn messages(graph: &Graph, bucket: usize, only: Option<Peer>) -> Vec<Message> {
    let own = |m: &Message| only.is_none_or(|p| m.from == p || Peer::Rank(m.to) == p);
    graph.messages(bucket).into_iter().filter(own).collect()
}

/// Text of each rank's steps: one a bucket, then what it computes from what has landed.
fn steps(
    program: &Program,
    graph: &Graph,
    messages: &[Vec<Message>],
    only: Option<Peer>,
) -> BTreeMap<Peer, BTreeMap<usize, String>> {
    let mut steps: BTreeMap<Peer, BTreeMap<usize, String>> = BTreeMap::new();
    for (bucket, messages) in messages.iter().enumerate() {
        let senders: BTreeSet<Peer> = messages.iter().map(|m| m.from).collect();
        let mut made: BTreeMap<u32, (usize, u64, BTreeSet<&str>)> = BTreeMap::new();
        let sent = |from: u32| senders.contains(&Peer::Trainer(from));
        for (_, flow) in graph.flows_of(bucket).filter(|(_, f)| sent(f.from)) {
            let (parts, bytes, names) = made.entry(flow.from).or_default();
            *bytes += flow.bytes;
            for part in graph.parts_of(flow) {
                *parts += 1;
                names.insert(&program.units[part.unit as usize].name);
            }
        }
        for (trainer, (parts, bytes, names)) in made {
            let names: Vec<&str> = names.into_iter().collect();
            let text = format!(
                "launch {bucket}: {parts} parts, {bytes} bytes\\n{}",
                names.join("\\n")
            );
            steps.entry(Peer::Trainer(trainer)).or_default().insert(bucket, text);
        }
        for message in messages {
            let text = format!("store {bucket}");
            steps.entry(Peer::Rank(message.to)).or_default().insert(bucket, text);
        }
    }
    let derived = |r: usize| {
        let targets = program.ranks[r].targets.iter();
        let derived = targets.filter(|t| t.kind == TargetKind::Derived);
        derived.map(|t| t.name.as_str()).collect::<Vec<_>>()
    };
    let shown = |r: &usize| only.is_none_or(|p| p == Peer::Rank(RankId(*r as u64)));
    for rank in (0..graph.ranks as usize).filter(shown) {
        let names = derived(rank % program.ranks.len());
        if !names.is_empty() {
            let own = steps.entry(Peer::Rank(RankId(rank as u64))).or_default();
            own.insert(graph.buckets.len(), format!("derive\\n{}", names.join("\\n")));
        }
    }
    steps
}

fn id(peer: Peer) -> String {
    match peer {
        Peer::Trainer(t) => format!("t{t}"),
        Peer::Rank(r) => format!("r{r}"),
    }
}

fn node(peer: Peer, step: usize) -> String {
    format!("{}_{step}", id(peer))
}
