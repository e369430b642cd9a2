//! Finds the tiles that no single rank makes, as boxes with one set of holders.

use crate::ir::Dims;
use crate::shard::Window;

/// A part of what a recipe quantizes, and the trainer rank that makes it.
pub(super) struct Made {
    pub window: Window,
    pub owner: u32,
}

/// Calls `emit` for each box of tiles (of size `block`) that parts of several owners make
/// together: with the owners, ascending.
pub(super) fn shared_tiles(
    parts: &[Made],
    extent: &[u64],
    block: u64,
    emit: &mut impl FnMut(Window, Vec<u32>),
) {
    let dims = extent.len();
    let tile = |d: usize| if d + 2 >= dims { block } else { 1 };
    let whole = |part: &Made| {
        (dims - 2..dims).all(|d| {
            let (lo, hi) = (part.window.lo[d], part.window.lo[d] + part.window.len[d]);
            lo.is_multiple_of(block) && (hi.is_multiple_of(block) || hi == extent[d])
        })
    };
    if parts.iter().all(whole) {
        return;
    }
    let bands: Vec<Vec<(u64, u64)>> = (0..dims).map(|d| bands(parts, d, tile(d))).collect();
    let mut at = vec![0usize; dims];
    loop {
        let lo: Dims = (0..dims).map(|d| bands[d][at[d]].0).collect();
        let len = (0..dims).map(|d| bands[d][at[d]].1 - bands[d][at[d]].0).collect();
        let tiles = Window { lo, len };
        let owners = owners(parts, &tiles, &tile);
        if let Some(owners) = owners {
            emit(tiles, owners);
        }
        let Some(d) = (0..dims).rev().find(|d| at[*d] + 1 < bands[*d].len()) else { return };
        at[d] += 1;
        at[d + 1..].fill(0);
    }
}

/// Ranges of tiles along a dimension over which the same parts lie: a tile that a part's edge
/// cuts is a range of its own.
fn bands(parts: &[Made], d: usize, tile: u64) -> Vec<(u64, u64)> {
    let mut edges: Vec<u64> = Vec::with_capacity(4 * parts.len());
    for part in parts {
        for at in [part.window.lo[d], part.window.lo[d] + part.window.len[d]] {
            edges.extend([at / tile, at.div_ceil(tile)]);
        }
    }
    edges.sort_unstable();
    edges.dedup();
    edges.windows(2).map(|w| (w[0], w[1])).collect()
}

/// The owners of the parts that meet in a box of tiles, if there are several.
fn owners(parts: &[Made], tiles: &Window, tile: &impl Fn(usize) -> u64) -> Option<Vec<u32>> {
    let meets = |part: &&Made| {
        (0..tiles.lo.len()).all(|d| {
            let (lo, hi) = (tiles.lo[d] * tile(d), (tiles.lo[d] + tiles.len[d]) * tile(d));
            part.window.lo[d] < hi && lo < part.window.lo[d] + part.window.len[d]
        })
    };
    let mut owners: Vec<u32> = parts.iter().filter(meets).map(|p| p.owner).collect();
    owners.sort_unstable();
    owners.dedup();
    (owners.len() > 1).then_some(owners)
}
