//! What a machine does to a run: a full disk, a limit on files, unreadable inputs, a place that is
//! taken, signals. A clear error, the earlier output as it was, nothing half-written.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::{TempDir, tempdir};

const ENGINE: &str = env!("CARGO_BIN_EXE_engine");

fn text(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name());
    let mut names: Vec<String> = entries.map(|n| n.into_string().unwrap()).collect();
    names.sort();
    names
}

/// A model of one matrix of zeros, which takes no room on the disk, and its plan.
struct Sparse {
    dir: TempDir,
    plan: PathBuf,
}

impl Sparse {
    fn new(rows: u64) -> Sparse {
        let dir = tempdir().unwrap();
        let model = dir.path().join("model");
        fs::create_dir(&model).unwrap();
        fs::write(model.join("config.json"), "{}").unwrap();
        let bytes = rows * 4096 * 2;
        let header = format!(
            r#"{{"w":{{"dtype":"BF16","shape":[{rows},4096],"data_offsets":[0,{bytes}]}}}}"#
        );
        let mut file = File::create(model.join("model.safetensors")).unwrap();
        file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
        file.write_all(header.as_bytes()).unwrap();
        file.set_len(8 + header.len() as u64 + bytes).unwrap();
        let plan = dir.path().join("plan.rhai");
        let body = format!("at(\"\")[\"w\"] = at(\"\").src(\"w\", [{rows}, 4096])");
        fs::write(&plan, format!("{body}.quantize(fp8::vllm);")).unwrap();
        Sparse { dir, plan }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, out: &Path) -> Command {
        let mut command = Command::new(ENGINE);
        command.arg("run").arg(&self.plan).arg("--model").arg(self.path("model"));
        command.args(["--backend", "cpu", "--out"]).arg(out);
        command
    }
}

