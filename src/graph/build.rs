//! Cuts a program's units into chunks and buckets, and writes down each rank's steps.

use std::collections::BTreeSet;

use crate::ir::Dims;
use crate::lower::{Program, TargetKind, Unit};
use crate::shard::{Window, row_major};

use super::{Bucket, Chunk, Graph, Step};

/// How much memory an update may use for staging, and how it is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Cap on all buckets in flight, in bytes.
    pub staging: u64,
    /// Buckets in flight.
    pub in_flight: u64,
}

impl Bounds {
    /// Buckets of at most 16 MiB, four in flight.
    pub fn with_staging(staging: u64) -> Self {
        Bounds { staging, in_flight: 4 }
    }

    fn bucket(&self) -> u64 {
        (self.staging / self.in_flight).clamp(1, 16 << 20)
    }
}

/// Bytes of a chunk that keep its input and output in a core's cache.
const CHUNK: u64 = 256 << 10;

/// Builds the graph of a program. Deterministic: buckets follow the units' order.
pub fn build(program: &Program, bounds: Bounds) -> Graph {
    let limit = bounds.bucket();
    let mut buckets: Vec<Bucket> = Vec::new();
    for (index, unit) in program.units.iter().enumerate() {
        for chunk in chunks(index, unit, CHUNK.min(limit)) {
            match buckets.last_mut() {
                Some(last) if last.bytes + chunk.bytes() <= limit => {
                    last.bytes += chunk.bytes();
                    last.chunks.push(chunk);
                }
                _ => buckets.push(Bucket { bytes: chunk.bytes(), chunks: vec![chunk] }),
            }
        }
    }
    let mut trainer = Vec::new();
    let mut ranks: Vec<Vec<Step>> = vec![Vec::new(); program.ranks.len()];
    for (bucket, b) in buckets.iter().enumerate() {
        trainer.push(Step::Launch { bucket });
        let to: BTreeSet<usize> = b
            .chunks
            .iter()
            .flat_map(|c| program.units[c.unit].receivers.iter().map(|r| r.0))
            .collect();
        for rank in to {
            trainer.push(Step::Send { bucket, to: rank });
            ranks[rank].extend([Step::Recv { bucket }, Step::Store { bucket }]);
        }
    }
    for (steps, rank) in ranks.iter_mut().zip(&program.ranks) {
        let derived = rank.targets.iter().enumerate();
        let derived = derived.filter(|(_, t)| t.kind == TargetKind::Derived);
        steps.extend(derived.map(|(target, _)| Step::Derive { target }));
    }
    let largest = buckets.iter().map(|b| b.bytes).max().unwrap_or(0);
    let staging_bytes = largest * bounds.in_flight.min(buckets.len() as u64);
    Graph { buckets, trainer, ranks, staging_bytes }
}

/// Cuts a unit into contiguous parts; rows of a quantized unit are cut at its tiles.
fn chunks(index: usize, unit: &Unit, limit: u64) -> Vec<Chunk> {
    let t = unit.value_type();
    if t.elements() == 0 {
        return Vec::new();
    }
    let scale_shape = t.scale_shape();
    let scale_size = t.scale_dtype().map_or(0, |d| d.size());
    let mut out = Vec::new();
    let whole = Window::whole(&t.shape);
    split(&whole, 0, t.dtype.size(), t.quant.map(|q| q.block), limit, &mut |window| {
        let offset = |shape: &[u64], at: &[u64]| -> u64 {
            at.iter().zip(row_major(shape)).map(|(i, s)| i * s).sum()
        };
        let elements: u64 = window.len.iter().product();
        let (mut scale_bytes, mut scale_at) = (0, 0);
        if let (Some(shape), Some(q)) = (&scale_shape, t.quant) {
            let (lo, len) = (tiles(&window.lo, q.block), tiles(&window.len, q.block));
            scale_bytes = len.iter().product::<u64>() * scale_size;
            scale_at = offset(shape, &lo) * scale_size;
        }
        out.push(Chunk {
            unit: index,
            value_bytes: elements * t.dtype.size(),
            value_at: offset(&t.shape, &window.lo) * t.dtype.size(),
            window,
            scale_bytes,
            scale_at,
        });
    });
    out
}

/// An index or a length with its last two dimensions counted in tiles, rounded up.
pub(crate) fn tiles(dims: &[u64], block: u64) -> Dims {
    let m = dims.len().saturating_sub(2);
    dims.iter().enumerate().map(|(d, n)| if d >= m { n.div_ceil(block) } else { *n }).collect()
}

/// Cuts along the first dimension that is not cut yet, into as few parts as keep to the limit, and goes one dimension deeper where one index alone is too large.
fn split(
    window: &Window,
    dim: usize,
    size: u64,
    block: Option<u64>,
    limit: u64,
    emit: &mut impl FnMut(Window),
) {
    let rank = window.len.len();
    let bytes = window.len.iter().product::<u64>() * size;
    // Columns of a tile row are not contiguous with their scales: never cut them.
    let last = if block.is_some() { rank.saturating_sub(1) } else { rank };
    if bytes <= limit || dim >= last {
        return emit(window.clone());
    }
    let step = if block.is_some() && dim + 2 == rank { block.unwrap_or(1) } else { 1 };
    let one = bytes / window.len[dim].max(1) * step;
    let count = (limit / one.max(1)).max(1) * step;
    let end = window.lo[dim] + window.len[dim];
    let mut lo = window.lo[dim];
    while lo < end {
        let mut part = window.clone();
        (part.lo[dim], part.len[dim]) = (lo, count.min(end - lo));
        if part.len[dim] <= step && part.len.iter().product::<u64>() * size > limit {
            split(&part, dim + 1, size, block, limit, emit);
        } else {
            emit(part);
        }
        lo += count;
    }
}
