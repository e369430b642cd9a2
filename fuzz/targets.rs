//! What is fed with bytes that nobody promises anything of: plans, configs, indexes, headers and
//! manifests. Each target takes any bytes, and must end without a panic.
//!
//! `fuzz_targets` gives them to libFuzzer; tests/fuzz_inputs.rs mutates their seeds by itself.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use kernelcast::backend::cpu::FiniteCheck;
use kernelcast::check::check;
use kernelcast::compile::{CompileError, CompileInputs, Compiled, ModelInput, compile};
use kernelcast::diag::{Diagnostic, Format, render};
use kernelcast::error::{Error, Result};
use kernelcast::exec::{Engine, Recorded, RunOptions, Schedule, run_to_files};
use kernelcast::graph::{Bounds, Setup};
use kernelcast::io::{
    Checkpoint, ExpertMapFile, ReceiverManifest, SourceManifest, read_cluster, read_config,
};
use kernelcast::load::OpenModel;
use kernelcast::script::{Limits, NoModules};
use kernelcast::shard::ExpertMap;
use kernelcast::topo::{Cluster, InferMesh, TrainMesh};
use kernelcast::verify::verify_output;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A target's name, what it does, and inputs to begin with.
pub struct Target {
    pub name: &'static str,
    /// True if the bytes were accepted.
    pub run: fn(&[u8]) -> bool,
    pub seeds: fn() -> Vec<Vec<u8>>,
}

pub const TARGETS: [Target; 8] = [
    Target { name: "plan", run: plan, seeds: plan_seeds },
    Target { name: "config", run: config, seeds: config_seeds },
    Target { name: "index", run: index, seeds: index_seeds },
    Target { name: "header", run: header, seeds: header_seeds },
    Target { name: "receiver", run: receiver, seeds: receiver_seeds },
    Target { name: "sources", run: sources, seeds: source_seeds },
    Target { name: "experts", run: experts, seeds: expert_seeds },
    Target { name: "output", run: output, seeds: output_seeds },
];

const SMALL: &str = r#"
let w = at("").src("w", [256, 128]);
at("a")["w"] = w.shard(0, tp).quantize(fp8::vllm);
at("model.layers.0")["e"] = at("").src("e", [4, 8]).experts(ep);
keep("x.*_scale", optional);
"#;

struct Given<'a> {
    text: &'a str,
    config: Value,
    infer: &'a str,
    placements: Option<&'a SourceManifest>,
    experts: ExpertMap,
}

fn compiled(given: Given<'_>) -> std::result::Result<Compiled, CompileError> {
    compile(CompileInputs {
        name: "fuzz.rhai",
        text: given.text,
        modules: Rc::new(NoModules),
        model: Some(ModelInput { config: given.config, catalog: None }),
        open_model: &|_| Err(Diagnostic::error("E0417", "there is no model").into()),
        mesh: InferMesh::parse(given.infer).ok(),
        train: TrainMesh::single(),
        placements: given.placements,
        options: BTreeMap::new(),
        target: BTreeMap::new(),
        experts: given.experts,
        limits: Limits {
            operations: 20_000,
            tensors: 5_000,
            time: Duration::from_secs(2),
            ..Limits::default()
        },
    })
}

/// The small plan, with experts balanced where a map of theirs is given.
fn small(placements: Option<&SourceManifest>, experts: ExpertMap) -> Option<Compiled> {
    let infer = if experts.is_empty() { "tp=2,ep=2" } else { "tp=2,ep=2,eplb=1" };
    let given = Given { text: SMALL, config: json!({}), infer, placements, experts };
    ended(compiled(given))
}

/// What a compilation gives, after its report was made or its schedule built.
fn ended(result: std::result::Result<Compiled, CompileError>) -> Option<Compiled> {
    match result {
        Ok(compiled) => {
            let cluster = Cluster::default();
            let setup = Setup::for_threads(1, &cluster, Bounds::with_staging(1 << 20));
            // A large one is only slow.
            if compiled.program.source_bytes() < 1 << 30 {
                drop(Schedule::of(&compiled, &setup));
            }
            Some(compiled)
        }
        Err(e) => {
            let text = Format::Text { color: false };
            assert!(!render(&e.error.diagnostics, &e.files, text).is_empty());
            render(&e.error.diagnostics, &e.files, Format::Json);
            None
        }
    }
}

