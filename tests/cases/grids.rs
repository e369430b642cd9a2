//! Where quantization blocks lie: full tensors and shards, fused parts, shards below a block.

use safetensors::tensor::Dtype;

use crate::world::{
    C, FULL, Held, bf16s, compiled, differences, folder, problems_of, receiver, run, said,
    shape, with_sources,
};

const PLAN_A: &str = r#"
let a = at("model.layers.0.self_attn");
a["q_b_proj.weight"] = a.src("q_b_proj.weight", [16384, 2048]).shard(0, tp).quantize(fp8::vllm);
a["o_proj.weight"] = a.src("o_proj.weight", [6144, 16384]).shard(1, tp).quantize(fp8::vllm);
"#;

const PLAN_B: &str = r#"
let a = at("model.layers.0.self_attn");
a["q_b_proj.weight"] = a.src("q_b_proj.weight", [16384, 2048]).quantize(fp8::vllm);
a["o_proj.weight"] = a.src("o_proj.weight", [6144, 16384]).quantize(fp8::vllm);
"#;

#[test]
fn a_full_tensor_meets_a_shard() {
    let plan = compiled(PLAN_A, "tp=8");
    let q = "model.layers.0.self_attn.q_b_proj.weight";
    let o = "model.layers.0.self_attn.o_proj.weight";
    for rank in 0..8 {
        assert_eq!(shape(&plan, rank, q), [2048, 2048]);
        assert_eq!(shape(&plan, rank, &format!("{q}_scale_inv")), [16, 16]);
        assert_eq!(shape(&plan, rank, o), [6144, 2048]);
        assert_eq!(shape(&plan, rank, &format!("{o}_scale_inv")), [48, 16]);
    }
    let e4m3 = "float8_e4m3fn";
    let receivers: Vec<_> = (0..8)
        .map(|rank| {
            let scales = [format!("{q}_scale_inv"), format!("{o}_scale_inv")];
            let held: [(&str, &str, &[u64]); 4] = [
                (q, e4m3, &[2048, 2048]),
                (&scales[0], "float32", &[16, 16]),
                (o, e4m3, &[6144, 2048]),
                (&scales[1], "float32", &[48, 16]),
            ];
            receiver(rank, &held, &[])
        })
        .collect();
    assert_eq!(differences(&plan, &receivers), []);

    // Without a shard rule every rank's two weights differ, and all are named at once.
    let found = differences(&compiled(PLAN_B, "tp=8"), &receivers);
    for rank in 0..8 {
        for (name, source, target) in
            [(q, "[16384, 2048]", "[2048, 2048]"), (o, "[6144, 16384]", "[6144, 2048]")]
        {
            let one = found.iter().find(|d| {
                d.subject.as_deref() == Some(name)
                    && d.notes.contains(&format!("rank {rank}, rank{rank}.json"))
            });
            let text = said(std::slice::from_ref(one.unwrap()));
            for word in ["E0409", source, target, &format!("tp {rank} of 8")] {
                assert!(text.contains(word), "{word} is not in {text}");
            }
        }
    }
}

#[test]
fn slicing_and_quantizing_commute_on_the_grid() {
    let plan = r#"
let w = at("").src("q_b", [2048, 256]);
at("")["cut_first"] = w.shard(0, tp).quantize(fp8::vllm);
at("")["cut_last"] = w.quantize(fp8::vllm).shard(0, tp);
at("")["whole"] = w.quantize(fp8::vllm);
let o = at("").src("o", [256, 2048]);
at("")["o_first"] = o.shard(1, tp).quantize(fp8::vllm);
at("")["o_last"] = o.quantize(fp8::vllm).shard(1, tp);
"#;
    let noise = |i: usize| ((i * 7919 + 13) % 1009) as f32 / 100.0 - 5.0;
    let model = folder(&[bf16s("q_b", &[2048, 256], noise), bf16s("o", &[256, 2048], noise)]);
    let done = run(plan, model.path(), "tp=8").done();
    for rank in 0..8 {
        for suffix in ["", "_scale_inv"] {
            let get = |name: &str| done.get(rank, &format!("{name}{suffix}"));
            let (first, whole) = (get("cut_first"), get("whole"));
            assert_eq!(first.shape, if suffix.is_empty() { [256, 256] } else { [2, 2] });
            assert_eq!(first.bytes, get("cut_last").bytes);
            // Rows [256 t, 256 t + 256) and scale rows [2 t, 2 t + 2) of the global grid.
            assert_eq!(first.bytes, whole.part(rank, 8));
            assert_eq!(get("o_first").bytes, get("o_last").bytes);
        }
    }
}

