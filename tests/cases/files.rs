//! Missing, truncated and duplicated files behind an index, through the whole binary.

use std::fs;
use std::path::Path;

use safetensors::tensor::Dtype;
use serde_json::{Map, Value, json};
use tempfile::{TempDir, tempdir};

use crate::world::{Run, Stored, run, save};

fn f32s(name: &'static str, value: f32) -> Stored {
    (name, Dtype::F32, vec![32, 32], value.to_le_bytes().repeat(1024))
}

fn index(folder: &Path, map: &[(&str, &str)]) {
    let map: Map<String, Value> =
        map.iter().map(|(name, file)| ((*name).to_owned(), json!(file))).collect();
    let text = json!({"metadata": {}, "weight_map": map}).to_string();
    fs::write(folder.join("model.safetensors.index.json"), text).unwrap();
}

const MAP: [(&str, &str); 4] = [
    ("a.weight", "m-1.safetensors"),
    ("b.weight", "m-2.safetensors"),
    ("c.weight", "m-3.safetensors"),
    ("d.weight", "overlay.safetensors"),
];

/// The four files of the case; m-1 has an old copy of d.weight, all 1.0, if asked for.
fn model(old_copy: bool) -> TempDir {
    let dir = tempdir().unwrap();
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    let mut first = vec![f32s("a.weight", 1.0)];
    if old_copy {
        first.push(f32s("d.weight", 1.0));
    }
    save(dir.path(), "m-1.safetensors", &first);
    save(dir.path(), "m-2.safetensors", &[f32s("b.weight", 1.0)]);
    save(dir.path(), "m-3.safetensors", &[f32s("c.weight", 1.0)]);
    save(dir.path(), "overlay.safetensors", &[f32s("d.weight", 2.0)]);
    index(dir.path(), &MAP);
    dir
}

fn copy_all(model: &TempDir) -> Run {
    let plan =
        r#"for name in ["a", "b", "c", "d"] { at(name).copy("weight", [32, 32], f32); }"#;
    run(plan, model.path(), "tp=1")
}

fn says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word} is not in {text}");
    }
}

#[test]
fn a_file_that_is_not_there() {
    let model = model(false);
    fs::remove_file(model.path().join("m-2.safetensors")).unwrap();
    says(&copy_all(&model).refused(), &["E0413", "m-2.safetensors", "1 tensor", "b.weight"]);
}

#[test]
fn a_file_that_is_too_short() {
    let model = model(false);
    let path = model.path().join("m-3.safetensors");
    let file = fs::File::options().write(true).open(&path).unwrap();
    let size = file.metadata().unwrap().len();
    // 3000 bytes of data where the header says 4096.
    file.set_len(size - 1096).unwrap();
    says(&copy_all(&model).refused(), &["E0414", "m-3.safetensors", "4096", "3000"]);
}

#[test]
fn an_old_copy_is_ignored_by_the_index_and_said() {
    let model = model(true);
    let done = copy_all(&model).done();
    assert_eq!(done.get(0, "d.weight").bits(), vec![2.0f32.to_bits(); 1024]);
    says(&done.stderr(), &["E0421", "d.weight"]);
}

#[test]
fn two_copies_without_an_index() {
    let model = model(true);
    fs::remove_file(model.path().join("model.safetensors.index.json")).unwrap();
    let words = ["E0415", "d.weight", "m-1.safetensors", "overlay.safetensors"];
    says(&copy_all(&model).refused(), &words);
}

#[test]
fn a_name_that_its_file_does_not_have() {
    let model = model(false);
    index(model.path(), &[&MAP[..], &[("e.weight", "m-1.safetensors")]].concat());
    says(&copy_all(&model).refused(), &["E0416", "e.weight", "m-1.safetensors"]);
}

#[test]
fn a_file_that_the_index_does_not_know() {
    let model = model(false);
    save(model.path(), "extra.safetensors", &[f32s("a.weight", 7.0)]);
    let done = copy_all(&model).done();
    assert_eq!(done.get(0, "a.weight").bits(), vec![1.0f32.to_bits(); 1024]);
    says(&done.stderr(), &["E0421", "extra.safetensors"]);
}
