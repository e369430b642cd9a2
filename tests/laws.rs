//! Laws that hold for every plan, topology and content.

#[path = "laws/cases.rs"]
mod cases;
#[path = "laws/cpu.rs"]
mod cpu;
#[path = "laws/gpu.rs"]
mod gpu;
#[path = "laws/limits.rs"]
mod limits;
#[path = "laws/pieces.rs"]
mod pieces;
#[path = "laws/tables.rs"]
mod tables;
#[path = "laws/train.rs"]
mod train;
#[path = "laws/world.rs"]
mod world;

use std::collections::BTreeMap;

use kernelcast::backend::reference::{Oracle, Stored};
use kernelcast::compile::Compiled;
use kernelcast::diag::Diagnostic;
use kernelcast::dtype::DType;
use kernelcast::exec::GpuPath;
use kernelcast::ir::Place;
use kernelcast::verify::{FileTensor, verify_rank};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

use cases::Case;
use train::Train;
use world::{Values, World, compile_case, compile_sharded};

/// Evaluates a compiled plan: for each rank its targets in the plan's order, none for what it
/// does not store.
type Evaluator<'a> = &'a dyn Fn(&Compiled, &World) -> Vec<Vec<Option<Stored>>>;

/// Law 1: what an evaluator makes of a rank is what the oracle finds, bit for bit.
fn check_against_oracle(case: &Case, seed: u64, values: Values, evaluate: Evaluator<'_>) {
    let world = World::random(&case.sources, seed, values);
    check_compiled(case, &world, compile_case(case, &world), evaluate);
}

fn check_compiled(
    case: &Case,
    world: &World,
    compiled: Result<Compiled, Vec<Diagnostic>>,
    evaluate: Evaluator<'_>,
) {
    let compiled = match compiled {
        Ok(compiled) => compiled,
        Err(e) => {
            let codes: Vec<_> = e.iter().map(|d| d.code).collect();
            assert!(codes.iter().all(|c| *c == "E0501"), "{e:#?}");
            return;
        }
    };
    let evaluated = evaluate(&compiled, world);
    assert_eq!(evaluated.len(), compiled.program.ranks.len());
    for (rank, found) in compiled.program.ranks.iter().zip(evaluated) {
        let plan = &compiled.stages[rank.coords.pp as usize];
        let place = Place::of(&compiled.mesh, rank.coords);
        let oracle = Oracle::new(plan, place, &case.experts, world).expect("it was compiled");
        assert_eq!(found.len(), plan.params.len());
        for (param, found) in plan.params.iter().zip(found) {
            let Some(found) = found else { continue };
            let expected = oracle.param(param).expect("every source is there");
            let what = format!("{} on rank {}", param.name, rank.rank);
            equal(&found.values, &expected.values, &format!("values of {what}"));
            let scales = |s: &Stored| s.scales.clone().unwrap_or_default();
            equal(&scales(&found), &scales(&expected), &format!("scales of {what}"));
        }
    }
}

/// Law 4 and 5 for a case's own trainer mesh, each rank with its own memory.
fn check_sharded(case: &Case, world: &World, evaluate: Evaluator<'_>) {
    let compiled = compile_sharded(case, world);
    if let Err(e) = &compiled
        && e.iter().any(|d| d.code == "E0308")
    {
        // The default rules cut codes and their scales each by its own rows.
        let by_rules = matches!(case.train, Train::Rules(_))
            && case.sources.iter().any(|s| s.name.ends_with("_scale_inv"));
        let twice = case.text.matches("quantize(").count() > 1;
        let may = by_rules || twice || case.text.contains(" + ");
        assert!(may && e.iter().all(|d| ["E0308", "E0501"].contains(&d.code)), "{e:#?}");
        return;
    }
    check_compiled(case, world, compiled, evaluate);
}

/// Failures are kept in a file and tried first.
fn config() -> ProptestConfig {
    let kept = FileFailurePersistence::Direct("tests/laws/failures.txt");
    ProptestConfig {
        max_shrink_iters: 20_000,
        failure_persistence: Some(Box::new(kept)),
        ..ProptestConfig::default()
    }
}

/// Says where bytes differ, not what they all are.
fn equal(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "length of {what}");
    if let Some(at) = (0..found.len()).find(|i| found[*i] != expected[*i]) {
        let part =
            |bytes: &[u8]| bytes[at / 4 * 4..].iter().take(8).copied().collect::<Vec<_>>();
        let (found, expected) = (part(found), part(expected));
        panic!("{what} differ at byte {at}: {found:02x?} instead of {expected:02x?}");
    }
}

