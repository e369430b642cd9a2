//! Plans that are written to hurt: each is refused in bounded time and memory, with the limit that
//! it met, and says so in a few lines.

mod support;

use std::time::{Duration, Instant};

use kernelcast::diag::{Format, render};
use kernelcast::exec::Schedule;
use kernelcast::graph::{self, Bounds};
use kernelcast::topo::{Cluster, InferMesh, TrainMesh};

use support::Setup;

/// What is said of a plan that must not compile.
fn refused(text: &str) -> String {
    let started = Instant::now();
    let Err(e) = Setup::new("hostile.rhai", text).compile() else { panic!("accepted: {text}") };
    let said = render(&e.error.diagnostics, &e.files, Format::Text { color: false });
    // Far above what any of them takes, far below what they ask for.
    assert!(started.elapsed() < Duration::from_secs(60), "{text}");
    assert!(said.len() < 100_000, "{} bytes of report for {text}", said.len());
    said
}

fn check(code: &str, text: &str) {
    let said = refused(text);
    assert!(said.contains(&format!("error[{code}]")), "{text}\n{said}");
}

#[test]
fn moves_that_split_into_elements() {
    let turned = "let x = at(\"\").src(\"w\", [1024, 1024]);
        for i in 0..12 { x = cat([x, x], i % 2).reshape([1024, -1]).permute([1, 0]); }
        at(\"\")[\"w\"] = x;";
    check("E0105", turned);
    let large = "at(\"\")[\"w\"] = at(\"\").src(\"w\", [100000, 100000]).permute([1, 0])
        .reshape([50000, 200000]).permute([1, 0]).reshape([-1]);";
    check("E0105", large);
    let sum = "let a = at(\"\").src(\"a\", [30000, 20000]).permute([1, 0]).reshape([-1]);
        at(\"\")[\"w\"] = a + a;";
    check("E0105", sum);
}

#[test]
fn values_that_grow() {
    for grow in [
        "let s = \"a\"; for i in 0..60 { s += s; }",
        "let s = \"a\"; for i in 0..60 { s = `${s}${s}`; }",
        "let s = \"\"; s.pad(1000000000000, \"x\");",
        "let s = [1]; for i in 0..60 { s += s; }",
        "let s = [1]; for i in 0..60 { s = [s, s]; }",
        "let s = #{}; for i in 0..60 { s = #{ a: s, b: s }; }",
        "let s = []; s.pad(1000000000000, 1);",
        "stack(-9223372036854775807..9223372036854775807, |i| i);",
        "fn f() { f() } f();",
        "let f = |g| g.call(g); f.call(f);",
        "loop { }",
        "for i in 0..100000 { keep(`a${i}`); }",
        "for i in 0..100000 { option(`a${i}`, 1); }",
        "let x = at(\"\").src(\"w\", [4]); for i in 0..60 { x = x + x; }",
        "let x = at(\"\").src(\"w\", [4]); for i in 0..9000 { x = x * 1.5; }",
    ] {
        check("E0105", grow);
    }
    // A function curried with itself doubles; nothing would count it.
    check("E0101", "let f = |x| x; for i in 0..3000 { f = f.curry(f); }");
    check("E0112", "let f = |x| x; curry(f, f);");
    check("E0112", "eval(\"1\")");
}

#[test]
fn sizes_that_overflow() {
    let most = i64::MAX;
    for size in [
        format!("at(\"\").copy(\"w\", [{most}, 2]);"),
        format!("at(\"\").copy(\"w\", [{most}]);"),
        format!("let w = at(\"\").src(\"w\", [3]).pad_to(0, {most});"),
        format!("let w = at(\"\").src(\"w\", [{}]); cat([w, w]);", most / 2),
        format!("let w = at(\"\").src(\"w\", [{}]); stack(0..9, |i| w);", most / 4),
        "at(\"\").copy(\"w\", [0]);".to_owned(),
        "at(\"\").copy(\"w\", [-1]);".to_owned(),
        format!("at(\"\").src(\"w\", [4]).heads(tp, {});", i64::MIN),
    ] {
        check("E0209", &size);
    }
    check("E0203", &format!("at(\"\").src(\"w\", [3]).slice(0, 0..={most});"));
    check("E0203", &format!("at(\"\").src(\"w\", [3]).slice(0, {}..2);", i64::MIN));
    check("E0204", &format!("at(\"\").src(\"w\", [4]).reshape([{most}, {most}]);"));
    check("E0204", "at(\"\").src(\"w\", [4]).reshape([-1, 0]);");
    check("E0204", &format!("at(\"\").src(\"w\", [4]).reshape([{}]);", i64::MIN));
    check("E0202", &format!("at(\"\").src(\"w\", [4]).shard({most}, tp);"));
    check("E0202", "at(\"\").src(\"w\", [4]).permute([0, 0]);");
    check("E0302", &format!("at(\"\").src(\"w\", [4]).heads(tp, {most});"));
    check("E0111", &format!("at(\"\").copy(\"w\", [{most} * 2]);"));
    check("E0307", &format!("infer(#{{ tp: {most}, dp: {most} }});"));
    check("E0307", "infer(#{ tp: -1 });");
}

#[test]
fn names_that_are_paths_or_have_no_end() {
    check("E0110", "at(\"../../etc\").copy(\"passwd\", [1]);");
    check("E0110", "at(\"\").copy(\"\", [1]);");
    check("E0110", "at(\".\").copy(\"w\", [1]);");
    let long = "let s = \"a\"; for i in 0..15 { s += s; }";
    check("E0110", &format!("{long} at(s).copy(\"w\", [1]);"));
    check("E0110", &format!("{long} keep(s);"));
    check("E0110", &format!("{long} option(s, 1);"));
    check("E0110", "keep(\"re:(a{100}){100}\");");
    // Said in full once, a message may not be a book.
    let said =
        refused(&format!("{long} for i in 0..1000 {{ require(false, `${{i}}${{s}}`); }}"));
    assert!(said.contains("error[E0108]"));
    for path in ["../x", "/etc/passwd", "lib/../../x", "lib//mla", "a b", "", "lib/mla.rhai/"] {
        check("E0106", &format!("import \"{path}\" as x;"));
    }
}

#[test]
fn patterns_end_quickly() {
    let stars = "*".repeat(500);
    let text = format!("drop(\"{}a\", optional); at(\"\").copy(\"w\", [1]);", "*a".repeat(400));
    let mut setup = Setup::new("hostile.rhai", &text);
    let mut tensors = support::Tensors::default();
    tensors.add("w BF16 [1]");
    tensors.add(&format!("{} BF16 [1]", "a".repeat(900)));
    setup.tensors = Some(tensors);
    let started = Instant::now();
    assert!(setup.compile().is_ok());
    setup.text = format!("drop(\"{stars}\"); drop(\"re:(.*)*b\", optional);");
    assert!(setup.compile().is_ok());
    assert!(started.elapsed() < Duration::from_secs(10));
}

/// What a plan's schedule is refused with.
fn unscheduled(text: &str, infer: &str, train: &str) -> String {
    let mut setup = Setup::new("hostile.rhai", text);
    (setup.infer, setup.train) = (Some(infer.to_owned()), Some(train.to_owned()));
    let compiled = match setup.compile() {
        Ok(compiled) => compiled,
        Err(e) => return e.error.diagnostics[0].code.to_owned(),
    };
    let cluster = Cluster::default();
    let bounds = Bounds::with_staging(64 << 20);
    match Schedule::of(&compiled, &graph::Setup::for_threads(1, &cluster, bounds)) {
        Ok(schedule) => format!("{} buckets", schedule.joined().buckets.len()),
        Err(e) => e.diagnostics[0].code.to_owned(),
    }
}

#[test]
fn updates_beyond_any_machine() {
    let exabytes = "at(\"\").copy(\"w\", [1152921504606846975]);";
    assert_eq!(unscheduled(exabytes, "tp=1", "fsdp=1"), "E0209");
    let matrix = "at(\"\")[\"w\"] = at(\"\").src(\"w\", [1073741824, 536870912])
        .shard(1, tp).quantize(fp8::vllm);";
    assert_eq!(unscheduled(matrix, "tp=8", "fsdp=8"), "E0209");
    // Each fits 63 bits, their sum does not.
    let many = "for i in 0..64 { at(\"\").copy(`w${i}`, [1152921504606846975]); }";
    assert_eq!(unscheduled(many, "tp=1", "fsdp=1"), "E0209");
    let replicas = "at(\"\").copy(\"w\", [4398046511104]);";
    assert_eq!(unscheduled(replicas, "replicas=1048576", "fsdp=1"), "E0209");
}

#[test]
fn as_many_cuts_as_rows() {
    let text = "at(\"\")[\"w\"] = at(\"\").src(\"w\", [65536, 128]).quantize(fp8::vllm);";
    let found = unscheduled(text, "tp=1", "fsdp=65536");
    assert!(found.ends_with("buckets"), "{found}");
}

#[test]
fn meshes_of_a_manifest_are_meshes() {
    let infer = |text: &str| serde_json::from_str::<InferMesh>(text).map_err(|e| e.to_string());
    assert_eq!(infer(r#"{"tp": 2, "ep": 2}"#), Ok(InferMesh::parse("tp=2,ep=2").unwrap()));
    assert!(infer(r#"{"tp": 1, "dp": 0}"#).unwrap_err().contains("axis dp is 0"));
    assert!(infer(r#"{"tp": 4294967296, "dp": 4294967296}"#).is_err());
    let train = |text: &str| serde_json::from_str::<TrainMesh>(text).map_err(|e| e.to_string());
    assert_eq!(train(r#"{"fsdp": 4, "ep": 2}"#), Ok(TrainMesh::parse("fsdp=4,ep=2").unwrap()));
    assert!(train(r#"{"fsdp": 0}"#).is_err() && train(r#"{"fsdp": 3, "ep": 2}"#).is_err());
}
