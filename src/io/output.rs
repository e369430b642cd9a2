//! The output of a file run: written aside, synced, renamed into place at the very end.
//! Knows nothing of how tensors are computed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::fault;
use super::index::is_plain_name;
use super::place::{Existing, Lock, Place, taken};
use super::rank_file::RankFile;
use crate::diag::Diagnostic;
use crate::dtype::DType;
use crate::error::Result;

type Checked<T> = std::result::Result<T, Diagnostic>;

/// An output in the making. Dropped without [`OutputDir::publish`], it leaves nothing.
#[derive(Debug)]
pub struct OutputDir {
    place: Place,
    staging: PathBuf,
    force: bool,
    published: bool,
    // Declared last: the place stays locked until the staging folder is gone.
    _lock: Lock,
}

impl OutputDir {
    /// Locks the place and makes a staging folder beside it. What lies there already is
    /// refused, unless it is an empty folder, or with `force` the output of an earlier run.
    pub fn create(out: &Path, force: bool) -> Result<OutputDir> {
        let place = Place::resolve(out)?;
        let lock = Lock::take(&place)?;
        if lock.held {
            place.clear_leftovers();
        }
        place.inspect(force)?;
        let staging = place.sibling(&format!("partial-{}", std::process::id()));
        fs::create_dir(&staging).map_err(|e| match e.kind() {
            io::ErrorKind::AlreadyExists => {
                taken(format!("{} is in use by another run", place.path.display()))
                    .note(format!("{} exists", staging.display()))
                    .hint("if no such run is alive, remove that folder")
            }
            _ => fault::os("make the folder", &staging, &e),
        })?;
        Ok(OutputDir { place, staging, force, published: false, _lock: lock })
    }

    /// Where the output will be.
    pub fn path(&self) -> &Path {
        &self.place.path
    }

    /// Where it is written until it is published.
    pub fn staging(&self) -> &Path {
        &self.staging
    }

    /// Makes a rank's file; see [`rank_file`].
    pub fn rank_file(
        &self,
        rank: u64,
        file_name: &str,
        tensors: &[(String, DType, Vec<u64>)],
    ) -> Result<RankFile> {
        rank_file(&self.staging, rank, file_name, tensors)
    }

    /// Writes the manifest, syncs everything and renames it into place. An output that it
    /// replaces is moved aside first and removed only after.
    pub fn publish(mut self, manifest: &Value) -> Result<()> {
        write_manifest(&self.staging.join("manifest.json"), manifest)?;
        sync_tree(&self.staging)?;
        let (staging, out) = (&self.staging, &self.place.path);
        let rename = |from: &Path, to: &Path| {
            fs::rename(from, to)
                .map_err(|e| fault::os(&format!("rename {} to", from.display()), to, &e))
        };
        // Asked again: the place may have been filled since.
        match self.place.inspect(self.force)? {
            Existing::Nothing | Existing::EmptyFolder => rename(staging, out)?,
            Existing::EarlierRun => {
                let old = self.place.sibling(&format!("old-{}", std::process::id()));
                rename(out, &old)?;
                if let Err(problem) = rename(staging, out) {
                    // If even this fails, the next run to this place moves it back.
                    _ = fs::rename(&old, out);
                    return Err(problem.into());
                }
                // What is left of it is cleared by the next run.
                _ = fs::remove_dir_all(&old);
            }
        }
        self.published = true;
        Ok(sync(&self.place.parent)?)
    }
}

/// Makes `rank-{rank}/{file_name}` below a staging folder, which another process may own, with
/// its header written and room for all tensors.
///
/// # Errors
/// E0601 with the reason of the operating system.
pub fn rank_file(
    staging: &Path,
    rank: u64,
    file_name: &str,
    tensors: &[(String, DType, Vec<u64>)],
) -> Result<RankFile> {
    if !is_plain_name(file_name) || !file_name.ends_with(".safetensors") {
        let text = format!("cannot name a rank's file {file_name:?}");
        return Err(Diagnostic::error("E0601", text).into());
    }
    let folder = staging.join(format!("rank-{rank}"));
    match fs::create_dir(&folder) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            Err(fault::os("make the folder", &folder, &e).into())
        }
        _ => Ok(RankFile::create(folder.join(file_name), tensors)?),
    }
}

impl Drop for OutputDir {
    fn drop(&mut self) {
        if !self.published {
            // Nothing can be done about a failure here; the name says that it is partial.
            _ = fs::remove_dir_all(&self.staging);
        }
    }
}

fn write_manifest(path: &Path, manifest: &Value) -> Checked<()> {
    let write = || {
        let file = OpenOptions::new().write(true).create_new(true).open(path)?;
        let mut out = BufWriter::new(file);
        serde_json::to_writer_pretty(&mut out, manifest)?;
        out.write_all(b"\n")?;
        out.flush()
    };
    write().map_err(|e: io::Error| fault::os("write", path, &e))
}

/// Syncs every file of a folder and then the folders, innermost first.
fn sync_tree(folder: &Path) -> Checked<()> {
    let os = |e: io::Error| fault::os("list", folder, &e);
    for entry in fs::read_dir(folder).map_err(os)? {
        let entry = entry.map_err(os)?;
        if entry.file_type().map_err(os)?.is_dir() {
            sync_tree(&entry.path())?;
        } else {
            sync(&entry.path())?;
        }
    }
    sync(folder)
}

fn sync(path: &Path) -> Checked<()> {
    let result = File::open(path).and_then(|file| file.sync_all());
    result.map_err(|e| fault::os("sync", path, &e))
}
