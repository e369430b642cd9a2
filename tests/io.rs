//! Checkpoints good and bad; outputs and JSON inputs in the files beside this one.

#[path = "io/inputs.rs"]
mod inputs;
#[path = "io/output.rs"]
mod output;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};

use kernelcast::diag::Diagnostic;
use kernelcast::dtype::DType;
use kernelcast::error::{Error, Result};
use kernelcast::io::{Checkpoint, checksum_tensor};
use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;
use tempfile::{TempDir, tempdir};

const INDEX: &str = "model.safetensors.index.json";

/// Writes f32 tensors: name, shape, the value of every element.
fn tensors(folder: &Path, file: &str, list: &[(&str, &[usize], f32)]) -> PathBuf {
    let data: Vec<Vec<u8>> =
        list.iter().map(|(_, s, v)| v.to_le_bytes().repeat(s.iter().product())).collect();
    let views = list.iter().zip(&data).map(|((name, shape, _), data)| {
        (*name, TensorView::new(Dtype::F32, shape.to_vec(), data).unwrap())
    });
    let path = folder.join(file);
    safetensors::serialize_to_file(views, None, &path).unwrap();
    path
}

/// A file with this header text, and `data` bytes of zeros behind it (a hole).
fn raw(path: &Path, header: &str, data: u64) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    let end = bytes.len() as u64 + data;
    fs::write(path, bytes).unwrap();
    File::options().write(true).open(path).unwrap().set_len(end).unwrap();
}

fn index(folder: &Path, map: &[(&str, &str)]) {
    let map: BTreeMap<_, _> = map.iter().copied().collect();
    fs::write(folder.join(INDEX), json!({"metadata": {}, "weight_map": map}).to_string())
        .unwrap();
}

/// The four tensors of the case, in four files; m-1 has a `d.weight` too if `old_d`.
fn sharded(old_d: bool) -> TempDir {
    let dir = tempdir().unwrap();
    let mut first: Vec<(&str, &[usize], f32)> = vec![("a.weight", &[4], 1.0)];
    if old_d {
        first.push(("d.weight", &[4], 1.0));
    }
    tensors(dir.path(), "m-1.safetensors", &first);
    tensors(dir.path(), "m-2.safetensors", &[("b.weight", &[4], 1.0)]);
    tensors(dir.path(), "m-3.safetensors", &[("c.weight", &[32, 32], 1.0)]);
    tensors(dir.path(), "overlay.safetensors", &[("d.weight", &[4], 2.0)]);
    index(dir.path(), &MAP);
    dir
}

const MAP: [(&str, &str); 4] = [
    ("a.weight", "m-1.safetensors"),
    ("b.weight", "m-2.safetensors"),
    ("c.weight", "m-3.safetensors"),
    ("d.weight", "overlay.safetensors"),
];

fn first_f32(checkpoint: &Checkpoint, name: &str) -> f32 {
    let mut buf = [0; 4];
    checkpoint.read_at(checkpoint.get(name).unwrap(), 0, &mut buf).unwrap();
    f32::from_le_bytes(buf)
}

fn codes(error: &Error) -> Vec<&'static str> {
    error.diagnostics.iter().map(|d| d.code).collect()
}

/// The only diagnostic of a failure: its code, and words that message or hint must have.
#[track_caller]
fn one<T: std::fmt::Debug>(result: Result<T>, code: &str, words: &[&str]) {
    let error = result.unwrap_err();
    assert_eq!(codes(&error), [code], "{error:?}");
    has(&error.diagnostics[0], words);
}

#[track_caller]
fn has(diagnostic: &Diagnostic, words: &[&str]) {
    let text = format!("{} {:?}", diagnostic.message, diagnostic.hint);
    for word in words {
        assert!(text.contains(word), "{word:?} is not in {text}");
    }
}

#[test]
fn good_folder_with_index() {
    let dir = sharded(false);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let names: Vec<_> = checkpoint.entries().map(|e| e.name.as_str()).collect();
    assert_eq!(names, ["a.weight", "b.weight", "c.weight", "d.weight"]);
    let c = checkpoint.get("c.weight").unwrap();
    assert_eq!((c.dtype, &c.shape[..], c.bytes), (Some(DType::F32), &[32, 32][..], 4096));
    assert_eq!(checkpoint.files().len(), 4);
    assert_eq!(checkpoint.path(), dir.path());
    assert!(checkpoint.get("e.weight").is_none() && checkpoint.notes().is_empty());
}

#[test]
fn case_a_file_missing() {
    let dir = sharded(false);
    fs::remove_file(dir.path().join("m-2.safetensors")).unwrap();
    one(
        Checkpoint::open(dir.path()),
        "E0413",
        &["m-2.safetensors is missing", "1 tensor (b.weight)"],
    );
}