#[test]
fn a_ragged_tail_is_fine() {
    let plan = compiled(
        r#"
let a = at("a");
a["fused"] = cat([a.src("q_a", [2048, 6144]), a.src("kv_a", [576, 6144])]).quantize(fp8::vllm);
"#,
        "tp=4",
    );
    assert_eq!(shape(&plan, 3, "a.fused"), [2624, 6144]);
    assert_eq!(shape(&plan, 3, "a.fused_scale_inv"), [21, 48]);

    // Small: 256 + 192 rows; the fused grid is the two grids stacked, since 256 % 128 == 0.
    let plan = r#"
let a = at("");
let q = a.src("q_a", [256, 256]);
let kv = a.src("kv_a", [192, 256]);
a["fused"] = cat([q, kv]).quantize(fp8::vllm);
a["q"] = q.quantize(fp8::vllm);
a["kv"] = kv.quantize(fp8::vllm);
"#;
    let noise = |i: usize| ((i * 31 + 7) % 257) as f32 - 100.0;
    let model = folder(&[bf16s("q_a", &[256, 256], noise), bf16s("kv_a", &[192, 256], noise)]);
    let done = run(plan, model.path(), "tp=1").done();
    for suffix in ["", "_scale_inv"] {
        let bytes = |name: &str| done.get(0, &format!("{name}{suffix}")).bytes;
        assert_eq!(bytes("fused"), [bytes("q"), bytes("kv")].concat());
    }
    assert_eq!(done.get(0, "fused_scale_inv").shape, [4, 2]);
}

#[test]
fn a_seam_inside_a_block_is_shared() {
    let plan = compiled(
        r#"
let a = at("a");
a["gate_up"] = cat([a.src("gate", [10944, 4096]), a.src("up", [10944, 4096])]).quantize(fp8::vllm);
"#,
        "tp=1",
    );
    assert_eq!(shape(&plan, 0, "a.gate_up"), [21888, 4096]);
    assert_eq!(shape(&plan, 0, "a.gate_up_scale_inv"), [171, 32]);

    let plan = r#"
let a = at("");
a["gate_up"] = cat([a.src("gate", [192, 128]), a.src("up", [192, 128])]).quantize(fp8::vllm);
"#;
    let model =
        folder(&[bf16s("gate", &[192, 128], |_| 1.0), bf16s("up", &[192, 128], |_| 4.0)]);
    let done = run(plan, model.path(), "tp=1").done();
    // The middle block holds 64 rows of 1 and 64 rows of 4: its scale is 4 c.
    assert_eq!(done.get(0, "gate_up_scale_inv").bits(), [C, 0x3C12_4925, 0x3C12_4925]);
    let codes = done.get(0, "gate_up").bytes;
    let row = |r: usize| &codes[r * 128..][..128];
    assert!((0..128).all(|r| row(r).iter().all(|c| *c == FULL)));
    assert!((128..192).all(|r| row(r).iter().all(|c| *c == 0x6E)));
    assert!((192..384).all(|r| row(r).iter().all(|c| *c == FULL)));
}

#[test]
fn fp8_parts_with_a_grid_each_do_not_join() {
    let plan = r#"
let a = at("a");
a["gate_up"] = cat([a.src("gate", [10944, 4096]), a.src("up", [10944, 4096])]).quantize(fp8::vllm);
"#;
    let sources = [
        "a.gate F8_E4M3 [10944, 4096]",
        "a.gate_scale_inv F32 [86, 32]",
        "a.up F8_E4M3 [10944, 4096]",
        "a.up_scale_inv F32 [86, 32]",
    ];
    let text = said(&problems_of(plan, "tp=1", &sources));
    assert!(text.contains("E0306") && text.contains("10944") && text.contains("128"), "{text}");
}

#[test]
fn a_cut_of_columns_inside_a_block_is_refused() {
    let plan = r#"let a = at("a"); a["down"] = a.src("down", [4096, 10944]).shard(1, tp).quantize(fp8::vllm);"#;
    let sources = ["a.down F8_E4M3 [4096, 10944]", "a.down_scale_inv F32 [32, 86]"];
    let text = said(&problems_of(plan, "tp=2", &sources));
    assert!(text.contains("E0304") && text.contains("5472 mod 128 = 96"), "{text}");

    // A bf16 source for a checkpoint-style target: the library's own rule refuses the same.
    let plan = r#"
import "lib/mlp" as mlp;
import "lib/quant" as quant;
mlp::swiglu(at("mlp"), 10944, quant::scheme());
"#;
    let mut setup = crate::world::setup(plan, "tp=2");
    setup.config = Some(serde_json::json!({"hidden_size": 4096}));
    setup.options.insert("quant".to_owned(), "fp8_block".to_owned());
    let text = said(&setup.compile().err().unwrap().error.diagnostics);
    assert!(text.contains("5472") && text.contains("remainder 96"), "{text}");
}

const SHARED_EXPERT: &str = r#"
let a = at("shared");
a["gate_up"] = cat([
    a.src("gate", [512, 2048]).shard(0, tp),
    a.src("up", [512, 2048]).shard(0, tp),
]).quantize(fp8::vllm);
a["down"] = a.src("down", [2048, 512]).shard(1, tp).quantize(fp8::vllm);
"#;

const SHARED_EXPERT_FP8: [&str; 6] = [
    "shared.gate F8_E4M3 [512, 2048]",
    "shared.gate_scale_inv F32 [4, 16]",
    "shared.up F8_E4M3 [512, 2048]",
    "shared.up_scale_inv F32 [4, 16]",
    "shared.down F8_E4M3 [2048, 512]",
    "shared.down_scale_inv F32 [16, 4]",
];

