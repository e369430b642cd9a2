//! Model folders, runs of the binary and what they leave.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use half::bf16;
use kernelcast::check::check;
use kernelcast::compile::Compiled;
use kernelcast::diag::{Diagnostic, Format, render};
use kernelcast::io::ReceiverManifest;
use kernelcast::table::{ParamRow, ShapeTable};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

use crate::support::Setup;

/// f32(1 / 448): the scale of a block whose largest value is 1.
pub const C: u32 = 0x3B12_4925;
/// The code of 448.
pub const FULL: u8 = 0x7E;

/// A tensor of a model folder: name, type, shape, bytes.
pub type Stored = (&'static str, Dtype, Vec<usize>, Vec<u8>);

/// A bf16 matrix or vector whose elements follow their index.
pub fn bf16s(name: &'static str, shape: &[usize], value: impl FnMut(usize) -> f32) -> Stored {
    let values = (0..shape.iter().product()).map(value);
    let bytes = values.flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect();
    (name, Dtype::BF16, shape.to_vec(), bytes)
}

/// A folder with an empty config and these tensors in one file.
pub fn folder(tensors: &[Stored]) -> TempDir {
    with_config(&json!({}), tensors)
}

pub fn with_config(config: &Value, tensors: &[Stored]) -> TempDir {
    let dir = tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    save(dir.path(), "model.safetensors", tensors);
    dir
}

pub fn save(folder: &Path, file: &str, tensors: &[Stored]) {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (*name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &folder.join(file)).unwrap();
}

/// A finished or refused run of the binary.
pub struct Run {
    pub output: Output,
    pub out: PathBuf,
    _dir: TempDir,
}

/// `engine run` of a plan's text.
pub fn run(plan: &str, model: &Path, infer: &str) -> Run {
    let dir = tempdir().unwrap();
    let path = dir.path().join("plan.rhai");
    fs::write(&path, plan).unwrap();
    let out = dir.path().join("out");
    let output = Command::new(env!("CARGO_BIN_EXE_engine"))
        .arg("run")
        .arg(&path)
        .args(["--backend", "cpu", "--infer", infer, "--model"])
        .arg(model)
        .arg("--out")
        .arg(&out)
        .output()
        .unwrap();
    Run { output, out, _dir: dir }
}

/// A tensor of one rank.
pub struct Held {
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Held {
    /// The elements as 32 bits each.
    pub fn bits(&self) -> Vec<u32> {
        self.bytes.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    /// The elements of a bf16 tensor.
    pub fn values(&self) -> Vec<f32> {
        let pairs = self.bytes.chunks_exact(2);
        pairs.map(|b| bf16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect()
    }

    /// One part of `parts` along dimension 0.
    pub fn part(&self, index: usize, parts: usize) -> &[u8] {
        let size = self.bytes.len() / parts;
        &self.bytes[index * size..][..size]
    }
}

impl Run {
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.output.stderr).into_owned()
    }

    /// The run, which must have succeeded.
    pub fn done(self) -> Run {
        assert!(self.output.status.success(), "{}", self.stderr());
        self
    }

    /// What a refused run says; it leaves no output and ends with status 1.
    pub fn refused(self) -> String {
        assert_eq!(self.output.status.code(), Some(1), "{}", self.stderr());
        assert!(!self.out.exists(), "a refused run left an output");
        self.stderr()
    }

    pub fn get(&self, rank: usize, name: &str) -> Held {
        let rank = self.out.join(format!("rank-{rank}"));
        let file = fs::read_dir(&rank).unwrap().next().unwrap().unwrap().path();
        let bytes = fs::read(file).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let view = tensors.tensor(name).unwrap();
        Held { shape: view.shape().to_vec(), bytes: view.data().to_vec() }
    }
}

/// A plan for sources that are known by shape only.
pub fn compiled(plan: &str, infer: &str) -> Compiled {
    setup(plan, infer).compile().unwrap_or_else(|e| {
        panic!("{}", render(&e.error.diagnostics, &e.files, Format::Text { color: false }))
    })
}

/// The diagnostics of a plan that is refused.
pub fn problems(plan: &str, infer: &str) -> Vec<Diagnostic> {
    match setup(plan, infer).compile() {
        Ok(_) => panic!("the plan compiles:\n{plan}"),
        Err(e) => e.error.diagnostics,
    }
}

/// The same for FP8 sources, given as lines `NAME DTYPE SHAPE`.
pub fn problems_of(plan: &str, infer: &str, sources: &[&str]) -> Vec<Diagnostic> {
    match with_sources(plan, infer, sources).compile() {
        Ok(_) => panic!("the plan compiles:\n{plan}"),
        Err(e) => e.error.diagnostics,
    }
}

pub fn with_sources(plan: &str, infer: &str, sources: &[&str]) -> Setup {
    let mut setup = setup(plan, infer);
    let tensors = setup.tensors.get_or_insert_default();
    sources.iter().for_each(|line| tensors.add(line));
    setup
}

pub fn setup(plan: &str, infer: &str) -> Setup {
    let mut setup = Setup::new("tests/case.rhai", plan);
    setup.infer = Some(infer.to_owned());
    setup
}

/// All that diagnostics say, for a search of words.
pub fn said(problems: &[Diagnostic]) -> String {
    let all = problems.iter().map(|d| {
        let parts = [Some(&d.message), d.label.as_ref(), d.hint.as_ref(), d.subject.as_ref()];
        let parts: Vec<&str> = parts.into_iter().flatten().map(String::as_str).collect();
        format!("{} {} {}", d.code, parts.join(" | "), d.notes.join(" | "))
    });
    all.collect::<Vec<_>>().join("\n")
}

/// One storage of one rank.
pub fn row(compiled: &Compiled, rank: usize, name: &str) -> ParamRow {
    let ranks: Vec<_> = compiled.mesh.ranks().collect();
    let table = ShapeTable::of(compiled, &ranks);
    let rows = &table.ranks[rank].params;
    rows.iter().find(|r| r.name == name).unwrap_or_else(|| panic!("no {name}")).clone()
}

pub fn shape(compiled: &Compiled, rank: usize, name: &str) -> Vec<u64> {
    row(compiled, rank, name).shape
}

/// A receiver's rank: parameters and buffers as name, torch type, shape.
pub fn receiver(
    rank: u64,
    parameters: &[(&str, &str, &[u64])],
    buffers: &[(&str, &str, &[u64])],
) -> (String, ReceiverManifest) {
    let list = |entries: &[(&str, &str, &[u64])]| -> Vec<Value> {
        let entry = |(name, dtype, shape): &(&str, &str, &[u64])| json!({"name": name, "dtype": dtype, "shape": shape});
        entries.iter().map(entry).collect()
    };
    let manifest = json!({
        "topology": {"global_rank": rank},
        "parameters": list(parameters),
        "buffers": list(buffers),
    });
    (format!("rank{rank}.json"), serde_json::from_value(manifest).unwrap())
}

/// What the plan and the receiver disagree about.
pub fn differences(
    compiled: &Compiled,
    receivers: &[(String, ReceiverManifest)],
) -> Vec<Diagnostic> {
    check(compiled, receivers).unwrap().1
}
