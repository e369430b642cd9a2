//! How processes meet: rounds, failures and their end, in process and over HTTP, and what an
//! unusable world, a stranger or a peer that dies is answered.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use kernelcast::diag::Diagnostic;
use kernelcast::rendezvous::{Hall, Member, Server, World, agree, join, serve};
use serde_json::{Value, json};

/// Longer than anything takes that goes well.
const LONG: Duration = Duration::from_secs(60);

/// What "at once" is, on a machine that is busy.
const SOON: Duration = Duration::from_secs(20);

fn world(rank: usize, size: usize, port: u16) -> World {
    let address = "127.0.0.1".into();
    World { rank, size, local_rank: rank, address, port, token: "test".into() }
}

/// Members of one hall: all in process, or all but the first over HTTP. The server goes last.
fn meet(size: usize, http: bool) -> (Vec<Member>, Option<Server>) {
    let hall = Hall::new(size);
    if !http {
        return ((0..size).map(|m| hall.member(m)).collect(), None);
    }
    let server = serve(Arc::clone(&hall), &world(0, size, 0)).unwrap();
    let mut members = vec![hall.member(0)];
    for rank in 1..size {
        members.push(join(&world(rank, size, server.port()), LONG).unwrap());
    }
    (members, Some(server))
}

/// Runs the same on a thread for each member; members stay until all are done.
fn each<T: Send>(members: &[Member], work: impl Fn(&Member) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let all: Vec<_> = members.iter().map(|m| scope.spawn(|| work(m))).collect();
        all.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn both(work: impl Fn(bool)) {
    work(false);
    work(true);
}

fn eventually(what: &str, is: impl Fn() -> bool) {
    let start = Instant::now();
    while !is() {
        assert!(start.elapsed() < SOON, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[track_caller]
fn says(diagnostic: &Diagnostic, code: &str, parts: &[&str]) {
    assert_eq!(diagnostic.code, code, "{diagnostic:?}");
    let mut text = diagnostic.message.clone();
    text.extend(diagnostic.notes.iter().chain(&diagnostic.hint).map(|n| format!("\n{n}")));
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

#[test]
fn rounds_give_all_payloads_in_order() {
    both(|http| {
        let (members, _server) = meet(4, http);
        each(&members, |member| {
            for round in 0..100 {
                // Half of the rounds share a name: the n-th use meets the n-th.
                let name =
                    if round % 2 == 0 { "same".into() } else { format!("round {round}") };
                let all = member.exchange(&name, json!([member.rank(), round]), LONG).unwrap();
                let wanted: Vec<Value> = (0..4).map(|m| json!([m, round])).collect();
                assert_eq!(all, wanted, "{name}");
            }
            assert!(member.failure().is_none());
        });
    });
}

#[test]
fn typed_values_name_who_sent_something_else() {
    let (members, _server) = meet(2, false);
    let got = each(&members, |member| match member.rank() {
        0 => member.share("handles", &vec![1u8, 2], LONG).map(|_| ()),
        _ => member.share("handles", &"x".to_string(), LONG).map(|_| ()),
    });
    says(got[0].as_ref().unwrap_err(), "E0611", &["process 1 gave at `handles`"]);
    says(got[1].as_ref().unwrap_err(), "E0611", &["process 0 gave at `handles`"]);
}

#[test]
fn members_that_never_come_are_named() {
    both(|http| {
        let (members, _server) = meet(4, http);
        let got = each(&members, |member| match member.rank() {
            0 => Some(member.barrier("end of update 7", Duration::from_millis(300))),
            2 => Some(member.barrier("end of update 7", LONG)),
            _ => None,
        });
        for got in got.into_iter().flatten() {
            let text = "processes 1 and 3 did not come to `end of update 7` within 0.3 s";
            says(&got.unwrap_err(), "E0604", &[text, "process 0 waited"]);
        }
        // Who comes too late hears the same, and so do watchdogs.
        let late = members[3].barrier("end of update 7", LONG).unwrap_err();
        says(&late, "E0604", &["processes 1 and 3 did not come"]);
        eventually("the watchdog of 1", || members[1].failure().is_some());
    });
}

#[test]
fn who_waits_elsewhere_is_said() {
    let (members, _server) = meet(2, true);
    let got = std::thread::scope(|scope| {
        let other = scope.spawn(|| members[1].barrier("end", LONG));
        // By then the other is there.
        let got = members[0].barrier("begin", Duration::from_secs(2)).unwrap_err();
        assert!(other.join().unwrap().is_err());
        got
    });
    says(&got, "E0604", &["process 1 waits at `end`", "process 1 runs on", "process id"]);
}

#[test]
fn a_failure_ends_all_waits_and_a_retry_forgets_it() {
    both(|http| {
        let (members, _server) = meet(4, http);
        for turn in 0..3 {
            let failing = 3 - turn;
            let start = Instant::now();
            let got = each(&members, |member| {
                member.barrier("begin", LONG).unwrap();
                if member.rank() == failing {
                    let no = Diagnostic::error("E0602", "w has 3 NaN").note("first at 17");
                    member.fail(&no);
                    // A second one, and one of another member, do not replace it.
                    member.fail(&Diagnostic::error("E0605", "no GPU"));
                }
                member.exchange("end", json!(turn), LONG).unwrap_err()
            });
            assert!(start.elapsed() < SOON);
            for (member, got) in got.iter().enumerate() {
                if member == failing {
                    says(got, "E0602", &["w has 3 NaN", "first at 17"]);
                } else {
                    let text = format!("process {failing} failed: w has 3 NaN");
                    says(got, "E0604", &[&text, "its code is E0602", "first at 17"]);
                }
            }
            for member in &members {
                eventually("watchdogs", || member.failure().is_some());
            }
            each(&members, |member| {
                assert!(member.barrier("later", LONG).is_err());
                member.retry(LONG).unwrap();
                assert!(member.failure().is_none(), "{turn}");
                let all = member.exchange("end", json!(member.rank()), LONG).unwrap();
                assert_eq!(all, [0, 1, 2, 3].map(|m| json!(m)));
            });
        }
    });
}

#[test]
fn a_retry_needs_all() {
    both(|http| {
        let (members, _server) = meet(3, http);
        // One that gives up without a failure ends the others' waits, too.
        let got = each(&members, |member| match member.rank() {
            0 => member.barrier("end", LONG),
            1 => member.retry(Duration::from_millis(300)),
            _ => Ok(()),
        });
        says(got[0].as_ref().unwrap_err(), "E0604", &["process 1 failed", "starts over"]);
        let text = "processes 0 and 2 did not come to start the update over within 0.3 s";
        says(got[1].as_ref().unwrap_err(), "E0604", &[text]);
        each(&members, |member| {
            member.retry(LONG).unwrap();
            member.barrier("end", LONG).unwrap();
        });
    });
}

#[test]
fn one_that_leaves_is_missed_only_where_it_is_needed() {
    both(|http| {
        let (mut members, _server) = meet(3, http);
        each(&members, |member| member.barrier("last", LONG).unwrap());
        drop(members.pop());
        assert!(members.iter().all(|m| m.failure().is_none()));
        let got = each(&members, |member| member.barrier("more", LONG).unwrap_err());
        for got in got {
            says(&got, "E0604", &["process 2 has left the run", "`more`"]);
        }
        let got = members[1].retry(LONG).unwrap_err();
        says(&got, "E0604", &["process 2 has left the run; an update cannot start over"]);
    });
}

#[test]
fn one_that_panics_tells() {
    let (mut members, _server) = meet(2, true);
    let panicking = members.pop().unwrap();
    let thread = std::thread::spawn(move || {
        let _member = panicking;
        std::panic::resume_unwind(Box::new("a bug"));
    });
    assert!(thread.join().is_err());
    let got = members[0].barrier("end", LONG).unwrap_err();
    says(&got, "E0604", &["process 1 failed: it stopped at a bug (a panic)"]);
}

#[test]
fn who_differs_is_named_with_both_values() {
    both(|http| {
        let (members, _server) = meet(4, http);
        let verdict = |hashes: [&str; 4]| {
            each(&members, |member| {
                let hash = hashes[member.rank()].to_owned();
                agree(member, &[("plan digest", "d1".into()), ("schedule hash", hash)], LONG)
            })
        };
        assert!(verdict(["a"; 4]).iter().all(Result::is_ok));
        for got in verdict(["a", "a", "b", "c"]) {
            let two =
                "process 2 has another schedule hash than processes 0 and 1: b instead of a";
            let three = "process 3 has another schedule hash than processes 0 and 1: c instead";
            says(&got.unwrap_err(), "E0611", &[two, three]);
        }
        // The odd one may be process 0.
        for got in verdict(["b", "a", "a", "a"]) {
            let text =
                "process 0 has another schedule hash than processes 1 to 3: b instead of a";
            says(&got.unwrap_err(), "E0611", &[text]);
        }
        assert!(verdict(["a"; 4]).iter().all(Result::is_ok));
    });
}

#[test]
fn strangers_are_refused() {
    let hall = Hall::new(3);
    let server = serve(Arc::clone(&hall), &world(0, 3, 0)).unwrap();
    let port = server.port();
    let no = |world: World| join(&world, LONG).err().expect("is refused");

    let token = World { token: "other".into(), ..world(1, 3, port) };
    says(&no(token), "E0610", &["another run: its token differs", "KERNELCAST_TOKEN"]);
    says(
        &no(world(1, 4, port)),
        "E0610",
        &["process 1 was started as one of 4, process 0 as one of 3"],
    );
    says(&no(world(5, 4, port)), "E0610", &["no process 5 among 4"]);

    let first = join(&world(1, 3, port), LONG).unwrap();
    says(
        &no(world(1, 3, port)),
        "E0610",
        &["process 1 has joined already", "now one joins from"],
    );
    // The first is not disturbed; once it has left, its number is free.
    assert!(first.failure().is_none());
    drop(first);
    drop(join(&world(1, 3, port), LONG).unwrap());

    // Process 0 twice.
    let taken = serve(Arc::clone(&hall), &world(0, 3, port)).err().expect("is refused");
    says(&taken, "E0610", &["process 0 cannot listen on 127.0.0.1", "KERNELCAST_PORT"]);
}

/// Sends bytes as they are; gives what comes back until the other end closes or a second ends.
fn raw(port: u16, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    let _ = stream.write_all(bytes);
    let (mut all, mut part) = (Vec::new(), [0; 4096]);
    while let Ok(n @ 1..) = stream.read(&mut part) {
        all.extend_from_slice(&part[..n]);
    }
    String::from_utf8_lossy(&all).into()
}

fn post(port: u16, path: &str, body: &str) -> String {
    let length = body.len();
    let head = format!("POST /v1/{path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n");
    raw(port, format!("{head}content-length: {length}\r\n\r\n{body}").as_bytes())
}

#[test]
fn garbage_is_answered_and_disturbs_nobody() {
    let (members, server) = meet(2, true);
    let port = server.as_ref().unwrap().port();
    let good = |change: &dyn Fn(&mut Value)| {
        let mut call = json!({
            "schema": 1, "version": env!("CARGO_PKG_VERSION"), "token": "test", "member": 1,
            "size": 2, "instance": "none", "body": {"place": "here"},
        });
        change(&mut call);
        call.to_string()
    };
    let cases: [(String, &str); 9] = [
        (good(&|c| c["schema"] = json!(2)), "speaks schema 2, process 0 1"),
        (good(&|c| c["version"] = json!("9.0")), "process 1 runs kernelcast 9.0, process 0"),
        (good(&|c| c["member"] = json!(0)), "two processes have number 0"),
        (good(&|c| c["member"] = json!(7)), "no process 7 among 2"),
        (good(&|c| c["member"] = json!(-1)), "makes no sense"),
        (good(&|c| drop(c.as_object_mut().unwrap().remove("token"))), "missing field `token`"),
        (good(&|c| c["body"] = json!([])), "makes no sense"),
        ("{".into(), "makes no sense"),
        ("\u{0}\u{1}".into(), "makes no sense"),
    ];
    for (body, answer) in cases {
        let got = post(port, "join", &body);
        assert!(got.starts_with("HTTP/1.1 4") && got.contains(answer), "{answer}: {got}");
    }
    for path in ["exchange", "again", "fail", "watch", "leave"] {
        let got = post(port, path, &good(&|_| ()));
        assert!(got.contains("process 1 has not joined this process 0"), "{path}: {got}");
    }
    let nested = format!("{{\"schema\":1,\"token\":{}", "[".repeat(100_000));
    assert!(post(port, "join", &nested).contains("makes no sense"));
    assert!(
        raw(port, b"GET /v1/join HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            .contains("405")
    );
    assert!(!raw(port, &[0xFF; 10_000]).contains("200 OK"));
    raw(port, b"POST /v1/exchange HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{");
    let huge = "POST /v1/exchange HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n";
    assert!(raw(port, huge.as_bytes()).contains("more than the 64 MiB allowed"));
    each(&members, |member| member.barrier("after", LONG).unwrap());
}

#[test]
fn a_payload_can_be_large_but_not_endless() {
    let (members, _server) = meet(2, true);
    let got = each(&members, |member| {
        let all = member.exchange("large", json!("x".repeat(8 << 20)), LONG).unwrap();
        assert!(all.iter().all(|v| v.as_str().is_some_and(|t| t.len() == 8 << 20)));
        let bytes = if member.rank() == 1 { 65 << 20 } else { 1 };
        member.exchange("huge", json!("x".repeat(bytes)), LONG).unwrap_err()
    });
    says(&got[1], "E0502", &["the payload of `huge` has 65 MiB, more than the 64 MiB allowed"]);
    says(&got[0], "E0604", &["process 1 failed: the payload of `huge`"]);
}

/// A port on which nothing listens now.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn process_0_may_be_late() {
    let port = free_port();
    let started = Barrier::new(2);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            started.wait();
            let member = join(&world(1, 2, port), LONG).unwrap();
            member.exchange("hello", json!(1), LONG).unwrap()
        });
        started.wait();
        std::thread::sleep(Duration::from_millis(400));
        let member = join(&world(0, 2, port), LONG).unwrap();
        assert_eq!((member.rank(), member.size()), (0, 2));
        assert_eq!(member.exchange("hello", json!(0), LONG).unwrap(), [json!(0), json!(1)]);
        assert_eq!(other.join().unwrap(), [json!(0), json!(1)]);
    });
}

#[test]
fn process_0_may_never_come() {
    let port = free_port();
    let got = join(&world(1, 2, port), Duration::from_millis(400)).err().unwrap();
    let at = format!("process 0 was not found at 127.0.0.1:{port} within 0.4 s");
    says(&got, "E0604", &[&at, "refused"]);
    // Something else listens there, and never speaks.
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = mute.local_addr().unwrap().port();
    let got = join(&world(1, 2, port), Duration::from_millis(400)).err().unwrap();
    says(&got, "E0604", &["process 0 was not found at", "no answer within"]);
    let nowhere = World { address: "no-such-host.invalid".into(), ..world(1, 2, 1) };
    let got = join(&nowhere, Duration::from_millis(400)).err().unwrap();
    says(&got, "E0604", &["process 0 was not found at no-such-host.invalid:1"]);
}

#[test]
fn process_0_may_leave() {
    let (mut members, server) = meet(3, true);
    let rest = members.split_off(1);
    let waiting = Barrier::new(2);
    let got = std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            waiting.wait();
            rest[0].barrier("end", LONG).unwrap_err()
        });
        waiting.wait();
        std::thread::sleep(Duration::from_millis(200));
        drop(members);
        drop(server);
        other.join().unwrap()
    });
    says(&got, "E0604", &["process 0 has left the run"]);
    let got = rest[1].barrier("end", LONG).unwrap_err();
    says(&got, "E0604", &["process 0", "`end`"]);
}

