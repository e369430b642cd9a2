//! The examples of docs/reference.md and docs/guide.md, each compiled and run; and whether the
//! reference has every word of the language. The page itself says what its comments mean.

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use kernelcast::backend::cpu::{FiniteCheck, Options};
use kernelcast::compile::Compiled;
use kernelcast::diag::{Format, render};
use kernelcast::dtype::DType;
use kernelcast::fp8::codec;
use kernelcast::lower::TargetKind;
use kernelcast::memory::{Sources, Targets, update};
use kernelcast::script::words;
use kernelcast::topo::RankId;
use serde_json::Value;

use support::{Setup, Tensors};

/// One fenced block of a page.
struct Example {
    /// Page and line, for messages.
    at: String,
    text: String,
}

#[derive(Default)]
struct Header {
    config: Option<Value>,
    infer: Option<String>,
    options: BTreeMap<String, String>,
    target: BTreeMap<String, String>,
    experts: BTreeMap<String, Vec<u64>>,
    tensors: Option<Tensors>,
    values: BTreeMap<String, Vec<f32>>,
    expected: Vec<String>,
}

fn examples(page: &str) -> Vec<Example> {
    let text = std::fs::read_to_string(page).unwrap();
    let mut out: Vec<Example> = Vec::new();
    let mut inside = false;
    for (i, line) in text.lines().enumerate() {
        match line {
            "```rhai" => {
                inside = true;
                out.push(Example { at: format!("{page}:{}", i + 1), text: String::new() });
            }
            _ if line.starts_with("```") => inside = false,
            _ if inside => {
                let text = &mut out.last_mut().unwrap().text;
                text.push_str(line);
                text.push('\n');
            }
            _ => {}
        }
    }
    out
}

fn pair(text: &str) -> (String, String) {
    let (key, value) = text.split_once('=').expect("KEY=VALUE");
    (key.trim().to_owned(), value.trim().to_owned())
}

/// `1 2 3`, or `1 * 4` for four ones; several of either in a row.
fn numbers(text: &str) -> Vec<f32> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let mut out = Vec::new();
    let mut at = 0;
    while at < words.len() {
        let value: f32 = words[at].parse().unwrap();
        let times = match words.get(at + 1) {
            Some(&"*") => words[at + 2].parse().unwrap(),
            _ => 1,
        };
        out.extend(std::iter::repeat_n(value, times));
        at += if words.get(at + 1) == Some(&"*") { 3 } else { 1 };
    }
    out
}

fn header(text: &str) -> Header {
    let mut h = Header::default();
    for line in text.lines() {
        if let Some(expected) = line.strip_prefix("//=") {
            h.expected.push(expected.trim().to_owned());
            continue;
        }
        let Some((word, rest)) = line.strip_prefix("// ").and_then(|l| l.split_once(':'))
        else {
            continue;
        };
        let rest = rest.trim();
        match word {
            "config" => h.config = Some(serde_json::from_str(rest).unwrap()),
            "infer" => h.infer = Some(rest.to_owned()),
            "set" => h.options.extend([pair(rest)]),
            "target" => h.target.extend([pair(rest)]),
            "experts" => h.experts = serde_json::from_str(rest).unwrap(),
            "source" => {
                let (declared, values) = rest.split_once('=').unwrap();
                h.tensors.get_or_insert_default().add(declared);
                let name = declared.split_whitespace().next().unwrap();
                h.values.insert(name.to_owned(), numbers(values));
            }
            _ => {}
        }
    }
    h
}

fn encode(dtype: DType, values: &[f32]) -> Vec<u8> {
    let bytes = values.iter().map(|x| match dtype {
        DType::F32 => x.to_le_bytes().to_vec(),
        DType::Bf16 => codec::f32_to_bf16(*x).to_le_bytes().to_vec(),
        DType::F16 => codec::f32_to_f16(*x).to_le_bytes().to_vec(),
        DType::E4m3 => vec![codec::e4m3_eager(*x)],
        DType::E8m0 => vec![codec::e8m0_encode(*x)],
        DType::I32 => (*x as i32).to_le_bytes().to_vec(),
        DType::U8 => vec![*x as u8],
    });
    bytes.flatten().collect()
}

