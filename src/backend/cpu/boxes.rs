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

/// Copies a row-major box to its place in a larger row-major tensor.
pub(super) fn scatter(
    part: &[u8],
    lo: &[u64],
    len: &[u64],
    out: &mut [u8],
    whole: &[u64],
    size: u64,
) {
    let Some(last) = len.len().checked_sub(1) else {
        out[..size as usize].copy_from_slice(part);
        return;
    };
    let row = (len[last] * size) as usize;
    if row == 0 {
        return;
    }
    let strides = row_major(whole);
    for (i, bytes) in part.chunks_exact(row).enumerate() {
        let mut left = i as u64;
        let mut at = lo[last];
        for d in (0..last).rev() {
            at += (lo[d] + left % len[d]) * strides[d];
            left /= len[d];
        }
        let at = (at * size) as usize;
        out[at..at + row].copy_from_slice(bytes);
    }
}

/// Copies a box out of a larger row-major tensor of bytes.
pub(super) fn gather(whole: &[u8], extent: &[u64], off: &[u64], len: &[u64], out: &mut [u8]) {
    let strides = row_major(extent);
    let last = len.len() - 1;
    let row = len[last] as usize;
    for (i, bytes) in out.chunks_exact_mut(row.max(1)).enumerate() {
        let mut left = i as u64;
        let mut at = off[last];
        for d in (0..last).rev() {
            at += (off[d] + left % len[d]) * strides[d];
            left /= len[d];
        }
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
