//! Every destination is accounted for, and no model is updated by half.

use kernelcast::check::check;
use safetensors::tensor::Dtype;
use serde_json::json;

use crate::world::{
    FULL, bf16s, compiled, differences, folder, problems, problems_of, receiver, run, said,
    with_config, with_sources,
};

const WEIGHT: &str =
    r#"at("x")["weight"] = at("x").src("weight", [256, 256]).quantize(fp8::vllm);"#;

type Entries<'a> = Vec<(&'a str, &'a str, &'a [u64])>;

fn weight() -> Entries<'static> {
    vec![("x.weight", "float8_e4m3fn", &[256, 256])]
}

fn scale() -> Entries<'static> {
    vec![("x.weight_scale_inv", "float32", &[2, 2])]
}

#[test]
fn buffers_are_written_and_counted() {
    let model = folder(&[bf16s("x.weight", &[256, 256], |_| 3.0)]);
    let done = run(WEIGHT, model.path(), "tp=1").done();
    assert!(done.get(0, "x.weight").bytes.iter().all(|c| *c == FULL));
    assert_eq!(done.get(0, "x.weight_scale_inv").bits(), [0x3BDB_6DB8; 4]);
    // The code 448 times the scale is the weight again, in the weight's own type.
    assert_eq!(half::bf16::from_f32(448.0 * f32::from_bits(0x3BDB_6DB8)).to_f32(), 3.0);

    let (report, problems) =
        check(&compiled(WEIGHT, "tp=1"), &[receiver(0, &weight(), &scale())]).unwrap();
    assert_eq!((problems, report.parameters, report.buffers), (vec![], 1, 1));
    // The weight without its scale is not a plan: they are one unit.
    let kept = format!("{WEIGHT} keep(\"x.weight_scale_inv\");");
    assert!(said(&problems_of(&kept, "tp=1", &["x.weight BF16 [256, 256]"])).contains("E0420"));
}

