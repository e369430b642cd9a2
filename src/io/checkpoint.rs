//! A checkpoint on disk: which tensors it holds, and positioned reads out of them.
//! Opened once, headers only; knows nothing of plans.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::rows::{self, Rows};
use super::{fault, index, place};
use crate::diag::Diagnostic;
use crate::dtype::DType;
use crate::error::{Error, Result};

/// One tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    pub name: String,
    /// None for a type that no plan can use (`I64`, `F64`, ...); an error only if one does.
    pub dtype: Option<DType>,
    /// The tag of the file's header (`BF16`).
    pub dtype_name: String,
    pub shape: Vec<u64>,
    /// Which of [`Checkpoint::files`] holds it.
    pub file: usize,
    /// First byte, counted from the start of the file.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// An open checkpoint. Reads are positioned, so any number of threads may read at once.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<OpenFile>,
    entries: Vec<TensorEntry>,
    notes: Vec<Diagnostic>,
}

#[derive(Debug)]
struct OpenFile {
    path: PathBuf,
    file: File,
    size: u64,
}

impl Checkpoint {
    /// Opens a folder (by its index if it has one, else every `*.safetensors`) or one file.
    /// Reads headers only, and collects every problem before it fails.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        let meta = fs::metadata(path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => fault::os("open the checkpoint", path, &e)
                .hint("give a folder that holds safetensors files, or one such file"),
            _ => fault::os("open the checkpoint", path, &e),
        })?;
        let found = if meta.is_dir() {
            let present = safetensors_files(path)?;
            if fs::symlink_metadata(path.join(index::INDEX)).is_ok() {
                index::indexed(path, &present)
            } else if present.is_empty() {
                return Err(no_files(path).into());
            } else {
                index::all_of(&present)
            }
        } else if path.to_string_lossy().ends_with(".index.json") {
            let text = format!("{} is an index, not a checkpoint", path.display());
            return Err(Diagnostic::error("E0414", text).hint("give its folder").into());
        } else {
            index::all_of(&[path.to_path_buf()])
        };
        if !found.problems.is_empty() {
            return Err(Error::refused(found.problems));
        }
        Ok(Checkpoint::build(path, found))
    }

    fn build(path: &Path, found: index::Found) -> Checkpoint {
        let mut entries: Vec<TensorEntry> = found
            .chosen
            .into_iter()
            .map(|(name, file, number)| {
                let header = &found.headers[file];
                let (_, info) = &header.tensors[number];
                let (from, to) = info.data_offsets;
                let dtype_name = info.dtype.to_string();
                TensorEntry {
                    name,
                    dtype: DType::from_safetensors_name(&dtype_name),
                    dtype_name,
                    shape: info.shape.iter().map(|&d| d as u64).collect(),
                    file,
                    // Offsets were checked against the file's size when the header was read.
                    offset: header.data + from as u64,
                    bytes: (to - from) as u64,
                }
            })
            .collect();
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        let files = found.headers.into_iter();
        let files = files.map(|h| OpenFile { path: h.path, file: h.file, size: h.size });
        Checkpoint {
            path: path.to_path_buf(),
            files: files.collect(),
            entries,
            notes: found.notes,
        }
    }

    /// The folder or file it was opened from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files that are read, with their sizes in bytes.
    pub fn files(&self) -> impl ExactSizeIterator<Item = (&Path, u64)> {
        self.files.iter().map(|f| (f.path.as_path(), f.size))
    }

    /// What was ignored: files outside the index, copies that the index does not take.
    pub fn notes(&self) -> &[Diagnostic] {
        &self.notes
    }

    /// A tensor by name.
    pub fn get(&self, name: &str) -> Option<&TensorEntry> {
        let at = self.entries.binary_search_by(|e| e.name.as_str().cmp(name)).ok()?;
        self.entries.get(at)
    }

    /// All tensors, sorted by name.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = &TensorEntry> {
        self.entries.iter()
    }

    /// Fills `buf` from byte `offset` of the tensor on.
    pub fn read_at(
        &self,
        tensor: &TensorEntry,
        offset: u64,
        buf: &mut [u8],
    ) -> std::result::Result<(), Diagnostic> {
        let end = offset.checked_add(buf.len() as u64);
        let (file, start) = self.locate(tensor, offset, end)?;
        file.file.read_exact_at(buf, start).map_err(|e| read_fault(file, tensor, &e))
    }

    /// Reads `rows` segments of `row_bytes`, the first at byte `offset` of the tensor and each
    /// `stride` bytes after the one before, into consecutive places of `buf`.
    pub fn read_rows(
        &self,
        tensor: &TensorEntry,
        offset: u64,
        row_bytes: u64,
        stride: u64,
        rows: u64,
        buf: &mut [u8],
    ) -> std::result::Result<(), Diagnostic> {
        if row_bytes.checked_mul(rows) != Some(buf.len() as u64) {
            return Err(Diagnostic::error(
                "E0601",
                format!(
                    "cannot read {rows} rows of {row_bytes} bytes of {} into {} bytes",
                    tensor.name,
                    buf.len()
                ),
            ));
        }
        if buf.is_empty() {
            return Ok(());
        }
        let last = stride.checked_mul(rows - 1).and_then(|n| n.checked_add(offset));
        let end = last.and_then(|n| n.checked_add(row_bytes));
        let (file, start) = self.locate(tensor, offset, end)?;
        // At most the length of `buf`, so it fits.
        let row_bytes = row_bytes as usize;
        let at = Rows { offset: start, row_bytes, stride, rows };
        rows::read(at, buf, |buf, at| file.file.read_exact_at(buf, at))
            .map_err(|e| read_fault(file, tensor, &e))
    }

    /// The file of a tensor and the place of `offset` in it, if all up to `end` is the tensor's.
    fn locate(
        &self,
        tensor: &TensorEntry,
        offset: u64,
        end: Option<u64>,
    ) -> std::result::Result<(&OpenFile, u64), Diagnostic> {
        let file = self.files.get(tensor.file);
        let start = tensor.offset.checked_add(offset);
        match (file, start, end) {
            (Some(file), Some(start), Some(end)) if end <= tensor.bytes => Ok((file, start)),
            _ => Err(Diagnostic::error(
                "E0601",
                format!(
                    "cannot read byte {offset} to {} of {}, which has {} bytes",
                    end.map_or("past 2^64".to_owned(), |e| e.to_string()),
                    tensor.name,
                    tensor.bytes
                ),
            )
            .about(&tensor.name)),
        }
    }
}

