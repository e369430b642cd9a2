//! Runs on GPUs through the binary: in one process and in two, and what happens when one of them
//! does not come. Without a GPU they are skipped, or fail where `KERNELCAST_REQUIRE_GPU` is set.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use kernelcast::backend::cuda::driver;

/// How many GPUs there are; none, with the reason, where there are fewer than `least`.
fn gpus(least: usize) -> Option<usize> {
    let found = driver::device_count();
    let why = match &found {
        Ok(count) if *count >= least => return Some(*count),
        Ok(count) => format!("{count} GPUs, {least} are needed"),
        Err(why) => why.message.clone(),
    };
    let required = std::env::var_os("KERNELCAST_REQUIRE_GPU").is_some();
    assert!(!required, "a GPU is required: {why}");
    eprintln!("skipped: {why}");
    None
}

fn engine(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_engine"));
    command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(out: &Path, more: &[&str]) -> Vec<String> {
    let mut args: Vec<String> = ["run", "plans/quickstart.rhai", "--backend", "cuda", "--out"]
        .map(str::to_owned)
        .to_vec();
    args.push(out.display().to_string());
    args.extend(more.iter().map(|s| (*s).to_owned()));
    args
}

/// One process of two, as a launcher starts it.
fn process(rank: usize, port: u16, args: &[String]) -> Child {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let world = [("RANK", rank.to_string()), ("LOCAL_RANK", rank.to_string())];
    let meeting = [("MASTER_ADDR", "127.0.0.1".to_owned()), ("MASTER_PORT", port.to_string())];
    let all = world.into_iter().chain(meeting).chain([("WORLD_SIZE", "2".to_owned())]);
    engine(&args).envs(all).spawn().expect("it starts")
}

fn succeeded(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn verify(out: &Path) {
    succeeded(&engine(&["verify", &out.display().to_string()]).output().expect("it runs"));
}

/// Two ports for one run: NCCL's neighbours and ours.
fn port() -> u16 {
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port is free");
    // The rendezvous listens one above the port that launchers announce.
    free.local_addr().expect("it is bound").port() - 1
}

#[test]
fn one_process_writes_what_the_oracle_makes() {
    if gpus(1).is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    for path in ["peer", "nccl"] {
        for train in ["fsdp=1", "fsdp=3", "dp_replicate=2,fsdp=2,ep=2"] {
            let out = folder.path().join(format!("{path}-{train}"));
            let args = run(&out, &["--path", path, "--train", train]);
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            succeeded(&engine(&args).output().expect("it runs"));
            verify(&out);
        }
    }
}

#[test]
fn two_processes_write_what_the_oracle_makes() {
    if gpus(2).is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    for path in ["peer", "nccl"] {
        let out = folder.path().join(path);
        let args = run(&out, &["--path", path, "--train", "fsdp=3"]);
        let port = port();
        let both = [0, 1].map(|rank| process(rank, port, &args));
        for one in both {
            succeeded(&one.wait_with_output().expect("it ends"));
        }
        verify(&out);
    }
}

#[test]
fn a_process_that_dies_is_named_and_nothing_is_published() {
    if gpus(2).is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    for path in ["peer", "nccl"] {
        for wait in [150, 400, 900] {
            let out = folder.path().join(format!("{path}-{wait}"));
            let args = run(&out, &["--path", path, "--timeout", "5"]);
            let port = port();
            let first = process(0, port, &args);
            let mut second = process(1, port, &args);
            std::thread::sleep(Duration::from_millis(wait));
            second.kill().expect("it is ours");
            second.wait().expect("it ends");
            let left = first.wait_with_output().expect("it ends");
            let said = String::from_utf8_lossy(&left.stderr).into_owned();
            // It may have been through before.
            if !left.status.success() {
                assert_eq!(left.status.code(), Some(3), "{said}");
                let named = said.contains("process 1") || said.contains("GPU 1");
                assert!(named, "{said}");
                assert!(!out.exists(), "nothing is published");
            }
        }
    }
}

#[test]
fn processes_with_other_plans_do_not_start() {
    if gpus(2).is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("out");
    let port = port();
    let first = process(0, port, &run(&out, &["--timeout", "20"]));
    let other = run(&out, &["--timeout", "20", "--infer", "tp=1"]);
    let second = process(1, port, &other);
    let both = [first, second].map(|p| p.wait_with_output().expect("it ends"));
    for output in &both {
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{said}");
    }
    let said: String = both.iter().map(|o| String::from_utf8_lossy(&o.stderr)).collect();
    assert!(said.contains("E0611"), "{said}");
    assert!(!out.exists(), "nothing is published");
}
