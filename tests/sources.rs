//! Other sources than a checkpoint of one matrix an expert: the same weights under a trainer's
//! names and in its layouts give the bytes that vLLM's own loader gave.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize_to_file};
use serde_json::Value;
use sha2::{Digest, Sha256};

#[derive(Clone)]
struct Held {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

type Weights = BTreeMap<String, Held>;

impl Held {
    /// Rows of dimension 0.
    fn rows(&self, start: usize, end: usize) -> &[u8] {
        let row = self.bytes.len() / self.shape[0];
        &self.bytes[start * row..end * row]
    }

    /// Pieces of one type joined along dimension 0.
    fn joined(&self, pieces: &[&[u8]]) -> Held {
        let bytes = pieces.concat();
        let mut shape = self.shape.clone();
        shape[0] = bytes.len() * self.shape[0] / self.bytes.len();
        Held { dtype: self.dtype, shape, bytes }
    }
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn files(folder: &Path, part: &str) -> Vec<PathBuf> {
    let all = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    let mut found: Vec<_> = all.filter(|p| p.to_string_lossy().contains(part)).collect();
    found.sort();
    found
}

fn weights(folder: &Path) -> Weights {
    let mut out = Weights::new();
    for path in
        files(folder, ".safetensors").iter().filter(|p| p.extension().unwrap() != "json")
    {
        let bytes = std::fs::read(path).unwrap();
        for (name, t) in SafeTensors::deserialize(&bytes).unwrap().iter() {
            let (shape, bytes) = (t.shape().to_vec(), t.data().to_vec());
            out.insert(name.to_owned(), Held { dtype: t.dtype(), shape, bytes });
        }
    }
    out
}

/// The experts' tensors `mlp.experts.N.PART` of one part, stacked; taken out of `all`.
fn stacked(all: &mut Weights, block: &str, part: &str) -> Option<Held> {
    let names = (0..).map(|e| format!("{block}.{e}.{part}"));
    let parts: Vec<Held> = names.map_while(|n| all.remove(&n)).collect();
    let first = parts.first()?;
    let shape = [vec![parts.len()], first.shape.clone()].concat();
    let bytes = parts.iter().flat_map(|p| p.bytes.clone()).collect();
    Some(Held { dtype: first.dtype, shape, bytes })
}

fn expert_blocks(all: &Weights) -> Vec<String> {
    let found = all.keys().filter_map(|n| n.split_once(".experts.0."));
    let mut blocks: Vec<String> = found.map(|(b, _)| format!("{b}.experts")).collect();
    blocks.dedup();
    blocks
}

/// Transformers 5: one tensor for all experts, gate before up; scales likewise.
fn fused(mut all: Weights, _: &Value) -> Weights {
    for block in expert_blocks(&all) {
        for (leaf, suffix) in [(".weight", ""), (".weight_scale_inv", "_scale_inv")] {
            let [gate, up, down] = ["gate", "up", "down"]
                .map(|part| stacked(&mut all, &block, &format!("{part}_proj{leaf}")));
            let (Some(gate), Some(up), Some(down)) = (gate, up, down) else { continue };
            let experts = gate.shape[0];
            let pieces: Vec<&[u8]> =
                (0..experts).flat_map(|e| [gate.rows(e, e + 1), up.rows(e, e + 1)]).collect();
            let shape = vec![experts, 2 * gate.shape[1], gate.shape[2]];
            let gate_up = Held { dtype: gate.dtype, shape, bytes: pieces.concat() };
            all.insert(format!("{block}.gate_up_proj{suffix}"), gate_up);
            all.insert(format!("{block}.down_proj{suffix}"), down);
        }
    }
    all
}

/// prime-rl's trainer: stacked w1, w3 and w2; shared experts are one of them.
fn prime_rl(mut all: Weights, config: &Value) -> Weights {
    let draft = format!("model.layers.{}.", config["num_hidden_layers"]);
    all.retain(|name, _| !name.starts_with(&draft));
    let names = [("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")];
    for block in expert_blocks(&all) {
        for (part, w) in names {
            let all_of_it = stacked(&mut all, &block, &format!("{part}.weight")).unwrap();
            all.insert(format!("{block}.{w}"), all_of_it);
            let one = block.replace(".experts", ".shared_experts");
            if let Some(mut held) = all.remove(&format!("{one}.{part}.weight")) {
                held.shape.insert(0, 1);
                all.insert(
                    format!("{}.{w}", block.replace(".experts", ".shared_expert")),
                    held,
                );
            }
        }
    }
    let renamed = |n: String| {
        n.replace("mlp.gate.weight", "mlp.router.gate.weight")
            .replace("mlp.gate.e_score_correction_bias", "mlp.expert_bias")
    };
    all.into_iter().map(|(n, held)| (renamed(n), held)).collect()
}

/// How many tensor-parallel ranks the Megatron trainer had, whose parts are joined.
const RANKS: usize = 2;
/// Rows of its vocabulary tables.
const VOCABULARY: usize = 384;

fn megatron(all: Weights, config: &Value) -> Weights {
    let size = |key: &str| config[key].as_u64().unwrap() as usize;
    let (kv, head) = (size("num_key_value_heads"), size("head_dim"));
    let group = size("num_attention_heads") / kv * head;
    let mut out = Weights::new();
    let table = |name: &str| {
        let t = &all[name];
        let filler = vec![7; t.rows(0, VOCABULARY - t.shape[0]).len()];
        t.joined(&[&t.bytes, &filler])
    };
    out.insert("embedding.word_embeddings.weight".into(), table("model.embed_tokens.weight"));
    out.insert("output_layer.weight".into(), table("lm_head.weight"));
    out.insert("decoder.final_layernorm.weight".into(), all["model.norm.weight"].clone());
    for i in 0..size("num_hidden_layers") {
        let (from, to) = (format!("model.layers.{i}"), format!("decoder.layers.{i}"));
        let sparse = all.contains_key(&format!("{from}.mlp.gate.weight"));
        let second = if sparse {
            "pre_mlp_layernorm.weight"
        } else {
            "mlp.linear_fc1.layer_norm_weight"
        };
        let mut moves = vec![
            (
                "input_layernorm.weight".into(),
                "self_attention.linear_qkv.layer_norm_weight".into(),
            ),
            ("post_attention_layernorm.weight".into(), second.to_owned()),
            ("self_attn.o_proj.weight".into(), "self_attention.linear_proj.weight".into()),
            ("self_attn.q_norm.weight".into(), "self_attention.q_layernorm.weight".into()),
            ("self_attn.k_norm.weight".into(), "self_attention.k_layernorm.weight".into()),
            ("mlp.gate.weight".into(), "mlp.router.weight".into()),
            ("mlp.gate.e_score_correction_bias".into(), "mlp.router.expert_bias".into()),
        ];
        for leaf in ["weight", "bias"] {
            let name = |part: &str| format!("{from}.self_attn.{part}_proj.{leaf}");
            let Some(q) = all.get(&name("q")) else { continue };
            let (k, v) = (&all[&name("k")], &all[&name("v")]);
            let pieces: Vec<&[u8]> = (0..kv)
                .flat_map(|g| {
                    let own = (g * head, (g + 1) * head);
                    [
                        q.rows(g * group, (g + 1) * group),
                        k.rows(own.0, own.1),
                        v.rows(own.0, own.1),
                    ]
                })
                .collect();
            out.insert(format!("{to}.self_attention.linear_qkv.{leaf}"), q.joined(&pieces));
        }
        let experts = (0..).map(|e| format!("mlp.experts.{e}"));
        let experts = experts
            .take_while(|b| all.contains_key(&format!("{from}.{b}.up_proj.weight")))
            .enumerate()
            .map(|(e, b)| (b, "mlp.experts", e.to_string(), 1));
        let mut mlps: Vec<_> = experts.collect();
        mlps.push(("mlp".to_owned(), "mlp", String::new(), RANKS));
        mlps.push((
            "mlp.shared_experts".to_owned(),
            "mlp.shared_experts",
            String::new(),
            RANKS,
        ));
        for (block, to_block, e, ranks) in mlps {
            let Some(gate) = all.get(&format!("{from}.{block}.gate_proj.weight")) else {
                continue;
            };
            let up = &all[&format!("{from}.{block}.up_proj.weight")];
            let rows = gate.shape[0] / ranks;
            let pieces: Vec<&[u8]> = (0..ranks)
                .flat_map(|t| [gate, up].map(|half| half.rows(t * rows, (t + 1) * rows)))
                .collect();
            out.insert(format!("{to}.{to_block}.linear_fc1.weight{e}"), gate.joined(&pieces));
            moves.push((
                format!("{block}.down_proj.weight"),
                format!("{to_block}.linear_fc2.weight{e}"),
            ));
        }
        for (old, new) in moves {
            if let Some(held) = all.get(&format!("{from}.{old}")) {
                out.insert(format!("{to}.{new}"), held.clone());
            }
        }
    }
    out
}

/// Runs the plan on the case's weights after `convert`, and compares every rank's bytes.
fn same_bytes(case: &str, quant: &str, sets: &[&str], convert: fn(Weights, &Value) -> Weights) {
    let root = Path::new(case);
    if !root.exists() {
        eprintln!("skipped: {case} is not there");
        return;
    }
    let from = root.join(if quant == "bf16" { "hf" } else { "hf_fp8" });
    let config = json(&from.join("config.json"));
    let plan = format!("plans/{}.rhai", config["model_type"].as_str().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    std::fs::create_dir(&model).unwrap();
    std::fs::copy(from.join("config.json"), model.join("config.json")).unwrap();
    let converted = convert(weights(&from), &config);
    let views = converted
        .iter()
        .map(|(name, t)| (name, TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap()));
    serialize_to_file(views, None, &model.join("model.safetensors")).unwrap();

    for path in files(root, &format!(".{quant}.rank")) {
        let load = json(&path);
        let out = dir.path().join("out");
        let axis = |key: &str| load["topology"].get(key).and_then(Value::as_u64).unwrap_or(0);
        let axes: Vec<String> = ["tp", "dp", "ep", "redundant_experts"]
            .iter()
            .filter(|key| axis(key) > u64::from(**key != "redundant_experts"))
            .map(|key| format!("{key}={}", axis(key)))
            .collect();
        let mut run = Command::new(env!("CARGO_BIN_EXE_engine"));
        run.args(["run", &plan, "--force", "--set", &format!("quant={quant}"), "--model"]);
        run.arg(&model).arg("--out").arg(&out);
        sets.iter().for_each(|set| {
            run.args(["--set", set]);
        });
        if !axes.is_empty() {
            run.args(["--infer", &axes.join(",")]);
        }
        // Every other case from a trainer whose ranks hold parts.
        if axis("tp") > 1 {
            run.args(["--train", "fsdp=2,tp=2"]);
        }
        let done = run.output().unwrap();
        assert!(done.status.success(), "{sets:?}: {}", String::from_utf8_lossy(&done.stderr));
        let held = weights(&out.join(format!("rank-{}", axis("global_rank"))));
        for p in load["parameters"].as_array().unwrap() {
            if p["untouched"] != true {
                let name = p["name"].as_str().unwrap();
                let sum = format!("{:x}", Sha256::digest(&held[name].bytes));
                assert_eq!(p["sha256"], sum, "{} {sets:?} {name}", path.display());
            }
        }
    }
}

const QWEN3_MOE: &str = "tests/data/loads/qwen3_moe";
const GLM4_MOE: &str = "../shared/golden/loads/glm4_moe";

#[test]
fn experts_in_one_tensor() {
    for quant in ["bf16", "fp8_block"] {
        same_bytes(QWEN3_MOE, quant, &["source=hf_fused"], fused);
        same_bytes(GLM4_MOE, quant, &["source=hf_fused"], fused);
    }
}

#[test]
fn prime_rl_s_own_names() {
    same_bytes(QWEN3_MOE, "bf16", &["source=prime_rl"], prime_rl);
    same_bytes(GLM4_MOE, "bf16", &["source=prime_rl"], prime_rl);
}

#[test]
fn megatron_s_groups_and_interleaved_halves() {
    let sets = ["source=megatron", "trainer_tp=2", "padded_vocab=384"];
    same_bytes(QWEN3_MOE, "bf16", &sets, megatron);
    same_bytes(GLM4_MOE, "bf16", &sets, megatron);
}