#[test]
fn an_fp8_shard_below_a_block_is_refused() {
    let found = problems_of(SHARED_EXPERT, "tp=8", &SHARED_EXPERT_FP8);
    // All three at once: tensor, dimension, local width, block, ranks that share a tile.
    for (name, dim) in [("shared.gate", 0), ("shared.up", 0), ("shared.down", 1)] {
        let one = found.iter().find(|d| d.subject.as_deref() == Some(name)).unwrap();
        let text = said(std::slice::from_ref(one));
        assert!(text.contains("E0304") && text.contains("block of 128"), "{text}");
        assert!(text.contains(&format!("dimension {dim} of 512 into 64")), "{text}");
        assert!(text.contains("ranks 0 and 1, 2 and 3, 4 and 5, 6 and 7"), "{text}");
    }
    let experts = r#"
let a = at("a");
a["w13"] = cat([
    a.src("gate", [8, 320, 2048]).experts(ep).shard(1, etp),
    a.src("up", [8, 320, 2048]).experts(ep).shard(1, etp),
], 1).quantize(fp8::vllm);
"#;
    let sources = [
        "a.gate F8_E4M3 [8, 320, 2048]",
        "a.gate_scale_inv F32 [8, 3, 16]",
        "a.up F8_E4M3 [8, 320, 2048]",
        "a.up_scale_inv F32 [8, 3, 16]",
    ];
    for (infer, local) in [("tp=2", 160), ("tp=4", 80), ("tp=8", 40)] {
        let text = said(&problems_of(experts, infer, &sources));
        assert!(text.contains("E0304") && text.contains(&format!("into {local}")), "{text}");
    }
    let dense = r#"let a = at("a"); a["up"] = a.src("up", [18432, 256]).shard(0, tp).quantize(fp8::vllm);"#;
    let sources = ["a.up F8_E4M3 [18432, 256]", "a.up_scale_inv F32 [144, 2]"];
    let text = said(&problems_of(dense, "tp=32", &sources));
    assert!(text.contains("E0304") && text.contains("576 mod 128 = 64"), "{text}");
}

#[test]
fn a_bf16_shard_below_a_block_has_its_own_grid() {
    let plan = compiled(SHARED_EXPERT, "tp=8");
    assert_eq!(shape(&plan, 7, "shared.down"), [2048, 64]);
    assert_eq!(shape(&plan, 7, "shared.down_scale_inv"), [16, 1]);
    assert_eq!(shape(&plan, 7, "shared.gate_up"), [128, 2048]);
    assert_eq!(shape(&plan, 7, "shared.gate_up_scale_inv"), [1, 16]);
    // A receiver that registered one grid a half is not guessed at.
    let held: [(&str, &str, &[u64]); 4] = [
        ("shared.gate_up", "float8_e4m3fn", &[128, 2048]),
        ("shared.gate_up_scale_inv", "float32", &[2, 16]),
        ("shared.down", "float8_e4m3fn", &[2048, 64]),
        ("shared.down_scale_inv", "float32", &[16, 1]),
    ];
    let found = differences(&plan, &[receiver(0, &held, &[])]);
    assert_eq!(found.iter().map(|d| d.code).collect::<Vec<_>>(), ["E0409"]);
    assert_eq!(found[0].subject.as_deref(), Some("shared.gate_up_scale_inv"));
    // Whole experts of 320: the grid over the fused 640 rows has 5 rows.
    let plan = compiled(
        r#"
let a = at("a");
a["w13"] = cat([a.src("gate", [8, 320, 2048]), a.src("up", [8, 320, 2048])], 1).experts(ep).quantize(fp8::vllm);
"#,
        "tp=8,ep=8",
    );
    assert_eq!(shape(&plan, 0, "a.w13"), [1, 640, 2048]);
    assert_eq!(shape(&plan, 0, "a.w13_scale_inv"), [1, 5, 16]);
}

#[test]
fn an_fp8_shard_of_whole_blocks_takes_its_column_of_scales() {
    assert!(with_sources(SHARED_EXPERT, "tp=4", &SHARED_EXPERT_FP8).compile().is_ok());
    let plan =
        r#"at("")["down"] = at("").src("down", [2048, 512]).shard(1, tp).quantize(fp8::vllm);"#;
    let scales: Vec<f32> = (0..16 * 4).map(|i| 1.0 + i as f32).collect();
    let model = folder(&[
        ("down", Dtype::F8_E4M3, vec![2048, 512], vec![0x38; 2048 * 512]),
        (
            "down_scale_inv",
            Dtype::F32,
            vec![16, 4],
            scales.iter().flat_map(|s| s.to_le_bytes()).collect(),
        ),
    ]);
    let done = run(plan, model.path(), "tp=4").done();
    for rank in 0..4 {
        let held: Held = done.get(rank, "down_scale_inv");
        let column: Vec<u32> = (0..16).map(|r| scales[r * 4 + rank].to_bits()).collect();
        assert_eq!((held.shape.as_slice(), held.bits()), ([16, 1].as_slice(), column));
    }
}
