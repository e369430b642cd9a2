//! What the shipped plans and their words do beyond the golden tables: refusals that vLLM would
//! make, FP8 sources for other targets, layouts that follow the receiver.

use std::process::{Command, Output};

use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize_to_file};
use serde_json::{Value, json};
use tempfile::tempdir;

fn engine(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_engine")).args(args).output().unwrap()
}

/// Dry run of a shipped plan for a config.
fn dry_run(plan: &str, config: &Value, args: &[&str]) -> Output {
    let dir = tempdir().unwrap();
    let path = dir.path().join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    let plan = format!("plans/{plan}.rhai");
    let mut all = vec!["dry-run", &plan, "--model", path.to_str().unwrap()];
    all.extend(["--format", "json"]);
    all.extend(args);
    engine(&all)
}

/// Type and shape of a parameter of the first rank, or the refusal.
fn found(out: &Output, name: &str) -> Result<(String, Value), String> {
    if !out.status.success() {
        assert_eq!(out.status.code(), Some(1));
        return Err(String::from_utf8_lossy(&out.stderr).into_owned());
    }
    let table: Value = serde_json::from_slice(&out.stdout).unwrap();
    let params = table["ranks"][0]["params"].as_array().unwrap();
    let row = params.iter().find(|p| p["name"] == name);
    let row = row.unwrap_or_else(|| panic!("{name} is not in the table"));
    Ok((row["dtype"].as_str().unwrap().to_owned(), row["shape"].clone()))
}

fn qwen3_moe() -> Value {
    json!({
        "model_type": "qwen3_moe", "vocab_size": 640, "hidden_size": 256,
        "intermediate_size": 512, "moe_intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "num_experts": 8,
        "decoder_sparse_step": 2, "tie_word_embeddings": false
    })
}

fn glm() -> Value {
    json!({
        "model_type": "glm_moe_dsa", "vocab_size": 640, "hidden_size": 256,
        "intermediate_size": 512, "moe_intermediate_size": 128, "num_hidden_layers": 6,
        "num_attention_heads": 8, "n_shared_experts": 2, "n_routed_experts": 8,
        "kv_lora_rank": 128, "q_lora_rank": 128, "qk_rope_head_dim": 64, "v_head_dim": 64,
        "qk_nope_head_dim": 96, "index_head_dim": 128, "index_n_heads": 4,
        "first_k_dense_replace": 1, "tie_word_embeddings": false
    })
}

const W13: &str = "model.layers.1.mlp.experts.routed_experts.w13_weight";
const W13_SCALE: &str = "model.layers.1.mlp.experts.routed_experts.w13_weight_scale_inv";

#[test]
fn expert_tiles_shrink_to_the_local_width() {
    let scale = |axes: &str, quant: &str| {
        let out = dry_run("qwen3_moe", &qwen3_moe(), &["--infer", axes, "--set", quant]);
        found(&out, W13_SCALE).map(|f| f.1)
    };
    assert_eq!(scale("tp=1", "quant=fp8_block"), Ok(json!([8, 6, 4])));
    assert_eq!(scale("tp=2", "quant=fp8_block"), Ok(json!([8, 6, 8])));
    assert_eq!(scale("tp=2,ep=2", "quant=fp8_block"), Ok(json!([4, 6, 4])));
    let why = scale("tp=4", "quant=fp8_block").unwrap_err();
    assert!(why.contains("refuses 48 rows of gate and up"), "{why}");
    let why = scale("tp=1", "quant=ct_fp8_block").unwrap_err();
    assert!(why.contains("refuses 192 rows of gate and up"), "{why}");
    // Online, each half is filled up to whole blocks.
    assert_eq!(scale("tp=4", "quant=fp8_per_block_online"), Ok(json!([8, 2, 2])));
}

#[test]
fn what_vllm_refuses_at_construction_is_refused() {
    let cases = [
        ("qwen3_moe", "tp=16", "quant=bf16", "8 attention heads over tp = 16"),
        ("qwen3_moe", "tp=8", "quant=fp8_block", "down_proj: vLLM refuses 64 input columns"),
        ("qwen3_moe", "tp=2,redundant_experts=2", "quant=bf16", "eplb needs expert"),
        ("qwen3_moe", "tp=4,ep=4,redundant_experts=3", "quant=bf16", "11 physical experts"),
        ("glm_moe_dsa", "tp=8", "quant=fp8_block", "kv_b_proj: vLLM refuses 160 output rows"),
        (
            "glm_moe_dsa",
            "tp=4,ep=4",
            "quant=fp8_block",
            "shared_experts.down_proj: vLLM refuses 64",
        ),
    ];
    for (plan, axes, quant, why) in cases {
        let config = if plan == "qwen3_moe" { qwen3_moe() } else { glm() };
        let out = dry_run(plan, &config, &["--infer", axes, "--set", quant]);
        let said = found(&out, W13).unwrap_err();
        assert!(said.contains(why), "{plan} {axes} {quant}: {said}");
    }
}

