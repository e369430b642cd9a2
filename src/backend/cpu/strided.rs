//! Reads strided boxes of a storage.

use crate::shard::View;

use super::Strided;
use super::boxes::transpose;
use super::eval::{Fallible, Inputs};
use super::finite::all_finite;

/// Reads a strided box in the order in which it lies in storage, then puts it in its own order.
pub(super) fn load(
    inputs: &Inputs<'_>,
    view: &View,
    len: &[u64],
    out: &mut [u8],
) -> Fallible<()> {
    if len.contains(&0) {
        return Ok(());
    }
    let mut order: Vec<usize> = (0..len.len()).filter(|d| len[*d] > 1).collect();
    order.sort_by_key(|d| std::cmp::Reverse(view.strides[*d]));
    if order.is_sorted() {
        load_ordered(inputs, view, len, &order, out)?;
    } else {
        let mut bytes = vec![0u8; out.len()];
        load_ordered(inputs, view, len, &order, &mut bytes)?;
        transpose(&bytes, len, &order, view.dtype.size() as usize, out);
    }
    if inputs.watched.get() {
        inputs.note(all_finite(view.dtype, out));
    }
    Ok(())
}

/// Reads a box whose dimensions of more than one index are `order`, outermost first.
fn load_ordered(
    inputs: &Inputs<'_>,
    view: &View,
    len: &[u64],
    order: &[usize],
    out: &mut [u8],
) -> Fallible<()> {
    let size = view.dtype.size();
    // Dimensions that lie back to back are one: (length, stride) from the inside out.
    let mut dims: Vec<(u64, u64)> = vec![(1, 1)];
    for d in order.iter().rev() {
        let (n, stride) = (len[*d], view.strides[*d]);
        let last = dims.len() - 1;
        if stride == dims[last].0 * dims[last].1 {
            dims[last].0 *= n;
        } else {
            dims.push((n, stride));
        }
    }
    let row_bytes = dims[0].0 * size;
    let (count, stride) = dims.get(1).map_or((1, 0), |d| (d.0, d.1 * size));
    let outer = dims.get(2..).unwrap_or(&[]);
    let block = (row_bytes * count) as usize;
    for (i, part) in out.chunks_exact_mut(block).enumerate() {
        let mut left = i as u64;
        let mut start = view.start;
        for (n, stride) in outer {
            start += left % n * stride;
            left /= n;
        }
        let strided = Strided { offset: start * size, row_bytes, stride, rows: count };
        inputs.rows.read(view.storage, strided, part)?;
    }
    Ok(())
}