fn said<T>(result: Result<T>) -> Option<T> {
    let said = |e: &Error| assert!(!e.diagnostics.is_empty());
    result.inspect_err(said).ok()
}

/// A folder with one file of the bytes.
fn with_file<T>(name: &str, data: &[u8], work: impl FnOnce(&Path) -> T) -> T {
    let dir = tempfile::tempdir().expect("a temporary folder");
    fs::write(dir.path().join(name), data).expect("a small file");
    work(dir.path())
}

/// Compiles the bytes as a plan.
pub fn plan(data: &[u8]) -> bool {
    let text = String::from_utf8_lossy(data);
    let config = json!({"num_hidden_layers": 2, "hidden_size": 256, "vocab_size": 330});
    let given = Given {
        text: &text,
        config,
        infer: "tp=2,ep=2",
        placements: None,
        experts: ExpertMap::new(),
    };
    ended(compiled(given)).is_some()
}

/// Reads the bytes as a config.json and compiles plans for it.
pub fn config(data: &[u8]) -> bool {
    let Some((config, _)) =
        with_file("config.json", data, |dir| said(read_config(&dir.join("config.json"))))
    else {
        return false;
    };
    let mut any = false;
    for text in [
        include_str!("../plans/qwen3_moe.rhai"),
        include_str!("../plans/glm_moe_dsa.rhai"),
        include_str!("../plans/gpt_oss.rhai"),
    ] {
        let config = config.clone();
        let experts = ExpertMap::new();
        let infer = "tp=2,dp=2,ep=4";
        any |=
            ended(compiled(Given { text, config, infer, placements: None, experts })).is_some();
    }
    any
}

/// Opens a folder of two small files with the bytes as its index.
pub fn index(data: &[u8]) -> bool {
    with_file("model.safetensors.index.json", data, |dir| {
        for name in ["m-1.safetensors", "m-2.safetensors"] {
            fs::write(dir.join(name), &header_seeds()[0]).expect("a small file");
        }
        said(Checkpoint::open(dir)).is_some()
    })
}

/// Opens the bytes as a safetensors file and reads the ends of each tensor.
pub fn header(data: &[u8]) -> bool {
    with_file("model.safetensors", data, |dir| {
        let Some(checkpoint) = said(Checkpoint::open(dir)) else { return false };
        for tensor in checkpoint.entries() {
            let size = tensor.dtype.map_or(1, |d| d.size());
            let bytes = tensor.shape.iter().product::<u64>() * size;
            let mut one = [0];
            for at in [0, bytes.saturating_sub(1), bytes] {
                let read = checkpoint.read_at(tensor, at, &mut one);
                assert!(tensor.dtype.is_none() || read.is_ok() == (at < bytes));
            }
        }
        true
    })
}

/// Compares the bytes as a receiver manifest with a plan.
pub fn receiver(data: &[u8]) -> bool {
    let read = |dir: &Path| said(ReceiverManifest::read(&dir.join("m.json")));
    let Some(manifest) = with_file("m.json", data, read) else { return false };
    let Some(compiled) = small(None, ExpertMap::new()) else { return false };
    let found = check(&compiled, &[("m.json".to_owned(), manifest)]);
    found.is_ok_and(|(_, problems)| !problems.iter().any(Diagnostic::is_error))
}

/// Places a plan's sources as the bytes say.
pub fn sources(data: &[u8]) -> bool {
    let read = |dir: &Path| said(SourceManifest::read(&dir.join("m.json")));
    let Some(manifest) = with_file("m.json", data, read) else { return false };
    small(Some(&manifest), ExpertMap::new()).is_some()
}

