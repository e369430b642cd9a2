//! Copies boxes between row-major tensors of bytes.

use crate::shard::row_major;

/// First element of a box if it is contiguous in a tensor of the given lengths.
pub(super) fn contiguous(lo: &[u64], len: &[u64], whole: &[u64]) -> Option<u64> {
    let mut partial = false;
    for d in (0..len.len()).rev() {
        if partial && len[d] != 1 {
            return None;
        }
        partial |= len[d] != whole[d];
    }
    Some(lo.iter().zip(row_major(whole)).map(|(i, s)| i * s).sum())
}

/// First elements of the rows of a box in a larger row-major tensor, in the box's order.
fn row_starts<'a>(
    lo: &'a [u64],
    len: &'a [u64],
    whole: &[u64],
) -> impl Iterator<Item = u64> + 'a {
    let strides = row_major(whole);
    let outer = len.len().saturating_sub(1);
    let rows: u64 = len[..outer].iter().product();
    (0..rows).map(move |row| {
        let mut left = row;
        let mut at = lo.get(outer).copied().unwrap_or(0);
        for d in (0..outer).rev() {
            at += (lo[d] + left % len[d]) * strides[d];
            left /= len[d];
        }
        at
    })
}

/// Bytes of a row of a box; a scalar is one row of one element.
fn row_bytes(len: &[u64], size: u64) -> usize {
    (len.last().copied().unwrap_or(1) * size) as usize
}

/// Copies a row-major box to its place in a larger row-major tensor.
pub(super) fn scatter(
    part: &[u8],
    lo: &[u64],
    len: &[u64],
    out: &mut [u8],
    whole: &[u64],
    size: u64,
) {
    let row = row_bytes(len, size);
    for (bytes, at) in part.chunks_exact(row.max(1)).zip(row_starts(lo, len, whole)) {
        out[(at * size) as usize..][..row].copy_from_slice(bytes);
    }
}

/// Copies a box out of a larger row-major tensor of bytes.
pub(super) fn gather(whole: &[u8], extent: &[u64], lo: &[u64], len: &[u64], out: &mut [u8]) {
    let row = row_bytes(len, 1);
    for (bytes, at) in out.chunks_exact_mut(row.max(1)).zip(row_starts(lo, len, extent)) {
        bytes.copy_from_slice(&whole[at as usize..][..row]);
    }
}

/// From storage order to the box's own order.
pub(super) fn transpose(
    bytes: &[u8],
    len: &[u64],
    order: &[usize],
    size: usize,
    out: &mut [u8],
) {
    let own = row_major(len);
    let dims: Vec<(usize, usize)> =
        order.iter().map(|d| (len[*d] as usize, own[*d] as usize)).collect();
    let mut index = vec![0usize; dims.len()];
    let mut at = 0;
    for element in bytes.chunks_exact(size) {
        out[at * size..(at + 1) * size].copy_from_slice(element);
        for d in (0..dims.len()).rev() {
            index[d] += 1;
            at += dims[d].1;
            if index[d] < dims[d].0 {
                break;
            }
            at -= dims[d].0 * dims[d].1;
            index[d] = 0;
        }
    }
}
