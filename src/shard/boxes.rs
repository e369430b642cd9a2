//! Axis-aligned ranges of a tensor, and how they look after a reshape.

use smallvec::smallvec;

use crate::ir::Dims;

use super::budget;

/// A range of a tensor: first index and length in each dimension.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Window {
    pub lo: Dims,
    pub len: Dims,
}

impl Window {
    /// All of a tensor.
    pub fn whole(shape: &[u64]) -> Self {
        Window { lo: smallvec![0; shape.len()], len: shape.into() }
    }

    pub fn is_empty(&self) -> bool {
        self.len.contains(&0)
    }

    /// True if all of another window lies in this one.
    pub fn contains(&self, other: &Window) -> bool {
        (0..self.lo.len()).all(|d| {
            self.lo[d] <= other.lo[d] && other.lo[d] + other.len[d] <= self.lo[d] + self.len[d]
        })
    }

    /// The common part, if there is one.
    pub fn intersect(&self, other: &Window) -> Option<Window> {
        let mut out = self.clone();
        for d in 0..self.lo.len() {
            let lo = self.lo[d].max(other.lo[d]);
            let hi = (self.lo[d] + self.len[d]).min(other.lo[d] + other.len[d]);
            if lo >= hi {
                return None;
            }
            (out.lo[d], out.len[d]) = (lo, hi - lo);
        }
        Some(out)
    }
}

/// Strides of a contiguous tensor, in elements.
pub fn row_major(shape: &[u64]) -> Dims {
    let mut strides: Dims = smallvec![1; shape.len()];
    for d in (1..shape.len()).rev() {
        strides[d - 1] = strides[d] * shape[d];
    }
    strides
}

/// A box before a reshape and the box with the same elements, in the same order, after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pair {
    pub old: Window,
    pub new: Window,
}

/// Cuts a window of the new shape into boxes that are boxes of the old shape too.
///
/// `[8, 6] → [2, 4, 6]`, window `[0..2, 1..3, ..]`: old rows 1..3 and 5..7.
pub(super) fn through_reshape(old: &[u64], new: &[u64], window: &Window) -> Vec<Pair> {
    let empty = Pair {
        old: Window { lo: Dims::new(), len: Dims::new() },
        new: Window { lo: Dims::new(), len: Dims::new() },
    };
    let mut pairs = vec![empty];
    for (o, n) in groups(old, new) {
        let part =
            Window { lo: window.lo[n.clone()].into(), len: window.len[n.clone()].into() };
        let found = in_group(&old[o], &new[n], &part);
        if !budget::take((pairs.len() as u64).saturating_mul(found.len() as u64)) {
            return Vec::new();
        }
        pairs = pairs
            .iter()
            .flat_map(|left| found.iter().map(move |right| joined(left, right)))
            .collect();
    }
    pairs
}

fn joined(left: &Pair, right: &Pair) -> Pair {
    let glue = |a: &Window, b: &Window| Window {
        lo: a.lo.iter().chain(&b.lo).copied().collect(),
        len: a.len.iter().chain(&b.len).copied().collect(),
    };
    Pair { old: glue(&left.old, &right.old), new: glue(&left.new, &right.new) }
}

type Range = std::ops::Range<usize>;

/// Smallest runs of dimensions with equal products on both sides.
fn groups(old: &[u64], new: &[u64]) -> Vec<(Range, Range)> {
    let (mut i, mut j) = (0, 0);
    let mut out = Vec::new();
    while i < old.len() || j < new.len() {
        let (start_i, start_j) = (i, j);
        let (mut a, mut b) = (1u64, 1u64);
        if i < old.len() {
            a = old[i];
            i += 1;
        }
        if j < new.len() {
            b = new[j];
            j += 1;
        }
        while a != b {
            if a < b && i < old.len() {
                a *= old[i];
                i += 1;
            } else if j < new.len() {
                b *= new[j];
                j += 1;
            } else {
                break;
            }
        }
        out.push((start_i..i, start_j..j));
    }
    out
}

fn in_group(old: &[u64], new: &[u64], window: &Window) -> Vec<Pair> {
    if old == new {
        return vec![Pair { old: window.clone(), new: window.clone() }];
    }
    let mut out = Vec::new();
    let (inner, _) = contiguous(window, new);
    let runs = window.len[..inner].iter().fold(1u64, |all, n| all.saturating_mul(*n));
    if !budget::take(runs) {
        return out;
    }
    for (mut start, mut left) in flat_runs(new, window) {
        while left > 0 && budget::take(1) {
            let count = common_prefix(old, new, start, left);
            out.push(Pair {
                old: prefix_box(old, start, count),
                new: prefix_box(new, start, count),
            });
            start += count;
            left -= count;
        }
    }
    out
}

/// The first of the dimensions whose elements lie end to end, and how many elements that are.
pub(crate) fn contiguous(window: &Window, shape: &[u64]) -> (usize, u64) {
    let mut inner = shape.len();
    let mut run = 1;
    while inner > 0 {
        inner -= 1;
        run *= window.len[inner];
        if window.len[inner] != shape[inner] {
            break;
        }
    }
    (inner, run)
}

/// The contiguous runs (first element, count) of a window, in order.
fn flat_runs(shape: &[u64], window: &Window) -> Vec<(u64, u64)> {
    let strides = row_major(shape);
    let (inner, run) = contiguous(window, shape);
    let mut starts = vec![(0..shape.len()).map(|d| window.lo[d] * strides[d]).sum::<u64>()];
    for d in 0..inner {
        starts = starts
            .iter()
            .flat_map(|s| (0..window.len[d]).map(move |i| (*s, i)))
            .map(|(s, i)| s + i * strides[d])
            .collect();
    }
    starts.into_iter().map(|s| (s, run)).collect()
}

/// The most elements from `start` that form one box in both shapes.
fn common_prefix(old: &[u64], new: &[u64], start: u64, left: u64) -> u64 {
    let mut best = 1;
    for (so, lo) in levels(old, start) {
        for (sn, ln) in levels(new, start) {
            let step = so / gcd(so, sn) * sn;
            let most = left.min(so * lo).min(sn * ln);
            best = best.max(most / step * step);
        }
    }
    best
}

/// For each dimension at whose boundary `start` lies: its stride, and how many indices are left.
fn levels(shape: &[u64], start: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
    let strides = row_major(shape);
    (0..shape.len()).filter_map(move |d| {
        let stride = strides[d];
        start.is_multiple_of(stride).then(|| (stride, shape[d] - start / stride % shape[d]))
    })
}

/// The box of `count` elements from `start`; the caller knows that they form one.
fn prefix_box(shape: &[u64], start: u64, count: u64) -> Window {
    let strides = row_major(shape);
    let lo: Dims = (0..shape.len()).map(|d| start / strides[d] % shape[d]).collect();
    let len = (0..shape.len())
        .map(|d| if count < strides[d] { 1 } else { (count / strides[d]).min(shape[d]) })
        .collect();
    Window { lo, len }
}

pub(super) fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}
