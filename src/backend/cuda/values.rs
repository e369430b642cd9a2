//! Jobs that copy and compute: boxes of any number of dimensions as jobs of two.

use smallvec::SmallVec;

use crate::dtype::DType;
use crate::ir::Dims;
use crate::shard::{Expr, Window};

use super::Fallible;
use super::jobs::{self, Evaluation, Job, Op, Operand, Segment};
use super::parts::{Lowering, depth};
use super::place::{Plane, Strides};
use super::segments::{Part, Read, matrix, matrix_strides};
use super::table::Table;

/// A dimension of a copy: length, and bytes from one index to the next on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Axis {
    len: u64,
    src: i64,
    dst: i64,
}

/// Bytes of a job of a copy of rows.
const COPY_BYTES: u64 = 32 << 10;

impl Lowering<'_> {
    /// Adds what computes a window of an expression that is not quantized.
    pub(super) fn values(
        &mut self,
        expr: &Expr,
        dtype: DType,
        window: &Window,
        to: &Plane,
    ) -> Fallible<()> {
        let (unit, level) = (self.unit, depth(expr));
        for part in self.segments(expr, window, false)? {
            let to = Plane { address: to.at(&part.window.lo), strides: to.strides.clone() };
            let table = self.level(level);
            match part.copied().filter(|_| part.flags & jobs::RAW != 0) {
                Some(read) => {
                    let from = Plane { address: read.address, strides: read.strides.clone() };
                    table.copy(unit, read.dtype, &part.window.len, &from, &to);
                }
                None => table.compute(unit, dtype, &part, &to),
            }
        }
        Ok(())
    }
}

impl Table {
    /// Adds the copy of a box of elements; both planes begin at its first element.
    pub fn copy(&mut self, unit: u32, dtype: DType, len: &[u64], from: &Plane, to: &Plane) {
        let size = dtype.size() as i64;
        let mut axes: SmallVec<[Axis; 4]> = SmallVec::new();
        for ((len, src), dst) in len.iter().zip(&from.strides).zip(&to.strides) {
            let axis = Axis { len: *len, src: *src, dst: *dst };
            match axes.last_mut() {
                _ if *len == 1 => {}
                // Dimensions that lie back to back on both sides are one.
                Some(last)
                    if last.src == *len as i64 * src && last.dst == *len as i64 * dst =>
                {
                    *last = Axis { len: last.len * len, ..axis };
                }
                _ => axes.push(axis),
            }
        }
        let runs = axes.last().is_none_or(|a| a.src == size && a.dst == size);
        if runs {
            let col = axes.pop().unwrap_or(Axis { len: 1, src: size, dst: size });
            let rows = axes.pop().unwrap_or(Axis { len: 1, src: 0, dst: 0 });
            each(&axes, from.address, to.address, &mut |src, dst| {
                self.copy_rows(unit, dtype, rows, col.len, src, dst);
            });
            return;
        }
        // Something is permuted: through shared memory, by the runs of either side.
        let least = |key: &dyn Fn(&Axis) -> i64, axes: &[Axis]| {
            (0..axes.len()).min_by_key(|i| key(&axes[*i]).abs()).unwrap_or(0)
        };
        let col = axes.remove(least(&|a| a.dst, &axes));
        let row = match axes.is_empty() {
            true => Axis { len: 1, src: 0, dst: 0 },
            false => axes.remove(least(&|a| a.src, &axes)),
        };
        each(&axes, from.address, to.address, &mut |src, dst| {
            self.copy_matrix(unit, dtype, row, col, src, dst);
        });
    }

    /// Rows of neighbouring elements, in jobs of about equal size.
    fn copy_rows(&mut self, unit: u32, dtype: DType, row: Axis, cols: u64, src: u64, dst: u64) {
        let size = dtype.size();
        let strides = (u32::try_from(row.src), u32::try_from(row.dst));
        let (src_row, dst_row, most) = match strides {
            (Ok(src), Ok(dst)) => (src, dst, row.len),
            // Rows too far apart for one job.
            _ => (0, 0, 1),
        };
        let width = cols.min(COPY_BYTES / size);
        let height = (COPY_BYTES / (width * size)).clamp(1, most);
        for (r, rows) in steps(row.len, height) {
            for (c, cols) in steps(cols, width) {
                self.copies.push(Job {
                    src: src.wrapping_add_signed(r as i64 * row.src) + c * size,
                    dst: dst.wrapping_add_signed(r as i64 * row.dst) + c * size,
                    src_row,
                    dst_row,
                    unit,
                    rows: rows as u16,
                    cols: cols as u16,
                    kind: jobs::COPY,
                    dtype: jobs::number(dtype),
                    ..Job::default()
                });
            }
        }
    }

    fn copy_matrix(
        &mut self,
        unit: u32,
        dtype: DType,
        row: Axis,
        col: Axis,
        src: u64,
        dst: u64,
    ) {
        let read = Read {
            address: src,
            strides: SmallVec::from_slice(&[row.src, col.src]),
            phase: [0, 0],
            step: 1,
            block: 1,
            dtype,
        };
        let part = Part {
            window: Window::whole(&[row.len, col.len]),
            ops: vec![Op { what: jobs::RAW_LOAD, arg: 0 }],
            reads: vec![read],
            flags: jobs::RAW,
        };
        let to = Plane { address: dst, strides: SmallVec::from_slice(&[row.dst, col.dst]) };
        self.compute(unit, dtype, &part, &to);
    }

