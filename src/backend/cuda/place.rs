//! Where elements lie in a GPU's memory: whole tensors, shards of them, boxes in staging.

use smallvec::SmallVec;

use crate::diag::Diagnostic;
use crate::ir::Dims;
use crate::shard::{View, Window, row_major};
use crate::topo::Held;

use super::Fallible;

/// Strides in bytes.
pub type Strides = SmallVec<[i64; 4]>;

/// Elements of a box by their index: `address` is that of index 0, which need not exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plane {
    pub address: u64,
    pub strides: Strides,
}

impl Plane {
    /// A window packed row-major at an address, by the window's own indices.
    pub fn packed(address: u64, window: &Window, size: u64) -> Plane {
        let strides: Strides =
            row_major(&window.len).iter().map(|s| (s * size) as i64).collect();
        let first = Plane { address, strides };
        let lo = first.at(&window.lo).wrapping_sub(address);
        Plane { address: address.wrapping_sub(lo), ..first }
    }

    pub fn at(&self, index: &[u64]) -> u64 {
        let off = index.iter().zip(&self.strides).map(|(i, s)| (*i as i64).wrapping_mul(*s));
        off.fold(self.address, |at, off| at.wrapping_add_signed(off))
    }

    /// The same elements with index `by` as index 0.
    pub fn moved(&self, by: &[u64]) -> Plane {
        Plane { address: self.at(by), strides: self.strides.clone() }
    }
}

/// A tensor, or what one rank holds of it.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub address: u64,
    /// Lengths and element strides of the whole tensor, row-major.
    shape: Dims,
    whole: Dims,
    /// Ranges of each dimension that are here; none if all are.
    held: Option<Held>,
    /// Bytes from one index to the next of each dimension, here.
    strides: Strides,
}

impl Tensor {
    /// A whole tensor with strides in bytes.
    pub fn whole(address: u64, shape: &[u64], strides: Strides) -> Tensor {
        Tensor { address, shape: shape.into(), whole: row_major(shape), held: None, strides }
    }

    /// A row-major shard.
    pub fn shard(address: u64, shape: &[u64], size: u64, held: Held) -> Tensor {
        let lengths = local_shape(&held);
        let strides = row_major(&lengths).iter().map(|s| (s * size) as i64).collect();
        let all = lengths.iter().zip(shape).all(|(a, b)| a == b);
        let held = (!all).then_some(held);
        Tensor { address, shape: shape.into(), whole: row_major(shape), held, strides }
    }

    /// Address of an element of the whole tensor, by its row-major number.
    fn element(&self, number: u64) -> Fallible<u64> {
        let mut at = self.address;
        for d in 0..self.shape.len() {
            let index = number / self.whole[d] % self.shape[d];
            let local = match &self.held {
                None => index,
                Some(held) => local_index(&held[d], index).ok_or_else(outside)?,
            };
            at = at.wrapping_add_signed(local as i64 * self.strides[d]);
        }
        Ok(at)
    }

    /// A view over a box that lies in one range of every dimension: the address of the element
    /// at `lo`, and the view's strides here.
    pub fn view(&self, view: &View, lo: &[u64]) -> Fallible<Plane> {
        let first = lo.iter().zip(&view.strides).map(|(i, s)| i * s).sum::<u64>();
        let address = self.element(view.start + first)?;
        let stride = |s: &u64| {
            let mut left = *s;
            let digits = (0..self.shape.len()).map(|d| {
                let digit = left / self.whole[d];
                left %= self.whole[d];
                digit as i64 * self.strides[d]
            });
            digits.sum()
        };
        Ok(Plane { address, strides: view.strides.iter().map(stride).collect() })
    }
}

/// Lengths of what a rank holds.
pub fn local_shape(held: &Held) -> Dims {
    held.iter().map(|ranges| ranges.iter().map(|r| r.end - r.start).sum()).collect()
}

fn local_index(ranges: &[std::ops::Range<u64>], index: u64) -> Option<u64> {
    let mut before = 0;
    for range in ranges {
        if range.contains(&index) {
            return Some(before + index - range.start);
        }
        before += range.end - range.start;
    }
    None
}

fn outside() -> Diagnostic {
    Diagnostic::error("E0502", "a trainer rank would read what it does not hold")
}
