//! Which trainer ranks hold which box of a tensor.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::Placement;

/// A mesh axis as one tensor sees it.
pub struct Cut {
    /// Ranks along the axis.
    pub size: u64,
    /// A rank's index on the axis.
    pub index: Box<dyn Fn(u32) -> u64>,
    pub placement: Placement,
}

/// A grid of boxes over a tensor, and the trainer ranks that hold each.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    /// For each dimension the edges of the boxes, from 0 to the size.
    pub cuts: Vec<Vec<u64>>,
    /// Ascending ranks of each box, row-major over the grid.
    holders: Vec<Arc<[u32]>>,
}

/// What a rank holds: for each dimension the ranges that its local tensor joins.
pub type Held = Vec<Vec<Range<u64>>>;

impl Layout {
    /// A tensor that some ranks hold whole.
    pub fn whole(shape: &[u64], holders: Arc<[u32]>) -> Layout {
        let cuts = shape.iter().map(|n| if *n == 0 { vec![0] } else { vec![0, *n] });
        let cells = usize::from(!shape.contains(&0));
        Layout { cuts: cuts.collect(), holders: vec![holders; cells] }
    }

    /// Applies placements in the order of the mesh axes, as DTensor does, for the ranks that
    /// hold the tensor at all.
    pub fn of(shape: &[u64], cuts: &[Cut], ranks: impl Iterator<Item = u32>) -> Layout {
        let held: Vec<(u32, Held)> =
            ranks.map(|rank| (rank, held(shape, cuts, rank))).collect();
        let edges: Vec<Vec<u64>> = (shape.iter().enumerate())
            .map(|(d, n)| {
                let ranges = held.iter().flat_map(|(_, h)| &h[d]);
                let ends = ranges.flat_map(|r| [r.start, r.end]).chain([0, *n]);
                let mut edges: Vec<u64> = ends.collect();
                edges.sort_unstable();
                edges.dedup();
                edges
            })
            .collect();
        let boxes = edges.iter().map(|e| e.len() - 1).product();
        let mut holders: Vec<Vec<u32>> = vec![Vec::new(); boxes];
        for (rank, held) in &held {
            for cell in cells(held, &edges) {
                holders[cell].push(*rank);
            }
        }
        // Boxes with the same holders share the list.
        let mut known: BTreeMap<Vec<u32>, Arc<[u32]>> = BTreeMap::new();
        let mut shared = |list: Vec<u32>| match known.get(&list) {
            Some(list) => Arc::clone(list),
            None => {
                let new: Arc<[u32]> = list.as_slice().into();
                known.insert(list, Arc::clone(&new));
                new
            }
        };
        Layout { holders: holders.into_iter().map(&mut shared).collect(), cuts: edges }
    }

    /// The ranks that hold a box of the grid.
    pub fn holders(&self, cell: &[usize]) -> &Arc<[u32]> {
        let at = cell.iter().zip(&self.cuts).fold(0, |at, (i, c)| at * (c.len() - 1) + i);
        &self.holders[at]
    }

    /// The ranges of each dimension that a rank holds, neighbours joined; none if it holds
    /// nothing. Its local tensor is their product, in order.
    pub fn held(&self, rank: u32) -> Option<Held> {
        let sizes: Vec<usize> = self.cuts.iter().map(|c| c.len() - 1).collect();
        let mut mine: Held = self.cuts.iter().map(|_| Vec::new()).collect();
        let own =
            (0..self.holders.len()).filter(|i| self.holders[*i].binary_search(&rank).is_ok());
        let mut any = false;
        for cell in own {
            any = true;
            let mut left = cell;
            for d in (0..sizes.len()).rev() {
                let i = left % sizes[d];
                left /= sizes[d];
                mine[d].push(self.cuts[d][i]..self.cuts[d][i + 1]);
            }
        }
        mine.iter_mut().for_each(join);
        any.then_some(mine)
    }
}

/// Sorts ranges and joins those that touch.
fn join(ranges: &mut Vec<Range<u64>>) {
    ranges.sort_unstable_by_key(|r| r.start);
    ranges.dedup_by(|next, last| {
        let touch = next.start <= last.end;
        if touch {
            last.end = last.end.max(next.end);
        }
        touch
    });
}