#[test]
fn messages_of_library_rules_show_the_calls() {
    let out = dry_run("glm_moe_dsa", &glm(), &["--infer", "tp=3"]);
    let line = String::from_utf8(out.stderr).unwrap();
    let first = line.lines().find(|l| l.contains("attention heads")).unwrap();
    assert!(first.contains("in call to mla"), "{first}");
}

#[test]
fn indexers_follow_the_config() {
    let layers = |config: &Value| -> Vec<u64> {
        let out = dry_run("glm_moe_dsa", config, &[]);
        let table: Value = serde_json::from_slice(&out.stdout).unwrap();
        let rows = table["ranks"][0]["params"].as_array().unwrap();
        let names = rows.iter().filter_map(|p| p["name"].as_str());
        let names = names.filter(|n| n.ends_with("indexer.wq_b.weight"));
        names.map(|n| n.split('.').nth(2).unwrap().parse().unwrap()).collect()
    };
    let mut config = glm();
    assert_eq!(layers(&config), [0, 1, 2, 3, 4, 5]);
    config["index_topk_freq"] = json!(3);
    config["index_skip_topk_offset"] = json!(2);
    assert_eq!(layers(&config), [0, 1, 4]);
    config["index_topk_pattern"] = json!("FSSFS");
    assert_eq!(layers(&config), [0, 3, 5]);
}

#[test]
fn sequence_parallel_ranks_hold_whole_mlps() {
    let shape = |axes: &str, name: &str| {
        found(&dry_run("glm_moe_dsa", &glm(), &["--infer", axes]), name).unwrap().1
    };
    let dense = "model.layers.0.mlp.gate_up_proj.weight";
    let shared = "model.layers.1.mlp.shared_experts.gate_up_proj.weight";
    assert_eq!(shape("tp=2,ep=2", dense), json!([512, 256]));
    assert_eq!(shape("tp=2,dp=2,ep=4", dense), json!([1024, 256]));
    assert_eq!(shape("tp=2,dp=2,ep=4", shared), json!([512, 256]));
    // vLLM 0.33 has the dense ones whole without pipeline stages only.
    assert_eq!(shape("tp=2,dp=2,ep=4,pp=2", dense), json!([512, 256]));
    assert_eq!(shape("tp=2,dp=2,ep=4,pp=2", shared), json!([512, 256]));
}

fn deepseek() -> Value {
    let mut config = glm();
    config["model_type"] = json!("deepseek_v3");
    config["num_hidden_layers"] = json!(2);
    config["topk_method"] = json!("noaux_tc");
    config
}

#[test]
fn deepseek_keeps_the_dense_mlp_cut() {
    let shape = |name: &str| {
        let out = dry_run("deepseek_v3", &deepseek(), &["--infer", "tp=2,dp=2,ep=4"]);
        found(&out, name).unwrap().1
    };
    assert_eq!(shape("model.layers.0.mlp.gate_up_proj.weight"), json!([512, 256]));
    assert_eq!(
        shape("model.layers.1.mlp.shared_experts.gate_up_proj.weight"),
        json!([512, 256])
    );
}

#[test]
fn deepseek_follows_its_config() {
    let names = |plan: &str, config: &Value| -> Vec<String> {
        let table: Value =
            serde_json::from_slice(&dry_run(plan, config, &["--infer", "tp=2"]).stdout)
                .unwrap();
        let rows = table["ranks"][0]["params"].as_array().unwrap().iter();
        rows.map(|p| p["name"].as_str().unwrap().to_owned()).collect()
    };
    let has_bias = |plan: &str, config: &Value| {
        names(plan, config).iter().any(|n| n.ends_with("gate.e_score_correction_bias"))
    };
    let mut config = deepseek();
    assert!(has_bias("deepseek_v3", &config));
    config["topk_method"] = json!("greedy");
    assert!(!has_bias("deepseek_v3", &config));
    // What vLLM's config classes say of a config that does not name the method.
    config.as_object_mut().unwrap().remove("topk_method");
    assert!(!has_bias("deepseek_v3", &config));
    config["model_type"] = json!("kimi_k2");
    assert!(has_bias("kimi_k2", &config));

    let mut config = deepseek();
    config["q_lora_rank"] = Value::Null;
    let out = dry_run("deepseek_v3", &config, &["--infer", "tp=2"]);
    let shape =
        |name: &str| found(&out, &format!("model.layers.0.self_attn.{name}")).unwrap().1;
    assert_eq!(shape("q_proj.weight"), json!([640, 256]));
    assert_eq!(shape("kv_a_proj_with_mqa.weight"), json!([192, 256]));
    let attn = names("deepseek_v3", &config);
    assert!(!attn.iter().any(|n| n.contains("q_a_") || n.contains("fused_qkv")));

    let mut config = deepseek();
    config["index_topk"] = json!(2048);
    let why = found(&dry_run("deepseek_v3", &config, &[]), W13).unwrap_err();
    assert!(why.contains("sparse indexer"), "{why}");
}

