//! The expert map as an operand of an update: a changed map moves experts and nothing else.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kernelcast::backend::cpu::{FiniteCheck, Options};
use kernelcast::compile::Compiled;
use kernelcast::dtype::DType;
use kernelcast::error::Error;
use kernelcast::exec::Schedule;
use kernelcast::graph::{self, Bounds};
use kernelcast::lower::TargetKind;
use kernelcast::memory::{Sources, Targets, update_agreed};
use kernelcast::topo::{Cluster, RankId};

use support::{Setup, Tensors};

const EXPERTS: u64 = 6;
const PLAN: &str = r#"
let m = at("model.layers.0");
let gate = stack((0..6).collect().map(|i| m.src(`experts.${i}.w`, [128, 256])));
m["mlp.w13"] = gate.experts(ep).quantize(fp8::vllm);
m["norm"] = m.src("norm", [256]);
"#;

fn compiled(map: &[u64], train: &str) -> Compiled {
    let text = PLAN.replace("(0..6).collect()", "[0, 1, 2, 3, 4, 5]");
    let mut setup = Setup::new("plan", &text);
    let mut tensors = Tensors::default();
    for i in 0..EXPERTS {
        tensors.add(&format!("model.layers.0.experts.{i}.w BF16 [128, 256]"));
    }
    tensors.add("model.layers.0.norm BF16 [256]");
    setup.tensors = Some(tensors);
    setup.infer = Some("dp=4,ep=4,redundant_experts=2,replicas=2".to_owned());
    setup.train = Some(train.to_owned());
    if !map.is_empty() {
        setup.experts = BTreeMap::from([("model.layers.0".to_owned(), map.to_vec())]);
    }
    setup.compile().map_err(|e| e.error.diagnostics).unwrap()
}

/// Whole tensors; bf16 of different size in each expert.
fn tensors() -> Vec<(String, Vec<u64>, Vec<u8>)> {
    let value = |seed: u64| (0x3C00 + ((seed * 2_654_435_761) >> 7) % 0x0300) as u16;
    let filled = |tag: u64, count: u64| -> Vec<u8> {
        (0..count).flat_map(|i| value(i + 100_000 * tag).to_le_bytes()).collect()
    };
    let expert =
        |i| (format!("model.layers.0.experts.{i}.w"), vec![128, 256], filled(i, 1 << 15));
    let mut all: Vec<_> = (0..EXPERTS).map(expert).collect();
    all.push(("model.layers.0.norm".to_owned(), vec![256], filled(9, 256)));
    all
}

type Memory = BTreeMap<(u64, String), Vec<u8>>;

/// An update from a trainer of one rank; gives what all ranks of all replicas hold.
fn update(compiled: &Compiled, schedule: &Schedule) -> Result<(Memory, u64), Error> {
    let whole = tensors();
    let mut sources = Sources::default();
    for (name, shape, bytes) in &whole {
        sources.add(name, DType::Bf16, shape, bytes)?;
    }
    let ranks = &compiled.program.ranks;
    let mut memory = Memory::new();
    for replica in 0..compiled.mesh.replicas {
        for rank in ranks {
            let written = rank.targets.iter().filter(|t| t.kind == TargetKind::Parameter);
            for s in written.flat_map(|t| &t.storages) {
                let id = replica * ranks.len() as u64 + rank.rank.0;
                memory.insert((id, s.name.clone()), vec![0xa5; s.bytes() as usize]);
            }
        }
    }
    let mut targets = Targets::default();
    for ((rank, name), bytes) in &mut memory {
        targets.bind(RankId(*rank), name, bytes);
    }
    let options = Options {
        finite: FiniteCheck::During,
        timeout: Duration::from_secs(20),
        progress: &|_| {},
    };
    let trainers = std::slice::from_ref(&sources);
    let report = update_agreed(compiled, schedule, trainers, &mut targets, &options)?;
    Ok((memory, report.sent_bytes))
}

