//! The plan of Kimi-K2, of which vLLM has printed no table here: every name, type and shape of
//! the real sizes, by the rules that hold for DeepSeek-V3.

use std::collections::BTreeMap;
use std::process::Command;

use serde_json::{Value, json};

const H: u64 = 7168;
const HEADS: u64 = 64;
const EXPERTS: u64 = 384;
const WIDTH: u64 = 2048;

/// The published sizes, of the 61 layers one dense and one with experts.
fn config(fp8: bool) -> Value {
    let mut config = json!({
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2",
        "vocab_size": 163840, "hidden_size": H, "intermediate_size": 18432,
        "moe_intermediate_size": WIDTH, "num_hidden_layers": 2, "first_k_dense_replace": 1,
        "moe_layer_freq": 1, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        "routed_scaling_factor": 2.827, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "num_nextn_predict_layers": 0, "tie_word_embeddings": false, "dtype": "bfloat16"
    });
    if fp8 {
        config["quantization_config"] = json!({
            "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
            "weight_block_size": [128, 128]
        });
    }
    config
}

/// The rows of one rank as the engine shows them.
fn shown(config: &Value, axes: &str, rank: u64) -> Vec<Value> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    let (path, rank) = (path.display().to_string(), rank.to_string());
    let args = ["dry-run", "plans/kimi_k2.rhai", "--model", &path, "--infer", axes];
    let out = Command::new(env!("CARGO_BIN_EXE_engine"))
        .args(args)
        .args(["--rank", &rank, "--format", "json"])
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let table: Value = serde_json::from_slice(&out.stdout).unwrap();
    table["ranks"][0]["params"].as_array().unwrap().clone()
}

type Table = BTreeMap<String, (String, Vec<u64>)>;

fn table(rows: &[Value]) -> Table {
    let row = |p: &Value| {
        let shape = p["shape"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap());
        let dtype = p["dtype"].as_str().unwrap().to_owned();
        (p["name"].as_str().unwrap().to_owned(), (dtype, shape.collect()))
    };
    rows.iter().map(row).collect()
}

/// What a rank holds by the rules, built up entry by entry.
struct Rules {
    fp8: bool,
    table: Table,
}

impl Rules {
    fn plain(&mut self, name: &str, dtype: &str, shape: &[u64]) {
        self.table.insert(name.to_owned(), (dtype.to_owned(), shape.to_vec()));
    }

    fn bf16(&mut self, name: &str, shape: &[u64]) {
        self.plain(name, "bfloat16", shape);
    }

    /// A weight of the target's scheme; block FP8 has a scale for each tile of its last two dims.
    fn weight(&mut self, name: &str, shape: &[u64]) {
        if !self.fp8 {
            return self.bf16(name, shape);
        }
        self.plain(name, "float8_e4m3fn", shape);
        let mut scale = shape.to_vec();
        let matrix = scale.len() - 2;
        scale[matrix..].iter_mut().for_each(|n| *n = n.div_ceil(128));
        self.plain(&format!("{name}_scale_inv"), "float32", &scale);
    }

    fn mlp(&mut self, block: &str, width: u64) {
        self.weight(&format!("{block}.gate_up_proj.weight"), &[2 * width, H]);
        self.weight(&format!("{block}.down_proj.weight"), &[H, width]);
    }
}