/// Numbers of the grid's boxes that lie in a product of ranges.
fn cells(held: &Held, edges: &[Vec<u64>]) -> Vec<usize> {
    let mut out = vec![0];
    for (ranges, edges) in held.iter().zip(edges) {
        let inside =
            |i: &usize| ranges.iter().any(|r| r.start <= edges[*i] && edges[*i] < r.end);
        let own: Vec<usize> = (0..edges.len() - 1).filter(inside).collect();
        let width = edges.len() - 1;
        out = out.iter().flat_map(|at| own.iter().map(move |i| at * width + i)).collect();
    }
    out
}

/// What one rank holds of each dimension.
fn held(shape: &[u64], cuts: &[Cut], rank: u32) -> Held {
    let mut held: Held = shape.iter().map(|n| std::iter::once(0..*n).collect()).collect();
    // Blocks of a strided shard that an axis further in will choose from.
    let mut blocks: Vec<Option<Vec<Vec<Range<u64>>>>> = vec![None; shape.len()];
    for cut in cuts {
        let index = (cut.index)(rank);
        match cut.placement {
            Placement::Replicate => {}
            Placement::StridedShard { dim, split } => {
                let dim = dim as usize;
                let parts = (0..split).map(|j| {
                    let block = chunk(&held[dim], split, j);
                    chunk(&block, cut.size, index)
                });
                let parts: Vec<Vec<Range<u64>>> = parts.collect();
                held[dim] = parts.iter().flatten().cloned().collect();
                blocks[dim] = Some(parts);
            }
            Placement::Shard(dim) => {
                let dim = dim as usize;
                held[dim] = match blocks[dim].take() {
                    Some(blocks) if blocks.len() as u64 == cut.size => {
                        blocks[index as usize].clone()
                    }
                    _ => chunk(&held[dim], cut.size, index),
                };
            }
        }
    }
    held
}

/// Part `index` of `torch.chunk(parts)` of some ranges end to end: ceil(n / parts) each, the
/// last ones short or empty.
fn chunk(ranges: &[Range<u64>], parts: u64, index: u64) -> Vec<Range<u64>> {
    let total: u64 = ranges.iter().map(|r| r.end - r.start).sum();
    let size = total.div_ceil(parts);
    let (from, to) = ((index * size).min(total), ((index + 1) * size).min(total));
    let mut start = 0;
    let mut out = Vec::new();
    for range in ranges {
        let end = start + range.end - range.start;
        let (lo, hi) = (from.max(start), to.min(end));
        if lo < hi {
            out.push(range.start + lo - start..range.start + hi - start);
        }
        start = end;
    }
    out
}