fn case() -> impl Strategy<Value = Case> {
    vec(any::<u32>(), 0..120).prop_map(cases::make)
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn pieces_are_what_the_oracle_finds(case in case(), seed: u64) {
        check_against_oracle(&case, seed, Values::Any, &pieces::evaluate);
    }

    #[test]
    fn the_cpu_backend_writes_what_the_oracle_finds(case in case(), seed: u64) {
        check_against_oracle(&case, seed, Values::Any, &cpu::evaluate);
    }

    #[test]
    fn a_sharded_trainer_writes_what_the_oracle_finds(case in case(), seed: u64) {
        let world = World::random(&case.sources, seed, Values::Any);
        check_sharded(&case, &world, &cpu::evaluate);
    }

    #[test]
    fn gpu_programs_write_what_the_oracle_finds(case in case(), seed: u64, count in 1usize..5, mapped: bool) {
        let world = World::random(&case.sources, seed, Values::Any);
        let gpus = tables::Gpus { count, mapped };
        check_sharded(&case, &world, &|c, w| tables::evaluate(c, w, gpus));
    }

    #[test]
    fn another_expert_map_changes_what_follows_it_alone(case in case(), seed: u64) {
        let world = World::random(&case.sources, seed, Values::Any);
        let Ok(compiled) = compile_sharded(&case, &world) else { return Ok(()) };
        let mut turned = case.clone();
        turned.experts.values_mut().for_each(|map| map.reverse());
        let Ok(other) = compile_sharded(&turned, &world) else { return Ok(()) };
        let same = compiled.program.fixed_digest() == other.program.fixed_digest();
        // Without balancing a map is a part of the plan like any other.
        assert!(same || !compiled.mesh.eplb, "more than the map has changed");
    }

    #[test]
    fn gpus_write_what_the_oracle_finds(case in case(), seed: u64, peer: bool) {
        let Some(launch) = gpu::find() else { return Ok(()) };
        let path = if peer { GpuPath::Peer } else { GpuPath::Nccl };
        let world = World::random(&case.sources, seed, Values::Any);
        check_sharded(&case, &world, &|c, w| gpu::evaluate(c, w, &launch, path));
    }

    #[test]
    fn gpus_that_stay_open_follow_weights_and_maps(case in case(), seed: u64, peer: bool) {
        let Some(launch) = gpu::find() else { return Ok(()) };
        let path = if peer { GpuPath::Peer } else { GpuPath::Nccl };
        let worlds = [seed, !seed].map(|s| World::random(&case.sources, s, Values::Any));
        let Ok(compiled) = compile_sharded(&case, &worlds[0]) else { return Ok(()) };
        let mut turned = case.clone();
        turned.experts.values_mut().for_each(|map| map.reverse());
        let other = compile_sharded(&turned, &worlds[0]).ok();
        let follows = |c: &Compiled| {
            c.program.fixed_digest() == compiled.program.fixed_digest()
        };
        let other = other.filter(|c| turned.experts != case.experts && follows(c));
        let worlds = [&worlds[0], &worlds[1]];
        let mut left = gpu::replays(&compiled, worlds, other.as_ref(), &launch, path).into_iter();
        for (case, world) in [(&case, worlds[0]), (&case, worlds[1]), (&turned, worlds[0])] {
            let Some(found) = left.next() else { break };
            let again = compile_sharded(case, world);
            let once = std::cell::Cell::new(Some(found));
            check_compiled(case, world, again, &|_, _| once.take().expect("asked once"));
        }
    }

    #[test]
    fn quantize_commutes_with_aligned_cuts_and_no_others(cut in cut()) {
        check_cut(&cut);
    }
}

/// A cut of a matrix, in words, and where it really cuts.
#[derive(Clone, Debug)]
struct Cut {
    shape: [u64; 2],
    block: u64,
    ranks: u64,
    call: String,
    dim: usize,
    /// For each rank: first and last index (exclusive) of `dim`.
    parts: Vec<(u64, u64)>,
}

