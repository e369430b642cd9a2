//! A trillion parameters: Kimi-K2 in full, from 256 trainer ranks, against what the links allow.

use std::process::Command;

use serde_json::Value;

fn simulate(infer: &str) -> Value {
    let out = Command::new(env!("CARGO_BIN_EXE_engine"))
        .args(["simulate", "plans/kimi_k2.rhai", "--model", "tests/data/configs/kimi_k2"])
        .args(["--train", "fsdp=256,ep=8", "--infer", infer, "--format", "json"])
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

/// 31.72 GB of experts a rank and 14.24 GB of the rest, shared by a host's 8 NICs of 45 GB/s.
#[test]
fn four_replicas_are_fed_at_the_rate_of_their_nics() {
    let report = simulate("dp=32,ep=32,replicas=4");
    let number = |key: &str| report[key].as_f64().unwrap();
    let roofline = (8.0 * 31.72 + 14.24) / (8.0 * 45.0);
    assert!((number("roofline_s") - roofline).abs() < 0.0005, "{}", number("roofline_s"));
    assert!(number("predicted_s") < 1.15 * roofline, "{}", number("predicted_s"));
    assert!(number("imbalance") < 1.1, "{}", number("imbalance"));
    assert!(number("staging_peak_bytes") <= (256 << 20) as f64);
    // Each replica holds the same, and every distinct byte leaves the trainers once.
    let wire = report["bytes"]["wire"].as_u64().unwrap() as f64 / 1e9;
    assert!((wire - (32.0 * 31.72 + 14.24)).abs() < 0.5, "{wire} GB");
    // Beside the trainer's own bytes only maxima travel between its ranks.
    let amax = report["bytes"]["amax"].as_u64().unwrap();
    assert!(amax < 1 << 30, "{amax}");
}