/// Waits until a run has its staging folder.
fn started(child: &mut Child, folder: &Path) {
    let until = Instant::now() + Duration::from_secs(30);
    while !names(folder).iter().any(|n| n.starts_with(".out.partial-")) {
        assert!(child.try_wait().unwrap().is_none(), "the run is over");
        assert!(Instant::now() < until, "the run does not start");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill").args(["-s", name, &child.id().to_string()]).status();
    assert!(sent.unwrap().success());
}

#[test]
fn an_interrupted_run_leaves_nothing_and_what_was_there_stays() {
    let model = Sparse::new(1 << 19);
    let place = tempdir().unwrap();
    let out = place.path().join("out");
    let first = Sparse::new(128).command(&out).output().unwrap();
    assert!(first.status.success(), "{}", text(&first));
    let manifest = fs::read(out.join("manifest.json")).unwrap();
    for name in ["INT", "TERM"] {
        let mut child =
            model.command(&out).arg("--force").stderr(Stdio::piped()).spawn().unwrap();
        started(&mut child, place.path());
        // Another run to the same place is refused meanwhile.
        let other = model.command(&out).arg("--force").output().unwrap();
        assert_eq!(other.status.code(), Some(1));
        let said = text(&other);
        assert!(said.contains("E0603") && said.contains("in use by another run"), "{said}");
        signal(&child, name);
        let done = child.wait_with_output().unwrap();
        assert_eq!(done.status.code(), Some(1), "{}", text(&done));
        let said = text(&done);
        assert!(said.contains("E0608") && said.contains("nothing was published"), "{said}");
        assert_eq!(names(place.path()), ["out"]);
        assert_eq!(fs::read(out.join("manifest.json")).unwrap(), manifest);
    }
}

#[test]
fn a_killed_run_is_cleared_by_the_next() {
    let model = Sparse::new(1 << 19);
    let place = tempdir().unwrap();
    let out = place.path().join("out");
    let mut child = model.command(&out).stderr(Stdio::null()).spawn().unwrap();
    started(&mut child, place.path());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(names(place.path()).iter().any(|n| n.starts_with(".out.partial-")));
    let next = Sparse::new(128).command(&out).output().unwrap();
    assert!(next.status.success(), "{}", text(&next));
    assert_eq!(names(place.path()), ["out"]);
}

#[test]
fn a_limit_on_the_size_of_files_is_an_error_of_the_write() {
    let model = Sparse::new(1 << 10);
    let place = tempdir().unwrap();
    let out = place.path().join("out");
    let limited = "ulimit -f 1000; exec \"$@\"";
    let command = model.command(&out);
    let run = Command::new("sh")
        .args(["-c", limited, "sh", ENGINE])
        .args(command.get_args())
        .output()
        .unwrap();
    assert_eq!(run.status.code(), Some(1), "{}", text(&run));
    assert!(text(&run).contains("E0601") && text(&run).contains("ulimit -f"), "{}", text(&run));
    assert_eq!(names(place.path()), Vec::<String>::new());
}

#[test]
fn a_full_disk_is_an_error_and_leaves_nothing() {
    let model = Sparse::new(1 << 10);
    let place = tempdir().unwrap();
    let out = place.path().join("out");
    // A mount that ends with the process.
    let script = "mount -t tmpfs -o size=1m tmpfs \"$0\" || exit 77; \"$@\"; s=$?; ls -A \"$0\"; exit $s";
    let command = model.command(&out);
    let run = Command::new("unshare")
        .args(["-m", "sh", "-c", script])
        .arg(place.path())
        .arg(ENGINE)
        .args(command.get_args())
        .output();
    match run {
        Ok(run) if run.status.code() == Some(1) && text(&run).contains("E0601") => {
            assert!(text(&run).contains("free space there"), "{}", text(&run));
            assert_eq!(String::from_utf8_lossy(&run.stdout), "");
        }
        Ok(run) if run.status.code() == Some(77) || text(&run).contains("unshare") => {
            eprintln!("skipped: no file system can be mounted here");
        }
        Ok(run) => panic!("{}", text(&run)),
        Err(why) => eprintln!("skipped: unshare does not run: {why}"),
    }
}

#[test]
fn standard_output_that_is_full_is_an_error() {
    let Ok(full) = File::options().write(true).open("/dev/full") else { return };
    let run = Command::new(ENGINE)
        .args(["dry-run", "plans/quickstart.rhai"])
        .stdout(full)
        .output()
        .unwrap();
    assert_eq!(run.status.code(), Some(1));
    assert!(text(&run).contains("E0601"), "{}", text(&run));
}

/// A run whose inputs are changed first; what it says.
fn refused(change: impl FnOnce(&Sparse)) -> String {
    let model = Sparse::new(128);
    change(&model);
    let place = tempdir().unwrap();
    let mut command = model.command(&place.path().join("out"));
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let until = Instant::now() + Duration::from_secs(30);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > until {
            child.kill().unwrap();
            panic!("it waits for ever");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(status.code(), Some(1), "{said}");
    assert_eq!(names(place.path()), Vec::<String>::new());
    assert!(!said.contains("panicked"), "{said}");
    said
}

#[test]
fn inputs_that_cannot_be_read_are_named() {
    let replaced = |name: &'static str, with: &'static str| {
        refused(move |model| {
            let path = model.path(name);
            fs::remove_file(&path).unwrap();
            match with {
                "folder" => fs::create_dir(&path).unwrap(),
                "pipe" => {
                    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success())
                }
                "device" => std::os::unix::fs::symlink("/dev/zero", &path).unwrap(),
                "loop" => std::os::unix::fs::symlink(&path, &path).unwrap(),
                _ => std::os::unix::fs::symlink("/nowhere/at/all", &path).unwrap(),
            }
        })
    };
    for name in ["plan.rhai", "model/config.json", "model/model.safetensors"] {
        let file = name.rsplit('/').next().unwrap();
        for with in ["folder", "pipe", "device", "loop", "dangling"] {
            let said = replaced(name, with);
            let lost = file == "model.safetensors" && said.contains("E0413");
            assert!(lost || said.contains(file), "{name} is a {with}: {said}");
        }
    }
    // A folder that may not be searched; root may.
    let closed = tempdir().unwrap();
    fs::write(closed.path().join("f"), "").unwrap();
    chmod(closed.path(), 0);
    if File::open(closed.path().join("f")).is_ok() {
        eprintln!("skipped: permissions do not bind this user");
    } else {
        let said = refused(|model| {
            chmod(&model.path("model/model.safetensors"), 0);
        });
        assert!(said.contains("E0601") && said.contains("who may read"), "{said}");
    }
    chmod(closed.path(), 0o700);
}

#[test]
fn places_that_no_output_can_take_are_refused() {
    let model = Sparse::new(128);
    let place = tempdir().unwrap();
    let file = place.path().join("file");
    fs::write(&file, "mine").unwrap();
    let foreign = place.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("mine"), "mine").unwrap();
    let long = place.path().join("x".repeat(300));
    for (out, code) in [
        (file.clone(), "E0603"),
        (file.join("below"), "E0601"),
        (foreign.clone(), "E0603"),
        (long, "E0601"),
        (PathBuf::from("/proc/engine-out"), "E0601"),
        (PathBuf::from("/"), "E0603"),
    ] {
        let run = model.command(&out).arg("--force").output().unwrap();
        assert_eq!(run.status.code(), Some(1), "{}: {}", out.display(), text(&run));
        assert!(text(&run).contains(code), "{}: {}", out.display(), text(&run));
    }
    assert_eq!(names(place.path()), ["file", "foreign"]);
    assert_eq!(fs::read(&file).unwrap(), b"mine");
    assert_eq!(names(&foreign), ["mine"]);
}