fn decode(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    let two = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]);
    let four = |b: &[u8]| [b[0], b[1], b[2], b[3]];
    let values = bytes.chunks_exact(dtype.size() as usize).map(|b| match dtype {
        DType::F32 => f32::from_le_bytes(four(b)),
        DType::Bf16 => codec::bf16_to_f32(two(b)),
        DType::F16 => codec::f16_to_f32(two(b)),
        DType::E4m3 => codec::e4m3_decode(b[0]),
        DType::E8m0 => codec::e8m0_decode(b[0]),
        DType::I32 => i32::from_le_bytes(four(b)) as f32,
        DType::U8 => f32::from(b[0]),
    });
    values.collect()
}

fn show(values: &[f32]) -> String {
    values.iter().map(f32::to_string).collect::<Vec<_>>().join(" ")
}

fn compiled(e: &Example, h: &Header) -> Result<Compiled, String> {
    let mut setup = Setup::new("example", &e.text);
    setup.config = h.config.clone().or(setup.config);
    setup.tensors = h.tensors.clone();
    setup.infer = h.infer.clone();
    setup.options = h.options.clone();
    setup.target = h.target.clone();
    setup.experts = h.experts.clone();
    setup
        .compile()
        .map_err(|e| render(&e.error.diagnostics, &e.files, Format::Text { color: false }))
}

/// Every storage of every rank, in the plan's order: rank, description and values.
fn held(compiled: &Compiled, h: &Header) -> Vec<(u64, String, Vec<f32>)> {
    let bytes: Vec<Vec<u8>> = compiled
        .program
        .sources
        .iter()
        .map(|s| {
            let count = s.shape.iter().product::<u64>() as usize;
            let counted: Vec<f32> = (0..count).map(|i| i as f32).collect();
            let values = h.values.get(&s.name).unwrap_or(&counted);
            assert_eq!(values.len(), count, "{}", s.name);
            encode(s.dtype, values)
        })
        .collect();
    let mut sources = Sources::default();
    for (s, bytes) in compiled.program.sources.iter().zip(&bytes) {
        sources.add(&s.name, s.dtype, &s.shape, bytes).unwrap();
    }
    let storages = compiled.program.ranks.iter().flat_map(|r| {
        let written = r.targets.iter().filter(|t| t.kind != TargetKind::Alias);
        written.flat_map(|t| &t.storages).map(|s| (r.rank, s))
    });
    let storages: Vec<_> = storages.collect();
    let mut memory: Vec<Vec<u8>> =
        storages.iter().map(|(_, s)| vec![0; s.bytes() as usize]).collect();
    let mut targets = Targets::default();
    for ((rank, s), bytes) in storages.iter().zip(&mut memory) {
        targets.bind(RankId(rank.0), &s.name, bytes);
    }
    let options = Options {
        finite: FiniteCheck::Before,
        timeout: Duration::from_secs(10),
        progress: &|_| {},
    };
    update(compiled, std::slice::from_ref(&sources), &mut targets, 1 << 20, &options).unwrap();
    let all = storages.iter().zip(&memory);
    let all = all.map(|((rank, s), bytes)| {
        let what = format!("{} {} {:?}", s.name, s.dtype.short_name(), s.shape.as_slice());
        (rank.0, what, decode(s.dtype, bytes))
    });
    all.collect()
}

