//! One safetensors header: read, checked against the file's real size, never the data.
//! The safetensors crate checks offsets, shapes and types; this file says which tensor is wrong.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use safetensors::SafeTensorError;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};

use super::{fault, json};
use crate::diag::Diagnostic;

/// The format's own limit on a header, in bytes.
pub(super) const MAX_HEADER: u64 = 100_000_000;
/// Bytes of the header's length field.
const LENGTH: u64 = 8;

/// A file with its header read: tensors in the order of their data.
#[derive(Debug)]
pub(super) struct Header {
    pub path: PathBuf,
    pub file: File,
    pub size: u64,
    pub tensors: Vec<(String, TensorInfo)>,
    /// Where the data section begins in the file.
    pub data: u64,
}

/// Why a header could not be had.
#[derive(Debug)]
pub(super) enum HeaderFault {
    Missing,
    Bad(Diagnostic),
}

impl From<Diagnostic> for HeaderFault {
    fn from(diagnostic: Diagnostic) -> Self {
        HeaderFault::Bad(diagnostic)
    }
}

/// Opens a file and reads its header.
pub(super) fn open(path: &Path) -> Result<Header, HeaderFault> {
    let file = fault::open_regular(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => HeaderFault::Missing,
        _ => HeaderFault::Bad(fault::os("read", path, &e)),
    })?;
    Ok(read(path.to_path_buf(), file)?)
}

/// What helps where a file ends too early.
const AGAIN: &str = "copy or download the file again";

fn read(path: PathBuf, file: File) -> Result<Header, Diagnostic> {
    let os = |e: std::io::Error| fault::os("read", &path, &e);
    let name = path.display();
    let size = file.metadata().map_err(os)?.len();
    if size < LENGTH {
        return Err(bad(format!(
            "{name} is {size} bytes long and ends before its header length (8 bytes)"
        ))
        .hint(AGAIN));
    }
    let mut length = [0; LENGTH as usize];
    file.read_exact_at(&mut length, 0).map_err(os)?;
    if length == *b"version " {
        return Err(bad(format!("{name} is a git-lfs pointer, not the file itself"))
            .hint("fetch the data with `git lfs pull`"));
    }
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER {
        return Err(bad(format!(
            "{name} declares a header of {length} bytes; a safetensors header has at most \
             {MAX_HEADER}"
        ))
        .hint("the file is not a safetensors file, or its first bytes are damaged"));
    }
    let data = LENGTH + length;
    if data > size {
        return Err(bad(format!(
            "{name} is truncated: it declares a header of {length} bytes, but ends after {}",
            size - LENGTH
        ))
        .hint(AGAIN));
    }
    // The length was checked against the limit and the file, so this allocation is bounded.
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, LENGTH).map_err(os)?;
    let (tensors, declared) = parse(&bytes)
        .map_err(|reason| bad(format!("the header of {name} is refused: {reason}")))?;
    let real = size - data;
    if declared != real {
        let problem = if real < declared { "truncated" } else { "longer than declared" };
        return Err(bad(format!(
            "{name} is {problem}: its header declares {declared} bytes of data, the file has \
             {real}"
        ))
        .hint(AGAIN));
    }
    Ok(Header { path, file, size, tensors, data })
}

/// Tensors in the order of their data, and the declared length of the data.
fn parse(bytes: &[u8]) -> Result<(Vec<(String, TensorInfo)>, u64), String> {
    let Listing(mut tensors) = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    let repeated = json::repeated(tensors.iter().map(|(name, _)| name.as_str()));
    if !repeated.is_empty() {
        let names: Vec<String> = repeated.into_iter().collect();
        return Err(format!("it names {} twice", fault::some_names(&names)));
    }
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let metadata = Metadata::new(None, tensors.clone()).map_err(|e| explain(&tensors, &e))?;
    Ok((tensors, metadata.data_len() as u64))
}

/// Names the tensor where the crate's error does not, and what its bytes should have been.
fn explain(tensors: &[(String, TensorInfo)], error: &SafeTensorError) -> String {
    let mut end = 0;
    for (name, info) in tensors {
        let (from, to) = info.data_offsets;
        if to < from {
            return format!("{name} ends at byte {to} of the data, before its start {from}");
        }
        if from < end {
            return format!("{name} starts at byte {from}, inside the tensor before it");
        }
        if from > end {
            return format!("bytes {end} to {from} of the data, before {name}, are nobody's");
        }
        end = to;
        let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |n, &d| n.checked_mul(d));
        let Some(bits) = bits else {
            return format!("the size of {name} {:?} does not fit 64 bits", info.shape);
        };
        if bits != (to - from).saturating_mul(8) {
            return format!(
                "{name} {} {:?} needs {} bytes, its offsets give {}",
                info.dtype,
                info.shape,
                bits.div_ceil(8),
                to - from
            );
        }
    }
    error.to_string()
}

fn bad(message: String) -> Diagnostic {
    Diagnostic::error("E0414", message)
}

/// The header's tensors as written, `__metadata__` left out, repeats kept.
struct Listing(Vec<(String, TensorInfo)>);

impl<'de> Deserialize<'de> for Listing {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ListingVisitor;
        impl<'de> Visitor<'de> for ListingVisitor {
            type Value = Listing;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Listing, A::Error> {
                let mut tensors = Vec::new();
                while let Some(key) = map.next_key::<String>()? {
                    if key == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        tensors.push((key, map.next_value()?));
                    }
                }
                Ok(Listing(tensors))
            }
        }
        deserializer.deserialize_map(ListingVisitor)
    }
}
