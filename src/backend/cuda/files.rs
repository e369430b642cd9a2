//! Between readers or sinks and a GPU's memory: shards up, parameters down.

use std::sync::Arc;

use super::Fallible;
use super::driver::{Gpu, Memory, Stream};
use super::place::{Tensor, local_shape};
use super::session::Session;
use crate::backend::cpu::{Rows, Sink, Strided};
use crate::diag::Diagnostic;
use crate::lower::{Part, Program, TargetKind, TargetStorage};
use crate::shard::{Storage, row_major};
use crate::topo::{Held, RankId};

/// Bytes that are brought down at once.
const PIECE: u64 = 64 << 20;

/// Alignment of each source in its rank's allocation.
const ALIGN: u64 = 256;

/// Takes memory for what a trainer rank holds.
///
/// # Errors
/// E0605 for too little memory.
pub fn place(
    program: &Program,
    trainer: u32,
    gpu: &Arc<Gpu>,
) -> Fallible<(Vec<Option<Tensor>>, Memory)> {
    let held: Vec<Option<Held>> =
        program.sources.iter().map(|s| s.layout.held(trainer)).collect();
    let mut at = 0;
    let mut offsets = Vec::with_capacity(held.len());
    for (source, held) in program.sources.iter().zip(&held) {
        offsets.push(at);
        let bytes = held.as_ref().map_or(0, |h| bytes_of(h, source.dtype.size()));
        at = (at + bytes).next_multiple_of(ALIGN);
    }
    let memory = gpu.alloc(at)?;
    let sources = program.sources.iter().zip(held).zip(offsets);
    let tensors = sources.map(|((source, held), offset)| {
        let (address, size) = (memory.address() + offset, source.dtype.size());
        held.map(|h| Tensor::shard(address, &source.shape, size, h))
    });
    Ok((tensors.collect(), memory))
}

/// Reads what a trainer rank holds to where it lies.
///
/// # Errors
/// A read that fails; E0605.
pub fn upload(
    program: &Program,
    trainer: u32,
    rows: &dyn Rows,
    tensors: &[Option<Tensor>],
    stream: &Stream,
) -> Fallible<()> {
    for (id, (source, tensor)) in (0..).zip(program.sources.iter().zip(tensors)) {
        let (Some(tensor), Some(held)) = (tensor, source.layout.held(trainer)) else {
            continue;
        };
        let size = source.dtype.size();
        let mut bytes = vec![0; bytes_of(&held, size) as usize];
        let mut filled = 0;
        for (first, count) in runs(&source.shape, &held) {
            let run = (count * size) as usize;
            let strided =
                Strided { offset: first * size, row_bytes: run as u64, stride: 0, rows: 1 };
            rows.read(Storage::Source(id), strided, &mut bytes[filled..filled + run])?;
            filled += run;
        }
        stream.upload(tensor.address, &bytes)?;
    }
    Ok(())
}

fn bytes_of(held: &Held, size: u64) -> u64 {
    local_shape(held).iter().product::<u64>() * size
}

/// Runs of neighbouring elements of a whole tensor that a rank holds: first element and count,
/// in the order of its local tensor.
fn runs(shape: &[u64], held: &Held) -> Vec<(u64, u64)> {
    let strides = row_major(shape);
    let whole = |d: usize| held[d].len() == 1 && held[d][0] == (0..shape[d]);
    // From here on all of every dimension is held.
    let inner = (0..shape.len()).rev().take_while(|d| whole(*d)).last().unwrap_or(shape.len());
    let Some(cut) = inner.checked_sub(1) else { return vec![(0, shape.iter().product())] };
    let mut out = vec![0];
    for d in 0..cut {
        let own: Vec<u64> = held[d].iter().cloned().flatten().collect();
        let stride = strides[d];
        out =
            out.iter().flat_map(|at: &u64| own.iter().map(move |i| at + i * stride)).collect();
    }
    let stride = strides[cut];
    let part = |at: u64| {
        held[cut].iter().map(move |r| (at + r.start * stride, (r.end - r.start) * stride))
    };
    out.into_iter().flat_map(part).collect()
}

/// Brings an inference rank's parameters down; with `derived` those that it computed as well.
///
/// # Errors
/// A write that fails; E0605.
pub fn store(
    program: &Program,
    rank: RankId,
    sink: &dyn Sink,
    derived: bool,
    session: &Session,
) -> Fallible<()> {
    let index = (rank.0 % program.ranks.len().max(1) as u64) as usize;
    for (i, target) in (0..).zip(&program.ranks[index].targets) {
        let wanted = match target.kind {
            TargetKind::Parameter => true,
            TargetKind::Derived => derived,
            TargetKind::Alias => false,
        };
        for s in target.storages.iter().filter(|_| wanted) {
            let address = session.target(rank, i, s.part)?;
            store_one(s, address, i as usize, sink, session.control())?;
        }
    }
    Ok(())
}

fn store_one(
    s: &TargetStorage,
    address: u64,
    target: usize,
    sink: &dyn Sink,
    stream: &Stream,
) -> Fallible<()> {
    let write = |part: Part, offset: u64, bytes: &[u8]| -> Result<(), Diagnostic> {
        let rows = Strided { offset, row_bytes: bytes.len() as u64, stride: 0, rows: 1 };
        sink.write(target, part, rows, bytes)
    };
    if s.strides != row_major(&s.shape) {
        let mut bytes = vec![0; s.span() as usize];
        stream.download(address, &mut bytes)?;
        return write(s.part, 0, &in_order(s, &bytes));
    }
    let mut at = 0;
    while at < s.bytes() {
        let mut bytes = vec![0; PIECE.min(s.bytes() - at) as usize];
        stream.download(address + at, &mut bytes)?;
        write(s.part, at, &bytes)?;
        at += bytes.len() as u64;
    }
    Ok(())
}

/// A strided tensor's elements in row-major order.
fn in_order(s: &TargetStorage, bytes: &[u8]) -> Vec<u8> {
    let (own, size) = (row_major(&s.shape), s.dtype.size() as usize);
    let mut out = Vec::with_capacity(s.bytes() as usize);
    for i in 0..s.shape.iter().product() {
        let index = |d: usize| i / own[d] % s.shape[d];
        let at: u64 = (0..s.shape.len()).map(|d| index(d) * s.strides[d]).sum();
        out.extend(&bytes[at as usize * size..][..size]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_join_what_lies_together() {
        assert_eq!(runs(&[4, 3], &vec![vec![0..4], vec![0..3]]), [(0, 12)]);
        assert_eq!(runs(&[4, 3], &vec![vec![1..2, 3..4], vec![0..3]]), [(3, 3), (9, 3)]);
        assert_eq!(runs(&[2, 4], &vec![vec![0..2], vec![2..4]]), [(2, 2), (6, 2)]);
        assert_eq!(runs(&[], &vec![]), [(0, 1)]);
    }
}