fn mixer(rules: &str) -> String {
    format!(r#"let m = at("mixer"); for name in [{rules}] {{ m.copy(name, [8]); }}"#)
}

#[test]
fn a_vector_without_a_writer_is_named() {
    let held: Entries =
        ["mixer.D", "mixer.A", "mixer.dt_bias"].map(|n| (n, "bfloat16", &[8u64][..])).to_vec();
    let receivers = [receiver(0, &held, &[])];
    let found = differences(&compiled(&mixer(r#""A", "dt_bias""#), "tp=1"), &receivers);
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].code, found[0].subject.as_deref()), ("E0407", Some("mixer.D")));
    let whole = compiled(&mixer(r#""A", "D", "dt_bias""#), "tp=1");
    assert_eq!(differences(&whole, &receivers), []);
    let text = said(&problems(&mixer(r#""A", "D", "dt_bias", "D""#), "tp=1"));
    assert!(text.contains("E0406") && text.contains("mixer.D"), "{text}");
}

#[test]
fn the_binary_refuses_with_status_1() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let plan = write("plan.rhai", &mixer(r#""A""#));
    let config = write("config.json", "{}");
    let held: Entries = vec![
        ("mixer.A", "bfloat16", &[8]),
        ("mixer.B", "bfloat16", &[8]),
        ("mixer.C", "bfloat16", &[8]),
    ];
    let (_, manifest) = receiver(0, &held, &[]);
    let manifest = write("rank0.json", &serde_json::to_string(&manifest).unwrap());
    let out = std::process::Command::new(env!("CARGO_BIN_EXE_engine"))
        .arg("check")
        .arg(plan)
        .arg("--model")
        .arg(config)
        .arg("--manifest")
        .arg(manifest)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{text}");
    assert!(text.contains("mixer.B") && text.contains("mixer.C"), "{text}");
}

#[test]
fn calibration_scalars_are_kept_only_when_the_plan_says_so() {
    let mut buffers = scale();
    buffers.push(("attn._k_scale", "float32", &[]));
    buffers.push(("attn._v_scale", "float32", &[]));
    let receivers = [receiver(0, &weight(), &buffers)];
    let found = differences(&compiled(WEIGHT, "tp=1"), &receivers);
    let names: Vec<_> = found.iter().map(|d| (d.code, d.subject.as_deref())).collect();
    assert_eq!(names, [("E0407", Some("attn._k_scale")), ("E0407", Some("attn._v_scale"))]);
    let kept = format!("{WEIGHT} keep(\"attn._k_scale\"); keep(\"attn._v_scale\");");
    let (report, problems) = check(&compiled(&kept, "tp=1"), &receivers).unwrap();
    assert_eq!((problems, report.kept), (vec![], 2));
}

const SOURCES: [&str; 4] = [
    "l0.self_attn.o_proj.weight BF16 [2048, 4096]",
    "l0.linear_attn.in_proj_qkv.weight BF16 [8192, 2048]",
    "l0.linear_attn.in_proj_a.weight BF16 [32, 2048]",
    "l0.linear_attn.A_log BF16 [32]",
];

const PLAN_1: &str = r#"
at("l0.self_attn")["o_proj.weight"] = at("l0.self_attn").src("o_proj.weight", [2048, 4096]).quantize(fp8::vllm);
let a = at("l0.linear_attn");
a.copy("in_proj_qkv.weight", [8192, 2048]);
a.copy("in_proj_a.weight", [32, 2048]);
a.copy("A_log", [32]);
"#;

const PLAN_2: &str = r#"
at("l0.self_attn")["o_proj.weight"] = at("l0.self_attn").src("o_proj.weight", [2048, 4096]).quantize(fp8::vllm);
let a = at("l0.linear_attn");
a["in_proj_qkv.weight"] = a.src("in_proj_qkv.weight", [8192, 2048]).quantize(fp8::vllm);
a.copy("in_proj_a.weight", [32, 2048]);
a["A_log"] = a.src("A_log", [32]).to(f32);
"#;

#[test]
fn what_does_not_become_fp8_is_listed_before_a_byte_moves() {
    let held: Entries = vec![
        ("l0.self_attn.o_proj.weight", "float8_e4m3fn", &[2048, 4096]),
        ("l0.self_attn.o_proj.weight_scale_inv", "float32", &[16, 32]),
        ("l0.linear_attn.in_proj_qkv.weight", "float8_e4m3fn", &[8192, 2048]),
        ("l0.linear_attn.in_proj_qkv.weight_scale_inv", "float32", &[64, 16]),
        ("l0.linear_attn.in_proj_a.weight", "bfloat16", &[32, 2048]),
        ("l0.linear_attn.A_log", "float32", &[32]),
    ];
    let receivers = [receiver(0, &held, &[])];
    let compile = |plan: &str| {
        let mut setup = with_sources(plan, "tp=1", &SOURCES);
        // No "fmt": that means e4m3.
        let quant = json!({"quant_method": "fp8", "weight_block_size": [128, 128]});
        setup.config = Some(json!({"quantization_config": quant}));
        setup.compile().unwrap_or_else(|e| panic!("{}", said(&e.error.diagnostics)))
    };
    let found = differences(&compile(PLAN_1), &receivers);
    let wrong: Vec<_> =
        found.iter().filter(|d| d.code == "E0410").map(|d| d.subject.as_deref()).collect();
    assert_eq!(
        wrong,
        [Some("l0.linear_attn.in_proj_qkv.weight"), Some("l0.linear_attn.A_log")],
        "{}",
        said(&found)
    );
    assert_eq!(differences(&compile(PLAN_2), &receivers), []);
}

#[test]
fn widening_is_exact_and_narrowing_is_written() {
    let plan = r#"at("")["A_log"] = at("").src("A_log", [32]).to(f32);"#;
    let value = |i: usize| -3.0 + i as f32 / 7.0;
    let config = json!({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}});
    let model = with_config(&config, &[bf16s("A_log", &[32], value)]);
    let done = run(plan, model.path(), "tp=1").done();
    let wanted: Vec<u32> =
        (0..32).map(|i| half::bf16::from_f32(value(i)).to_f32().to_bits()).collect();
    let bits = done.get(0, "A_log").bits();
    assert_eq!(bits, wanted);
    assert!(bits.iter().all(|b| b & 0xFFFF == 0));

    let narrow = r#"at("").copy("A_log", [32]);"#;
    let text = said(&problems_of(narrow, "tp=1", &["A_log F32 [32]"]));
    assert!(text.contains("E0403") && text.contains(".to(bf16)"), "{text}");
    let model = folder(&[("A_log", Dtype::F32, vec![32], 1.5f32.to_le_bytes().repeat(32))]);
    assert!(run(narrow, model.path(), "tp=1").refused().contains("E0403"));
}
