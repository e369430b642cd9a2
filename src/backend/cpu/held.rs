//! Reads of whole tensors' coordinates, served from the shards that trainer ranks hold.

use crate::diag::Diagnostic;
use crate::lower::{Program, ProgramSource};
use crate::shard::{Storage, row_major};
use crate::topo::Held;

use super::{Rows, Strided};

/// A run of elements that lies in one box of a source's layout.
struct Run {
    /// First element in the whole tensor, and how many.
    start: u64,
    count: u64,
    /// Index of the box in each dimension.
    cell: Vec<usize>,
}

/// Cuts elements `from..to` of a source where its layout does.
fn runs(source: &ProgramSource, from: u64, to: u64) -> Vec<Run> {
    let (shape, strides) = (&source.shape, row_major(&source.shape));
    let cuts = &source.layout.cuts;
    // Elements up to the next edge of the innermost dimension that is cut lie together.
    let edge = (0..shape.len()).rev().find(|d| cuts[*d].len() > 2);
    let mut out = Vec::new();
    let mut start = from;
    while start < to {
        let at = |d: usize| start / strides[d] % shape[d];
        let cell: Vec<usize> =
            (0..shape.len()).map(|d| cuts[d].partition_point(|c| *c <= at(d)) - 1).collect();
        let end = match edge {
            Some(d) => {
                let base = start - start % (strides[d] * shape[d]);
                base + cuts[d][cell[d] + 1] * strides[d]
            }
            None => to,
        };
        let count = end.min(to) - start;
        out.push(Run { start, count, cell });
        start += count;
    }
    out
}

/// Reads a run into its part of a buffer.
type Read<'a> = &'a mut dyn FnMut(&Run, &mut [u8]) -> Result<(), Diagnostic>;

/// Calls `read` for each run of some rows, with its part of the buffer.
fn each_run(
    source: &ProgramSource,
    rows: Strided,
    buf: &mut [u8],
    read: Read<'_>,
) -> Result<(), Diagnostic> {
    let size = source.dtype.size();
    let row_bytes = (rows.row_bytes as usize).max(1);
    for (i, row) in buf.chunks_exact_mut(row_bytes).enumerate() {
        let from = (rows.offset + i as u64 * rows.stride) / size;
        let mut rest = row;
        for run in runs(source, from, from + rows.row_bytes / size) {
            let (mine, others) = rest.split_at_mut((run.count * size) as usize);
            read(&run, mine)?;
            rest = others;
        }
    }
    Ok(())
}

fn source_of(
    program: &Program,
    storage: Storage,
) -> Result<(usize, &ProgramSource), Diagnostic> {
    match storage {
        Storage::Source(id) => Ok((id as usize, &program.sources[id as usize])),
        _ => Err(Diagnostic::error("E0502", "a trainer rank reads a landed parameter")),
    }
}

/// Whole tensors, each box from a rank that holds it: for reports, never for an update.
pub(super) struct AnyHolder<'a> {
    pub program: &'a Program,
    pub rows: &'a [&'a dyn Rows],
}

impl Rows for AnyHolder<'_> {
    fn read(&self, storage: Storage, rows: Strided, buf: &mut [u8]) -> Result<(), Diagnostic> {
        if let [only] = self.rows {
            return only.read(storage, rows, buf);
        }
        let (_, source) = source_of(self.program, storage)?;
        let size = source.dtype.size();
        each_run(source, rows, buf, &mut |run, part| {
            let holder = source.layout.holders(&run.cell)[0];
            let offset = run.start * size;
            let row = Strided { offset, row_bytes: part.len() as u64, stride: 0, rows: 1 };
            self.rows[holder as usize].read(storage, row, part)
        })
    }
}

/// What one trainer rank holds of tensors that can be read whole: anything else is an error.
pub struct Fenced<'a> {
    pub program: &'a Program,
    pub rank: u32,
    pub rows: &'a dyn Rows,
}

impl Rows for Fenced<'_> {
    fn read(&self, storage: Storage, rows: Strided, buf: &mut [u8]) -> Result<(), Diagnostic> {
        let (_, source) = source_of(self.program, storage)?;
        if source.layout.cuts.iter().all(|c| c.len() <= 2) {
            let cell = vec![0; source.shape.len()];
            held(source, self.rank, &Run { start: 0, count: 0, cell })?;
        } else {
            each_run(source, rows, buf, &mut |run, _| held(source, self.rank, run))?;
        }
        self.rows.read(storage, rows, buf)
    }
}

fn held(source: &ProgramSource, rank: u32, run: &Run) -> Result<(), Diagnostic> {
    let holders = source.layout.holders(&run.cell);
    if holders.binary_search(&rank).is_ok() {
        return Ok(());
    }
    let text = format!("trainer {rank} reads a part of {} that it does not hold", source.name);
    Err(Diagnostic::error("E0502", text))
}

/// The local tensors of one trainer rank, row-major, by source; empty where it holds nothing.
pub struct Shards<'a> {
    pub program: &'a Program,
    pub rank: u32,
    pub tensors: Vec<&'a [u8]>,
    /// What it holds of each.
    pub held: Vec<Option<Held>>,
}

impl Rows for Shards<'_> {
    fn read(&self, storage: Storage, rows: Strided, buf: &mut [u8]) -> Result<(), Diagnostic> {
        let (id, source) = source_of(self.program, storage)?;
        let size = source.dtype.size() as usize;
        each_run(source, rows, buf, &mut |run, part| {
            held(source, self.rank, run)?;
            let Some(ranges) = &self.held[id] else { return Ok(()) };
            let at = local(source, ranges, run.start) as usize * size;
            part.copy_from_slice(&self.tensors[id][at..at + part.len()]);
            Ok(())
        })
    }
}

/// Where an element of the whole tensor lies in a rank's local one.
fn local(source: &ProgramSource, ranges: &Held, element: u64) -> u64 {
    let strides = row_major(&source.shape);
    (0..strides.len()).fold(0, |at, d| {
        let index = element / strides[d] % source.shape[d];
        let width: u64 = ranges[d].iter().map(|r| r.end - r.start).sum();
        let before: u64 =
            ranges[d].iter().map(|r| r.end.min(index).saturating_sub(r.start)).sum();
        at * width + before
    })
}
