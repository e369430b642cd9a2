//! The binary's wiring: exit statuses, help, output that is the same in every process.

use std::path::Path;
use std::process::{Command, Output};

fn engine(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_engine")).args(args).output().unwrap()
}

fn stdout(args: &[&str]) -> String {
    let out = engine(args);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

#[test]
fn help_says_what_each_command_takes() {
    insta::assert_snapshot!("help", stdout(&["--help"]));
    for command in ["dry-run", "run", "check", "verify", "simulate", "bench", "explain"] {
        insta::assert_snapshot!(format!("help-{command}"), stdout(&[command, "--help"]));
    }
    for what in ["transfer", "quantize"] {
        let help = stdout(&["bench", what, "--help"]);
        insta::assert_snapshot!(format!("help-bench-{what}"), help);
    }
}

#[test]
fn dry_run_is_the_same_in_every_process() {
    for emit in ["shapes", "plan", "shards", "program", "graph"] {
        let args = ["dry-run", "plans/quickstart.rhai", "--format", "json", "--emit", emit];
        let first = stdout(&args);
        assert!(!first.is_empty());
        assert_eq!(first, stdout(&args), "{emit}");
    }
}

#[test]
fn quickstart_runs_verifies_and_is_replaced_only_when_forced() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let out = out.to_str().unwrap();
    let run = ["run", "plans/quickstart.rhai", "--out", out];
    assert!(stdout(&run).contains("for 2 ranks"));
    assert!(stdout(&["verify", out]).starts_with("verified: 56 tensors of 2 ranks"));
    let again = engine(&run);
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&again.stderr).contains("E0603"));
    assert!(
        stdout(&["run", "plans/quickstart.rhai", "--out", out, "--force", "--verify"])
            .contains("verified")
    );
}

#[test]
fn verify_finds_one_changed_byte_and_says_where() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    stdout(&["run", "plans/quickstart.rhai", "--out", out.to_str().unwrap()]);
    let file = out.join("rank-1/model-rank-1-part-0.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let found = engine(&["verify", out.to_str().unwrap()]);
    assert_eq!(found.status.code(), Some(4));
    let text = String::from_utf8_lossy(&found.stderr).into_owned();
    assert!(text.contains("E0606") && text.contains("differs in 1 of"), "{text}");
}

#[test]
fn exit_statuses_tell_refusal_usage_and_device_apart() {
    let status = |args: &[&str]| engine(args).status.code();
    assert_eq!(status(&["dry-run", "plans/missing.rhai"]), Some(1));
    assert_eq!(status(&["dry-run", "plans/quickstart.rhai", "--infer", "tp=3"]), Some(1));
    assert_eq!(status(&["dry-run"]), Some(2));
    assert_eq!(status(&["explain", "E9999"]), Some(2));
    assert_eq!(status(&["dry-run", "plans/quickstart.rhai", "--set", "quant"]), Some(2));
    assert_eq!(status(&["dry-run", "plans/quickstart.rhai", "--infer", "tp"]), Some(2));
    assert_eq!(status(&["dry-run", "plans/quickstart.rhai", "--infer", "ep=3"]), Some(1));
    assert_eq!(status(&["dry-run", "plans/quickstart.rhai", "--train", "xp=2"]), Some(2));
    assert_eq!(status(&["dry-run", "plans/quickstart.rhai", "--rank", "2"]), Some(2));
    assert_eq!(status(&["run", "plans/quickstart.rhai", "--backend", "cuda"]), Some(3));
}

#[test]
fn explain_knows_every_code_in_either_case() {
    assert!(stdout(&["explain", "e0304"]).starts_with("E0304: "));
}