/// A short read means that the file was cut after its header had been checked.
fn read_fault(file: &OpenFile, tensor: &TensorEntry, error: &io::Error) -> Diagnostic {
    if error.kind() != io::ErrorKind::UnexpectedEof {
        return fault::os("read", &file.path, error).about(&tensor.name);
    }
    let now = file.file.metadata().map_or("fewer".to_owned(), |m| m.len().to_string());
    let text = format!(
        "{} shrank while it was read: {} bytes when opened, {now} now; {} is incomplete",
        file.path.display(),
        file.size,
        tensor.name
    );
    Diagnostic::error("E0414", text)
        .about(&tensor.name)
        .hint("let the writer finish before the engine reads")
}

/// Every `*.safetensors` of a folder, sorted; hidden files are not part of a checkpoint.
fn safetensors_files(folder: &Path) -> std::result::Result<Vec<PathBuf>, Diagnostic> {
    let os = |e: io::Error| fault::os("list", folder, &e);
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(os)? {
        let path = entry.map_err(os)?.path();
        let hidden = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'));
        if path.extension().is_some_and(|e| e == "safetensors") && !hidden {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// The error for a folder without safetensors files, with a guess at what it is instead.
fn no_files(folder: &Path) -> Diagnostic {
    let text = format!("{} holds no safetensors file", folder.display());
    let diagnostic = Diagnostic::error("E0413", text);
    if place::looks_like_a_run(folder).is_ok() {
        return diagnostic.hint(
            "it is the output of a run (manifest.json and rank-* folders), not a checkpoint: \
             give the model's folder, or one rank-* folder",
        );
    }
    let pickled = fs::read_dir(folder).is_ok_and(|entries| {
        entries.flatten().any(|e| {
            let path = e.path();
            path.extension().is_some_and(|x| x == "bin" || x == "pt" || x == "pth")
        })
    });
    if pickled {
        return diagnostic.hint("pickled weights are not read: save them as safetensors");
    }
    diagnostic.hint("give the folder that holds the model's *.safetensors files")
}
