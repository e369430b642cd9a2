//! The place of a run's output: its lock, what already lies there, what a crash left.
//! Knows nothing of tensors.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{fault, json};
use crate::diag::Diagnostic;

type Checked<T> = Result<T, Diagnostic>;

/// The schema number of a run's manifest.
const SCHEMA: u64 = 1;

/// Where an output will be published: a real parent folder and a name in it.
#[derive(Debug)]
pub(super) struct Place {
    pub parent: PathBuf,
    pub name: String,
    pub path: PathBuf,
}

/// What lies at a place that a run may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Existing {
    Nothing,
    EmptyFolder,
    /// An earlier output that the user wants replaced.
    EarlierRun,
}

impl Place {
    /// Follows links to the real place, and makes the parent folder if it is not there.
    pub(super) fn resolve(out: &Path) -> Checked<Place> {
        if out.as_os_str().is_empty() {
            return Err(taken("the output path is empty".to_owned()));
        }
        let path = match fs::canonicalize(out) {
            Ok(path) => path,
            Err(_) if fs::symlink_metadata(out).is_ok() => {
                let text = format!("{} is a link that leads nowhere", out.display());
                return Err(taken(text));
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let parent = match out.parent() {
                    Some(parent) if !parent.as_os_str().is_empty() => parent,
                    _ => Path::new("."),
                };
                let Some(name) = out.file_name() else {
                    let text = format!("{} does not end in a folder's name", out.display());
                    return Err(taken(text));
                };
                fs::create_dir_all(parent)
                    .and_then(|()| fs::canonicalize(parent))
                    .map_err(|e| fault::os("make the folder", parent, &e))?
                    .join(name)
            }
            Err(e) => return Err(fault::os("open the output folder", out, &e)),
        };
        let name = path.file_name().and_then(|n| n.to_str());
        let (Some(parent), Some(name)) = (path.parent(), name) else {
            return Err(taken(format!("{} cannot be an output folder", path.display())));
        };
        Ok(Place { parent: parent.to_path_buf(), name: name.to_owned(), path: path.clone() })
    }

    /// A hidden sibling of the output, on the same file system so that a rename is one step.
    pub(super) fn sibling(&self, what: &str) -> PathBuf {
        self.parent.join(format!(".{}.{what}", self.name))
    }

    /// Says what lies there, or why a run may not take the place.
    pub(super) fn inspect(&self, force: bool) -> Checked<Existing> {
        let shown = self.path.display();
        let meta = match fs::symlink_metadata(&self.path) {
            Ok(meta) => meta,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Existing::Nothing),
            Err(e) => return Err(fault::os("open the output folder", &self.path, &e)),
        };
        if !meta.is_dir() {
            return Err(taken(format!("{shown} exists and is not a folder")));
        }
        let os = |e: io::Error| fault::os("list", &self.path, &e);
        let parent = fs::metadata(&self.parent).map_err(os)?;
        if parent.dev() != meta.dev() {
            let text = format!("{shown} is a mount point and cannot be replaced in one step");
            return Err(taken(text).hint("give a folder inside it"));
        }
        if fs::read_dir(&self.path).map_err(os)?.next().is_none() {
            return Ok(Existing::EmptyFolder);
        }
        match (looks_like_a_run(&self.path), force) {
            (Ok(()), true) => Ok(Existing::EarlierRun),
            (Ok(()), false) => {
                Err(taken(format!("{shown} holds the output of an earlier run"))
                    .hint("choose another folder, or replace it with --force"))
            }
            (Err(_), false) => {
                Err(taken(format!("{shown} exists and is not empty"))
                    .hint("choose another folder"))
            }
            (Err(why), true) => Err(taken(format!(
                "{shown} is not the output of a run ({why}), so --force does not replace it"
            ))
            .hint("choose another folder, or remove it by hand")),
        }
    }

    /// Clears what a killed run left beside the place. Only the holder of the lock may call it.
    pub(super) fn clear_leftovers(&self) {
        // Failing here costs disk space only; what matters is checked again before a rename.
        let Ok(entries) = fs::read_dir(&self.parent) else { return };
        let partial = format!(".{}.partial-", self.name);
        let old = format!(".{}.old-", self.name);
        for path in entries.flatten().map(|e| e.path()) {
            let Some(name) = path.file_name().and_then(|n| n.to_str()) else { continue };
            let ours = |prefix: &str| {
                name.strip_prefix(prefix)
                    .is_some_and(|rest| rest.bytes().all(|b| b.is_ascii_digit() || b == b'-'))
            };
            if ours(&partial) && only_output_inside(&path).is_ok() {
                _ = fs::remove_dir_all(&path);
            } else if ours(&old) && looks_like_a_run(&path).is_ok() {
                // A crash between the two renames of a replacement: the old output comes back.
                _ = match fs::symlink_metadata(&self.path) {
                    Ok(_) => fs::remove_dir_all(&path),
                    Err(_) => fs::rename(&path, &self.path),
                };
            }
        }
    }
}

