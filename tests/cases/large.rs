//! More than 2^31 elements in one tensor: a file of 12 GiB that is a hole but for one tile.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use half::bf16;
use serde_json::Value;
use tempfile::{TempDir, tempdir};

use crate::world::{FULL, run};

const SHAPE: [u64; 3] = [256, 4096, 6144];
const BYTES: u64 = 12_884_901_888;

/// Expert 255, rows 3968 on, columns 6016 on are 2.0; all else is zero and not stored.
fn sparse() -> TempDir {
    let dir = tempdir().unwrap();
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    let header =
        format!(r#"{{"w13":{{"dtype":"BF16","shape":{SHAPE:?},"data_offsets":[0,{BYTES}]}}}}"#);
    let start = 8 + header.len() as u64;
    let file = File::create(dir.path().join("model.safetensors")).unwrap();
    file.write_all_at(&(header.len() as u64).to_le_bytes(), 0).unwrap();
    file.write_all_at(header.as_bytes(), 8).unwrap();
    file.set_len(start + BYTES).unwrap();
    let row = bf16::from_f32(2.0).to_le_bytes().repeat(128);
    for r in 3968..4096 {
        let element = (255 * SHAPE[1] + r) * SHAPE[2] + 6016;
        file.write_all_at(&row, start + 2 * element).unwrap();
    }
    dir
}

fn dry_run(model: &Path, plan: &str) -> Value {
    let path = model.join("plan.rhai");
    fs::write(&path, plan).unwrap();
    let out = Command::new(env!("CARGO_BIN_EXE_engine"))
        .arg("dry-run")
        .arg(path)
        .args(["--format", "json", "--model"])
        .arg(model)
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

#[test]
fn a_dry_run_counts_exactly() {
    let model = sparse();
    let plan = r#"at("")["w13"] = at("").src("w13", [256, 4096, 6144]).quantize(fp8::vllm);"#;
    let table = dry_run(model.path(), plan);
    let params = table["ranks"][0]["params"].as_array().unwrap();
    let numbers = |i: usize| (params[i]["shape"].to_string(), params[i]["bytes"].as_u64());
    assert_eq!(numbers(0), ("[256,4096,6144]".to_owned(), Some(6_442_450_944)));
    assert_eq!(numbers(1), ("[256,32,48]".to_owned(), Some(1_572_864)));
    assert_eq!(table["totals"]["source_bytes"].as_u64(), Some(BYTES));
    assert_eq!(table["totals"]["bytes"].as_u64(), Some(6_442_450_944 + 1_572_864));
}

#[test]
fn the_last_tile_is_read_beyond_32_bits() {
    let model = sparse();
    // The last 256 rows of the last expert: offsets from 12 881 756 160 bytes on, 2 x 48 tiles.
    let plan = r#"
let w = at("").src("w13", [256, 4096, 6144]);
at("")["w13"] = w.slice(0, 255..256).slice(1, 3840..4096).quantize(fp8::vllm);
"#;
    let done = run(plan, model.path(), "tp=1").done();
    let scales = done.get(0, "w13_scale_inv");
    assert_eq!(scales.shape, [1, 2, 48]);
    let mut wanted = vec![0x346F_ACAD; 96];
    wanted[95] = 0x3B92_4925;
    assert_eq!(scales.bits(), wanted);
    let codes = done.get(0, "w13").bytes;
    for (row, codes) in codes.chunks_exact(6144).enumerate() {
        let (zeros, last) = codes.split_at(6016);
        assert!(zeros.iter().all(|c| *c == 0), "row {row}");
        let code = if row < 128 { 0 } else { FULL };
        assert!(last.iter().all(|c| *c == code), "row {row}");
    }
}
