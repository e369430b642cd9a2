//! The scripts that read a live worker and a live trainer, against stand-ins with the interfaces
//! that they use (`tests/scripts`); what they write goes to the binary. Skipped without python3.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};
use tempfile::tempdir;

/// Runs a stand-in; none where there is no python3.
fn python(script: &str, args: &[&str]) -> Option<String> {
    let out = Command::new("python3")
        .arg(format!("tests/scripts/{script}"))
        .args(args)
        .env("PYTHONPATH", "scripts:tests/scripts")
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output();
    let out = match out {
        Ok(out) => out,
        Err(why) => {
            eprintln!("skipped: python3 does not run: {why}");
            return None;
        }
    };
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    Some(String::from_utf8(out.stdout).unwrap())
}

fn engine(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_engine")).args(args).output().unwrap()
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn a_worker_is_dumped_and_fits_its_plan() {
    let dir = tempdir().unwrap();
    let folder = dir.path().to_str().unwrap();
    let Some(said) = python("receiver.py", &[folder]) else { return };
    let manifest = said.trim();
    assert!(manifest.ends_with("rank-1.json"), "{manifest}");
    let found = read(Path::new(manifest));
    assert_eq!(found["topology"]["global_rank"], 1);
    assert_eq!(found["parameters"].as_array().unwrap().len(), 9);
    assert_eq!(found["parameters"][0]["name"], "model.embed_tokens.weight");
    let aliases = json!([
        {"name": "lm_head.weight", "of": "model.embed_tokens.weight"},
        {"name": "model.layers.0.mlp._k_scale", "of": "model.layers.0.self_attn.attn._k_scale"},
    ]);
    assert_eq!(found["aliases"], aliases);
    let persistent = |i: usize| found["buffers"][i]["persistent"].as_bool();
    assert_eq!((persistent(0), persistent(1)), (Some(false), Some(true)));
    assert_eq!(
        found["vllm_info"]["kernels"],
        json!({"Kernel fp8_backend=TRITON": "model.layers.0.mlp"})
    );
    let last = &found["parameters"][8];
    assert_eq!((&last["name"], &last["stride"]), (&json!("W_UV"), &Value::Null));

    // A receiver with a tensor more than the plan: said, unless the plan keeps it.
    let config = dir.path().join("config.json");
    let llama = json!({
        "model_type": "llama", "vocab_size": 100, "hidden_size": 256, "num_hidden_layers": 1,
        "intermediate_size": 512, "num_attention_heads": 2, "num_key_value_heads": 2,
        "tie_word_embeddings": true
    });
    std::fs::write(&config, llama.to_string()).unwrap();
    let plan = std::fs::read_to_string("plans/llama.rhai").unwrap();
    let own = dir.path().join("own.rhai");
    std::fs::write(&own, format!("{plan}\nkeep(\"W_UV\");\n")).unwrap();
    let check = |plan: &str| {
        let config = config.to_str().unwrap();
        let args =
            ["check", plan, "--model", config, "--infer", "tp=2", "--manifest", manifest];
        let out = engine(&args);
        let text = [out.stdout, out.stderr].concat();
        (out.status.code(), String::from_utf8(text).unwrap())
    };
    let (status, text) = check("plans/llama.rhai");
    assert!(status == Some(1) && text.contains("W_UV") && text.contains("E0407"), "{text}");
    let own = own.to_str().unwrap();
    let (status, text) = check(own);
    assert!(status == Some(0) && text.starts_with("fits: "), "{text}");

    // Strides of the live tensor reach the comparison.
    python("receiver.py", &[folder, "strided"]).unwrap();
    let o = "model.layers.0.self_attn.o_proj.weight";
    let strided = read(Path::new(manifest));
    let params = strided["parameters"].as_array().unwrap();
    let found = params.iter().find(|p| p["name"] == o).unwrap();
    assert_eq!(found["stride"], json!([1, 256]));
    let (_, text) = check(own);
    assert!(text.contains("has strides [1, 256] on the receiver"), "{text}");
}

#[test]
fn a_trainer_is_dumped_and_its_placements_are_read() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("sources.json");
    let Some(said) = python("sources.py", &[path.to_str().unwrap()]) else { return };
    assert_eq!(
        said,
        "w is cut unevenly by fsdp, which the mesh has in parts\n[('a', 0), ('b', 1)]\n"
    );
    let manifest = read(&path);
    assert_eq!(manifest["mesh"], json!([["fsdp_mod_ep", 4], ["ep", 2]]));
    let row = |name: &str, dtype: &str, shape: Value, placements: Value| json!({"name": name, "dtype": dtype, "shape": shape, "placements": placements});
    let expected = json!([
        row("w", "float32", json!([16, 4]), json!(["S(0)", "S(0)"])),
        row("experts", "bfloat16", json!([2, 8, 4]), json!(["SS(1,1)", "S(0)"])),
        row("whole", "bfloat16", json!([4]), json!(["R", "R"])),
        row("bias", "bfloat16", json!([3]), json!(["R", "R"])),
    ]);
    assert_eq!(manifest["tensors"], expected);

    let plan = dir.path().join("plan.rhai");
    let text = r#"let root = at("");
        root["w"] = root.src("w", [16, 4], f32).shard(0, tp);
        root["experts"] = root.src("experts", [2, 8, 4]).experts(ep);
        root.copy("whole", [4]);
        root.copy("bias", [3]);"#;
    std::fs::write(&plan, text).unwrap();
    let config = dir.path().join("config.json");
    std::fs::write(&config, "{}").unwrap();
    let (plan, path) = (plan.to_str().unwrap(), path.to_str().unwrap());
    let args = ["dry-run", plan, "--model", config.to_str().unwrap(), "--infer", "tp=2,ep=2"];
    let out = engine(&[&args[..], &["--source-manifest", path, "--emit", "graph"]].concat());
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{said}");
    // Eight trainers send, none of them a tensor as a whole.
    let graph = String::from_utf8(out.stdout).unwrap();
    assert!((0..8).all(|t| graph.contains(&format!("t{t}"))), "{graph}");
}