#[test]
fn check_compares_with_vllms_own_table() {
    let table = "tests/data/manifests/qwen3_moe/qwen3-30b-a3b.tp1.fp8_block.rank0.json";
    let text: serde_json::Value =
        serde_json::from_slice(&std::fs::read(table).unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.json");
    std::fs::write(&config, text["hf_config"].to_string()).unwrap();
    let config = config.to_str().unwrap();
    let plan = "plans/qwen3_moe.rhai";
    let fits = stdout(&["check", plan, "--model", config, "--manifest", table]);
    assert!(fits.starts_with("fits: "), "{fits}");
    // The plan for bf16 against a receiver in FP8: every difference, and none of them silent.
    let args = ["check", plan, "--model", config, "--set", "quant=bf16", "--manifest", table];
    let differs = engine(&args);
    assert_eq!(differs.status.code(), Some(1));
    let text = String::from_utf8_lossy(&differs.stderr).into_owned();
    assert!(text.contains("E0410") && text.contains("E0407"), "{text}");
}

#[test]
fn diagnostics_are_json_lines_when_asked() {
    let out =
        engine(&["dry-run", "plans/quickstart.rhai", "--infer", "tp=3", "--format", "json"]);
    let text = String::from_utf8(out.stderr).unwrap();
    let first: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert_eq!(
        (first["code"].as_str(), first["severity"].as_str()),
        (Some("E0302"), Some("error"))
    );
    assert!(first["line"].as_u64().unwrap() > 1);
}

#[test]
fn nothing_is_written_when_a_plan_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let args =
        ["run", "plans/quickstart.rhai", "--infer", "tp=3", "--out", out.to_str().unwrap()];
    assert_eq!(engine(&args).status.code(), Some(1));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    assert!(!Path::new(&out).exists());
}

/// A folder with an empty config and one tensor `w` of [4, 4], and a plan beside it.
fn one_tensor(plan: &str) -> (tempfile::TempDir, String, String) {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    std::fs::create_dir(&model).unwrap();
    std::fs::write(model.join("config.json"), "{}").unwrap();
    let header = br#"{"w":{"dtype":"F32","shape":[4,4],"data_offsets":[0,64]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend(0..64u8);
    std::fs::write(model.join("model.safetensors"), bytes).unwrap();
    let path = dir.path().join("p.rhai");
    std::fs::write(&path, plan).unwrap();
    let text = |p: &Path| p.to_str().unwrap().to_owned();
    let (path, model) = (text(&path), text(&model));
    (dir, path, model)
}

fn stderr(args: &[&str]) -> String {
    String::from_utf8(engine(args).stderr).unwrap()
}

#[test]
fn a_plan_can_print_and_json_stays_clean() {
    let plan = "print(6 * 7); at(\"\").copy(\"w\", [4, 4], f32);";
    let (_dir, plan, model) = one_tensor(plan);
    let args = ["dry-run", &plan, "--model", &model];
    assert_eq!(stderr(&args), "42\n");
    assert_eq!(stderr(&[&args[..], &["--format", "json"]].concat()), "");
}

#[test]
fn a_result_that_cannot_be_written_is_an_error() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_engine"));
    let out = command.args(["dry-run", "plans/quickstart.rhai"]).stdout(full).output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("E0601"));
}

#[test]
fn likely_slips_have_a_hint() {
    for (plan, hint) in [
        ("at(\"\").copy(\"weight\", [4, 4]);", "the source holds w"),
        ("at(\"\")[\"w\"] = at(\"\").src(\"w\", [4, 4]).quantize(fp8.vllm);", "fp8::vllm"),
        ("at(\"\")[\"w\"] = at(\"\").src(\"w\", [4, 4]).to(bfloat16);", "written `bf16`"),
    ] {
        let (_dir, plan, model) = one_tensor(plan);
        let text = stderr(&["dry-run", &plan, "--model", &model]);
        assert!(text.contains(hint), "{text}");
    }
    let two = ["dry-run", "plans/quickstart.rhai", "--set", "quant=bf16,recipe=vllm"];
    assert!(stderr(&two).contains("--set quant=bf16 --set recipe=vllm"));
    let (_dir, plan, model) = one_tensor("");
    let weights = format!("{model}/model.safetensors");
    assert!(stderr(&["dry-run", &plan, "--model", &weights]).contains("give the folder"));
}

