//! One inference rank's safetensors file: header first, then parallel positioned writes.
//! Keeps a checksum a tensor; knows nothing of folders.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use xxhash_rust::xxh3::Xxh3;

use super::{checksum, fault, header, json};
use crate::diag::Diagnostic;
use crate::dtype::DType;
use crate::error::{Error, Result};

type Checked<T> = std::result::Result<T, Diagnostic>;

/// A rank's file in the making. Tensors are numbered as they were listed at creation.
#[derive(Debug)]
pub struct RankFile {
    path: PathBuf,
    file: File,
    slots: Vec<Slot>,
}

#[derive(Debug)]
struct Slot {
    name: String,
    /// First byte, counted from the start of the file.
    offset: u64,
    bytes: u64,
    progress: Mutex<Progress>,
}

#[derive(Debug, Default)]
struct Progress {
    /// Bytes written so far.
    written: u64,
    sum: Sum,
}

/// The checksum as far as it is known. A hasher exists only while its tensor is being written.
#[derive(Default)]
enum Sum {
    #[default]
    Fresh,
    Running(Box<Xxh3>),
    Done(u128),
    /// Writes came out of order, so the bytes are read again at the end.
    Unknown,
}

impl std::fmt::Debug for Sum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Sum::Fresh => "Fresh",
            Sum::Running(_) => "Running",
            Sum::Done(_) => "Done",
            Sum::Unknown => "Unknown",
        })
    }
}

impl RankFile {
    pub(super) fn create(
        path: PathBuf,
        tensors: &[(String, DType, Vec<u64>)],
    ) -> Checked<RankFile> {
        let (header, slots) = lay_out(tensors).map_err(|reason| {
            let text = format!("cannot lay {} out: {reason}", path.display());
            Diagnostic::error("E0601", text)
        })?;
        let end = slots.iter().map(|s| s.offset + s.bytes).max();
        let size = end.unwrap_or(header.len() as u64);
        let open = || {
            let mut options = OpenOptions::new();
            let file = options.read(true).write(true).create_new(true).open(&path)?;
            file.write_all_at(&header, 0)?;
            file.set_len(size)?;
            Ok(file)
        };
        let file = open().map_err(|e: io::Error| fault::os("write", &path, &e))?;
        Ok(RankFile { path, file, slots })
    }

    /// Where the file lies until the output is published.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes `bytes` at byte `offset` of a tensor. Writes in order are hashed on the way;
    /// writes to different tensors do not wait for one another.
    pub fn write_at(&self, tensor: usize, offset: u64, bytes: &[u8]) -> Checked<()> {
        let length = bytes.len() as u64;
        let end = offset.checked_add(length);
        let (slot, end) = match (self.slots.get(tensor), end) {
            (Some(slot), Some(end)) if end <= slot.bytes => (slot, end),
            (slot, _) => return Err(self.outside(slot, tensor, offset, length)),
        };
        if bytes.is_empty() {
            return Ok(());
        }
        // Offset and end lie in the file, whose size was computed with checks.
        self.file
            .write_all_at(bytes, slot.offset + offset)
            .map_err(|e| fault::os("write", &self.path, &e).about(&slot.name))?;
        let mut progress = slot.progress.lock().unwrap_or_else(PoisonError::into_inner);
        let in_order = progress.written == offset;
        progress.written = progress.written.saturating_add(length);
        progress.sum = match std::mem::take(&mut progress.sum) {
            Sum::Fresh if in_order => Sum::Running(Box::new(Xxh3::new())),
            Sum::Running(hasher) if in_order => Sum::Running(hasher),
            _ => Sum::Unknown,
        };
        if let Sum::Running(hasher) = &mut progress.sum {
            hasher.update(bytes);
            if end == slot.bytes {
                progress.sum = Sum::Done(hasher.digest128());
            }
        }
        Ok(())
    }

    /// Syncs the data and gives a checksum for each tensor, in the order of creation. A tensor
    /// that received fewer bytes than it has is an error.
    pub fn finish(&self) -> Result<Vec<String>> {
        self.file.sync_data().map_err(|e| fault::os("sync", &self.path, &e))?;
        let sums: Vec<Checked<String>> =
            self.slots.par_iter().map(|slot| self.checksum(slot)).collect();
        let mut checksums = Vec::with_capacity(sums.len());
        let mut problems = Vec::new();
        for sum in sums {
            match sum {
                Ok(sum) => checksums.push(sum),
                Err(problem) => problems.push(problem),
            }
        }
        if problems.is_empty() { Ok(checksums) } else { Err(Error::refused(problems)) }
    }

