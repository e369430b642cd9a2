//! Graphs are equal wherever they are built, and the verifier finds what is wrong with one.

use std::time::Duration;

use kernelcast::backend::cpu::{FiniteCheck, Options, Rows, Shards, Sink, run};
use kernelcast::compile::Compiled;
use kernelcast::dtype::DType;
use kernelcast::graph::{Bounds, Fan, Graph, Route, Setup, build, check};
use kernelcast::topo::Cluster;

use crate::failures::{Nowhere, own};
use crate::world::{Case, Local, shards};

/// A dense matrix that all ranks hold, experts, and a vector.
fn case(train: &str, infer: &str) -> Case {
    let text = "
        let m = at(\"experts\");
        m[\"w\"] = m.src(\"w\", [8, 160, 96]).experts(ep).quantize(fp8::vllm);
        b[\"q\"] = b.src(\"q\", [576, 130]).quantize(fp8::vllm);
        b[\"o\"] = b.src(\"o\", [130, 576]).shard(1, tp).quantize(fp8::vllm);
        b[\"n\"] = b.src(\"n\", [64]);";
    Case::new(text, train, infer)
        .with("experts.w", DType::Bf16, &[8, 160, 96])
        .with("q", DType::Bf16, &[576, 130])
        .with("o", DType::Bf16, &[130, 576])
        .with("n", DType::Bf16, &[64])
}

fn graph_of(compiled: &Compiled, fan: Fan) -> Graph {
    let (replicas, cluster) = (compiled.mesh.replicas as u32, Cluster::default());
    let bounds = Bounds::with_staging(256 << 10);
    let setup = Setup { fan: Some(fan), ..Setup::new(replicas, &cluster, bounds) };
    let program = &compiled.program;
    build(program, program.all(), &setup).expect("every tile has an owner")
}

fn compiled(train: &str, infer: &str) -> Compiled {
    case(train, infer).compile().unwrap_or_else(|e| panic!("{e:#?}"))
}

#[test]
fn schedules_are_equal_on_every_rank_and_differ_with_the_mesh() {
    let mut digests = std::collections::BTreeSet::new();
    let meshes = [
        ("fsdp=8", "tp=4"),
        ("fsdp=4", "tp=4"),
        ("fsdp=8,ep=2", "tp=4"),
        ("fsdp=8,ep=2,expert_fsdp_dim=0", "tp=4"),
        ("dp_replicate=2,fsdp=4", "tp=4"),
        ("fsdp=4,tp=2", "tp=4"),
        ("pp=2,fsdp=4", "tp=4"),
        ("fsdp=8", "tp=2"),
        ("fsdp=8", "tp=4,ep=4"),
        ("fsdp=8", "tp=4,replicas=2"),
    ];
    for (train, infer) in meshes {
        let (one, two) = (compiled(train, infer), compiled(train, infer));
        assert_eq!(one.digest, two.digest, "{train} to {infer}");
        let (a, b) = (graph_of(&one, Fan::Chain), graph_of(&two, Fan::Chain));
        assert_eq!(a.digest, b.digest, "{train} to {infer}");
        assert_eq!(a, b);
        assert!(digests.insert(a.digest), "{train} to {infer} is as another mesh");
    }
}

/// How a graph that was right is spoiled.
type Spoil = fn(&mut Graph);

const SPOILED: [(&str, Spoil); 15] = [
    ("a flow is left out", |g| g.buckets.last_mut().unwrap().flows.end -= 1),
    ("a bucket is left out", |g| g.buckets.truncate(g.buckets.len() - 1)),
    ("a bucket comes twice", |g| g.buckets.push(g.buckets[0].clone())),
    ("a part comes twice", |g| {
        g.parts.push(g.parts.last().unwrap().clone());
        g.flows.last_mut().unwrap().parts.end += 1;
    }),
    ("a part is left out", |g| g.flows[0].parts.start += 1),
    ("a part is moved onto another", |g| {
        let i = halves(g);
        g.parts[i].window.lo[0] += 1;
    }),
    ("a part reaches out of its unit", |g| g.parts[0].window.lo[0] += 4096),
    ("a part is shorter than its bytes", |g| g.parts[0].window.len[0] -= 1),
    ("a flow has fewer bytes than its parts", |g| g.flows[0].bytes -= 1),
    ("a flow takes another route", |g| {
        let other = (0..g.routes.len()).find(|r| reach(&g.routes[*r]) != reach_of(g, 0));
        g.flows[0].route = other.unwrap() as u32;
    }),
    ("a rank is sent the same twice", |g| {
        let entry = g.routes[0].entries[0];
        g.routes[0].entries.push(entry);
    }),
    ("a relay is left out", |g| {
        let r = g.routes.iter_mut().find(|r| !r.relays.is_empty()).unwrap();
        r.relays.pop();
    }),
    ("a relay comes twice", |g| {
        let r = g.routes.iter_mut().find(|r| !r.relays.is_empty()).unwrap();
        r.relays.push(*r.relays.last().unwrap());
    }),
    ("a relay comes before what it passes on", |g| {
        let chain = |r: &&mut Route| {
            r.relays.len() > 1 && r.relays.iter().any(|(from, _)| !r.entries.contains(from))
        };
        g.routes.iter_mut().find(chain).unwrap().relays.reverse();
    }),
    ("a rank relays to itself", |g| {
        let r = g.routes.iter_mut().find(|r| !r.relays.is_empty()).unwrap();
        r.relays[0].1 = r.relays[0].0;
    }),
];

/// A part that can be moved a row down and still lies in its unit, which has others.
fn halves(g: &Graph) -> usize {
    let more = |i: &usize| {
        let p = &g.parts[*i];
        p.window.lo[0] == 0
            && p.window.len[0] > 1
            && g.parts.iter().any(|q| q.unit == p.unit && q.window.lo[0] > 0)
    };
    (0..g.parts.len()).find(more).expect("a unit of several parts")
}

fn reach(route: &Route) -> std::collections::BTreeSet<u64> {
    let relayed = route.relays.iter().map(|(_, to)| to.0);
    route.entries.iter().map(|r| r.0).chain(relayed).collect()
}

fn reach_of(g: &Graph, flow: usize) -> std::collections::BTreeSet<u64> {
    reach(&g.routes[g.flows[flow].route as usize])
}

#[test]
fn the_verifier_finds_every_way_to_spoil_a_graph() {
    // Three hosts of inference ranks: relays go on from hosts and inside of them.
    let compiled = compiled("fsdp=5", "tp=4,ep=4,replicas=4");
    let graph = graph_of(&compiled, Fan::Chain);
    check(&compiled.program, compiled.program.all(), &graph)
        .expect("it is right as it was built");
    check(&compiled.program, compiled.program.all(), &graph_of(&compiled, Fan::Direct))
        .expect("so is the other");
    let mut missed = Vec::new();
    for (what, spoil) in SPOILED {
        let mut spoiled = graph.clone();
        spoil(&mut spoiled);
        match check(&compiled.program, compiled.program.all(), &spoiled) {
            Err(d) => assert_eq!(d.code, "E0502", "{what}"),
            Ok(()) => missed.push(what),
        }
    }
    assert_eq!(missed, [""; 0], "not found");
}

/// Who holds what is not proven before an update; a reader refuses to give another rank's rows.
#[test]
fn a_wrong_sender_or_a_tile_that_is_not_agreed_on_ends_the_update() {
    let spoiled: [(&str, Spoil); 4] = [
        ("no tile is agreed on", |g| g.shared.clear()),
        ("the collector is left out", |g| g.shared[0].holders.start += 1),
        ("a holder is left out", |g| g.shared.last_mut().unwrap().holders.end -= 1),
        ("another trainer sends", |g| g.flows[0].from = (g.flows[0].from + 1) % g.trainers),
    ];
    let case = case("fsdp=5", "tp=2");
    let compiled = case.compile().expect("the plan is right");
    let graph = graph_of(&compiled, Fan::Chain);
    let trainers = 0..compiled.program.trainers;
    let local: Vec<Vec<Local>> =
        trainers.clone().map(|t| shards(&compiled, &case.world, t)).collect();
    let rows: Vec<Shards<'_>> =
        trainers.map(|t| own(&compiled, &local[t as usize], t)).collect();
    let rows: Vec<&dyn Rows> = rows.iter().map(|r| r as &dyn Rows).collect();
    let sinks: [&dyn Sink; 2] = [&Nowhere, &Nowhere];
    let timeout = Duration::from_secs(2);
    let options = Options { finite: FiniteCheck::During, timeout, progress: &|_| {} };
    run(&compiled.program, &graph, &rows, &sinks, &options)
        .expect("it is right as it was built");
    for (what, spoil) in spoiled {
        let mut graph = graph.clone();
        spoil(&mut graph);
        let done = run(&compiled.program, &graph, &rows, &sinks, &options);
        let e = done.map(|_| ()).expect_err(what);
        assert_eq!((e.exit_code(), e.diagnostics[0].code), (3, "E0502"), "{what}");
    }
}
