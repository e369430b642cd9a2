//! Zero blocks, values that are not finite, and module lists that mean what they say.

use kernelcast::compile::Compiled;
use serde_json::json;

use crate::world::{C, FULL, bf16s, folder, row, run, said, setup};

fn quantized(recipe: &str) -> String {
    format!(r#"at("")["w"] = at("").src("w", [256, 256]).quantize({recipe});"#)
}

/// Zeros but for one element.
fn one_value(value: f32) -> impl FnMut(usize) -> f32 {
    move |i| if i == 0 { value } else { 0.0 }
}

#[test]
fn zero_blocks_have_the_floor_of_their_recipe() {
    let model = folder(&[bf16s("w", &[256, 256], one_value(1.0))]);
    for (recipe, floor) in [("fp8::vllm", 0x346F_ACAD), ("fp8::prime_rl", 0x2B8C_BCCC)] {
        let done = run(&quantized(recipe), model.path(), "tp=1").done();
        let codes = done.get(0, "w").bytes;
        assert_eq!(codes[0], FULL);
        assert!(codes[1..].iter().all(|c| *c == 0));
        assert_eq!(done.get(0, "w_scale_inv").bits(), [C, floor, floor, floor], "{recipe}");
    }
    let done = run(&quantized("fp8::ue8m0.scales(e8m0)"), model.path(), "tp=1").done();
    // 2^-22 for the zero blocks.
    assert_eq!(done.get(0, "w_scale_inv").bytes[1..], [105, 105, 105]);
    assert!(done.get(0, "w").bytes[1..].iter().all(|c| *c == 0));
}

#[test]
fn a_block_of_448_has_scale_one() {
    let model = folder(&[bf16s("w", &[256, 256], one_value(448.0))]);
    let done = run(&quantized("fp8::vllm"), model.path(), "tp=1").done();
    assert_eq!(done.get(0, "w_scale_inv").bits()[0], 1.0f32.to_bits());
    assert_eq!(done.get(0, "w").bytes[0], FULL);
}

#[test]
fn values_that_are_not_finite_are_refused_with_their_place() {
    for (value, kind) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        let model = folder(&[bf16s("w", &[256, 256], |i| match i {
            0 => 1.0,
            i if i == 130 * 256 + 5 => value,
            _ => 0.0,
        })]);
        let text = run(&quantized("fp8::vllm"), model.path(), "tp=1").refused();
        for word in ["E0602", "w", "1 ", "130, 5"] {
            assert!(text.contains(word), "{word} is not in {text}");
        }
        assert!(text.to_lowercase().contains(&kind.to_lowercase()), "{text}");
    }
}

const NAMES: [(&str, bool); 8] = [
    ("model.layers.0.mlp.gate_proj.weight", false),
    ("model.layers.0.mlp.up_proj.weight", false),
    ("model.layers.3.mlp.gate.weight", true),
    ("model.layers.3.mlp.gate.e_score_correction_bias", true),
    ("model.layers.3.mlp.experts.0.gate_proj.weight", false),
    ("model.layers.3.mlp.shared_experts.gate_proj.weight", false),
    ("model.layers.3.mlpXgate.weight", false),
    ("lm_head.weight", true),
];

/// Quantizes each of the names unless the config's list keeps its module.
fn with_list(list: &[&str]) -> Compiled {
    let names: Vec<&str> = NAMES.iter().map(|n| n.0).collect();
    let plan = format!(
        r#"
for name in {names:?} {{
    let w = at("").src(name, [128, 128]);
    at("")[name] = w.quantize(if at("").ignored(name) {{ none }} else {{ fp8::vllm }});
}}
"#
    );
    let mut setup = setup(&plan, "tp=1");
    setup.config = Some(json!({"quantization_config": {"modules_to_not_convert": list}}));
    setup.compile().unwrap_or_else(|e| panic!("{}", said(&e.error.diagnostics)))
}

#[test]
fn a_module_list_keeps_exactly_its_modules() {
    let plan = with_list(&["mlp.gate", "lm_head"]);
    for (name, kept) in NAMES {
        let dtype = if kept { "bfloat16" } else { "float8_e4m3fn" };
        assert_eq!(row(&plan, 0, name).dtype, dtype, "{name}");
    }
    assert_eq!(plan.notes, []);
}

#[test]
fn an_entry_that_matches_nothing_is_said_aloud() {
    let text = said(&with_list(&["mlp.gate", "lm_head", "mlp.gat"]).notes);
    assert!(text.contains("E0422") && text.contains("mlp.gat"), "{text}");
}

#[test]
fn half_of_a_fused_weight_cannot_be_kept() {
    let plan = r#"
import "lib/mlp" as mlp;
import "lib/quant" as quant;
mlp::swiglu(at("mlp"), 256, quant::scheme());
"#;
    let mut setup = setup(plan, "tp=1");
    setup.config = Some(json!({
        "hidden_size": 256,
        "quantization_config": {"quant_method": "fp8", "modules_to_not_convert": ["mlp.gate_proj"]},
    }));
    let text = said(&setup.compile().err().unwrap().error.diagnostics);
    assert!(text.contains("E0108") && text.contains("gate_proj"), "{text}");
}