#[test]
fn one_process_needs_nobody() {
    // Nothing is listened on: the port is taken, and that does not matter.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let member = join(&world(0, 1, port), LONG).unwrap();
    assert_eq!(member.exchange("alone", json!(5), LONG).unwrap(), [json!(5)]);
    member.fail(&Diagnostic::error("E0605", "no GPU"));
    says(&member.failure().unwrap(), "E0605", &["no GPU"]);
    member.retry(LONG).unwrap();
    member.barrier("again", LONG).unwrap();
}

/// Not a test of its own: the other process of those below, which runs until it is killed.
#[test]
fn another_process() {
    let Ok(text) = std::env::var("RENDEZVOUS_OTHER") else { return };
    let (rank, port) = text.split_once(' ').unwrap();
    let member = join(&world(rank.parse().unwrap(), 2, port.parse().unwrap()), LONG).unwrap();
    member.barrier("begin", LONG).unwrap();
    std::thread::sleep(LONG);
}

struct Other(std::process::Child);

impl Other {
    fn start(rank: usize, port: u16) -> Other {
        let own = std::env::current_exe().unwrap();
        let mut command = std::process::Command::new(own);
        command.args(["--exact", "another_process"]);
        command.env("RENDEZVOUS_OTHER", format!("{rank} {port}"));
        Other(command.stdout(std::process::Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_death_of_a_process_is_noticed() {
    for dying in [0, 1] {
        let port = free_port();
        let other = Other::start(dying, port);
        let member = join(&world(1 - dying, 2, port), LONG).unwrap();
        member.barrier("begin", LONG).unwrap();
        assert!(member.failure().is_none());
        drop(other);
        // Nobody waits in a round: only the watchdog can know.
        eventually("a failure", || member.failure().is_some());
        let name = format!("process {dying}");
        says(&member.failure().unwrap(), "E0604", &[&name, "is gone"]);
        says(&member.barrier("end", LONG).unwrap_err(), "E0604", &[&name]);
        says(&member.retry(LONG).unwrap_err(), "E0604", &[&name]);
    }
}

#[test]
fn a_wait_ends_when_a_process_dies() {
    for dying in [0, 1] {
        let port = free_port();
        let other = Other::start(dying, port);
        let member = join(&world(1 - dying, 2, port), LONG).unwrap();
        member.barrier("begin", LONG).unwrap();
        std::thread::scope(|scope| {
            let wait = scope.spawn(|| member.barrier("end", LONG).unwrap_err());
            std::thread::sleep(Duration::from_millis(200));
            let start = Instant::now();
            drop(other);
            let got = wait.join().unwrap();
            assert!(start.elapsed() < SOON);
            says(&got, "E0604", &[&format!("process {dying} "), "`end`"]);
        });
    }
}

fn from_env(set: &[(&str, &str)]) -> Result<Option<World>, Diagnostic> {
    let set: BTreeMap<&str, &str> = set.iter().copied().collect();
    World::from_env(&|name| set.get(name).map(|v| (*v).to_owned()))
}

const TORCHRUN: [(&str, &str); 6] = [
    ("RANK", "3"),
    ("WORLD_SIZE", "16"),
    ("LOCAL_RANK", "1"),
    ("MASTER_ADDR", "node17"),
    ("MASTER_PORT", "29500"),
    ("TORCHELASTIC_RUN_ID", "job"),
];

const SRUN: [(&str, &str); 7] = [
    ("SLURM_PROCID", "3"),
    ("SLURM_NTASKS", "16"),
    ("SLURM_LOCALID", "1"),
    ("SLURM_JOB_ID", "job"),
    ("SLURM_STEP_ID", "0"),
    ("MASTER_ADDR", "node17"),
    ("MASTER_PORT", "29500"),
];

#[test]
fn worlds_that_launchers_describe() {
    let wanted = World {
        rank: 3,
        size: 16,
        local_rank: 1,
        address: "node17".into(),
        port: 29501,
        token: "job".into(),
    };
    assert_eq!(from_env(&TORCHRUN).unwrap(), Some(wanted.clone()));
    assert_eq!(from_env(&SRUN).unwrap(), Some(wanted.clone()));
    // torchrun under srun: torchrun's words hold.
    let under = [&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "2")][..], &TORCHRUN].concat();
    assert_eq!(from_env(&under).unwrap(), Some(wanted.clone()));
    let with = |more: &[(&'static str, &'static str)]| {
        from_env(&[&TORCHRUN[..], more].concat()).unwrap().unwrap()
    };
    assert_eq!(with(&[("KERNELCAST_PORT", "7000")]).port, 7000);
    assert_eq!(with(&[("KERNELCAST_PORT", "7000"), ("MASTER_PORT", "65535")]).port, 7000);
    assert_eq!(with(&[("KERNELCAST_TOKEN", "mine")]).token, "mine");
    assert_eq!(with(&[("KERNELCAST_TOKEN", "")]).token, "job");
    assert_eq!(with(&[("TORCHELASTIC_RUN_ID", "")]).token, "kernelcast");
    assert_eq!(with(&[("MASTER_ADDR", "10.0.0.7")]).authority(), "10.0.0.7:29501");
    for address in ["fd00::1", "[fd00::1]", "fd00:0::1"] {
        let world = with(&[("MASTER_ADDR", address)]);
        assert_eq!((&*world.address, &*world.authority()), ("fd00::1", "[fd00::1]:29501"));
    }

    // No run of several processes: nothing set, a shell in an allocation, a batch script, an
    // interactive step of one task.
    let none: [&[(&str, &str)]; 5] = [
        &[],
        &[("MASTER_ADDR", "node17"), ("MASTER_PORT", "29500")],
        &[("SLURM_NTASKS", "16"), ("SLURM_JOB_ID", "9")],
        &[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "16"), ("SLURM_JOB_ID", "9")],
        &[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "1"), ("SLURM_LOCALID", "0")],
    ];
    for set in none {
        assert_eq!(from_env(set).unwrap(), None, "{set:?}");
    }
}