#[test]
fn halves_follow_the_expert_kernel() {
    let sources = |backend: &str| -> Vec<String> {
        let target = format!("moe_backend={backend}");
        let out = dry_run("qwen3_moe", &qwen3_moe(), &["--target", &target]);
        let table: Value = serde_json::from_slice(&out.stdout).unwrap();
        let rows = table["ranks"][0]["params"].as_array().unwrap();
        let row = rows.iter().find(|p| p["name"] == W13).unwrap();
        let names = row["sources"].as_array().unwrap().iter();
        names.map(|n| n.as_str().unwrap().to_owned()).collect()
    };
    assert!(sources("triton")[0].ends_with("experts.0.gate_proj.weight"));
    assert!(sources("flashinfer_cutlass")[0].ends_with("experts.0.up_proj.weight"));
    let out = dry_run("qwen3_moe", &qwen3_moe(), &["--target", "moe_backend=marlin"]);
    assert!(found(&out, W13).unwrap_err().contains("marlin"));
}

#[test]
fn a_function_without_parameters_reads_the_config() {
    let text = r#"drop("v"); drop("w"); drop("w_scale_inv");
        fn all() { require(model.get("x", ()) == (), "x"); }
        all();"#;
    let out = with_fp8_source(text, "tp=1");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

/// Dry run of a plan's text beside a checkpoint of `w` [256, 128] in FP8 and `v` [8] in bf16.
fn with_fp8_source(text: &str, axes: &str) -> Output {
    let dir = tempdir().unwrap();
    let (codes, scales, v) = ([0u8; 256 * 128], [0u8; 8], [0u8; 16]);
    let view = |dtype, shape: &[usize], data| TensorView::new(dtype, shape.to_vec(), data);
    let tensors = [
        ("w", view(Dtype::F8_E4M3, &[256, 128], &codes[..]).unwrap()),
        ("w_scale_inv", view(Dtype::F32, &[2, 1], &scales).unwrap()),
        ("v", view(Dtype::BF16, &[8], &v).unwrap()),
    ];
    serialize_to_file(tensors, None, &dir.path().join("model.safetensors")).unwrap();
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    let plan = dir.path().join("plan.rhai");
    std::fs::write(&plan, text).unwrap();
    let (plan, model) = (plan.to_str().unwrap(), dir.path().to_str().unwrap());
    engine(&["dry-run", plan, "--model", model, "--infer", axes, "--format", "json"])
}

#[test]
fn an_fp8_source_takes_the_form_of_its_target() {
    let plan = |recipe: &str| {
        format!(
            r#"drop("v"); let to = {recipe};
            at("")["w"] = at("").src("w", [256, 128]).refine(to).shard(0, tp).quantize(to);"#
        )
    };
    // Four cuts of 64 rows need tiles of 64; the codes go through.
    let out = with_fp8_source(&plan("fp8::vllm.block(64)"), "tp=4");
    assert_eq!(found(&out, "w_scale_inv"), Ok(("float32".into(), json!([1, 2]))));
    // A target that is not quantized holds the values, cut anywhere.
    let out = with_fp8_source(&plan("none"), "tp=8");
    assert_eq!(found(&out, "w"), Ok(("bfloat16".into(), json!([32, 128]))));
    let why = found(&with_fp8_source(&plan("fp8::vllm"), "tp=4"), "w").unwrap_err();
    assert!(why.contains("ranks 0 and 1, 2 and 3 would share tiles"), "{why}");
}

#[test]
fn a_source_is_read_in_the_type_that_the_plan_declares() {
    let text = r#"drop("w"); drop("w_scale_inv"); at("").copy("v", [8], f32);"#;
    assert_eq!(found(&with_fp8_source(text, "tp=1"), "v"), Ok(("float32".into(), json!([8]))));
    let twice = format!("{text} at(\"\")[\"u\"] = at(\"\").src(\"v\", [8], f16);");
    let why = found(&with_fp8_source(&twice, "tp=1"), "v").unwrap_err();
    assert!(why.contains("named twice"), "{why}");
}

#[test]
fn mixtral_has_its_ends_on_every_stage() {
    let config = json!({
        "model_type": "mixtral", "vocab_size": 640, "hidden_size": 256,
        "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_local_experts": 4, "tie_word_embeddings": false
    });
    let out = dry_run("mixtral", &config, &["--infer", "pp=2"]);
    assert_eq!(found(&out, "model.norm.weight").unwrap().1, json!([256]));
    assert_eq!(found(&out, "lm_head.weight").unwrap().1, json!([640, 256]));
}

#[test]
fn gpt_oss_shares_are_whole_blocks() {
    let config = json!({
        "model_type": "gpt_oss", "vocab_size": 640, "hidden_size": 256,
        "intermediate_size": 160, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "num_local_experts": 4,
        "attention_bias": true, "quantization_config": { "quant_method": "mxfp4" }
    });
    let routed = "model.layers.0.mlp.experts.routed_experts";
    // 160 over two is 96 and 64, each at the front of 128.
    let out = dry_run("gpt_oss", &config, &["--infer", "tp=2"]);
    let weight = found(&out, &format!("{routed}.w2_weight"));
    assert_eq!(weight, Ok(("uint8".into(), json!([4, 256, 64]))));
    let why = found(&dry_run("gpt_oss", &config, &["--infer", "tp=4"]), "").unwrap_err();
    assert!(why.contains("refuses 2 kv heads"), "{why}");
    let axes = "tp=2,ep=2,redundant_experts=2";
    let why = found(&dry_run("gpt_oss", &config, &["--infer", axes]), "").unwrap_err();
    assert!(why.contains("refuses eplb"), "{why}");
}

#[test]
fn packed_codes_and_their_exponents_are_bytes() {
    let dir = tempdir().unwrap();
    let (codes, scales, bytes) = ([0u8; 128 * 128], [127u8], [0u8; 64]);
    let view = |dtype, shape: &[usize], data| TensorView::new(dtype, shape.to_vec(), data);
    let tensors = [
        ("m.weight", view(Dtype::F8_E4M3, &[128, 128], &codes[..]).unwrap()),
        // The name that DeepSeek gives scales.
        ("m.scale", view(Dtype::F8_E8M0, &[1, 1], &scales).unwrap()),
        ("packed", view(Dtype::I8, &[4, 16], &bytes).unwrap()),
        ("exponents", view(Dtype::F8_E8M0, &[4, 16], &bytes).unwrap()),
    ];
    serialize_to_file(tensors, None, &dir.path().join("model.safetensors")).unwrap();
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    let plan = dir.path().join("plan.rhai");
    let text = r#"let root = at("");
        root.copy("packed", [4, 16], u8);
        root.copy("exponents", [4, 16], u8);
        let m = root.src("m.weight", [128, 128]);
        root["m.weight"] = m.quantize(fp8::ue8m0.scales(e8m0));
        root["wide"] = m.quantize(fp8::vllm);"#;
    std::fs::write(&plan, text).unwrap();
    let (plan, model) = (plan.to_str().unwrap(), dir.path().to_str().unwrap());
    let out_dir = dir.path().join("out");
    let out = engine(&["run", plan, "--model", model, "--out", out_dir.to_str().unwrap()]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let out = engine(&["verify", out_dir.to_str().unwrap()]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let out = engine(&["dry-run", plan, "--model", model, "--format", "json"]);
    let scale = found(&out, "m.weight_scale_inv");
    assert_eq!(scale, Ok(("float8_e8m0fnu".into(), json!([1, 1]))));
    assert_eq!(found(&out, "wide_scale_inv"), Ok(("float32".into(), json!([1, 1]))));
    let file = std::fs::read(out_dir.join("rank-0/model-rank-0-part-0.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&file).unwrap();
    assert_eq!(file.tensor("m.weight_scale_inv").unwrap().data(), [127]);
    assert_eq!(file.tensor("wide_scale_inv").unwrap().data(), 1f32.to_le_bytes());
    assert_eq!(found(&out, "exponents"), Ok(("uint8".into(), json!([4, 16]))));
}

fn olmoe() -> Value {
    // The sizes of OLMoE-1B-7B, with two of its 16 layers.
    json!({
        "model_type": "olmoe", "vocab_size": 50304, "hidden_size": 2048,
        "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 16,
        "num_key_value_heads": 16, "num_experts": 64, "tie_word_embeddings": false
    })
}

#[test]
fn olmoe_holds_what_its_class_registers() {
    let shape = |axes: &str, quant: &str, name: &str| {
        let out = dry_run("olmoe", &olmoe(), &["--infer", axes, "--set", quant]);
        found(&out, name).map(|f| f.1)
    };
    let layer = |name: &str| format!("model.layers.1.{name}");
    let routed = |name: &str| layer(&format!("mlp.experts.routed_experts.{name}"));
    let bf16 = |axes: &str, name: &str| shape(axes, "quant=bf16", name);
    for (axes, name, expected) in [
        ("tp=4", layer("self_attn.qkv_proj.weight"), json!([1536, 2048])),
        ("tp=4", layer("self_attn.o_proj.weight"), json!([2048, 512])),
        // Gathered before it is normed, so whole.
        ("tp=4", layer("self_attn.q_norm.weight"), json!([2048])),
        ("tp=4", layer("mlp.gate.weight"), json!([64, 2048])),
        ("tp=4", routed("w13_weight"), json!([64, 512, 2048])),
        ("tp=4", routed("w2_weight"), json!([64, 2048, 256])),
        ("tp=2,dp=2,ep=4", routed("w13_weight"), json!([16, 2048, 2048])),
        ("tp=2,dp=2,ep=4", routed("w2_weight"), json!([16, 2048, 1024])),
        ("tp=2,pp=2", "lm_head.weight".to_owned(), json!([25152, 2048])),
    ] {
        assert_eq!(bf16(axes, &name), Ok(expected), "{axes} {name}");
    }
    let fp8 = |axes: &str, name: &str| shape(axes, "quant=fp8_block", name);
    assert_eq!(fp8("tp=4", &routed("w13_weight_scale_inv")), Ok(json!([64, 4, 16])));
    // 64 columns: vLLM's Triton kernel takes tiles of 64.
    assert_eq!(fp8("tp=16", &routed("w2_weight_scale_inv")), Ok(json!([64, 32, 1])));
    let why = bf16("tp=2,ep=2,redundant_experts=2", "").unwrap_err();
    assert!(why.contains("refuses eplb"), "{why}");
}

#[test]
fn olmoe_runs_and_verifies() {
    let config = json!({
        "model_type": "olmoe", "vocab_size": 100, "hidden_size": 256,
        "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_experts": 2, "quantization_config": {"quant_method": "fp8",
        "modules_to_not_convert": ["mlp.gate"]}
    });
    let layer = "model.layers.0";
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![100, 256]),
        ("model.norm.weight".to_owned(), vec![256]),
        ("lm_head.weight".to_owned(), vec![100, 256]),
        (format!("{layer}.mlp.gate.weight"), vec![2, 256]),
    ];
    let norms = ["input_layernorm", "post_attention_layernorm"].map(str::to_owned);
    let heads = ["q", "k"].map(|x| format!("self_attn.{x}_norm"));
    shapes.extend(
        [norms, heads].concat().iter().map(|n| (format!("{layer}.{n}.weight"), vec![256])),
    );
    for x in ["q", "k", "v", "o"] {
        shapes.push((format!("{layer}.self_attn.{x}_proj.weight"), vec![256, 256]));
    }
    for (e, x) in [(0, "gate"), (0, "up"), (1, "gate"), (1, "up")] {
        shapes.push((format!("{layer}.mlp.experts.{e}.{x}_proj.weight"), vec![128, 256]));
    }
    for e in 0..2 {
        shapes.push((format!("{layer}.mlp.experts.{e}.down_proj.weight"), vec![256, 128]));
    }
    let bytes: Vec<u8> = (0..1 << 17).flat_map(|i: u32| [i as u8, 0x3F]).collect();
    let views = shapes.iter().map(|(name, shape)| {
        let data = &bytes[..2 * shape.iter().product::<usize>()];
        (name.as_str(), TensorView::new(Dtype::BF16, shape.clone(), data).unwrap())
    });
    let dir = tempdir().unwrap();
    serialize_to_file(views, None, &dir.path().join("model.safetensors")).unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let (model, out) = (dir.path().to_str().unwrap(), dir.path().join("out"));
    let out = out.to_str().unwrap();
    let args = ["run", "plans/olmoe.rhai", "--model", model, "--infer", "tp=2,ep=2"];
    let run = engine(&[&args[..], &["--out", out, "--verify"]].concat());
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
}