fn schedule(compiled: &Compiled) -> Schedule {
    let cluster = Cluster::default();
    Schedule::of(
        compiled,
        &graph::Setup::for_threads(2, &cluster, Bounds::with_staging(1 << 20)),
    )
    .unwrap()
}

const FIRST: [u64; 8] = [0, 1, 2, 3, 4, 5, 0, 1];
const SECOND: [u64; 8] = [5, 4, 3, 2, 1, 0, 5, 5];

/// Codes and scales.
type Bytes<'a> = (&'a [u8], &'a [u8]);

/// Each slot holds its expert's codes and scales, on every replica.
fn check(memory: &Memory, map: &[u64]) {
    let mut of: BTreeMap<u64, BTreeSet<Bytes<'_>>> = BTreeMap::new();
    for (slot, expert) in map.iter().enumerate() {
        for replica in 0..2 {
            let rank = replica * 4 + slot as u64 / 2;
            let codes = &memory[&(rank, "model.layers.0.mlp.w13".to_owned())];
            let scales = memory.keys().find(|k| k.0 == rank && k.1.contains("scale")).unwrap();
            let codes = &codes[slot % 2 * 32768..][..32768];
            let scales = &memory[scales][slot % 2 * 8..][..8];
            of.entry(*expert).or_default().insert((codes, scales));
        }
    }
    assert_eq!(of.len() as u64, EXPERTS, "every expert is somewhere");
    let distinct: BTreeSet<_> = of.values().flatten().collect();
    assert_eq!(distinct.len() as u64, EXPERTS, "experts differ, their copies do not");
    assert!(of.values().all(|copies| copies.len() == 1));
}

#[test]
fn copies_of_an_expert_are_sent_once_and_are_identical() {
    let compiled = compiled(&FIRST, "fsdp=1");
    let (memory, sent) = update(&compiled, &schedule(&compiled)).unwrap();
    check(&memory, &FIRST);
    // Six experts of codes and two scales each, and the norm; the rest is relayed.
    assert_eq!(sent, 6 * (128 * 256 + 2 * 4) + 2 * 256);
}

#[test]
fn a_changed_map_changes_the_experts_part_alone() {
    let (before, after) = (compiled(&FIRST, "fsdp=1"), compiled(&SECOND, "fsdp=1"));
    let agreed = schedule(&before);
    let cluster = Cluster::default();
    let remapped = agreed
        .remap(&after, &graph::Setup::for_threads(2, &cluster, Bounds::with_staging(1 << 20)))
        .unwrap();
    assert_eq!(remapped.fixed, agreed.fixed);
    assert_ne!(remapped.mapped, agreed.mapped);
    assert_ne!(remapped.digest(), agreed.digest());
    assert_eq!(remapped.digest(), schedule(&after).digest());
    let (memory, _) = update(&after, &remapped).unwrap();
    check(&memory, &SECOND);
    check(&update(&before, &agreed).unwrap().0, &FIRST);
}

#[test]
fn a_map_that_changed_since_it_was_agreed_is_refused() {
    let (before, after) = (compiled(&FIRST, "fsdp=1"), compiled(&SECOND, "fsdp=1"));
    let e = update(&after, &schedule(&before)).unwrap_err();
    assert_eq!(
        (e.diagnostics[0].code, e.diagnostics[0].message.as_str()),
        ("E0305", "the expert map of model.layers.0 has changed since the schedule was agreed")
    );
    // The initial map is a map too.
    let e = update(&compiled(&[], "fsdp=1"), &schedule(&before)).unwrap_err();
    assert_eq!(e.diagnostics[0].code, "E0305");
}

#[test]
fn a_plan_that_differs_in_more_than_the_map_needs_a_new_schedule() {
    let agreed = schedule(&compiled(&FIRST, "fsdp=1"));
    let mut other = compiled(&SECOND, "fsdp=1");
    other.program.units.remove(0);
    let cluster = Cluster::default();
    let e = agreed
        .remap(&other, &graph::Setup::for_threads(2, &cluster, Bounds::with_staging(1 << 20)));
    assert_eq!(e.unwrap_err().diagnostics[0].code, "E0305");
}