#[test]
fn case_b_file_truncated() {
    let dir = sharded(false);
    let path = dir.path().join("m-3.safetensors");
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(file.metadata().unwrap().len() - 1096).unwrap();
    one(
        Checkpoint::open(dir.path()),
        "E0414",
        &["m-3.safetensors is truncated", "declares 4096 bytes", "has 3000"],
    );
}

#[test]
fn case_c_index_decides() {
    let dir = sharded(true);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(first_f32(&checkpoint, "d.weight"), 2.0);
    let [note] = checkpoint.notes() else { panic!("{:?}", checkpoint.notes()) };
    assert_eq!(note.code, "E0421");
    has(note, &["d.weight", "m-1.safetensors", "overlay.safetensors"]);
}

#[test]
fn case_d_twice_without_index() {
    let dir = sharded(true);
    fs::remove_file(dir.path().join(INDEX)).unwrap();
    one(
        Checkpoint::open(dir.path()),
        "E0415",
        &["d.weight", "m-1.safetensors", "overlay.safetensors"],
    );
}

#[test]
fn case_e_index_names_an_absent_tensor() {
    let dir = sharded(false);
    index(dir.path(), &[&MAP[..], &[("e.weight", "m-1.safetensors")]].concat());
    one(Checkpoint::open(dir.path()), "E0416", &["e.weight", "m-1.safetensors"]);
}