/// Places a plan's experts as the bytes say; a cluster file is read from them too.
pub fn experts(data: &[u8]) -> bool {
    with_file("m.json", data, |dir| {
        said(read_cluster(&dir.join("m.json")));
        let map = said(ExpertMapFile::read(&dir.join("m.json")));
        map.is_some_and(|map| small(None, map.layers).is_some())
    })
}

/// Verifies a folder whose manifest is the bytes.
pub fn output(data: &[u8]) -> bool {
    let run = &*RUN;
    with_file("manifest.json", data, |dir| {
        let file = "rank-0/model-rank-0-part-0.safetensors";
        fs::create_dir(dir.join("rank-0")).expect("a folder");
        fs::copy(run.path().join("out").join(file), dir.join(file)).expect("a small file");
        verify_output(dir, Some(&run.path().join("model"))).is_ok()
    })
}

/// A model and the output of a run.
static RUN: LazyLock<TempDir> = LazyLock::new(|| {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let model = dir.path().join("model");
    fs::create_dir(&model).expect("a folder");
    fs::write(model.join("config.json"), "{}").expect("a small file");
    fs::write(model.join("model.safetensors"), &header_seeds()[0]).expect("a small file");
    let text = "at(\"\").copy(\"a\", [2, 4]); drop(\"b\");";
    let plan = dir.path().join("plan.rhai");
    fs::write(&plan, text).expect("a small file");
    let model = OpenModel::open(&model).expect("the model opens");
    let made = compile(CompileInputs {
        name: "plan.rhai",
        text,
        modules: Rc::new(NoModules),
        model: Some(model.input(None)),
        open_model: &|_| Err(Diagnostic::error("E0417", "there is no model").into()),
        mesh: None,
        train: TrainMesh::single(),
        placements: None,
        options: BTreeMap::new(),
        target: BTreeMap::new(),
        experts: ExpertMap::new(),
        limits: Limits::default(),
    });
    let compiled = made.unwrap_or_else(|e| panic!("{}", e.error));
    let files = vec![("plan.rhai".to_owned(), text.to_owned())];
    let recorded = Recorded { plan: "plan.rhai".to_owned(), files, ..Recorded::default() };
    let options = RunOptions {
        engine: Engine::Cpu,
        finite: FiniteCheck::During,
        timeout: Duration::from_secs(60),
        staging: 1 << 20,
        force: false,
        stop: Arc::default(),
    };
    let checkpoint = model.checkpoint.as_ref().expect("weights");
    let out = dir.path().join("out");
    run_to_files(&compiled, checkpoint, &recorded, &out, &options, &|_| {}).expect("a run");
    dir
});

fn texts(list: &[&str]) -> Vec<Vec<u8>> {
    list.iter().map(|text| text.as_bytes().to_vec()).collect()
}

fn plan_seeds() -> Vec<Vec<u8>> {
    texts(&[
        SMALL,
        include_str!("../plans/quickstart.rhai"),
        include_str!("../plans/llama.rhai"),
        r#"import "lib/mla" as mla; let q = fp8::named("ue8m0_two_step").scales(e8m0);
        let t = stack(0..4, |i| at(`m.${i}`).src("w", [128, 64], f32)).reshape([4, 64, -1]);
        at("m")["w"] = cat([t.permute([0, 2, 1]), t.pad_to(1, 128, 1.5)], 1).to(bf16) * 2.0;
        at("m")["s"] = t.slice(1, 0..32).quantize(q.block(32)).refine(32).codes();
        at("m")["d"] = t.quantize(fp8::vllm).dequantize(bf16).heads(tp, 4);
        require(model.get("x", 1) == 1 && stage(0), "no"); drop("re:a.*b", optional);"#,
    ])
}