    /// Adds the boxes of a part; `to` begins at its first element.
    pub(super) fn compute(&mut self, unit: u32, dtype: DType, part: &Part, to: &Plane) {
        let window = matrix(&part.window);
        let to = Plane { address: to.address, strides: matrix_strides(&to.strides) };
        let strides = |r: &Read| Read { strides: matrix_strides(&r.strides), ..r.clone() };
        let reads: Vec<Read> = part.reads.iter().map(strides).collect();
        let m = window.len.len() - 2;
        let height = window.len[m].min(jobs::TILE);
        let width = (jobs::ELEMENTS / height / jobs::TILE * jobs::TILE).max(jobs::TILE);
        let outer: u64 = window.len[..m].iter().product();
        for i in 0..outer {
            let lead = unravel(i, &window.len[..m]);
            for (r, rows) in steps(window.len[m], height) {
                for (c, cols) in steps(window.len[m + 1], width) {
                    let mut by = lead.clone();
                    by.extend([r, c]);
                    let first = self.segments.len();
                    let moved: Vec<Read> = reads.iter().map(|r| r.moved(&by)).collect();
                    self.push_segment(part, &moved, [0, 0], [rows, cols]);
                    let b = Evaluation {
                        dst: to.at(&by),
                        dst_row: to.strides[m],
                        dst_col: to.strides[m + 1],
                        unit,
                        rows: rows as u16,
                        cols: cols as u16,
                        store_rows: rows as u16,
                        store_cols: cols as u16,
                        mode: jobs::VALUES,
                        dtype: jobs::number(dtype),
                        ..Evaluation::default()
                    };
                    self.push_evaluation(b, first);
                }
            }
        }
    }

    /// Adds a segment at a place in the next box; its reads begin at its first element.
    pub(super) fn push_segment(
        &mut self,
        part: &Part,
        reads: &[Read],
        at: [u64; 2],
        len: [u64; 2],
    ) {
        let ops = self.ops(&part.ops);
        let operands = self.operands.len() as u32;
        let mut flags = part.flags;
        for read in reads {
            let [row, col] = last_two(&read.strides);
            if read.block == 1 && len[0] > 1 && row.abs() < col.abs() {
                flags |= jobs::BY_COLUMN;
            }
            self.operands.push(Operand {
                address: read.address,
                row,
                col,
                phase_row: read.phase[0] as u32,
                phase_col: read.phase[1] as u32,
                step: read.step as u32,
                block: read.block as u32,
                dtype: u32::from(jobs::number(read.dtype)),
                pad: 0,
            });
        }
        self.segments.push(Segment {
            ops,
            op_count: part.ops.len() as u32,
            operands,
            flags,
            row: at[0] as u16,
            col: at[1] as u16,
            rows: len[0] as u16,
            cols: len[1] as u16,
        });
    }

    /// Adds jobs that look for NaN and infinity in neighbouring elements.
    pub fn scan(&mut self, unit: u32, dtype: DType, address: u64, count: u64) {
        for (i, cols) in steps(count, COPY_BYTES / dtype.size()) {
            self.copies.push(Job {
                src: address + i * dtype.size(),
                unit,
                rows: 1,
                cols: cols as u16,
                kind: jobs::SCAN,
                dtype: jobs::number(dtype),
                ..Job::default()
            });
        }
    }

    /// Adds jobs that raise some words to those of another rank.
    pub fn maximum(&mut self, from: u64, to: u64, count: u64) {
        for (i, cols) in steps(count, 8192) {
            let (src, dst) = (from + 4 * i, to + 4 * i);
            let (kind, cols) = (jobs::MAXIMUM, cols as u16);
            self.copies.push(Job { src, dst, kind, rows: 1, cols, ..Job::default() });
        }
    }
}

/// Parts of at most `width` of a length: first index and length.
fn steps(len: u64, width: u64) -> impl Iterator<Item = (u64, u64)> {
    let width = width.max(1);
    (0..len.div_ceil(width)).map(move |i| (i * width, width.min(len - i * width)))
}

fn unravel(number: u64, len: &[u64]) -> Dims {
    let mut left = number;
    let mut at: Dims = SmallVec::from_elem(0, len.len());
    for d in (0..len.len()).rev() {
        at[d] = left % len[d];
        left /= len[d];
    }
    at
}

fn last_two(strides: &Strides) -> [i64; 2] {
    let m = strides.len().saturating_sub(2);
    [strides[m], strides[m + 1]]
}

/// Calls `f` with both addresses of every index of some dimensions.
fn each(axes: &[Axis], src: u64, dst: u64, f: &mut dyn FnMut(u64, u64)) {
    let Some((axis, rest)) = axes.split_first() else { return f(src, dst) };
    for i in 0..axis.len as i64 {
        each(
            rest,
            src.wrapping_add_signed(i * axis.src),
            dst.wrapping_add_signed(i * axis.dst),
            f,
        );
    }
}