#[test]
fn case_f_spare_file() {
    let dir = sharded(false);
    tensors(dir.path(), "extra.safetensors", &[("a.weight", &[4], 7.0)]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(first_f32(&checkpoint, "a.weight"), 1.0);
    let [note] = checkpoint.notes() else { panic!("{:?}", checkpoint.notes()) };
    assert_eq!(note.code, "E0421");
    has(note, &["extra.safetensors"]);
}

#[test]
fn every_problem_at_once() {
    let dir = sharded(false);
    fs::remove_file(dir.path().join("m-2.safetensors")).unwrap();
    fs::write(dir.path().join("m-3.safetensors"), "abc").unwrap();
    index(dir.path(), &[&MAP[..], &[("e.weight", "m-1.safetensors")]].concat());
    let error = Checkpoint::open(dir.path()).unwrap_err();
    assert_eq!(codes(&error), ["E0416", "E0413", "E0414"]);
    assert_eq!(error.exit_code(), 1);
}

#[test]
fn index_must_stay_in_its_folder() {
    for file in
        ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", ".", "..", "", "a\\b"]
    {
        let dir = sharded(false);
        index(dir.path(), &[&MAP[..], &[("e.weight", file)]].concat());
        one(Checkpoint::open(dir.path()), "E0416", &["e.weight", &format!("{file:?}")]);
    }
}

#[test]
fn malformed_index() {
    let cases = [
        ("{\n  \"weight_map\": {,", "line 2, column 18"),
        ("[]", "line 1"),
        ("{\"weight_map\": {\"a\": 1}}", "line 1, column 22"),
        ("{\"weight_map\": {}}", "maps no tensor"),
        ("{}", "weight_map"),
        (
            r#"{"weight_map":{"a.weight":"m-1.safetensors","a.weight":"m-1.safetensors"}}"#,
            "a.weight more than once",
        ),
    ];
    for (text, words) in cases {
        let dir = sharded(false);
        fs::write(dir.path().join(INDEX), text).unwrap();
        one(Checkpoint::open(dir.path()), "E0419", &[INDEX, words]);
    }
}

#[test]
fn nothing_to_open() {
    let dir = tempdir().unwrap();
    one(Checkpoint::open(&dir.path().join("absent")), "E0601", &["absent", "give a folder"]);
    one(Checkpoint::open(dir.path()), "E0413", &["no safetensors file", "give the folder"]);
    fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
    one(Checkpoint::open(dir.path()), "E0413", &["pickled"]);
    symlink("gone", dir.path().join("m.safetensors")).unwrap();
    one(Checkpoint::open(dir.path()), "E0413", &["m.safetensors is missing", "link"]);
    fs::remove_file(dir.path().join("m.safetensors")).unwrap();
    fs::create_dir(dir.path().join("m.safetensors")).unwrap();
    one(Checkpoint::open(dir.path()), "E0601", &["m.safetensors", "regular file"]);
}

#[test]
fn parts_missing_without_index() {
    let dir = tempdir().unwrap();
    tensors(dir.path(), "model-00001-of-00003.safetensors", &[("a", &[1], 0.0)]);
    tensors(dir.path(), "model-00003-of-00003.safetensors", &[("c", &[1], 0.0)]);
    one(Checkpoint::open(dir.path()), "E0413", &["2 of the 3", "model-*-of-*"]);
    tensors(dir.path(), "model-00002-of-00003.safetensors", &[("b", &[1], 0.0)]);
    assert_eq!(Checkpoint::open(dir.path()).unwrap().entries().len(), 3);
}

#[test]
fn bad_headers() {
    let tensor = |shape: &str, from: u64, to: u64| {
        format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":[{from},{to}]}}"#)
    };
    let two = |b: String| format!(r#"{{"a":{},"b":{b}}}"#, tensor("[2]", 0, 8));
    let cases = [
        (two(tensor("[2]", 12, 20)), 20, "bytes 8 to 12 of the data, before b"),
        (two(tensor("[2]", 4, 12)), 12, "b starts at byte 4, inside"),
        (two(tensor("[2]", 16, 8)), 8, "b ends at byte 8"),
        (two(tensor("[3]", 8, 16)), 16, "b F32 [3] needs 12 bytes, its offsets give 8"),
        (two(tensor("[2]", 8, 16)), 17, "longer than declared"),
        (two(tensor("[9223372036854775807,8]", 8, 16)), 16, "does not fit 64 bits"),
        (two(tensor("[-1]", 8, 16)), 16, "invalid value"),
        (format!(r#"{{"a":{t},"a":{t}}}"#, t = tensor("[0]", 0, 0)), 0, "names a twice"),
        (r#"{"a":{"dtype":"F99","shape":[],"data_offsets":[0,4]}}"#.into(), 4, "F99"),
        ("[1, 2]".into(), 0, "object of tensors"),
        ("\u{1}".into(), 0, "refused"),
        (format!("{}1{}", "[".repeat(9000), "]".repeat(9000)), 0, "refused"),
    ];
    let dir = tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    for (header, data, words) in cases {
        raw(&path, &header, data);
        one(Checkpoint::open(&path), "E0414", &["x.safetensors", words]);
    }
}

#[test]
fn lying_lengths() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let cases: [(&[u8], &str); 6] = [
        (b"", "0 bytes long"),
        (b"\x02\0\0\0", "4 bytes long"),
        (b"\x03\0\0\0\0\0\0\0{}", "header of 3 bytes, but ends after 2"),
        (b"\x01\xe1\xf5\x05\0\0\0\0{}", "header of 100000001 bytes"),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff{}", "header of 18446744073709551615 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ];
    for (bytes, words) in cases {
        fs::write(&path, bytes).unwrap();
        one(Checkpoint::open(&path), "E0414", &[words]);
    }
}

#[test]
fn empty_and_scalar_tensors() {
    let dir = tempdir().unwrap();
    let list: [(&str, &[usize], f32); 3] =
        [("empty", &[0, 7], 0.0), ("last", &[3], 5.0), ("scalar", &[], 2.5)];
    let path = tensors(dir.path(), "x.safetensors", &list);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let empty = checkpoint.get("empty").unwrap();
    assert_eq!((empty.bytes, &empty.shape[..]), (0, &[0, 7][..]));
    checkpoint.read_at(empty, 0, &mut []).unwrap();
    checkpoint.read_rows(empty, 0, 0, 28, 5, &mut []).unwrap();
    checkpoint.read_rows(empty, 0, 4, 28, 0, &mut []).unwrap();
    assert_eq!(
        checksum_tensor(&checkpoint, empty).unwrap(),
        "99aa06d3014798d86001c324468d497f"
    );
    assert!(checkpoint.get("scalar").unwrap().shape.is_empty());
    assert_eq!(first_f32(&checkpoint, "scalar"), 2.5);
    // The byte after a tensor is another's, or nobody's.
    for name in ["empty", "last", "scalar"] {
        let tensor = checkpoint.get(name).unwrap();
        assert_eq!(
            checkpoint.read_at(tensor, tensor.bytes, &mut [0]).unwrap_err().code,
            "E0601"
        );
        let far = checkpoint.read_at(tensor, u64::MAX, &mut [0]).unwrap_err();
        has(&far, &[name, "past 2^64"]);
        assert!(checkpoint.read_rows(tensor, 0, 1, u64::MAX, 3, &mut [0; 3]).is_err());
        assert!(checkpoint.read_rows(tensor, 0, 2, 2, 2, &mut [0; 3]).is_err());
    }
}

#[test]
fn types_without_a_use_are_kept() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    raw(&path, r#"{"n":{"dtype":"I64","shape":[2],"data_offsets":[0,16]}}"#, 16);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let entry = checkpoint.get("n").unwrap();
    assert_eq!((entry.dtype, entry.dtype_name.as_str(), entry.bytes), (None, "I64", 16));
}

#[test]
fn twelve_gigabytes_of_hole() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let bytes = 256 * 4096 * 6144 * 2u64;
    let header = format!(
        r#"{{"w13":{{"dtype":"BF16","shape":[256,4096,6144],"data_offsets":[0,{bytes}]}}}}"#
    );
    raw(&path, &header, bytes);
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[1, 2, 3, 4], file.metadata().unwrap().len() - 4).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let w13 = checkpoint.get("w13").unwrap();
    assert_eq!((w13.bytes, w13.bytes - 2), (12_884_901_888, 2 * 6_442_450_943));
    let mut buf = [9; 8];
    checkpoint.read_at(w13, w13.bytes - 8, &mut buf).unwrap();
    assert_eq!(buf, [0, 0, 0, 0, 1, 2, 3, 4]);
    // The last 128 columns of the last two rows, then one row from each far end.
    let mut rows = vec![9; 512];
    let row = 6144 * 2;
    checkpoint.read_rows(w13, bytes - row - 256, 256, row, 2, &mut rows).unwrap();
    assert!(rows[..508].iter().all(|&b| b == 0) && rows[508..] == [1, 2, 3, 4]);
    checkpoint.read_rows(w13, 0, 4, bytes - 4, 2, &mut buf).unwrap();
    assert_eq!(buf, [0, 0, 0, 0, 1, 2, 3, 4]);
}

#[test]
fn file_shrinks_under_us() {
    let dir = tempdir().unwrap();
    let path = tensors(dir.path(), "x.safetensors", &[("w", &[1024], 1.0)]);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let size = fs::metadata(&path).unwrap().len();
    File::options().write(true).open(&path).unwrap().set_len(size - 1).unwrap();
    let w = checkpoint.get("w").unwrap();
    checkpoint.read_at(w, 0, &mut [0; 4095]).unwrap();
    let fault = checkpoint.read_at(w, 0, &mut [0; 4096]).unwrap_err();
    assert_eq!((fault.code, fault.subject.as_deref()), ("E0414", Some("w")));
    has(
        &fault,
        &["x.safetensors shrank", &format!("{size} bytes"), &format!("{} now", size - 1)],
    );
    let fault = checkpoint.read_rows(w, 0, 8, 16, 256, &mut [0; 2048]);
    assert!(fault.is_ok(), "the last gap is not read");
    assert_eq!(
        checkpoint.read_rows(w, 8, 8, 16, 256, &mut [0; 2048]).unwrap_err().code,
        "E0414"
    );
}

#[test]
fn links_are_followed() {
    let dir = tempdir().unwrap();
    let blob = tensors(dir.path(), "blob", &[("w", &[2], 3.0)]);
    let snapshot = dir.path().join("snapshot");
    fs::create_dir(&snapshot).unwrap();
    symlink("../blob", snapshot.join("model.safetensors")).unwrap();
    fs::write(snapshot.join("._model.safetensors"), "resource fork").unwrap();
    assert_eq!(first_f32(&Checkpoint::open(&snapshot).unwrap(), "w"), 3.0);
    assert_eq!(first_f32(&Checkpoint::open(&blob).unwrap(), "w"), 3.0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]
    #[test]
    fn rows_equal_slices(
        offset in 0u64..40_000,
        row_bytes in prop_oneof![1u64..64, 1u64..20_000],
        gap in prop_oneof![0u64..64, 0u64..20_000],
        rows in prop_oneof![1u64..4, 1u64..3000],
    ) {
        static FILE: std::sync::OnceLock<(TempDir, Checkpoint, Vec<u8>)> = std::sync::OnceLock::new();
        let (_, checkpoint, data) = FILE.get_or_init(|| {
            let dir = tempdir().unwrap();
            let data: Vec<u8> = (0..1_500_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
            let view = TensorView::new(Dtype::U8, vec![data.len()], &data).unwrap();
            let path = dir.path().join("x.safetensors");
            safetensors::serialize_to_file([("x", view)], None, &path).unwrap();
            let checkpoint = Checkpoint::open(&path).unwrap();
            (dir, checkpoint, data)
        });
        let stride = row_bytes + gap;
        let rows = rows.min((data.len() as u64 - offset - row_bytes) / stride + 1);
        let mut got = vec![0; (rows * row_bytes) as usize];
        checkpoint.read_rows(checkpoint.get("x").unwrap(), offset, row_bytes, stride, rows, &mut got).unwrap();
        let want: Vec<u8> = (0..rows)
            .flat_map(|r| { let at = (offset + r * stride) as usize; &data[at..at + row_bytes as usize] })
            .copied().collect();
        prop_assert!(got == want);
    }
}