#[test]
fn worlds_that_make_no_sense() {
    for (missing, _) in &TORCHRUN[..5] {
        let rest: Vec<_> = TORCHRUN.iter().copied().filter(|(n, _)| n != missing).collect();
        let got = from_env(&rest).unwrap_err();
        says(
            &got,
            "E0610",
            &["torchrun's", &format!("are set, but not {missing}"), "to run one"],
        );
    }
    for missing in ["SLURM_NTASKS", "SLURM_LOCALID", "MASTER_ADDR", "MASTER_PORT"] {
        let rest: Vec<_> = SRUN.iter().copied().filter(|(n, _)| *n != missing).collect();
        let got = from_env(&rest).unwrap_err();
        says(&got, "E0610", &["srun's", &format!("are set, but not {missing}"), "scontrol"]);
    }
    let cases = [
        ("RANK", "", "RANK is ``, not a number from 0 to"),
        ("RANK", "x", "RANK is `x`, not a number"),
        ("RANK", "-1", "RANK is `-1`, not a number"),
        ("RANK", "+1", "RANK is `+1`, not a number"),
        ("RANK", "1.0", "RANK is `1.0`, not a number"),
        ("RANK", " 1", "RANK is ` 1`, not a number"),
        ("RANK", "99999999999999999999999", "not a number"),
        ("RANK", "16", "RANK is 16, but WORLD_SIZE is 16"),
        ("LOCAL_RANK", "17", "LOCAL_RANK is 17, but WORLD_SIZE is 16"),
        ("WORLD_SIZE", "0", "WORLD_SIZE is `0`, not a number from 1"),
        (
            "WORLD_SIZE",
            "1000000000",
            "WORLD_SIZE is `1000000000`, not a number from 1 to 65536",
        ),
        ("MASTER_PORT", "0", "MASTER_PORT is `0`, not a number from 1 to 65535"),
        ("MASTER_PORT", "65536", "MASTER_PORT is `65536`, not a number from 1 to 65535"),
        ("MASTER_PORT", "65535", "there is no port after it"),
        ("MASTER_PORT", "http", "MASTER_PORT is `http`"),
        ("KERNELCAST_PORT", "0", "KERNELCAST_PORT is `0`"),
        ("KERNELCAST_PORT", "", "KERNELCAST_PORT is ``"),
        ("MASTER_ADDR", "", "MASTER_ADDR is ``, not a host name"),
        ("MASTER_ADDR", "node17:29500", "MASTER_ADDR is `node17:29500`, not a host name"),
        ("MASTER_ADDR", "http://node17", "not a host name"),
        ("MASTER_ADDR", "node17/x", "not a host name"),
        ("MASTER_ADDR", "me@node17", "not a host name"),
        ("MASTER_ADDR", "node 17", "not a host name"),
        ("MASTER_ADDR", "[node17]", "not a host name"),
        ("MASTER_ADDR", "fe80::1%eth0", "not a host name"),
    ];
    for (name, value, text) in cases {
        let set = [&TORCHRUN[..], &[(name, value)]].concat();
        says(&from_env(&set).unwrap_err(), "E0610", &[text]);
    }
}

/// Prints what a barrier costs; no bound, for machines differ.
#[test]
fn what_a_barrier_costs() {
    for (size, http, rounds) in
        [(1, false, 2000), (2, false, 2000), (8, false, 500), (2, true, 500), (8, true, 100)]
    {
        let (members, _server) = meet(size, http);
        let start = Instant::now();
        each(&members, |member| {
            for _ in 0..rounds {
                member.barrier("cost", LONG).unwrap();
            }
        });
        let each = start.elapsed() / rounds;
        println!("{size} members, {}: {each:?} a barrier", if http { "HTTP" } else { "local" });
    }
}