fn config_seeds() -> Vec<Vec<u8>> {
    let moe = json!({
        "model_type": "qwen3_moe", "vocab_size": 64, "hidden_size": 128,
        "intermediate_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 4,
        "mlp_only_layers": [0], "tie_word_embeddings": false,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128],
            "modules_to_not_convert": ["mlp.gate", "re:lm_.*"]}
    });
    let glm = json!({
        "model_type": "glm_moe_dsa", "vocab_size": 64, "hidden_size": 128,
        "intermediate_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "n_shared_experts": 1, "n_routed_experts": 4,
        "kv_lora_rank": 128, "q_lora_rank": 128, "qk_rope_head_dim": 64, "v_head_dim": 64,
        "qk_nope_head_dim": 64, "index_head_dim": 128, "index_n_heads": 4,
        "first_k_dense_replace": 1, "index_topk_pattern": "FS", "num_nextn_predict_layers": 1
    });
    let oss = json!({
        "model_type": "gpt_oss", "vocab_size": 64, "hidden_size": 128,
        "intermediate_size": 160, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 4,
        "attention_bias": true, "quantization_config": {"quant_method": "mxfp4"}
    });
    [moe, glm, oss].iter().map(|v| v.to_string().into_bytes()).collect()
}

fn index_seeds() -> Vec<Vec<u8>> {
    texts(&[
        r#"{"metadata": {"total_size": 24}, "weight_map":
            {"a": "m-1.safetensors", "b": "m-1.safetensors"}}"#,
        r#"{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "../m-3"}}"#,
    ])
}

fn header_seeds() -> Vec<Vec<u8>> {
    let file = |header: &str, data: usize| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 0x3C);
        bytes
    };
    vec![
        file(
            r#"{"__metadata__": {"format": "pt"},
            "a": {"dtype": "BF16", "shape": [2, 4], "data_offsets": [0, 16]},
            "b": {"dtype": "F32", "shape": [], "data_offsets": [16, 20]}}"#,
            20,
        ),
        file(
            r#"{"w": {"dtype": "F8_E4M3", "shape": [2, 2], "data_offsets": [0, 4]},
            "w_scale_inv": {"dtype": "I64", "shape": [1, 1], "data_offsets": [4, 12]}}"#,
            12,
        ),
    ]
}

fn receiver_seeds() -> Vec<Vec<u8>> {
    texts(&[
        r#"{"topology": {"tp": 2, "ep": 2, "global_rank": 1, "tp_rank": 1}, "parameters": [
            {"name": "a.w", "dtype": "float8_e4m3fn", "shape": [128, 128], "stride": [128, 1]},
            {"name": "a.w_scale_inv", "dtype": "float32", "shape": [1, 1]}], "buffers": [
            {"name": "model.layers.0.e", "dtype": "bfloat16", "shape": [2, 8]},
            {"name": "x.k_scale", "dtype": "int64", "shape": [], "persistent": true}],
            "aliases": [{"name": "b.w", "of": "a.w"}]}"#,
        r#"{"refused": "no", "hf_config": {}, "relative_to": "x", "parameters": []}"#,
    ])
}

fn source_seeds() -> Vec<Vec<u8>> {
    texts(&[
        r#"{"schema": 1, "mesh": [["dp", 2], ["fsdp", 4], ["ep", 2]], "tensors": [
            {"name": "w", "dtype": "bfloat16", "shape": [256, 128],
             "placements": ["R", "SS(0,2)", "S(0)"]},
            {"name": "e", "dtype": "bfloat16", "shape": [4, 8], "placements": ["R", "S(1)", "R"],
             "on": {"ep": 1}}]}"#,
        r#"{"schema": 1, "mesh": [], "tensors": []}"#,
    ])
}

fn expert_seeds() -> Vec<Vec<u8>> {
    texts(&[
        r#"{"schema": 1, "layers": {"model.layers.0": [0, 2, 1, 3]}}"#,
        r#"{"schema": 1, "gpus_per_host": 8, "nics_per_host": 8, "nvlink_gb_s": 370.0,
            "nic_gb_s": 45.0, "latency_us": 20.0}"#,
    ])
}

fn output_seeds() -> Vec<Vec<u8>> {
    vec![fs::read(RUN.path().join("out/manifest.json")).expect("a manifest")]
}
