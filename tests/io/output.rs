//! Outputs: published in one step, never over something else, nothing left of a failure.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use kernelcast::dtype::DType;
use kernelcast::error::Result;
use kernelcast::io::{Checkpoint, OutputDir, checksum_tensor, read_json};
use serde_json::{Value, json};
use tempfile::tempdir;

use super::{codes, has, one};

fn layout() -> Vec<(String, DType, Vec<u64>)> {
    vec![
        ("codes".into(), DType::E4m3, vec![3, 5]),
        ("scale".into(), DType::F32, vec![1, 2]),
        ("none".into(), DType::Bf16, vec![0]),
        ("one".into(), DType::Bf16, vec![]),
    ]
}

/// Publishes one rank file whose codes are `fill` and the rest zeros.
fn publish(out: &Path, force: bool, fill: u8) -> Result<Vec<String>> {
    let dir = OutputDir::create(out, force)?;
    let file = dir.rank_file(0, "model-rank-0-part-0.safetensors", &layout())?;
    file.write_at(0, 0, &[fill; 15]).unwrap();
    file.write_at(1, 0, &[0; 8]).unwrap();
    file.write_at(3, 0, &[0; 2]).unwrap();
    let sums = file.finish()?;
    dir.publish(&json!({"schema": 1}))?;
    Ok(sums)
}

fn listing(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name());
    let mut names: Vec<_> = names.map(|n| n.into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn output_reads_back() {
    let dir = tempdir().unwrap();
    let out = dir.path().join("deep/out");
    let output = OutputDir::create(&out, false).unwrap();
    let name = "model-rank-3-part-0.safetensors";
    let file = output.rank_file(3, name, &layout()).unwrap();
    // Two writes from the end, so its checksum comes from the file.
    file.write_at(0, 10, &[3; 5]).unwrap();
    file.write_at(0, 0, &[2; 10]).unwrap();
    for i in 0..8 {
        file.write_at(1, i, &[i as u8]).unwrap();
    }
    file.write_at(3, 0, &[7, 8]).unwrap();
    for (tensor, offset, n) in [(0, 15, 1), (0, u64::MAX, 1), (2, 0, 1), (4, 0, 0)] {
        assert_eq!(file.write_at(tensor, offset, &vec![1; n]).unwrap_err().code, "E0601");
    }
    let sums = file.finish().unwrap();
    assert!(!out.exists());
    output.publish(&json!({"schema": 1, "sums": sums})).unwrap();
    assert_eq!(listing(&dir.path().join("deep")), ["out"]);
    assert_eq!(listing(&out), ["manifest.json", "rank-3"]);

    let checkpoint = Checkpoint::open(&out.join("rank-3")).unwrap();
    for ((name, dtype, shape), sum) in layout().iter().zip(&sums) {
        let entry = checkpoint.get(name).unwrap();
        assert_eq!((entry.dtype, &entry.shape), (Some(*dtype), shape));
        assert_eq!(entry.offset % dtype.size(), 0);
        assert_eq!(&checksum_tensor(&checkpoint, entry).unwrap(), sum);
    }
    let mut codes = [0; 15];
    checkpoint.read_at(checkpoint.get("codes").unwrap(), 0, &mut codes).unwrap();
    assert_eq!(codes, *[&[2; 10][..], &[3; 5]].concat());
    let manifest: Value = read_json(&out.join("manifest.json"), "manifest").unwrap();
    assert_eq!(manifest["sums"][0], sums[0]);
    one(Checkpoint::open(&out), "E0413", &["output of a run", "rank-*"]);
    // Other readers agree on the file.
    let bytes = fs::read(out.join("rank-3").join(name)).unwrap();
    assert_eq!(safetensors::SafeTensors::deserialize(&bytes).unwrap().len(), 4);
}

#[test]
fn checksums_do_not_depend_on_the_order_of_writes() {
    let dir = tempdir().unwrap();
    let output = OutputDir::create(&dir.path().join("out"), false).unwrap();
    let n = 3_000_000usize;
    let data: Vec<u8> = (0..n).map(|i| ((i * i) >> 7) as u8).collect();
    let tensor = |name: &str| (name.to_owned(), DType::U8, vec![n as u64]);
    let list = [tensor("forward"), tensor("backward"), tensor("parallel"), tensor("again")];
    let file = output.rank_file(0, "x.safetensors", &list).unwrap();
    let pieces: Vec<(usize, &[u8])> =
        data.chunks(70_001).enumerate().map(|(i, p)| (i * 70_001, p)).collect();
    let write = |tensor, piece: &(usize, &[u8])| {
        file.write_at(tensor, piece.0 as u64, piece.1).unwrap();
    };
    std::thread::scope(|scope| {
        scope.spawn(|| pieces.iter().for_each(|p| write(0, p)));
        scope.spawn(|| pieces.iter().rev().for_each(|p| write(1, p)));
        for k in 0..3 {
            let pieces = &pieces;
            scope.spawn(move || pieces.iter().skip(k).step_by(3).for_each(|p| write(2, p)));
        }
        scope.spawn(|| {
            file.write_at(3, 0, &vec![1; n]).unwrap();
            file.write_at(3, 0, &data).unwrap();
        });
    });
    let sums = file.finish().unwrap();
    let want = format!("{:032x}", xxhash_rust::xxh3::xxh3_128(&data));
    assert_eq!(sums, vec![want; 4]);
}

#[test]
fn unfinished_output_leaves_nothing() {
    let dir = tempdir().unwrap();
    let out = dir.path().join("out");
    let output = OutputDir::create(&out, false).unwrap();
    one(OutputDir::create(&out, true), "E0603", &["in use"]);
    let file = output.rank_file(0, "x.safetensors", &layout()).unwrap();
    file.write_at(0, 0, &[0; 14]).unwrap();
    let error = file.finish().unwrap_err();
    assert_eq!(codes(&error), ["E0601"; 3]);
    has(&error.diagnostics[0], &["codes", "got 14 of its 15 bytes"]);
    assert!(output.rank_file(0, "x.safetensors", &[]).is_err(), "the same file twice");
    for name in ["../x.safetensors", "a/b.safetensors", "x.bin", ""] {
        one(output.rank_file(0, name, &[]), "E0601", &[name]);
    }
    let twice = [layout(), layout()].concat();
    one(output.rank_file(1, "x.safetensors", &twice), "E0601", &["codes is listed twice"]);
    let huge = [("h".to_owned(), DType::F32, vec![1 << 40, 1 << 40])];
    one(output.rank_file(2, "x.safetensors", &huge), "E0601", &["h", "64 bits"]);
    drop(output);
    assert!(listing(dir.path()).is_empty());
    publish(&out, false, 1).unwrap();
}

#[test]
fn what_may_be_replaced() {
    let dir = tempdir().unwrap();
    let out = dir.path().join("out");
    fs::create_dir(&out).unwrap();
    let first = publish(&out, false, 1).unwrap();
    one(publish(&out, false, 2), "E0603", &["earlier run", "--force"]);
    assert_ne!(publish(&out, true, 2).unwrap()[0], first[0]);
    assert_eq!(listing(dir.path()), ["out"]);

    let link = dir.path().join("link");
    symlink("out", &link).unwrap();
    publish(&link, true, 3).unwrap();
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());

    let breaks: [(&str, &str, &str); 4] = [
        ("notes.txt", "mine", "it holds notes.txt"),
        ("rank-0/notes.txt", "mine", "it holds rank-0/notes.txt"),
        ("manifest.json", "{\"schema\": 2}", "schema"),
        ("manifest.json", "{", "not valid JSON"),
    ];
    for (file, text, why) in breaks {
        let place = dir.path().join("broken");
        publish(&place, false, 1).unwrap();
        fs::write(place.join(file), text).unwrap();
        one(publish(&place, true, 2), "E0603", &["not the output of a run", why]);
        assert_eq!(fs::read_to_string(place.join(file)).unwrap(), text);
        fs::remove_dir_all(&place).unwrap();
    }
    fs::write(dir.path().join("file"), "").unwrap();
    one(publish(&dir.path().join("file"), true, 1), "E0603", &["not a folder"]);
    symlink("gone", dir.path().join("dangling")).unwrap();
    one(publish(&dir.path().join("dangling"), true, 1), "E0603", &["leads nowhere"]);
    one(publish(Path::new("/"), true, 1), "E0603", &["cannot be an output"]);
    one(publish(Path::new("/proc/self"), true, 1), "E0601", &["/proc"]);
}