    fn checksum(&self, slot: &Slot) -> Checked<String> {
        let progress = slot.progress.lock().unwrap_or_else(PoisonError::into_inner);
        if progress.written < slot.bytes {
            let text = format!(
                "{} of {} got {} of its {} bytes",
                slot.name,
                self.path.display(),
                progress.written,
                slot.bytes
            );
            return Err(Diagnostic::error("E0601", text).about(&slot.name));
        }
        if let Sum::Done(digest) = progress.sum {
            return Ok(checksum::hex(digest));
        }
        let read = |offset, buf: &mut [u8]| {
            let result = self.file.read_exact_at(buf, slot.offset + offset);
            result.map_err(|e| fault::os("read", &self.path, &e))
        };
        Ok(checksum::hex(checksum::stream(slot.bytes, read)?))
    }

    fn outside(
        &self,
        slot: Option<&Slot>,
        tensor: usize,
        offset: u64,
        length: u64,
    ) -> Diagnostic {
        let path = self.path.display();
        let text = match slot {
            Some(Slot { name, bytes, .. }) => format!(
                "cannot write {length} bytes at byte {offset} of {name} of {path}, which has \
                 {bytes}"
            ),
            None => format!("cannot write tensor {tensor} of {path}: there is no such tensor"),
        };
        Diagnostic::error("E0601", text)
    }
}

/// The bytes up to the data section, and the place of each tensor. Wider types come first and
/// names break ties, as the safetensors crate does, so every tensor is aligned to its type.
fn lay_out(
    tensors: &[(String, DType, Vec<u64>)],
) -> std::result::Result<(Vec<u8>, Vec<Slot>), String> {
    if let Some(name) = json::repeated(tensors.iter().map(|t| t.0.as_str())).first() {
        return Err(format!("{name} is listed twice"));
    }
    if tensors.iter().any(|t| t.0 == "__metadata__") {
        return Err("__metadata__ cannot be the name of a tensor".to_owned());
    }
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(tag(tensors[i].1)), &tensors[i].0));
    let mut infos = Vec::with_capacity(tensors.len());
    let mut starts = vec![(0, 0); tensors.len()];
    let mut at: usize = 0;
    for i in order {
        let (name, dtype, shape) = &tensors[i];
        let too_big = || format!("the size of {name} {shape:?} does not fit 64 bits");
        let bytes = shape.iter().try_fold(dtype.size(), |n, &d| n.checked_mul(d));
        let length = bytes.and_then(|n| usize::try_from(n).ok()).ok_or_else(too_big)?;
        let end = at.checked_add(length).ok_or_else(too_big)?;
        let shape: std::result::Result<Vec<usize>, _> =
            shape.iter().map(|&d| usize::try_from(d)).collect();
        let shape = shape.map_err(|_| too_big())?;
        let info = TensorInfo { dtype: tag(*dtype), shape, data_offsets: (at, end) };
        infos.push((name.clone(), info));
        starts[i] = (at as u64, length as u64);
        at = end;
    }
    let format = [("format".to_owned(), "pt".to_owned())].into_iter().collect();
    let metadata = Metadata::new(Some(format), infos).map_err(|e| e.to_string())?;
    let mut text = serde_json::to_vec(&metadata).map_err(|e| e.to_string())?;
    text.resize(text.len().next_multiple_of(8), b' ');
    if text.len() as u64 > header::MAX_HEADER {
        return Err(format!("{} tensors need too long a header", tensors.len()));
    }
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(&text);
    let data = bytes.len() as u64;
    // A file's size is a signed number.
    (at as u64)
        .checked_add(data)
        .filter(|&n| i64::try_from(n).is_ok())
        .ok_or("it is too big")?;
    let slots = tensors.iter().zip(starts).map(|((name, ..), (start, bytes))| Slot {
        name: name.clone(),
        offset: data + start,
        bytes,
        progress: Mutex::default(),
    });
    Ok((bytes, slots.collect()))
}

const fn tag(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        DType::E4m3 => Dtype::F8_E4M3,
        DType::E8m0 => Dtype::F8_E8M0,
        DType::I32 => Dtype::I32,
        DType::U8 => Dtype::U8,
    }
}
