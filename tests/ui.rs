//! Failing plans and what the engine says about each: `tests/ui/**/*.rhai` with a `.stderr` beside.
//! `BLESS=1 cargo test --test ui` writes the reports anew; folders named `lib` hold modules.
//!
//! A plan's first lines say what it is compiled for: `//! config: {..}`, `//! infer: tp=4`,
//! `//! train: fsdp=2`,
//! `//! set: name=value`, `//! target: name=value`, `//! source: NAME DTYPE SHAPE`,
//! `//! experts: {..}`. `//~ E0304` marks the line that a report must point to; `//! end: E0101`
//! stands for the end of the file, `//! code: E0405 [FILE]` for no place, or one in the built-in
//! library. `//! compiles` is for a plan of which there are only warnings.

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use kernelcast::diag::{Diagnostic, Format, SourceMap, codes, group, render, summary};

use support::{Setup, Tensors};

/// File, line and code; line 0 of no file for a report without a place, and of a built-in file.
type Marks = BTreeSet<(String, u32, String)>;

struct Case {
    setup: Setup,
    compiles: bool,
    elsewhere: Vec<(String, u32, String)>,
}

#[test]
fn reports_are_as_recorded() {
    let mut plans = Vec::new();
    collect(Path::new("tests/ui"), &mut plans);
    assert!(plans.len() >= 40, "only {} plans were found", plans.len());
    let bless = std::env::var_os("BLESS").is_some();
    let wrong: Vec<String> = plans.iter().filter_map(|p| check(p, bless).err()).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n----\n"));
}

#[test]
fn every_code_of_plans_has_a_plan() {
    let mut plans = Vec::new();
    collect(Path::new("tests/ui"), &mut plans);
    let reports: String = plans
        .iter()
        .map(|p| fs::read_to_string(p.with_extension("stderr")).unwrap_or_default())
        .collect();
    let script = codes::CODES.iter().map(|c| c.code).filter(|c| c < &"E04");
    let lost: Vec<&str> = script.filter(|c| !reports.contains(&format!("[{c}]"))).collect();
    assert!(lost.is_empty(), "no plan shows {lost:?}");
}

fn collect(folder: &Path, plans: &mut Vec<PathBuf>) {
    let mut entries: Vec<PathBuf> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() && !path.ends_with("lib") {
            collect(&path, plans);
        } else if path.extension().is_some_and(|e| e == "rhai") {
            plans.push(path);
        }
    }
}

/// Compiles one plan and compares places and text; what differs is the error.
fn check(path: &Path, bless: bool) -> Result<(), String> {
    let name = path.display().to_string();
    let case = read(&name, &fs::read_to_string(path).unwrap());
    let (diagnostics, files) = match case.setup.compile() {
        Ok(compiled) => (compiled.notes.clone(), compiled.files().clone()),
        Err(e) => (e.error.diagnostics, e.files),
    };
    if diagnostics.iter().any(Diagnostic::is_error) == case.compiles {
        let text = render(&diagnostics, &files, Format::Text { color: false });
        return Err(format!("{name}: errors, or none, against its header\n{text}"));
    }
    let text = render(&diagnostics, &files, Format::Text { color: false });
    let text = format!("{text}\n{}\n", summary(&diagnostics));
    inside_words(&text).map_err(|word| format!("{name}: `{word}` in the report:\n{text}"))?;
    let (found, wanted) = (places(&diagnostics, &files), marks(&case, &files));
    if found != wanted {
        return Err(format!("{name}: marked {wanted:?}\nreported {found:?}\n{text}"));
    }
    let recorded = path.with_extension("stderr");
    if bless {
        fs::write(&recorded, &text).unwrap();
        return Ok(());
    }
    match fs::read_to_string(&recorded) {
        Ok(old) if old == text => Ok(()),
        _ => Err(format!("{name}: the report differs from {}\n{text}", recorded.display())),
    }
}

/// Names of the engine's own types mean nothing to who writes a plan.
fn inside_words(text: &str) -> Result<(), String> {
    let words = ["kernelcast::", "alloc::", "rhai", "core::", "Dynamic", "u32::", "Some("];
    let said = text.replace(".rhai", "");
    match words.into_iter().find(|w| said.contains(w)) {
        Some(word) => Err(word.to_owned()),
        None => Ok(()),
    }
}

fn read(name: &str, text: &str) -> Case {
    let mut setup = Setup::new(name, text);
    setup.operations = 200_000;
    let mut case = Case { setup, compiles: false, elsewhere: Vec::new() };
    let header = text.lines().map_while(|l| l.strip_prefix("//!")).map(str::trim);
    for line in header {
        let (key, value) = line.split_once(": ").unwrap_or((line, ""));
        let pair = || {
            let (k, v) = value.split_once('=').expect("K=V");
            (k.to_owned(), v.to_owned())
        };
        match key {
            "config" => case.setup.config = Some(serde_json::from_str(value).unwrap()),
            "no config" => case.setup.config = None,
            "infer" => case.setup.infer = Some(value.to_owned()),
            "train" => case.setup.train = Some(value.to_owned()),
            "set" => case.setup.options.extend([pair()]),
            "target" => case.setup.target.extend([pair()]),
            "source" => case.setup.tensors.get_or_insert_with(Tensors::default).add(value),
            "experts" => case.setup.experts = serde_json::from_str(value).unwrap(),
            "code" => {
                let (code, file) = value.split_once(' ').unwrap_or((value, ""));
                case.elsewhere.push((file.to_owned(), 0, code.to_owned()));
            }
            "end" => {
                let last = text.lines().count() as u32 + 1;
                case.elsewhere.push((name.to_owned(), last, value.to_owned()));
            }
            "compiles" => case.compiles = true,
            // Words for the reader.
            _ => {}
        }
    }
    case
}

fn places(diagnostics: &[Diagnostic], files: &SourceMap) -> Marks {
    let place = |d: &Diagnostic| match d.span {
        Some(span) => {
            let name = files.name(span.file);
            let line = if name.starts_with("plans/lib/") { 0 } else { span.line };
            (name.to_owned(), line, d.code.to_owned())
        }
        None => (String::new(), 0, d.code.to_owned()),
    };
    group(diagnostics).iter().map(|g| place(g.first)).collect()
}

fn marks(case: &Case, files: &SourceMap) -> Marks {
    let mut out: Marks = case.elsewhere.iter().cloned().collect();
    let own = [(case.setup.name.as_str(), case.setup.text.as_str())];
    let all = files.files().chain(own.into_iter().filter(|o| files.find(o.0).is_none()));
    for (name, text) in all {
        for (index, line) in text.lines().enumerate() {
            let codes = line.split_once("//~ ").map_or("", |(_, codes)| codes);
            let codes = codes.split_whitespace();
            out.extend(codes.map(|c| (name.to_owned(), index as u32 + 1, c.to_owned())));
        }
    }
    out
}
