//! A trainer of many ranks: each inference rank holds what one that has all would send it, and
//! receives nothing else.

#[path = "sharded/experts.rs"]
mod experts;
#[path = "sharded/failures.rs"]
mod failures;
#[path = "sharded/finite.rs"]
mod finite;
#[path = "sharded/graphs.rs"]
mod graphs;
#[path = "sharded/recipes.rs"]
mod recipes;
#[path = "sharded/world.rs"]
mod world;

use kernelcast::dtype::DType;
use kernelcast::graph::{Bounds, Setup, build, check};
use kernelcast::topo::Cluster;

use world::Case;

/// One bf16 matrix `w`, and what the plan makes of it.
fn matrix(expression: &str, shape: [u64; 2], train: &str, infer: &str) -> Case {
    let text = format!("b[\"p\"] = b.src(\"w\", {shape:?}){expression};");
    Case::new(&text, train, infer).with("w", DType::Bf16, &shape)
}

const QUANTIZED: &str = ".quantize(fp8::vllm)";

#[test]
fn rows_that_are_no_multiples_of_tiles_and_ranks() {
    // 72 rows a rank: seven cuts, none between tiles; a tile of k holders has k - 1 of them.
    let report = matrix(QUANTIZED, [576, 256], "fsdp=8", "tp=1").check();
    assert_eq!(report.amax_bytes, 8 * 7 * 2);
    // 21706 rows a rank.
    let report = matrix(QUANTIZED, [151_936, 8], "fsdp=7", "tp=1").check();
    assert_eq!(report.amax_bytes, 8 * 6);
    // 684 rows a rank, two columns of tiles.
    let report = matrix(QUANTIZED, [10_944, 130], "fsdp=16", "tp=1").check();
    assert_eq!(report.amax_bytes, 8 * 15 * 2);
    // Whole tiles a rank.
    let report = matrix(QUANTIZED, [1024, 130], "fsdp=4", "tp=1").check();
    assert_eq!(report.amax_bytes, 0);
    // 228 rows of each half: cuts of the ranks' own grids at 684 - 576 and so on.
    let cut = ".shard(0, tp).quantize(fp8::vllm)";
    matrix(cut, [1152, 130], "fsdp=5", "tp=2").check();
}

#[test]
fn ranks_without_a_row() {
    // Two, two, one and no row.
    let report = matrix(QUANTIZED, [5, 200], "fsdp=4", "tp=1").check();
    assert_eq!(report.amax_bytes, 8 * 2 * 2);
    let report = matrix(QUANTIZED, [3, 40], "fsdp=8", "tp=1").check();
    assert_eq!(report.amax_bytes, 8 * 2);
    assert_eq!(matrix("", [3, 40], "fsdp=8", "tp=1").check().amax_bytes, 0);
}

