//! Compiled kernels on disk, so that only the first process compiles them.
//!
//! A folder that cannot be used, an entry that is damaged, two writers at once: none of it is
//! an error, the kernels are compiled again.

use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use super::Fallible;
use super::nvrtc::Compiler;

/// Names the folder; empty for none.
pub const VARIABLE: &str = "KERNELCAST_CACHE";

/// First word of an entry's first line, and part of its key. A change of the options that all
/// kernels share needs none: they are in the key.
const FORMAT: &str = "kernelcast-cubin-1";

/// A source compiled for a compute capability, from the disk if it is there.
///
/// # Errors
/// What the compiler says.
pub fn kernels(
    source: &str,
    name: &str,
    arch: (i32, i32),
    defines: &[(&str, String)],
) -> Fallible<Vec<u8>> {
    kernels_in(folder().as_deref(), source, name, arch, defines)
}

/// As [`kernels`], with the folder of entries given.
pub(super) fn kernels_in(
    folder: Option<&Path>,
    source: &str,
    name: &str,
    arch: (i32, i32),
    defines: &[(&str, String)],
) -> Fallible<Vec<u8>> {
    let compiler = Compiler::load()?;
    let options = compiler.options(arch, defines);
    let key = key(source, name, &options, arch, compiler.version());
    cached(folder, name, key, || compiler.cubin(source, name, arch, defines))
}

/// The folder of entries, if the environment gives one.
fn folder() -> Option<PathBuf> {
    folder_of(|name| std::env::var_os(name).map(PathBuf::from))
}

fn folder_of(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    if let Some(named) = variable(VARIABLE) {
        return (!named.as_os_str().is_empty()).then_some(named);
    }
    // A relative XDG_CACHE_HOME is to be ignored, by its specification.
    let shared = variable("XDG_CACHE_HOME").filter(|path| path.is_absolute());
    let home = || variable("HOME").filter(|path| path.is_absolute());
    Some(shared.or_else(|| Some(home()?.join(".cache")))?.join("kernelcast"))
}

