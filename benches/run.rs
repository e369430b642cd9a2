//! A whole `run` against a loop that reads and writes the run's own bytes: same threads, same
//! number of files, same syncs, files in the page cache. Prints medians and their ratio.
//!
//! `cargo bench --bench run [-- LAYERS [bf16|fp8_block]]`: Qwen3-8B dims, 4 layers by default.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use kernelcast::backend::cpu::FiniteCheck;
use kernelcast::compile::{CompileInputs, Compiled, compile};
use kernelcast::diag::{Diagnostic, Format, render};
use kernelcast::exec::{DEFAULT_STAGING, Engine, Recorded, RunOptions, run_to_files};
use kernelcast::load::{FolderModules, OpenModel};
use kernelcast::script::Limits;
use kernelcast::topo::{InferMesh, TrainMesh};

const ROUNDS: usize = 7;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let layers = args.first().and_then(|a| a.parse().ok()).unwrap_or(4);
    let quant = args.get(1).map_or("fp8_block", String::as_str);
    let dir = tempfile::tempdir().expect("a temporary folder");
    let read = write_checkpoint(dir.path(), layers);
    let model = OpenModel::open(dir.path()).expect("the checkpoint opens");
    let compiled = compiled(&model, quant);
    let checkpoint = model.checkpoint.as_ref().expect("weights");
    let options = RunOptions {
        engine: Engine::Cpu,
        finite: FiniteCheck::During,
        timeout: Duration::from_secs(60),
        staging: DEFAULT_STAGING,
        force: false,
        stop: Default::default(),
    };
    let (mut runs, mut copies) = (Vec::new(), Vec::new());
    let mut written = 0;
    for round in 0..ROUNDS {
        let out = dir.path().join(format!("out-{round}"));
        let started = Instant::now();
        let done =
            run_to_files(&compiled, checkpoint, &Recorded::default(), &out, &options, &|_| {});
        runs.push(started.elapsed());
        written = done.unwrap_or_else(|e| panic!("{e}")).written_bytes;
        std::fs::remove_dir_all(&out).expect("the output goes");
        copies.push(copy_loop(dir.path(), read, written, compiled.program.ranks.len()));
    }
    let (run, copy) = (median(runs), median(copies));
    println!(
        "{quant}, {layers} layers, reads {:.2} GB and writes {:.2} GB with {} threads: \
         run {:.2} s, read and write loop {:.2} s, ratio {:.2}",
        read as f64 / 1e9,
        written as f64 / 1e9,
        rayon::current_num_threads(),
        run.as_secs_f64(),
        copy.as_secs_f64(),
        run.as_secs_f64() / copy.as_secs_f64()
    );
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn compiled(model: &OpenModel, quant: &str) -> Compiled {
    let plan = Path::new("plans/qwen3.rhai");
    let text = std::fs::read_to_string(plan).expect("the plan");
    compile(CompileInputs {
        name: "plans/qwen3.rhai",
        text: &text,
        modules: std::rc::Rc::new(FolderModules::beside(plan)),
        model: Some(model.input(None)),
        open_model: &|_| Err(Diagnostic::error("E0417", "no input").into()),
        mesh: Some(InferMesh::parse("tp=2").expect("axes")),
        train: TrainMesh::single(),
        placements: None,
        options: [("quant".to_owned(), quant.to_owned())].into(),
        target: Default::default(),
        experts: Default::default(),
        limits: Limits::default(),
    })
    .unwrap_or_else(|e| {
        panic!("{}", render(&e.error.diagnostics, &e.files, Format::Text { color: false }))
    })
}

/// Reads the checkpoint and writes as many bytes as the run does, in parts of 4 MiB.
fn copy_loop(dir: &Path, read: u64, written: u64, files: usize) -> Duration {
    const PART: u64 = 4 << 20;
    let started = Instant::now();
    let source = File::open(dir.join("model.safetensors")).expect("the checkpoint");
    let threads = rayon::current_num_threads() as u64;
    let outs: Vec<File> = (0..files)
        .map(|i| File::create(dir.join(format!("copy-{i}"))).expect("a file"))
        .collect();
    let each = written / files as u64;
    outs.iter().for_each(|f| f.set_len(each).expect("room"));
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (source, outs) = (&source, &outs);
            scope.spawn(move || {
                let mut buffer = vec![0u8; PART as usize];
                let mut part = thread;
                while part * PART < read {
                    let n = PART.min(read - part * PART);
                    let bytes = &mut buffer[..n as usize];
                    source.read_exact_at(bytes, part * PART).expect("a read");
                    // Padding can make the output larger than the input.
                    let out = (n * written / read).min(n);
                    let at = part * PART * written / read;
                    let file = &outs[(at / each.max(1)).min(files as u64 - 1) as usize];
                    file.write_all_at(&bytes[..out as usize], at % each.max(1))
                        .expect("a write");
                    part += threads;
                }
            });
        }
    });
    outs.iter().for_each(|f| f.sync_data().expect("a sync"));
    let took = started.elapsed();
    (0..files).for_each(|i| std::fs::remove_file(dir.join(format!("copy-{i}"))).expect("gone"));
    took
}

/// A checkpoint at Qwen3-8B dims with a small vocabulary; returns the bytes of its tensors.
fn write_checkpoint(dir: &Path, layers: u64) -> u64 {
    let (h, i, v) = (4096u64, 12288u64, 1024u64);
    let config = serde_json::json!({
        "model_type": "qwen3", "vocab_size": v, "hidden_size": h, "intermediate_size": i,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "tie_word_embeddings": true,
    });
    std::fs::write(dir.join("config.json"), config.to_string()).expect("the config");
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![v, h]),
        ("model.norm.weight".to_owned(), vec![h]),
    ];
    for layer in 0..layers {
        let shapes: [(&str, Vec<u64>); 11] = [
            ("input_layernorm", vec![h]),
            ("post_attention_layernorm", vec![h]),
            ("self_attn.q_proj", vec![h, h]),
            ("self_attn.k_proj", vec![1024, h]),
            ("self_attn.v_proj", vec![1024, h]),
            ("self_attn.o_proj", vec![h, h]),
            ("self_attn.q_norm", vec![128]),
            ("self_attn.k_norm", vec![128]),
            ("mlp.gate_proj", vec![i, h]),
            ("mlp.up_proj", vec![i, h]),
            ("mlp.down_proj", vec![h, i]),
        ];
        for (name, shape) in shapes {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    let mut header = serde_json::Map::new();
    let mut offset = 0u64;
    for (name, shape) in &tensors {
        let end = offset + shape.iter().product::<u64>() * 2;
        let entry =
            serde_json::json!({"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]});
        header.insert(name.clone(), entry);
        offset = end;
    }
    let mut json = serde_json::Value::Object(header).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut file = File::create(dir.join("model.safetensors")).expect("the checkpoint");
    file.write_all(&(json.len() as u64).to_le_bytes()).expect("a write");
    file.write_all(&json).expect("a write");
    // bf16 numbers of both signs around 0.02, from a small generator.
    let mut seed = 0x9E37_79B9_7F4A_7C15u64;
    let block: Vec<u8> = (0..1 << 21)
        .flat_map(|_| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let bits = (seed >> 33) as u16;
            ((bits & 0x8000) | 0x3C00 | (bits & 0x01FF)).to_le_bytes()
        })
        .collect();
    let mut left = offset as usize;
    while left > 0 {
        let n = left.min(block.len());
        file.write_all(&block[..n]).expect("a write");
        left -= n;
    }
    offset
}
