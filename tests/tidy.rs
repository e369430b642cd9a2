//! The invariants of the source tree, as the sentences that `src/lib.rs` states.

use std::path::{Path, PathBuf};

/// Modules in the order of dependence: each may use only those before it.
const ORDER: [&str; 20] = [
    "diag",
    "error",
    "dtype",
    "fp8",
    "topo",
    "ir",
    "script",
    "shard",
    "lower",
    "graph",
    "simulate",
    "io",
    "rendezvous",
    "backend",
    "compile",
    "table",
    "load",
    "check",
    "exec",
    "memory",
];

/// Modules that stand beside the pipeline's end and may use all of it.
const ENDS: [&str; 4] = ["verify", "cli", "lib", "main"];

fn sources(root: &str) -> Vec<(PathBuf, String)> {
    let mut out = Vec::new();
    let mut queue = vec![PathBuf::from(root)];
    while let Some(dir) = queue.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                queue.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                out.push((path.clone(), std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    out.sort();
    out
}

/// The top-level module that a file belongs to.
fn module(path: &Path) -> String {
    let inner = path.strip_prefix("src").unwrap();
    inner
        .components()
        .next()
        .unwrap()
        .as_os_str()
        .to_string_lossy()
        .trim_end_matches(".rs")
        .into()
}

fn fails(rule: &str, offenders: &[String]) {
    assert!(offenders.is_empty(), "{rule}\n{}", offenders.join("\n"));
}

#[test]
fn modules_use_only_what_stands_before_them() {
    let mut wrong = Vec::new();
    for (path, text) in sources("src") {
        let own = module(&path);
        if ENDS.contains(&own.as_str()) {
            continue;
        }
        let rank = ORDER.iter().position(|m| *m == own);
        let rank = rank.unwrap_or_else(|| panic!("{own} has no place in the order"));
        let code: String = text.lines().filter(|l| !l.trim_start().starts_with("//")).collect();
        for (at, _) in code.match_indices("crate::") {
            let rest = &code[at + "crate::".len()..];
            let used: String =
                rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let later = match ORDER.iter().position(|m| *m == used) {
                Some(place) => place > rank,
                None => ENDS.contains(&used.as_str()),
            };
            if later {
                wrong.push(format!("{} uses {used}", path.display()));
            }
        }
    }
    fails("a module uses only modules that stand before it", &wrong);
}

#[test]
fn libraries_stay_in_their_homes() {
    let homes: [(&str, &[&str]); 9] = [
        ("rhai::", &["src/script"]),
        ("cudarc", &["src/backend/cuda"]),
        ("axum::", &["src/rendezvous"]),
        ("hyper_util::", &["src/rendezvous"]),
        ("tokio::", &["src/rendezvous"]),
        ("clap::", &["src/cli"]),
        ("indicatif", &["src/cli"]),
        ("signal_hook", &["src/cli"]),
        ("annotate_snippets", &["src/diag"]),
    ];
    let mut wrong = Vec::new();
    for (path, text) in sources("src") {
        for (library, allowed) in homes {
            let inside = allowed.iter().any(|home| path.starts_with(home));
            let used = text.lines().any(|l| {
                let l = l.trim_start();
                !l.starts_with("//") && !l.contains("//!") && l.contains(library)
            });
            if used && !inside && !path.ends_with("modules.rs") {
                wrong.push(format!("{} uses {library}", path.display()));
            }
        }
    }
    fails(
        "rhai lives in src/script, CUDA in src/backend/cuda, HTTP in src/rendezvous, \
         the terminal in src/cli",
        &wrong,
    );
}

#[test]
fn unsafe_lives_in_two_places_and_says_why() {
    let mut wrong = Vec::new();
    for (path, text) in sources("src") {
        let home = path.starts_with("src/backend/cuda")
            || path.starts_with("src/fp8/simd")
            || path == Path::new("src/fp8/simd.rs");
        let lines: Vec<&str> = text.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if !code.contains("unsafe {") && !code.contains("unsafe impl") {
                continue;
            }
            let said = lines[i.saturating_sub(6)..=i].iter().any(|l| l.contains("SAFETY"));
            if !home || !said {
                wrong.push(format!("{}:{}", path.display(), i + 1));
            }
        }
    }
    fails("unsafe lives in src/backend/cuda and src/fp8/simd, each block with SAFETY", &wrong);
}

#[test]
fn files_are_short_and_say_what_they_own() {
    let mut wrong = Vec::new();
    for (path, text) in sources("src") {
        let lines = text.lines().count();
        if lines > 500 {
            wrong.push(format!("{} has {lines} lines", path.display()));
        }
        if !text.starts_with("//! ") {
            wrong.push(format!("{} does not begin with what it owns", path.display()));
        }
    }
    fails("a file has at most 500 lines and begins with a sentence on what it owns", &wrong);
}

#[test]
fn nothing_is_left_for_later() {
    // Put together here, so that this file does not find itself.
    let words = [
        ["TO", "DO"],
        ["FIX", "ME"],
        ["todo", "!("],
        ["unimplemented", "!("],
        ["#[ign", "ore"],
    ];
    let mut wrong = Vec::new();
    for (path, text) in [sources("src"), sources("tests"), sources("examples")].concat() {
        for word in words.map(|w| w.concat()) {
            if text.contains(&word) {
                wrong.push(format!("{} has {word}", path.display()));
            }
        }
    }
    fails("no marker of unfinished work, no ignored test", &wrong);
}

#[test]
fn outside_data_is_never_unwrapped() {
    let mut wrong = Vec::new();
    for (path, text) in sources("src") {
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        let in_test_file = path.file_name().is_some_and(|n| n == "tests.rs");
        for (i, line) in code.lines().enumerate() {
            let line = line.split("//").next().unwrap_or_default();
            if !in_test_file && line.contains(".unwrap()") {
                wrong.push(format!("{}:{}", path.display(), i + 1));
            }
        }
    }
    fails("library code does not unwrap; `expect` states an invariant", &wrong);
}