/// Digest of all that the code depends on. Each part has its length before it, so that no two
/// lists of parts run together.
fn key(
    source: &str,
    name: &str,
    options: &[String],
    arch: (i32, i32),
    version: (i32, i32),
) -> u128 {
    let numbers = [arch.0, arch.1, version.0, version.1].map(|n| n.to_string());
    let parts = [FORMAT, source, name].into_iter();
    let parts = parts.chain(numbers.iter().map(String::as_str));
    let mut hash = Xxh3::new();
    for part in parts.chain(options.iter().map(String::as_str)) {
        hash.update(&(part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    hash.digest128()
}

/// The entry of this key, or else what `make` makes, which becomes the entry.
fn cached(
    folder: Option<&Path>,
    name: &str,
    key: u128,
    make: impl FnOnce() -> Fallible<Vec<u8>>,
) -> Fallible<Vec<u8>> {
    let Some(folder) = folder else { return make() };
    let path = folder.join(format!("{key:032x}.cubin"));
    match std::fs::read(&path) {
        Ok(entry) => match opened(&entry) {
            Some(code) => return Ok(code.to_vec()),
            None => tracing::debug!("{name}: {} is damaged: compiling", path.display()),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => tracing::debug!("{name}: cannot read {}: {error}", path.display()),
    }
    let code = make()?;
    if let Err(error) = store(folder, &path, &code) {
        tracing::debug!("{name}: cannot write {}: {error}", path.display());
    }
    Ok(code)
}

/// The first line of an entry.
fn header(code: &[u8]) -> String {
    format!("{FORMAT} {} {:032x}\n", code.len(), xxh3_128(code))
}

/// The code of an entry, if all of it is there and as it was written.
fn opened(entry: &[u8]) -> Option<&[u8]> {
    let end = entry.iter().take(128).position(|byte| *byte == b'\n')? + 1;
    let (first, code) = entry.split_at(end);
    (first == header(code).as_bytes()).then_some(code)
}

/// Writes an entry aside and renames it: a reader sees all of it or none.
fn store(folder: &Path, path: &Path, code: &[u8]) -> io::Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let aside = path.with_extension(format!("{}-{count}.tmp", std::process::id()));
    // A file left by a process of the same number that died is simply written over.
    let file = OpenOptions::new().write(true).create(true).truncate(true).open(&aside);
    let written = file.and_then(|mut file| {
        file.write_all(header(code).as_bytes())?;
        file.write_all(code)
    });
    let published = written.and_then(|()| std::fs::rename(&aside, path));
    if published.is_err() {
        let _ = std::fs::remove_file(&aside);
    }
    published
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::{cached, folder_of, key};
    use crate::diag::Diagnostic;

    fn code(length: usize) -> Vec<u8> {
        (0..length).map(|i| (i * 31 % 251) as u8).collect()
    }

    fn never() -> super::Fallible<Vec<u8>> {
        Err(Diagnostic::error("E0502", "compiled again"))
    }

    #[test]
    fn what_was_compiled_comes_back_from_disk() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("made/on/demand");
        for (key, length) in [(1, 0), (2, 5), (3, 100_000)] {
            let made = cached(Some(&folder), "k", key, || Ok(code(length))).unwrap();
            assert_eq!(made, code(length));
            let read = cached(Some(&folder), "k", key, never).unwrap();
            assert_eq!(read, code(length));
        }
        assert!(cached(Some(&folder), "k", 4, never).is_err());
        let left = std::fs::read_dir(&folder).unwrap().count();
        assert_eq!(left, 3, "nothing but entries is left");
    }

    #[test]
    fn a_damaged_entry_is_compiled_again() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Some(dir.path());
        let path = dir.path().join(format!("{:032x}.cubin", 7));
        cached(folder, "k", 7, || Ok(code(1000))).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        *flipped.last_mut().unwrap() ^= 1;
        let mut longer = whole.clone();
        longer.push(0);
        for damaged in [Vec::new(), whole[..500].to_vec(), b"junk".to_vec(), flipped, longer] {
            std::fs::write(&path, &damaged).unwrap();
            assert!(cached(folder, "k", 7, never).is_err());
            assert_eq!(cached(folder, "k", 7, || Ok(code(1000))).unwrap(), code(1000));
            assert_eq!(std::fs::read(&path).unwrap(), whole);
        }
    }

    #[test]
    fn a_folder_that_cannot_be_used_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "not a folder").unwrap();
        assert_eq!(cached(Some(&file), "k", 1, || Ok(code(9))).unwrap(), code(9));
        assert_eq!(cached(None, "k", 1, || Ok(code(9))).unwrap(), code(9));
    }

    #[test]
    fn writers_at_once_leave_a_whole_entry() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let got = cached(Some(folder), "k", 1, || Ok(code(50_000))).unwrap();
                        assert_eq!(got, code(50_000));
                        // Gone again, so that writers meet; readers may find nothing.
                        let _ = std::fs::remove_file(folder.join(format!("{:032x}.cubin", 1)));
                    }
                });
            }
        });
        cached(Some(folder), "k", 1, || Ok(code(50_000))).unwrap();
        assert_eq!(cached(Some(folder), "k", 1, never).unwrap(), code(50_000));
        assert_eq!(std::fs::read_dir(folder).unwrap().count(), 1);
    }

    #[test]
    fn every_part_of_the_key_counts() {
        let options = |list: &[&str]| -> Vec<String> {
            list.iter().map(|option| option.to_string()).collect()
        };
        let base = key("src", "k", &options(&["-Da=1", "-Db=2"]), (9, 0), (13, 0));
        let others = [
            key("src ", "k", &options(&["-Da=1", "-Db=2"]), (9, 0), (13, 0)),
            key("src", "k2", &options(&["-Da=1", "-Db=2"]), (9, 0), (13, 0)),
            key("src", "k", &options(&["-Da=1-Db=2"]), (9, 0), (13, 0)),
            key("src", "k", &options(&["-Da=1", "-Db=3"]), (9, 0), (13, 0)),
            key("src", "k", &options(&["-Da=1", "-Db=2"]), (10, 0), (13, 0)),
            key("src", "k", &options(&["-Da=1", "-Db=2"]), (9, 0), (13, 1)),
        ];
        assert!(others.iter().all(|other| *other != base));
    }

    #[test]
    fn the_folder_is_that_of_the_environment() {
        let environment = |set: &'static [(&str, &str)]| {
            folder_of(move |name| {
                set.iter().find(|(n, _)| *n == name).map(|(_, value)| PathBuf::from(value))
            })
        };
        let at = |path: &str| Some(PathBuf::from(path));
        assert_eq!(environment(&[("KERNELCAST_CACHE", "/c"), ("HOME", "/h")]), at("/c"));
        assert_eq!(environment(&[("KERNELCAST_CACHE", ""), ("HOME", "/h")]), None);
        let both = environment(&[("XDG_CACHE_HOME", "/x"), ("HOME", "/h")]);
        assert_eq!(both, at("/x/kernelcast"));
        let relative = environment(&[("XDG_CACHE_HOME", "x"), ("HOME", "/h")]);
        assert_eq!(relative, at("/h/.cache/kernelcast"));
        assert_eq!(environment(&[]), None);
    }
}
