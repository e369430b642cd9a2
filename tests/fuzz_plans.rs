//! Whatever a plan says, compiling it ends, with a result or with a report.

mod support;

use std::fs;

use kernelcast::diag::{Format, render};
use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::json;

use support::{Setup, Tensors};

/// Every word of the language once, on sources that are there.
const WORDS: &str = r#"
import "lib/quant" as quant;
let q = fp8::vllm.block(64).scale_suffix("_scale");
let two = fp8::named("ue8m0_two_step").scales(e8m0);
let choice = option("choice", "a", ["a", "b"]);
let a = at("a");
let w = a.src("w", [256, 128]);
a["w"] = w.heads(tp, 4).quantize(q);
a["s"] = w.slice(0, 0..128).shard(1, tp).pad_to(0, 96, 1.5).to(f32) * 2 + w.slice(0, 0..192).shard(1, tp).to(f32);
let e = stack(0..4, |i| a.src(`e.${i}`, [128, 256]));
a["e"] = e.experts(ep).shard(1, etp).quantize(fp8::vllm);
a["p"] = cat([e.permute([0, 2, 1]), e.reshape([4, 256, -1])], 2).quantize(two);
let c = a.src("c", [256, 256]);
a["c"] = c.refine(64).dequantize(bf16);
let kv = w.quantize(fp8::prime_rl);
a["kv"] = kv;
a["k_t"] = kv.dequantize(bf16).reshape([2, 128, 128]).permute([0, 2, 1]);
a.copy("n", [128], f32);
if target.sm >= 90 && stage(0) && first_stage { keep("x.y", optional); }
drop("unused");
require(model.get("missing", 3) == 3, `${choice} ${a.path()} ${a.ignored("w")}`);
"#;

fn words() -> Setup {
    let mut setup = Setup::new("tests/fuzz.rhai", WORDS);
    let mut tensors = Tensors::default();
    for line in [
        "a.w BF16 [256, 128]",
        "a.e.0 BF16 [128, 256]",
        "a.e.1 BF16 [128, 256]",
        "a.e.2 BF16 [128, 256]",
        "a.e.3 BF16 [128, 256]",
        "a.c F8_E4M3 [256, 256]",
        "a.c_scale_inv F32 [2, 2]",
        "a.n F32 [128]",
        "unused I64 [1]",
    ] {
        tensors.add(line);
    }
    setup.tensors = Some(tensors);
    setup.config = Some(json!({
        "num_hidden_layers": 2,
        "quantization_config": {"quant_method": "fp8", "modules_to_not_convert": ["a.n"]},
    }));
    setup
}

fn family() -> Setup {
    let text = fs::read_to_string("plans/qwen3.rhai").unwrap();
    let mut setup = Setup::new("plans/qwen3.rhai", &text);
    setup.config = Some(json!({
        "model_type": "qwen3",
        "num_hidden_layers": 2,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
    }));
    setup
}

#[derive(Clone, Debug)]
enum Change {
    Delete(Index),
    Double(Index),
    Swap(Index, Index),
    Put(Index, &'static str),
}

const PUT: [&str; 24] = [
    "0",
    "-1",
    "1",
    "65",
    "1099511627776",
    "9223372036854775807",
    "1.5",
    "none",
    "tp",
    "ep",
    "e8m0",
    "e4m3",
    "u8",
    "w",
    "a",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    "|",
    "\"",
    "`",
];

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        any::<Index>().prop_map(Change::Delete),
        any::<Index>().prop_map(Change::Double),
        any::<(Index, Index)>().prop_map(|(a, b)| Change::Swap(a, b)),
        (any::<Index>(), prop::sample::select(&PUT[..])).prop_map(|(i, p)| Change::Put(i, p)),
    ]
}

/// Words, and what stands between them one by one.
fn tokens(text: &str) -> Vec<&str> {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    let mut out = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let end = match word(first) {
            true => rest.find(|c| !word(c)).unwrap_or(rest.len()),
            false => first.len_utf8(),
        };
        out.push(&rest[..end]);
        rest = &rest[end..];
    }
    out
}