fn cut() -> impl Strategy<Value = Cut> {
    let local =
        prop_oneof![1u64..80, (1u64..4).prop_map(|n| 32 * n), (1u64..3).prop_map(|n| 64 * n)];
    let sizes =
        (local, 1u64..4, 1u64..5, 0usize..2, prop_oneof![Just(32u64), Just(64)], 1u64..70);
    (sizes, 0u64..3, any::<(u16, u16)>()).prop_map(
        |((local, heads, ranks, dim, block, other), kind, (a, b))| {
            let (size, call, dim, parts) = match kind {
                0 => {
                    let parts = (0..ranks).map(|r| (r * local, (r + 1) * local)).collect();
                    (local * ranks, format!("shard({dim}, tp)"), dim, parts)
                }
                1 => {
                    // One head a rank, or each head on several.
                    let heads = if ranks % heads == 0 { heads } else { 1 };
                    let part = |r: u64| r * heads / ranks * local;
                    let parts = (0..ranks).map(|r| (part(r), part(r) + local)).collect();
                    (local * heads, format!("heads(tp, {heads})"), 0, parts)
                }
                _ => {
                    let size = local * ranks;
                    let unit = if a % 3 == 0 { 1 } else { block };
                    let start = u64::from(a) % size / unit * unit;
                    let end = start + 1 + u64::from(b) % (size - start);
                    let end =
                        if b % 3 == 0 { end } else { end.next_multiple_of(unit).min(size) };
                    (
                        size,
                        format!("slice({dim}, {start}..{end})"),
                        dim,
                        vec![(start, end); ranks as usize],
                    )
                }
            };
            let shape = if dim == 0 { [size, other] } else { [other, size] };
            Cut { shape, block, ranks, call, dim, parts }
        },
    )
}

/// Law 4: quantizing and cutting commute exactly where every cut lies on the grid, and the
/// checker refuses exactly the rest.
fn check_cut(cut: &Cut) {
    let [rows, cols] = cut.shape;
    let quantize = format!("quantize(fp8::prime_rl.block({}))", cut.block);
    let case = |calls: &[&str], tp: u64| Case {
        text: format!(
            "let b = at(\"m\"); b[\"p\"] = b.src(\"s\", [{rows}, {cols}], f32).{};",
            calls.join(".")
        ),
        infer: format!("tp={tp}"),
        block: 128,
        sources: Vec::new(),
        experts: Default::default(),
        train: Default::default(),
    };
    // Ascending and descending values: no two different tiles have one amax in both.
    let count = rows * cols;
    let worlds = [0, count].map(|down| {
        let mut world = World::default();
        let values = (0..count).flat_map(|i| (1.0 + i.abs_diff(down) as f32).to_le_bytes());
        world.insert("m.s", DType::F32, &cut.shape, values.collect());
        world
    });
    let full = compile_case(&case(&[&quantize], 1), &worlds[0]).expect("there is no cut");
    let cut_first = compile_case(&case(&[&cut.call, &quantize], cut.ranks), &worlds[0]);
    let cut_first = cut_first.expect("floats can be cut anywhere");
    let cut_last = compile_case(&case(&[&quantize, &cut.call], cut.ranks), &worlds[0]);

    let size = cut.shape[cut.dim];
    let on_grid = |at: u64| at == size || at.is_multiple_of(cut.block);
    let aligned = cut.parts.iter().all(|(lo, hi)| on_grid(*lo) && on_grid(*hi));
    let mut commutes = true;
    for world in &worlds {
        let (full, _) = elements(&full, world, 0);
        for (rank, (lo, hi)) in cut.parts.iter().enumerate() {
            let (first, shape) = elements(&cut_first, world, rank);
            assert_eq!(shape[cut.dim], hi - lo);
            for (i, element) in first.iter().enumerate() {
                let mut at = [i as u64 / shape[1], i as u64 % shape[1]];
                at[cut.dim] += lo;
                commutes &= *element == full[(at[0] * cols + at[1]) as usize];
            }
            if let Ok(cut_last) = &cut_last {
                assert_eq!(elements(cut_last, world, rank).0, first, "rank {rank}");
            }
        }
    }
    assert_eq!(commutes, aligned, "what commutes");
    match cut_last {
        Ok(_) => assert!(aligned, "the checker let it pass"),
        Err(e) => {
            let codes: Vec<_> = e.iter().map(|d| d.code).collect();
            assert!(!aligned && codes == ["E0304"], "the checker said {codes:?}");
        }
    }
}

