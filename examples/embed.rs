//! Embeds the engine: a plan in a string, tensors in slices, no files.
//!
//! `cargo run --example embed`

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use kernelcast::backend::cpu::{FiniteCheck, Options};
use kernelcast::compile::{CompileInputs, ModelInput, compile};
use kernelcast::diag::{Diagnostic, Format, render};
use kernelcast::dtype::DType;
use kernelcast::memory::{Sources, Targets, update};
use kernelcast::script::{Limits, NoModules};
use kernelcast::topo::{InferMesh, RankId, TrainMesh};

const PLAN: &str = r#"
let mlp = at("mlp");
mlp["gate_up_proj.weight"] = cat([
    mlp.src("gate_proj.weight", [256, 128]).shard(0, tp),
    mlp.src("up_proj.weight", [256, 128]).shard(0, tp),
]).quantize(fp8::vllm);
"#;

pub fn main() -> Result<(), String> {
    // The trainer's tensors: all gate values are 1.0, all up values 4.0, in bf16.
    let gate = 0x3F80u16.to_le_bytes().repeat(256 * 128);
    let up = 0x4080u16.to_le_bytes().repeat(256 * 128);
    let mut sources = Sources::default();
    for (name, bytes) in [("mlp.gate_proj.weight", &gate), ("mlp.up_proj.weight", &up)] {
        sources.add(name, DType::Bf16, &[256, 128], bytes).map_err(|e| e.to_string())?;
    }

    let config = serde_json::json!({});
    let compiled = compile(CompileInputs {
        name: "embedded plan",
        text: PLAN,
        modules: Rc::new(NoModules),
        model: Some(ModelInput { config, catalog: Some(sources.catalog()) }),
        open_model: &|_| Err(Diagnostic::error("E0417", "this plan has no input").into()),
        mesh: Some(InferMesh::parse("tp=2").map_err(|d| d.message)?),
        train: TrainMesh::single(),
        placements: None,
        options: BTreeMap::new(),
        target: BTreeMap::new(),
        experts: BTreeMap::new(),
        limits: Limits::default(),
    })
    .map_err(|e| render(&e.error.diagnostics, &e.files, Format::Text { color: false }))?;

    // Each of the two ranks holds [gate_t; up_t]: 256 rows of codes, and a scale for each tile.
    let mut codes = [vec![0u8; 256 * 128], vec![0u8; 256 * 128]];
    let mut scales = [vec![0u8; 2 * 4], vec![0u8; 2 * 4]];
    let mut targets = Targets::default();
    for (rank, (codes, scales)) in codes.iter_mut().zip(&mut scales).enumerate() {
        let rank = RankId(rank as u64);
        targets.bind(rank, "mlp.gate_up_proj.weight", codes);
        targets.bind(rank, "mlp.gate_up_proj.weight_scale_inv", scales);
    }
    let options = Options {
        finite: FiniteCheck::Before,
        timeout: Duration::from_secs(10),
        progress: &|_| {},
    };
    let report =
        update(&compiled, std::slice::from_ref(&sources), &mut targets, 64 << 20, &options)
            .map_err(|e| e.to_string())?;

    // 448 is the largest code, 0x7E; the scales are 1/448 and 4/448.
    assert!(codes.iter().flatten().all(|c| *c == 0x7E));
    for scales in &scales {
        assert_eq!(scales[..4], 0x3B12_4925u32.to_le_bytes());
        assert_eq!(scales[4..], 0x3C12_4925u32.to_le_bytes());
    }
    println!("sent {} bytes to {} ranks", report.sent_bytes, compiled.program.ranks.len());
    Ok(())
}