#[test]
fn verify_tells_a_changed_checkpoint_from_a_changed_output() {
    let (dir, plan, model) = one_tensor("at(\"\").copy(\"w\", [4, 4], f32);");
    let out = dir.path().join("out");
    let out = out.to_str().unwrap();
    stdout(&["run", &plan, "--model", &model, "--out", out]);
    let weights = format!("{model}/model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() = 1;
    std::fs::write(&weights, bytes).unwrap();
    assert!(stderr(&["verify", out]).contains("has the checkpoint changed since?"));
    let file = format!("{out}/rank-0/model-rank-0-part-0.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() = 2;
    std::fs::write(&file, bytes).unwrap();
    let text = stderr(&["verify", out]);
    assert!(
        text.contains("has changed since the run") && !text.contains("checkpoint"),
        "{text}"
    );
}

#[test]
fn check_names_the_topology_that_differs() {
    let table = "tests/data/manifests/qwen3/qwen3-8b.tp2.bf16.rank1.json";
    let text: serde_json::Value =
        serde_json::from_slice(&std::fs::read(table).unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.json");
    std::fs::write(&config, text["hf_config"].to_string()).unwrap();
    let config = config.to_str().unwrap();
    let args = ["check", "plans/qwen3.rhai", "--model", config, "--manifest", table];
    let text = stderr(&[&args[..], &["--infer", "tp=4"]].concat());
    assert!(text.contains("is of tp=2, the plan is compiled for tp=4"), "{text}");
}

#[test]
fn the_digest_does_not_depend_on_how_the_plan_is_named() {
    let digest = |plan: &str| {
        let text = stdout(&["dry-run", plan, "--format", "json"]);
        let table: serde_json::Value = serde_json::from_str(&text).unwrap();
        table["plan_digest"].as_str().unwrap().to_owned()
    };
    let absolute = Path::new("plans/quickstart.rhai").canonicalize().unwrap();
    let named =
        ["plans/quickstart.rhai", "./plans/quickstart.rhai", absolute.to_str().unwrap()];
    assert_eq!(named.map(digest)[..2], [digest(named[2]), digest(named[2])]);
}

/// A matrix over a trainer mesh that a manifest gives; and the same from one rank.
#[test]
fn a_source_manifest_places_tensors_and_the_files_are_the_same() {
    let (dir, plan, model) =
        one_tensor("at(\"\")[\"w\"] = at(\"\").src(\"w\", [4, 4], f32).shard(0, tp);");
    let manifest = dir.path().join("sources.json");
    std::fs::write(
        &manifest,
        r#"{"schema": 1, "mesh": [["replicate", 2], ["fsdp", 3]], "tensors": [
            {"name": "w", "dtype": "float32", "shape": [4, 4], "placements": ["R", "S(1)"]}]}"#,
    )
    .unwrap();
    let manifest = manifest.to_str().unwrap();
    let files = |name: &str, more: &[&str]| {
        let out = dir.path().join(name);
        let out = out.to_str().unwrap();
        let args = ["run", &plan, "--model", &model, "--infer", "tp=2", "--out", out];
        stdout(&[&args[..], more].concat());
        let file = |r: u32| format!("{out}/rank-{r}/model-rank-{r}-part-0.safetensors");
        [0, 1].map(|r| std::fs::read(file(r)).unwrap())
    };
    let whole = files("whole", &[]);
    assert_eq!(files("placed", &["--source-manifest", manifest]), whole);
    assert_eq!(files("sharded", &["--train", "fsdp=3"]), whole);
    let both = ["dry-run", &plan, "--train", "fsdp=2", "--source-manifest", manifest];
    assert_eq!(engine(&both).status.code(), Some(2));
}

#[test]
fn simulate_predicts_and_says_it_as_json() {
    let args =
        ["simulate", "plans/quickstart.rhai", "--train", "fsdp=8", "--infer", "tp=8,ep=8"];
    assert!(stdout(&args).contains("roofline"));
    let json = stdout(&[&args[..], &["--format", "json"]].concat());
    let report: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(report["schema"], 1);
    let ranks = report["ranks"].as_array().unwrap();
    let sum = |key: &str, side: &str| -> u64 {
        let own = ranks.iter().filter(|r| r["side"] == side);
        own.map(|r| r[key].as_u64().unwrap()).sum()
    };
    assert_eq!(ranks.len(), 16);
    assert_eq!(sum("sent", "trainer"), report["bytes"]["wire"].as_u64().unwrap());
    let moved = sum("sent", "trainer") + sum("relayed", "inference");
    assert_eq!(sum("received", "inference"), moved);
    assert!(report["predicted_s"].as_f64() >= report["roofline_s"].as_f64());
}