/// Code and scale of each element of a rank's only parameter, and its shape.
fn elements(compiled: &Compiled, world: &World, rank: usize) -> (Vec<(u8, u32)>, Vec<u64>) {
    let plan = &compiled.stages[0];
    let place = Place::of(&compiled.mesh, compiled.program.ranks[rank].coords);
    let experts = Default::default();
    let oracle = Oracle::new(plan, place, &experts, world).expect("it was compiled");
    let param = &plan.params[0];
    let t = oracle.type_of(param.node);
    let stored = oracle.param(param).expect("every source is there");
    let (block, grid) =
        (t.quant.expect("quantized").block, t.scale_shape().expect("quantized"));
    let scales = stored.scales.expect("quantized");
    let scale = |i: u64| {
        let tile = i / t.shape[1] / block * grid[1] + i % t.shape[1] / block;
        u32::from_le_bytes(scales[4 * tile as usize..][..4].try_into().expect("four bytes"))
    };
    let codes = stored.values.into_iter();
    (codes.enumerate().map(|(i, c)| (c, scale(i as u64))).collect(), t.shape.to_vec())
}

/// What `verify` says of a rank's own bytes, and of one that was changed.
#[test]
fn verification_names_the_first_difference() {
    let case = Case {
        text: "let b = at(\"m\"); b[\"p\"] = b.src(\"s\", [8, 40]).shard(0, tp).quantize(\
               fp8::vllm.block(32));"
            .to_owned(),
        infer: "tp=2".to_owned(),
        block: 128,
        sources: vec![cases::SourceTensor {
            name: "m.s".to_owned(),
            dtype: DType::Bf16,
            shape: vec![8, 40],
        }],
        experts: Default::default(),
        train: Default::default(),
    };
    let world = World::random(&case.sources, 3, Values::Finite);
    let compiled = compile_case(&case, &world).expect("the plan is right");
    let coords = compiled.program.ranks[1].coords;
    let place = Place::of(&compiled.mesh, coords);
    let oracle = Oracle::new(&compiled.stages[0], place, &case.experts, &world).expect("right");
    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut tensors = Vec::new();
    let stored = cpu::evaluate(&compiled, &world).remove(1).remove(0).expect("it is stored");
    let contents = [stored.values, stored.scales.expect("it is quantized")];
    for (storage, bytes) in compiled.program.ranks[1].targets[0].storages.iter().zip(contents) {
        files.insert(storage.name.clone(), bytes);
        let (name, dtype, shape) = (storage.name.clone(), storage.dtype, storage.shape.clone());
        tensors.push(FileTensor { name, dtype, shape });
    }
    let check = |files: &BTreeMap<String, Vec<u8>>, tensors: &[FileTensor]| -> Vec<String> {
        let read = |name: &str| Ok(files[name].clone());
        let found = verify_rank(&oracle, 1, tensors, &read).expect("everything is read");
        found.into_iter().map(|m| m.diagnostic().message).collect()
    };
    assert_eq!(check(&files, &tensors), Vec::<String>::new());

    let codes = files.get_mut("m.p").expect("it is there");
    (codes[85], codes[90]) = (codes[85] ^ 1, codes[90] ^ 0x80);
    let found = check(&files, &tensors);
    assert!(
        found.len() == 1
            && found[0]
                .starts_with("m.p of rank 1 differs in 2 of 160 elements, first at [2, 5]:"),
        "{found:?}"
    );
    tensors[1].shape[0] = 2;
    tensors[0].name = "m.q".to_owned();
    assert_eq!(
        check(&files, &tensors),
        [
            "m.p is missing on rank 1",
            "m.p_scale_inv of rank 1 is f32 [2, 2], the plan makes f32 [1, 2]",
            "rank 1 holds m.q, which the plan does not define",
        ]
    );
}

/// The cases say something: nearly all compile, and every word of the language is in some.
#[test]
fn cases_are_worth_testing() {
    let words = [
        "cat(",
        "stack(",
        ".slice(",
        ".reshape(",
        ".permute(",
        ".pad_to(",
        ".to(",
        ".shard(",
        ".heads(",
        ".experts(",
        ".quantize(",
        ".refine(",
        ".dequantize(",
        " + ",
        " * ",
        "b[\"d",
    ];
    let mut seen = vec![0; words.len()];
    let (mut compiled, mut total) = (0, 0);
    for seed in 0..400u64 {
        let tape = World::noise(seed, 80);
        let case = cases::make(tape);
        let world = World::random(&case.sources, seed, Values::Finite);
        total += 1;
        if compile_case(&case, &world).is_err() {
            continue;
        }
        compiled += 1;
        for (word, seen) in words.iter().zip(&mut seen) {
            *seen += usize::from(case.text.contains(word));
        }
    }
    let rare: Vec<_> = words.iter().zip(&seen).filter(|(_, n)| **n < 10).collect();
    assert!(rare.is_empty(), "rare in {compiled} cases: {rare:?}");
    assert!(compiled * 10 > total * 8, "{compiled} of {total} compile");
}