#[test]
fn place_filled_during_the_run() {
    let dir = tempdir().unwrap();
    let out = dir.path().join("out");
    let output = OutputDir::create(&out, true).unwrap();
    fs::create_dir(&out).unwrap();
    fs::write(out.join("mine"), "").unwrap();
    one(output.publish(&json!({"schema": 1})), "E0603", &["not the output of a run"]);
    assert_eq!((listing(dir.path()), listing(&out)), (vec!["out".into()], vec!["mine".into()]));
}

#[test]
fn leftovers_of_a_killed_run() {
    let dir = tempdir().unwrap();
    let out = dir.path().join("out");
    publish(&out, false, 1).unwrap();
    // Killed between the two renames of a replacement, with another run's staging beside it.
    fs::rename(&out, dir.path().join(".out.old-77")).unwrap();
    fs::create_dir_all(dir.path().join(".out.partial-77/rank-0")).unwrap();
    fs::write(dir.path().join(".out.partial-77/rank-0/x.safetensors"), "half").unwrap();
    fs::create_dir_all(dir.path().join(".out.partial-mine")).unwrap();
    fs::write(dir.path().join(".out.lock"), "").unwrap();
    one(OutputDir::create(&out, false), "E0603", &["earlier run"]);
    assert_eq!(listing(dir.path()), [".out.partial-mine", "out"]);
}