/// Part of `torch.chunk(parts)` of `count` things that holds number `index`.
pub(super) fn chunk_of(count: u64, parts: u64, index: u64) -> u64 {
    index / count.div_ceil(parts).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axis(size: u64, inner: u64, placement: Placement) -> Cut {
        Cut { size, index: Box::new(move |rank| u64::from(rank) / inner % size), placement }
    }

    fn rows(layout: &Layout, ranks: u32) -> Vec<Vec<Range<u64>>> {
        (0..ranks).map(|r| layout.held(r).map_or(Vec::new(), |mut h| h.remove(0))).collect()
    }

    fn one(ranges: &[(u64, u64)]) -> Vec<Vec<Range<u64>>> {
        let one = |r: &(u64, u64)| (r.0 < r.1).then_some(r.0..r.1).into_iter().collect();
        ranges.iter().map(one).collect()
    }

    #[test]
    fn shards_are_those_of_torch_chunk() {
        let sizes = |rows_of: u64, parts: u64| -> Vec<u64> {
            let layout = Layout::of(
                &[rows_of, 2],
                &[axis(parts, 1, Placement::Shard(0))],
                0..parts as u32,
            );
            let held = rows(&layout, parts as u32);
            held.iter().map(|r| r.iter().map(|r| r.end - r.start).sum()).collect()
        };
        assert_eq!(sizes(5, 4), [2, 2, 1, 0]);
        assert_eq!(sizes(576, 8), [72; 8]);
        assert_eq!(sizes(151_936, 7), [21_706, 21_706, 21_706, 21_706, 21_706, 21_706, 21_700]);
        assert_eq!(sizes(10_944, 16), [684; 16]);
        assert_eq!(sizes(3, 8), [1, 1, 1, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn replicas_hold_the_same() {
        let hsdp = [axis(2, 2, Placement::Replicate), axis(2, 1, Placement::Shard(0))];
        let layout = Layout::of(&[6], &hsdp, 0..4);
        assert_eq!(layout.cuts, [[0, 3, 6]]);
        assert_eq!(layout.holders(&[0])[..], [0, 2]);
        assert_eq!(layout.holders(&[1])[..], [1, 3]);
    }

    #[test]
    fn two_axes_may_cut_one_dim() {
        let nested = [axis(2, 2, Placement::Shard(0)), axis(2, 1, Placement::Shard(0))];
        // 7 = 4 + 3, then 2 + 2 and 2 + 1.
        let layout = Layout::of(&[7], &nested, 0..4);
        assert_eq!(rows(&layout, 4), one(&[(0, 2), (2, 4), (4, 6), (6, 7)]));
    }

    #[test]
    fn a_strided_shard_lies_inside_the_inner_axis() {
        let over_tp = |n: u64| {
            let strided = Placement::StridedShard { dim: 0, split: 2 };
            let cuts = [axis(2, 2, strided), axis(2, 1, Placement::Shard(0))];
            rows(&Layout::of(&[n], &cuts, 0..4), 4)
        };
        // Ranks are (fsdp, tp): tp has 0..4 and 4..8, and each of them is halved by fsdp.
        assert_eq!(over_tp(8), one(&[(0, 2), (4, 6), (2, 4), (6, 8)]));
        assert_eq!(over_tp(7), one(&[(0, 2), (4, 6), (2, 4), (6, 7)]));
        // Alone it is a range of every block.
        let strided = Placement::StridedShard { dim: 0, split: 2 };
        let layout = Layout::of(&[8], &[axis(2, 1, strided)], 0..2);
        assert_eq!(rows(&layout, 2), [vec![0..2, 4..6], vec![2..4, 6..8]]);
    }

    #[test]
    fn a_block_of_a_strided_shard_may_have_a_gap() {
        let strided = |split| Placement::StridedShard { dim: 0, split };
        let cuts =
            [axis(2, 1, strided(2)), axis(1, 1, strided(1)), axis(1, 1, Placement::Shard(0))];
        let layout = Layout::of(&[8], &cuts, 0..2);
        assert_eq!(rows(&layout, 2), [vec![0..2, 4..6], vec![2..4, 6..8]]);
    }

    #[test]
    fn an_empty_tensor_is_held_by_nobody() {
        assert_eq!(Layout::whole(&[0, 3], Arc::from([0])).held(0), None);
        let cut = [axis(2, 1, Placement::Shard(0))];
        assert_eq!(Layout::of(&[0, 3], &cut, 0..2).held(0), None);
    }

    proptest::proptest! {
        /// Without replication each element is on exactly one rank, whatever the axes cut.
        #[test]
        fn every_element_is_held_once(
            shape in proptest::collection::vec(0u64..20, 1..3),
            axes in proptest::collection::vec((1u64..5, 0u64..2, 0u64..5), 1..4),
        ) {
            let world: u64 = axes.iter().map(|a| a.0).product();
            let mut inner = world;
            let cuts: Vec<Cut> = axes.iter().map(|&(size, dim, split)| {
                inner /= size;
                let dim = dim % shape.len() as u64;
                axis(size, inner, match split {
                    0 => Placement::Shard(dim),
                    split => Placement::StridedShard { dim, split },
                })
            }).collect();
            let layout = Layout::of(&shape, &cuts, 0..world as u32);
            let mut count = 0;
            for rank in 0..world as u32 {
                let size = |r: &Vec<Range<u64>>| r.iter().map(|r| r.end - r.start).sum::<u64>();
                count += layout.held(rank).map_or(0, |h| h.iter().map(size).product());
            }
            proptest::prop_assert_eq!(count, shape.iter().product::<u64>());
            proptest::prop_assert!(layout.holders.iter().all(|h| h.len() == 1));
        }
    }
}
