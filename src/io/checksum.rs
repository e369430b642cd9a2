//! xxh3-128 of a tensor's bytes, streamed in order, as 32 hexadecimal digits.
//! Knows nothing of where the bytes come from.

use xxhash_rust::xxh3::Xxh3;

use super::checkpoint::{Checkpoint, TensorEntry};
use crate::diag::Diagnostic;
use crate::error::Result;

/// Bytes read at a time.
const PIECE: u64 = 1 << 20;

/// The checksum of a tensor of a checkpoint, as a run's manifest records it.
pub fn checksum_tensor(checkpoint: &Checkpoint, tensor: &TensorEntry) -> Result<String> {
    let read = |offset, buf: &mut [u8]| checkpoint.read_at(tensor, offset, buf);
    Ok(hex(stream(tensor.bytes, read)?))
}

/// Hashes `bytes` bytes through `read(offset, buf)` in bounded pieces.
pub(super) fn stream(
    bytes: u64,
    read: impl Fn(u64, &mut [u8]) -> std::result::Result<(), Diagnostic>,
) -> std::result::Result<u128, Diagnostic> {
    let mut hasher = Xxh3::new();
    let mut piece = vec![0; bytes.min(PIECE) as usize];
    let mut offset = 0;
    while offset < bytes {
        let buf = &mut piece[..(bytes - offset).min(PIECE) as usize];
        read(offset, buf)?;
        hasher.update(buf);
        offset += buf.len() as u64;
    }
    Ok(hasher.digest128())
}

/// 32 lower-case digits, most significant first.
pub(super) fn hex(digest: u128) -> String {
    format!("{digest:032x}")
}
