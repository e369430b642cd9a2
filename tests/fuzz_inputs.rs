//! Damaged inputs of every kind: no panic, an end, a report. The targets of fuzz/ over a loop that
//! damages their seeds, the same damage each time. `KERNELCAST_FUZZ=N` gives each N inputs.

use std::panic::catch_unwind;
use std::time::{Duration, Instant};

#[path = "../fuzz/targets.rs"]
mod targets;

use targets::{TARGETS, Target};

/// Numbers from a seed (xorshift64*).
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % n.max(1)
    }

    fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}

const TOKENS: [&str; 34] = [
    "0",
    "-1",
    "1",
    "2",
    "3",
    "127",
    "128",
    "65536",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "1e400",
    "-0.0",
    "1.5",
    "null",
    "true",
    "\"\"",
    "\"x\"",
    "[]",
    "{}",
    "[[",
    "}}",
    ",",
    ":",
    "\\u0000",
    "\\ud800",
    "\"R\"",
    "\"S(9)\"",
    "\"SS(0,0)\"",
    "tp",
    "none",
    "e8m0",
    "..",
    "../",
];

/// One to four damages to a seed.
fn damaged(seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut bytes = random.pick(seeds).clone();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len());
        let end = (at + 1 + random.below(12)).min(bytes.len());
        match random.below(8) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
            1 if !bytes.is_empty() => drop(bytes.drain(at..end)),
            2 => bytes.insert(at, random.below(256) as u8),
            3 if !bytes.is_empty() => {
                let part = bytes[at..end].to_vec();
                bytes.splice(at..at, part.repeat(1 + random.below(40)));
            }
            4 => bytes.truncate(at),
            5 => {
                let other = random.pick(seeds);
                let from = random.below(other.len());
                bytes.splice(at..end.max(at), other[from..].iter().copied());
            }
            // What stands for a value gives way to another.
            _ => {
                let word = |b: &u8| b.is_ascii_alphanumeric() || *b == b'_' || *b == b'-';
                let from = bytes[at..].iter().position(word).map_or(at, |n| at + n);
                let to = bytes[from..].iter().position(|b| !word(b));
                let to = to.map_or(bytes.len(), |n| from + n);
                bytes.splice(from..to, random.pick(&TOKENS).bytes());
            }
        }
    }
    bytes
}

/// True if the target accepts the input.
fn run(target: &Target, data: &[u8], what: &str) -> bool {
    let started = Instant::now();
    let accepted = catch_unwind(|| (target.run)(data));
    let panicked = accepted.is_err();
    let slow = started.elapsed() > Duration::from_secs(30);
    if panicked || slow {
        let folder = std::path::Path::new("target/fuzz-failures");
        std::fs::create_dir_all(folder).unwrap();
        let path = folder.join(format!("{}-{what}", target.name));
        std::fs::write(&path, data).unwrap();
        let why = if panicked { "panicked" } else { "took more than 30 seconds" };
        panic!("{} {why} on {}: {}", target.name, path.display(), data.escape_ascii());
    }
    accepted.unwrap_or(false)
}

fn fuzz(name: &str) {
    let target = TARGETS.iter().find(|t| t.name == name).unwrap();
    let seeds = (target.seeds)();
    for (i, seed) in seeds.iter().enumerate() {
        let good = run(target, seed, &format!("seed-{i}"));
        assert!(good || i > 0, "{name}: the first seed is not accepted");
    }
    let given = std::env::var("KERNELCAST_FUZZ").ok().and_then(|n| n.parse().ok());
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    for i in 0..given.unwrap_or(1500) {
        run(target, &damaged(&seeds, &mut random), &i.to_string());
    }
}

macro_rules! fuzzed {
    ($($name:ident)*) => {
        $(#[test] fn $name() { fuzz(stringify!($name)); })*

        #[test]
        fn every_target_is_fuzzed_here_and_by_cargo_fuzz() {
            let names = [$(stringify!($name)),*];
            assert_eq!(TARGETS.map(|t| t.name), names);
            for name in names {
                let path = format!("fuzz/fuzz_targets/{name}.rs");
                let text = std::fs::read_to_string(path).unwrap();
                assert!(text.contains(&format!("targets::{name}(data)")));
            }
        }
    };
}

fuzzed! { plan config index header receiver sources experts output }