/// Rows, columns and heads, cut by the inference side's tensor parallelism.
fn parallel(train: &str, infer: &str) -> Case {
    let text = "
        b[\"rows\"] = b.src(\"r\", [512, 300]).shard(0, tp).quantize(fp8::vllm);
        b[\"columns\"] = b.src(\"c\", [300, 512]).shard(1, tp).quantize(fp8::vllm);
        b[\"heads\"] = b.src(\"h\", [320, 140]).heads(tp, 2).quantize(fp8::vllm);
        b[\"plain\"] = b.src(\"q\", [8, 36, 20], f32).shard(1, tp);
        b[\"norm\"] = b.src(\"n\", [77]);";
    Case::new(text, train, infer)
        .with("r", DType::Bf16, &[512, 300])
        .with("c", DType::Bf16, &[300, 512])
        .with("h", DType::Bf16, &[320, 140])
        .with("q", DType::F32, &[8, 36, 20])
        .with("n", DType::Bf16, &[77])
}

#[test]
fn tensor_parallelism_of_two_becomes_four_and_four_becomes_two() {
    for (train, infer) in [
        ("tp=2", "tp=4"),
        ("tp=4", "tp=2"),
        ("tp=2", "tp=2"),
        ("tp=4", "tp=4,dp=2"),
        ("fsdp=2,tp=2", "tp=4"),
        ("fsdp=3,tp=2", "tp=2"),
        ("fsdp=2,tp=2", "tp=1"),
    ] {
        parallel(train, infer).check();
    }
}

#[test]
fn a_strided_shard_is_two_ranges_of_rows() {
    // By rows tp has halves of 150, of which fsdp has 75 each.
    let case = matrix(".shard(0, tp).quantize(fp8::vllm)", [300, 256], "fsdp=2,tp=2", "tp=2");
    let report = case.check();
    // Each rank's own 150 rows: two rows of tiles, of which the first is cut at 75.
    assert_eq!(report.amax_bytes, 8 * 2 * 2);
    let placed = matrix(QUANTIZED, [300, 256], "", "tp=1")
        .placed(&[("fsdp", 2), ("tp", 2)], &[("w", "SS(0,2) S(0)")]);
    // Ranks 0, 2, 1 and 3 have 75 rows each: the first tiles lie on 0 and 2, the next on all
    // but 0, and the last on 3.
    assert_eq!(placed.check().amax_bytes, 8 * 2 * (1 + 2));
}

#[test]
fn pipeline_stages_become_tensor_parallelism() {
    let layer = "
        for l in 0..4 {
            let m = at(`layers.${l}`);
            m[\"w\"] = m.src(\"w\", [192, 260]).shard(0, tp).quantize(fp8::deepgemm);
        }
        b[\"head\"] = b.src(\"head\", [50, 64]).shard(0, tp);";
    let mut case = Case::new(layer, "pp=2", "tp=2").with("head", DType::Bf16, &[50, 64]);
    for l in 0..4 {
        case = case.with(&format!("layers.{l}.w"), DType::Bf16, &[192, 260]);
    }
    assert_eq!(case.check().amax_bytes, 0);
    case.train = "pp=2,fsdp=2".to_owned();
    // 96 rows a rank: those of inference.
    assert_eq!(case.check().amax_bytes, 0);
    (case.train, case.infer) = ("pp=3,fsdp=3".to_owned(), "tp=2,pp=2,replicas=2".to_owned());
    case.check();
}

#[test]
fn replicas_of_the_trainer_send_alike() {
    let text = "
        for l in 0..96 {
            let m = at(`layers.${l}`);
            m[\"w\"] = m.src(\"w\", [128, 64 + 8 * (l % 5)]).quantize(fp8::vllm);
        }";
    let mut case = Case::new(text, "", "tp=2");
    for l in 0..96 {
        case = case.with(&format!("layers.{l}.w"), DType::Bf16, &[128, 64 + 8 * (l % 5)]);
    }
    // Without tensor parallelism in the plan, tp ranks are replicas too.
    for train in ["dp_replicate=2,fsdp=4", "dp_replicate=4,fsdp=2", "fsdp=2,tp=4", "tp=8"] {
        case.train = train.to_owned();
        case.check();
        let compiled = case.compile().expect("it was compiled above");
        let bounds = Bounds::with_staging(case.staging);
        let graph = build(
            &compiled.program,
            compiled.program.all(),
            &Setup::for_threads(1, &Cluster::default(), bounds),
        );
        let graph = graph.expect("every tile has an owner");
        check(&compiled.program, compiled.program.all(), &graph).expect("it is proven");
        let mut sent = vec![0; graph.trainers as usize];
        for flow in &graph.flows {
            sent[flow.from as usize] += flow.bytes * graph.route(flow).entries.len() as u64;
        }
        let (most, all) = (sent.iter().max().copied().unwrap_or(0), sent.iter().sum::<u64>());
        assert!(most as f64 * 8.0 <= 1.1 * all as f64, "{train}: {sent:?}");
    }
}

#[test]
fn three_replicas_of_inference_hold_the_same() {
    for train in ["fsdp=3", "dp_replicate=2,fsdp=2", "fsdp=2,tp=2"] {
        let report = parallel(train, "tp=2,replicas=3").check();
        assert_eq!(report.received_bytes.len(), 6);
    }
}

#[test]
fn masters_are_cast_where_they_lie() {
    let text = "
        b[\"plain\"] = b.src(\"m\", [300, 96], f32).to(bf16).shard(0, tp);
        b[\"codes\"] = b.src(\"m\", [300, 96], f32).to(bf16).quantize(fp8::prime_rl);";
    for train in ["fsdp=4", "fsdp=7", "fsdp=2,tp=2"] {
        let report = Case::new(text, train, "tp=2").with("m", DType::F32, &[300, 96]).check();
        // Two bytes an element on the wire, and a code with three scales.
        assert_eq!(report.sent_bytes, 300 * 96 * 2 + 300 * 96 + 3 * 4);
    }
}
