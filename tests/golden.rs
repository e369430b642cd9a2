//! The engine against vLLM itself: parameter tables, bytes after vLLM's own loader, and
//! prime-rl's own conversion. The files under tests/data say how they were made.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rayon::prelude::*;
use serde_json::Value;
use sha2::{Digest, Sha256};

fn engine(args: &[String]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_engine")).args(args).output().unwrap()
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The files of a folder tree whose names have `.rank` in them, in order.
fn rank_files(root: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(root)
        .unwrap_or_else(|e| panic!("{root}: {e}"))
        .map(|e| e.unwrap().path())
        .filter(|p| p.to_string_lossy().contains(".rank"))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{root} has no tables");
    files
}

fn axes(topology: &Value) -> Vec<String> {
    let at = |key: &str| topology.get(key).and_then(Value::as_u64).unwrap_or(0);
    let mut axes: Vec<String> = ["tp", "dp", "ep", "pp"]
        .iter()
        .filter(|a| at(a) > 1)
        .map(|a| format!("{a}={}", at(a)))
        .collect();
    if at("redundant_experts") > 0 {
        axes.push(format!("redundant_experts={}", at("redundant_experts")));
    }
    if axes.is_empty() { vec![] } else { vec!["--infer".to_owned(), axes.join(",")] }
}

/// Entries of vLLM's tables that no checkpoint feeds; the plans keep them by rule.
fn unfed(name: &str) -> bool {
    ["_scale", "_zero_point"].iter().any(|s| name.ends_with(s)) && name.contains(".attn.")
}

/// The ignore list is written in full in a model's tp1 table only; others name that file.
fn with_ignore_list(config: &Value, folder: &Path) -> Value {
    let mut config = config.clone();
    for key in ["modules_to_not_convert", "ignore"] {
        let Some(text) = config["quantization_config"][key].as_str() else { continue };
        let file = text.rsplit(' ').next().unwrap();
        let full = json(&folder.join(file));
        config["quantization_config"][key] =
            full["hf_config"]["quantization_config"][key].clone();
    }
    config
}

fn table_problems(path: &Path, plan: &str) -> Vec<String> {
    let table = json(path);
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.json");
    let hf = with_ignore_list(&table["hf_config"], path.parent().unwrap());
    std::fs::write(&config, hf.to_string()).unwrap();
    let quant = match table["quant"].as_str().unwrap() {
        "fp8_block_noignore" => "fp8_block",
        other => other,
    };
    let rank = table["topology"]["global_rank"].as_u64().unwrap_or(0);
    let mut args = vec!["dry-run".to_owned(), plan.to_owned(), "--model".to_owned()];
    args.push(config.display().to_string());
    args.extend(axes(&table["topology"]));
    args.extend(["--rank", &rank.to_string(), "--format", "json"].map(str::to_owned));
    args.extend(["--set".to_owned(), format!("quant={quant}")]);
    let out = engine(&args);
    if let Some(why) = table.get("refused") {
        let silent = out.status.code() != Some(1) || out.stderr.is_empty();
        return if silent { vec![format!("vLLM refuses: {why}")] } else { vec![] };
    }
    if !out.status.success() {
        return vec![String::from_utf8_lossy(&out.stderr).into_owned()];
    }
    compare_table(&table, &serde_json::from_slice(&out.stdout).unwrap(), quant)
}

fn compare_table(table: &Value, shown: &Value, quant: &str) -> Vec<String> {
    let row = |p: &Value| {
        (p["name"].as_str().unwrap().to_owned(), (p["dtype"].clone(), p["shape"].clone()))
    };
    let params = shown["ranks"][0]["params"].as_array().unwrap();
    let got: BTreeMap<_, _> =
        params.iter().filter(|p| p["kind"] != "derived").map(row).collect();
    let mut want: BTreeMap<_, _> =
        table["parameters"].as_array().unwrap().iter().map(row).collect();
    if quant == "fp8_per_block_online" {
        // Printed before vLLM quantizes: e4m3 of the same shape, and its scale, come instead.
        for (name, value) in &got {
            let quantized = value.0 == "float8_e4m3fn";
            if quantized && want.get(name).is_some_and(|w| w.1 == value.1) {
                want.insert(name.clone(), value.clone());
                let scale = format!("{name}_scale_inv");
                assert!(got.contains_key(&scale), "{scale} is missing");
                want.insert(scale.clone(), got[&scale].clone());
            }
        }
    }
    let other: BTreeSet<&str> = ["aliases", "buffers"]
        .iter()
        .flat_map(|k| table[*k].as_array().unwrap())
        .map(|e| e["name"].as_str().unwrap())
        .collect();
    let mut problems = Vec::new();
    for (name, value) in &want {
        match got.get(name) {
            None if unfed(name) => {}
            None => problems.push(format!("{name} is missing")),
            Some(g) if g != value => problems.push(format!("{name}: {g:?}, not {value:?}")),
            Some(_) => {}
        }
    }
    let extra = got.keys().filter(|n| !want.contains_key(*n) && !other.contains(n.as_str()));
    problems.extend(extra.map(|n| format!("{n} is not vLLM's")));
    problems
}

/// What runs the loads: threads, or as a variable says, such as `--backend cuda --path nccl`.
fn how_to_run() -> Vec<String> {
    let said = std::env::var("KERNELCAST_GOLDEN_RUN");
    let said = said.unwrap_or_else(|_| "--backend cpu".to_owned());
    said.split_whitespace().map(str::to_owned).collect()
}

fn load_problems(path: &Path, plan: &str) -> Vec<String> {
    load_problems_from(path, plan, None)
}

/// Trainer meshes that take turns; what vLLM refuses is refused for one rank already.
const MESHES: [&str; 5] =
    ["fsdp=3", "fsdp=4,ep=2", "dp_replicate=2,fsdp=2", "fsdp=2,tp=2", "pp=2,fsdp=2"];

fn sharded_load_problems(path: &Path, plan: &str) -> Vec<String> {
    let name = path.file_name().unwrap().to_string_lossy().into_owned();
    let mesh = name.bytes().map(usize::from).sum::<usize>() % MESHES.len();
    let found = load_problems_from(path, plan, Some(MESHES[mesh]));
    found.into_iter().map(|p| format!("--train {}: {p}", MESHES[mesh])).collect()
}

fn load_problems_from(path: &Path, plan: &str, train: Option<&str>) -> Vec<String> {
    let load = json(path);
    let quant = load["quant"].as_str().unwrap();
    let checkpoint = load["checkpoint"].as_str().unwrap_or("hf");
    let model = path.parent().unwrap().join(checkpoint);
    let dir = tempfile::tempdir().unwrap();
    let out_dir = dir.path().join("out");
    let mut args = vec!["run".to_owned(), plan.to_owned(), "--model".to_owned()];
    args.push(model.display().to_string());
    args.extend(axes(&load["topology"]));
    args.extend(["--out".to_owned(), out_dir.display().to_string()]);
    args.extend(["--set".to_owned(), format!("quant={quant}")]);
    args.extend(how_to_run());
    args.extend(train.iter().flat_map(|t| ["--train".to_owned(), (*t).to_owned()]));
    let out = engine(&args);
    if load.get("refused").is_some() {
        let written = out_dir.exists();
        let right = out.status.code() == Some(1) && !out.stderr.is_empty() && !written;
        return if right {
            vec![]
        } else {
            vec!["vLLM refuses, the engine does not".to_owned()]
        };
    }
    if !out.status.success() {
        return vec![String::from_utf8_lossy(&out.stderr).into_owned()];
    }
    let rank = load["topology"]["global_rank"].as_u64().unwrap_or(0);
    let held = rank_tensors(&out_dir.join(format!("rank-{rank}")));
    let mut problems = Vec::new();
    for p in load["parameters"].as_array().unwrap() {
        let name = p["name"].as_str().unwrap();
        if p["untouched"] == true || unfed(name) {
            continue;
        }
        match held.get(name) {
            None => problems.push(format!("{name} is missing")),
            Some((_, shape, _)) if Value::from(shape.clone()) != p["shape"] => {
                problems.push(format!("{name} is {shape:?}"));
            }
            Some((_, _, bytes)) => {
                let sum = format!("{:x}", Sha256::digest(bytes));
                if p["sha256"] != sum {
                    problems.push(format!("{name} has other bytes"));
                }
            }
        }
    }
    problems
}

type Held = BTreeMap<String, (safetensors::Dtype, Vec<usize>, Vec<u8>)>;

fn tensors(path: &Path) -> Held {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    file.iter()
        .map(|(n, t)| (n.to_owned(), (t.dtype(), t.shape().to_vec(), t.data().to_vec())))
        .collect()
}

fn rank_tensors(folder: &Path) -> Held {
    let files = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    files.flat_map(|f| tensors(&f)).collect()
}

/// Runs one comparison for each file and fails with all differences.
fn all(root: &str, plan: &str, check: fn(&Path, &str) -> Vec<String>) {
    let wrong: Vec<String> = rank_files(root)
        .par_iter()
        .map(|path| (path, check(path, plan)))
        .filter(|(_, problems)| !problems.is_empty())
        .map(|(path, problems)| {
            let shown: Vec<&str> = problems.iter().take(4).map(String::as_str).collect();
            format!("{}: {} wrong: {}", path.display(), problems.len(), shown.join("; "))
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn tables_of_qwen3() {
    all("tests/data/manifests/qwen3", "plans/qwen3.rhai", table_problems);
}

#[test]
fn tables_of_qwen3_moe() {
    all("tests/data/manifests/qwen3_moe", "plans/qwen3_moe.rhai", table_problems);
}

#[test]
fn tables_of_glm_moe_dsa() {
    all("tests/data/manifests/glm_moe_dsa", "plans/glm_moe_dsa.rhai", table_problems);
}

#[test]
fn tables_of_deepseek_v3() {
    all("tests/data/manifests/deepseek_v3", "plans/deepseek_v3.rhai", table_problems);
}

#[test]
fn tables_of_llama() {
    all("tests/data/manifests/llama", "plans/llama.rhai", table_problems);
}

#[test]
fn tables_of_mixtral() {
    all("tests/data/manifests/mixtral", "plans/mixtral.rhai", table_problems);
}

#[test]
fn tables_of_glm4_moe() {
    all("tests/data/manifests/glm4_moe", "plans/glm4_moe.rhai", table_problems);
}

#[test]
fn tables_of_minimax_m2() {
    all("tests/data/manifests/minimax_m2", "plans/minimax_m2.rhai", table_problems);
}

#[test]
fn tables_of_gpt_oss() {
    all("tests/data/manifests/gpt_oss", "plans/gpt_oss.rhai", table_problems);
}

#[test]
fn tables_of_qwen3_next() {
    all("tests/data/manifests/qwen3_next", "plans/qwen3_next.rhai", table_problems);
}

#[test]
fn tables_of_qwen3_5_moe() {
    all("tests/data/manifests/qwen3_5_moe", "plans/qwen3_5_moe.rhai", table_problems);
}

#[test]
fn tables_of_deepseek_v4() {
    all("tests/data/manifests/deepseek_v4", "plans/deepseek_v4.rhai", table_problems);
}

#[test]
fn loads_of_qwen3() {
    all("tests/data/loads/qwen3-tied", "plans/qwen3.rhai", load_problems);
    all("tests/data/loads/qwen3-untied", "plans/qwen3.rhai", load_problems);
}

#[test]
fn loads_of_qwen3_moe() {
    all("tests/data/loads/qwen3_moe", "plans/qwen3_moe.rhai", load_problems);
}

#[test]
fn loads_of_glm_moe_dsa() {
    all("tests/data/loads/glm_moe_dsa", "plans/glm_moe_dsa.rhai", load_problems);
}

/// Loads that would take tests/data past 50 MB lie beside the repository, if anywhere; each is
/// held against one rank's trainer and against sharded ones.
fn all_beside(case: &str, plan: &str) {
    let root = format!("../shared/golden/loads/{case}");
    if !Path::new(&root).exists() {
        eprintln!("skipped: {root} is not there");
        return;
    }
    all(&root, plan, load_problems);
    all(&root, plan, sharded_load_problems);
}

#[test]
fn loads_of_deepseek_v3() {
    all_beside("deepseek_v3", "plans/deepseek_v3.rhai");
}

#[test]
fn loads_of_llama() {
    all_beside("llama", "plans/llama.rhai");
}

#[test]
fn loads_of_mixtral() {
    all_beside("mixtral", "plans/mixtral.rhai");
}

#[test]
fn loads_of_glm4_moe() {
    all_beside("glm4_moe", "plans/glm4_moe.rhai");
    all_beside("glm4_moe-ragged", "plans/glm4_moe.rhai");
}

#[test]
fn loads_of_minimax_m2() {
    all_beside("minimax_m2", "plans/minimax_m2.rhai");
}

#[test]
fn loads_of_gpt_oss() {
    all_beside("gpt_oss", "plans/gpt_oss.rhai");
}

#[test]
fn loads_of_qwen3_next() {
    all_beside("qwen3_next", "plans/qwen3_next.rhai");
}

#[test]
fn loads_of_qwen3_5_moe() {
    all_beside("qwen3_5_moe", "plans/qwen3_5_moe.rhai");
}

#[test]
fn loads_of_qwen3_from_sharded_trainers() {
    all("tests/data/loads/qwen3-tied", "plans/qwen3.rhai", sharded_load_problems);
    all("tests/data/loads/qwen3-untied", "plans/qwen3.rhai", sharded_load_problems);
}

#[test]
fn loads_of_qwen3_moe_from_sharded_trainers() {
    all("tests/data/loads/qwen3_moe", "plans/qwen3_moe.rhai", sharded_load_problems);
}

#[test]
fn loads_of_glm_moe_dsa_from_sharded_trainers() {
    all("tests/data/loads/glm_moe_dsa", "plans/glm_moe_dsa.rhai", sharded_load_problems);
}

/// prime-rl's own converter on its trainer names; dims are those of the source's metadata.
#[test]
fn conversion_of_prime_rl() {
    let root = Path::new("tests/data/prime_rl_glm");
    let source = root.join("dev.source.safetensors");
    for (quant, file) in
        [("bf16", "dev.bf16.safetensors"), ("fp8_block", "dev.fp8.safetensors")]
    {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(&source, dir.path().join("model.safetensors")).unwrap();
        std::fs::write(dir.path().join("config.json"), prime_rl_config(&source).to_string())
            .unwrap();
        let out = dir.path().join("out");
        let args = [
            "run",
            "plans/prime_rl_glm_moe_dsa.rhai",
            "--model",
            &dir.path().display().to_string(),
            "--out",
            &out.display().to_string(),
            "--set",
            &format!("quant={quant}"),
            "--set",
            "layers_only=true",
        ];
        let run = engine(&args.map(str::to_owned));
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        let got = rank_tensors(&out.join("rank-0"));
        let want = tensors(&root.join(file));
        assert_eq!(got.len(), want.len());
        for (name, (_, shape, bytes)) in &want {
            // The converter precedes vLLM's renaming of the experts' module.
            let name = name.replace(".experts.w", ".experts.routed_experts.w");
            let (_, got_shape, got_bytes) = &got[&name];
            assert_eq!((got_shape, got_bytes == bytes), (shape, true), "{quant} {name}");
        }
    }
}

fn prime_rl_config(source: &Path) -> Value {
    let bytes = std::fs::read(source).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let dims = header.metadata().as_ref().unwrap()["dims"].clone();
    let d: Value = serde_json::from_str(&dims).unwrap();
    serde_json::json!({
        "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa",
        "hidden_size": d["H"], "intermediate_size": d["I"], "moe_intermediate_size": d["MI"],
        "n_routed_experts": d["E"], "n_shared_experts": 1, "num_hidden_layers": 2,
        "first_k_dense_replace": 1, "q_lora_rank": d["ql"], "kv_lora_rank": d["kl"],
        "qk_rope_head_dim": d["rope"], "qk_nope_head_dim": d["nope"], "v_head_dim": d["v"],
        "num_attention_heads": d["n"], "num_key_value_heads": d["n"],
        "index_head_dim": d["ih"], "index_n_heads": d["nh"], "vocab_size": 64,
        "tie_word_embeddings": false, "num_nextn_predict_layers": 0,
    })
}