fn changed(text: &str, changes: &[Change]) -> String {
    let mut tokens = tokens(text);
    for change in changes {
        // Spaces mean nothing to the language: changing them would waste a case.
        let solid: Vec<usize> =
            (0..tokens.len()).filter(|i| !tokens[*i].trim().is_empty()).collect();
        if solid.is_empty() {
            break;
        }
        let pick = |i: &Index| *i.get(&solid);
        match change {
            Change::Delete(i) => drop(tokens.remove(pick(i))),
            Change::Double(i) => tokens.insert(pick(i), tokens[pick(i)]),
            Change::Swap(i, j) => tokens.swap(pick(i), pick(j)),
            Change::Put(i, text) => tokens[pick(i)] = text,
        }
    }
    tokens.concat()
}

/// Compiles, and renders what is said of the plan: a place may not be beyond its file.
fn ends(mut setup: Setup, infer: &str, changes: &[Change]) {
    setup.text = changed(&setup.text, changes);
    setup.infer = Some(infer.to_owned());
    setup.operations = 100_000;
    if let Err(e) = setup.compile() {
        let text = render(&e.error.diagnostics, &e.files, Format::Text { color: false });
        assert!(!text.is_empty() && !text.contains("kernelcast::"), "{text}\n{}", setup.text);
    }
}

#[test]
fn unchanged_plans_compile() {
    for setup in [words(), family()] {
        if let Err(e) = setup.compile() {
            panic!("{}", render(&e.error.diagnostics, &e.files, Format::Text { color: false }));
        }
    }
}

#[test]
fn deep_texts_end() {
    let many = |open: &str, inside: &str, close: &str| {
        format!("let x = {}{inside}{};", open.repeat(20_000), close.repeat(20_000))
    };
    let texts = [
        many("(", "1", ")"),
        many("[", "1", "]"),
        many("#{a:", "1", "}"),
        many("{", "1", "}"),
        many("!", "true", ""),
        many("-", "1", ""),
        many("if true { ", "1", " }"),
        many("|a| ", "1", ""),
        many("1 + ", "1", ""),
        many("1 ** ", "1", ""),
        many("true && ", "true", ""),
        many("`${", "1", "}`"),
        many("at(", "\"a\"", ")"),
        many("", "at(\"a\")", ".at(\"b\")"),
        many("", "[1]", "[0]"),
        many("", "if false { 1 }", " else if false { 1 }"),
        "fn f() { ".repeat(20_000),
        format!("fn f(n) {{ {}f(n + 1){} }} f(0);", "[".repeat(25), "]".repeat(25)),
        format!("fn f(n) {{ stack(0..1, |i| {}f(n){}); }} f(0);", "(".repeat(9), ")".repeat(9)),
        "/*".repeat(20_000),
        "let x = 1; ".repeat(20_000),
        format!("let x = \"{}\";", "a".repeat(1 << 20)),
        format!("let {} = 1;", "a".repeat(1 << 20)),
    ];
    for text in texts {
        let mut setup = words();
        setup.text = text;
        if let Err(e) = setup.compile() {
            let text = render(&e.error.diagnostics, &e.files, Format::Text { color: false });
            assert!(text.starts_with("error[E"), "{text}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn changed_words_end(
        infer in prop::sample::select(vec!["tp=1", "tp=2", "tp=2,ep=2", "tp=2,pp=2", "tp=3,ep=3,redundant_experts=2"]),
        changes in prop::collection::vec(change(), 1..6),
    ) {
        ends(words(), infer, &changes);
    }

    #[test]
    fn changed_families_end(
        infer in prop::sample::select(vec!["tp=2", "tp=3"]),
        changes in prop::collection::vec(change(), 1..4),
    ) {
        ends(family(), infer, &changes);
    }
}