/// tp cuts vocabulary, heads and MLPs; ep spreads whole experts, and without it tp * dp cuts
/// inside each. Where the experts' tokens are spread over tp, the shared ones are whole.
fn expected(fp8: bool, tp: u64, dp: u64, ep: u64) -> Table {
    let mut r = Rules { fp8, table: Table::new() };
    r.bf16("model.embed_tokens.weight", &[163840 / tp, H]);
    r.bf16("lm_head.weight", &[163840 / tp, H]);
    r.bf16("model.norm.weight", &[H]);
    let n = HEADS / tp;
    for layer in ["model.layers.0", "model.layers.1"] {
        r.bf16(&format!("{layer}.input_layernorm.weight"), &[H]);
        r.bf16(&format!("{layer}.post_attention_layernorm.weight"), &[H]);
        let attn = format!("{layer}.self_attn");
        r.weight(&format!("{attn}.fused_qkv_a_proj.weight"), &[1536 + 512 + 64, H]);
        r.bf16(&format!("{attn}.q_a_layernorm.weight"), &[1536]);
        r.weight(&format!("{attn}.q_b_proj.weight"), &[n * (128 + 64), 1536]);
        r.bf16(&format!("{attn}.kv_a_layernorm.weight"), &[512]);
        r.weight(&format!("{attn}.kv_b_proj.weight"), &[n * (128 + 128), 512]);
        r.weight(&format!("{attn}.o_proj.weight"), &[H, n * 128]);
        r.bf16(&format!("{attn}.mla_attn.mla_attn.W_UK_T"), &[n, 128, 512]);
        r.bf16(&format!("{attn}.mla_attn.mla_attn.W_UV"), &[n, 512, 128]);
    }
    r.mlp("model.layers.0.mlp", 18432 / tp);

    let moe = "model.layers.1.mlp";
    r.bf16(&format!("{moe}.gate.weight"), &[EXPERTS, H]);
    r.plain(&format!("{moe}.gate.e_score_correction_bias"), "float32", &[EXPERTS]);
    let spread = tp > 1 && dp > 1 && ep > 1;
    r.mlp(&format!("{moe}.shared_experts"), if spread { WIDTH } else { WIDTH / tp });
    let (slots, width) =
        if ep > 1 { (EXPERTS / ep, WIDTH) } else { (EXPERTS, WIDTH / (tp * dp)) };
    let experts = format!("{moe}.experts.routed_experts");
    r.weight(&format!("{experts}.w13_weight"), &[slots, 2 * width, H]);
    r.weight(&format!("{experts}.w2_weight"), &[slots, H, width]);
    r.table
}

#[test]
fn every_rank_holds_what_the_rules_say() {
    let cases = [
        ("tp=1", (1, 1, 1), 0),
        ("tp=8", (8, 1, 1), 0),
        ("tp=8", (8, 1, 1), 7),
        ("tp=8,ep=8", (8, 1, 8), 7),
        ("dp=32,ep=32", (1, 32, 32), 0),
        ("dp=32,ep=32", (1, 32, 32), 31),
        ("tp=2,dp=4", (2, 4, 1), 5),
        ("tp=4,dp=2,ep=8", (4, 2, 8), 6),
    ];
    for (axes, (tp, dp, ep), rank) in cases {
        for fp8 in [false, true] {
            let got = table(&shown(&config(fp8), axes, rank));
            let want = expected(fp8, tp, dp, ep);
            for name in got.keys().chain(want.keys()) {
                let (g, w) = (got.get(name), want.get(name));
                assert_eq!(g, w, "{name} of rank {rank}, {axes}, fp8 {fp8}");
            }
        }
    }
}

/// Numbers written out, so that a slip in the rules above cannot hide one in the plan.
#[test]
fn some_shapes_in_numbers() {
    let got = table(&shown(&config(true), "tp=8,ep=8", 0));
    let shape = |name: &str| got[&format!("model.layers.1.{name}")].1.clone();
    assert_eq!(shape("self_attn.fused_qkv_a_proj.weight"), [2112, 7168]);
    assert_eq!(shape("self_attn.fused_qkv_a_proj.weight_scale_inv"), [17, 56]);
    assert_eq!(shape("self_attn.q_b_proj.weight"), [1536, 1536]);
    assert_eq!(shape("self_attn.q_b_proj.weight_scale_inv"), [12, 12]);
    assert_eq!(shape("self_attn.kv_b_proj.weight_scale_inv"), [16, 4]);
    assert_eq!(shape("self_attn.o_proj.weight"), [7168, 1024]);
    assert_eq!(shape("mlp.shared_experts.gate_up_proj.weight"), [512, 7168]);
    assert_eq!(shape("mlp.experts.routed_experts.w13_weight"), [48, 4096, 7168]);
    assert_eq!(shape("mlp.experts.routed_experts.w2_weight_scale_inv"), [48, 56, 16]);
}

#[test]
fn a_rank_takes_its_own_experts_in_order() {
    for (rank, first) in [(0, 0), (31, 372)] {
        let rows = shown(&config(false), "dp=32,ep=32", rank);
        let w2 = rows.iter().find(|p| p["name"].as_str().unwrap().ends_with("w2_weight"));
        let want: Vec<String> = (first..first + 12)
            .map(|e| format!("model.layers.1.mlp.experts.{e}.down_proj.weight"))
            .collect();
        assert_eq!(w2.unwrap()["sources"], json!(want));
    }
}