fn check(e: &Example) -> Result<(), String> {
    let h = header(&e.text);
    let refused: Vec<&str> =
        h.expected.iter().filter_map(|l| l.strip_prefix("error ")).collect();
    let compiled = match (compiled(e, &h), refused.is_empty()) {
        (Ok(compiled), true) => compiled,
        (Ok(_), false) => return Err("it is not refused".to_owned()),
        (Err(said), true) => return Err(said),
        (Err(said), false) => {
            let right = refused.iter().all(|r| {
                let (code, text) = r.split_once(": ").expect("CODE: TEXT");
                said.contains(&format!("error[{code}]")) && said.contains(text)
            });
            return if right { Ok(()) } else { Err(said) };
        }
    };
    let held = held(&compiled, &h);
    let ranks = compiled.program.ranks.len() as u64;
    let mut open: Vec<_> = held.iter().collect();
    let mut wrong = Vec::new();
    for line in &h.expected {
        let (of, rest) = match line.split_once(": ") {
            Some((rank, rest)) => {
                (rank.parse().unwrap()..rank.parse::<u64>().unwrap() + 1, rest)
            }
            None => (0..ranks, line.as_str()),
        };
        let (what, values) = match rest.split_once(" = ") {
            Some((what, values)) => (what, Some(numbers(values))),
            None => (rest, None),
        };
        for rank in of {
            let found = open.iter().position(|f| f.0 == rank && f.1 == what);
            match found.map(|i| open.remove(i)) {
                Some(f) if values.as_ref().is_none_or(|v| *v == f.2) => {}
                Some(f) => wrong.push(format!("{rank}: {what} = {}", show(&f.2))),
                None => wrong.push(format!("{rank}: there is no {what}")),
            }
        }
    }
    // A block that says nothing of what is held only has to compile.
    if !h.expected.is_empty() {
        wrong.extend(open.iter().map(|f| format!("unsaid {}: {} = {}", f.0, f.1, show(&f.2))));
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n")) }
}

#[test]
fn examples_do_what_they_say() {
    let pages = ["docs/reference.md", "docs/guide.md"];
    let all: Vec<Example> = pages.into_iter().flat_map(examples).collect();
    assert!(all.len() >= 40, "only {} examples were found", all.len());
    let wrong: Vec<String> = all
        .iter()
        .filter_map(|e| check(e).err().map(|why| format!("{}\n{why}", e.at)))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n----\n"));
}

#[test]
fn a_wrong_example_is_found() {
    let example = |text: &str| Example { at: String::new(), text: text.to_owned() };
    let plan = "at(\"\").copy(\"w\", [2]);\n//= w bf16 [2] = ";
    assert!(check(&example(&format!("{plan}0 1\n"))).is_ok());
    assert!(check(&example(&format!("{plan}0 2\n"))).is_err());
    let more = "at(\"\").copy(\"v\", [1]);\n";
    assert!(check(&example(&format!("{plan}0 1\n{more}"))).is_err());
    assert!(check(&example("require(false, \"no\");\n")).is_err());
    assert!(check(&example("let x = 1;\n//= error E0101: parse\n")).is_err());
}

/// How the headings of the reference spell a word.
fn spelt(word: &str) -> String {
    match word {
        "index$get$" => "model[key]".to_owned(),
        "index$set$" => "block[name] = ".to_owned(),
        "+" | "*" => format!("tensor {word} "),
        "==" | "!=" => format!("recipe {word} "),
        "target" => "target.".to_owned(),
        // What stands alone on its heading, or is shown by the examples of others.
        _ => word.strip_prefix("get$").map_or_else(|| word.to_owned(), |p| format!(".{p}")),
    }
}

#[test]
fn every_word_is_in_the_reference() {
    let page = std::fs::read_to_string("docs/reference.md").unwrap();
    let headings: Vec<&str> = page.lines().filter(|l| l.starts_with("### ")).collect();
    let part = |c: char| c.is_alphanumeric() || c == '_';
    let whole = |line: &str, word: &str| {
        let (first, last) = (word.starts_with(part), word.ends_with(part));
        line.match_indices(word).any(|(at, _)| {
            let (before, after) = (&line[..at], &line[at + word.len()..]);
            !(first && before.ends_with(part) || last && after.starts_with(part))
        })
    };
    let words = words();
    assert!(words.contains("shard") && words.contains("fp8::vllm"), "{words:?}");
    let lost: Vec<&String> =
        words.iter().filter(|w| !headings.iter().any(|line| whole(line, &spelt(w)))).collect();
    assert!(lost.is_empty(), "no heading of docs/reference.md has {lost:?}");
}