/// A lock on one place, held by the process that writes there; a crash releases it.
#[derive(Debug)]
pub(super) struct Lock {
    path: PathBuf,
    file: File,
    /// False on a file system that has no locks.
    pub held: bool,
}

impl Lock {
    /// Takes the lock, or says that another run holds it.
    pub(super) fn take(place: &Place) -> Checked<Lock> {
        let path = place.sibling("lock");
        let os = |e: io::Error| fault::os("lock the output folder with", &path, &e);
        loop {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            let file = options.open(&path).map_err(os)?;
            let held = match file.try_lock() {
                Ok(()) => true,
                Err(TryLockError::WouldBlock) => {
                    let text = format!("{} is in use by another run", place.path.display());
                    return Err(taken(text).hint("wait for it or choose another folder"));
                }
                Err(TryLockError::Error(e)) if has_no_locks(&e) => false,
                Err(TryLockError::Error(e)) => return Err(os(e)),
            };
            // The run before removes its lock file at its end; a lock on a removed file is none.
            let mine = file.metadata().map_err(os)?;
            match fs::symlink_metadata(&path) {
                Ok(there) if (there.dev(), there.ino()) == (mine.dev(), mine.ino()) => {
                    return Ok(Lock { path, file, held });
                }
                _ => continue,
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Removed before it is released, so that whoever locks it next sees that it is gone.
        _ = fs::remove_file(&self.path);
        _ = self.file.unlock();
    }
}

fn has_no_locks(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Unsupported || error.raw_os_error() == Some(libc::ENOLCK)
}

/// Ok if a folder is a run's output and nothing else; else the reason.
pub(super) fn looks_like_a_run(folder: &Path) -> Result<(), String> {
    let text = fault::read_whole(&folder.join("manifest.json"), json::MOST_JSON)
        .map_err(|_| "it has no manifest.json that can be read".to_owned())?;
    let manifest: Value = serde_json::from_slice(&text)
        .map_err(|_| "its manifest.json is not valid JSON".to_owned())?;
    if manifest.get("schema").and_then(Value::as_u64) != Some(SCHEMA) {
        return Err(format!("its manifest.json does not have \"schema\": {SCHEMA}"));
    }
    match only_output_inside(folder)? {
        0 => Err("it has no rank-* folder".to_owned()),
        _ => Ok(()),
    }
}

/// How many rank folders there are, if there is nothing that a run does not write.
fn only_output_inside(folder: &Path) -> Result<usize, String> {
    let list = |path: &Path| {
        let entries = fs::read_dir(path).and_then(|e| e.collect::<io::Result<Vec<_>>>());
        entries.map_err(|e| format!("{} cannot be listed: {e}", path.display()))
    };
    let mut ranks = 0;
    for entry in list(folder)? {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let kind = entry.file_type().map_err(|e| e.to_string())?;
        let digits = name.strip_prefix("rank-").filter(|d| !d.is_empty());
        if kind.is_dir() && digits.is_some_and(|d| d.bytes().all(|b| b.is_ascii_digit())) {
            ranks += 1;
            for inner in list(&entry.path())? {
                let inner = inner.file_name();
                if !inner.to_string_lossy().ends_with(".safetensors") {
                    return Err(format!("it holds {name}/{}", inner.to_string_lossy()));
                }
            }
        } else if name != "manifest.json" || !kind.is_file() {
            return Err(format!("it holds {name}"));
        }
    }
    Ok(ranks)
}

pub(super) fn taken(message: String) -> Diagnostic {
    Diagnostic::error("E0603", message)
}
