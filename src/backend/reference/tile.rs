//! Tiles of quantized nodes: gathered, scaled and encoded one element at a time, then kept.

use std::sync::Arc;

use crate::error::Result;
use crate::fp8::codec::e4m3_satfinite;
use crate::fp8::rcp::rcp_full;
use crate::fp8::{Recipe, RecipeKind};
use crate::ir::{Dims, NodeId};
use crate::lower::Part;

use super::number::widen;
use super::walk::{Walk, moved};

/// Tiles that one band keeps; each has at most 16 KiB of codes.
const TILES: usize = 2048;

/// One tile of a quantized node.
pub(super) struct Tile {
    /// Bits of the scale as f32.
    pub scale: u32,
    pub cols: usize,
    pub codes: Vec<u8>,
}

impl Walk<'_, '_> {
    /// Codes or scales of a node that quantizes, along its last dimension.
    pub(super) fn quantize(
        &mut self,
        id: NodeId,
        input: NodeId,
        recipe: &Recipe,
        part: Part,
        at: &[u64],
        out: &mut [u32],
    ) -> Result<()> {
        let block = u64::from(recipe.block);
        let (row, last) = (at[at.len() - 2] % block, at.len() - 1);
        let mut done = 0;
        while done < out.len() {
            let mut tile = moved(at, last, done as u64);
            let col = (tile[last] % block) as usize;
            tile.iter_mut().rev().take(2).for_each(|n| *n /= block);
            let tile = self.tile(id, input, recipe, tile)?;
            let count = (tile.cols - col).min(out.len() - done);
            let out = &mut out[done..done + count];
            match part {
                Part::Values => {
                    let codes = &tile.codes[row as usize * tile.cols + col..];
                    out.iter_mut().zip(codes).for_each(|(x, code)| *x = u32::from(*code));
                }
                Part::Scales => out.fill(tile.scale),
            }
            done += count;
        }
        Ok(())
    }

    /// The tile at these coordinates of the node's own grid.
    fn tile(
        &mut self,
        id: NodeId,
        input: NodeId,
        recipe: &Recipe,
        tile: Dims,
    ) -> Result<Arc<Tile>> {
        let key = (id, tile);
        if let Some(found) = self.tiles.get(&key) {
            return Ok(Arc::clone(found));
        }
        let oracle = self.oracle;
        let t = oracle.type_of(input);
        let m = t.shape.len() - 2;
        let block = u64::from(recipe.block);
        let mut at = key.1.clone();
        at.iter_mut().skip(m).for_each(|n| *n *= block);
        let rows = (t.shape[m] - at[m]).min(block);
        let cols = (t.shape[m + 1] - at[m + 1]).min(block) as usize;
        let mut values = vec![0; rows as usize * cols];
        for row in values.chunks_exact_mut(cols) {
            self.fill(input, Part::Values, &at, row)?;
            at[m] += 1;
        }
        let values = values.into_iter().map(|bits| widen(t.dtype, bits));
        let amax = values.clone().map(|x| x.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
        let scale = recipe.scale_of(amax);
        let by = operand(recipe.kind, scale);
        let codes = values.map(|x| code(recipe.kind, x, by)).collect();
        let made = Arc::new(Tile { scale: scale.to_bits(), cols, codes });
        if self.tiles.len() >= TILES {
            self.tiles.clear();
        }
        self.tiles.insert(key, Arc::clone(&made));
        Ok(made)
    }
}

/// What every element of a tile is multiplied with, as each original computes the reciprocal of
/// the scale; for prime-rl what it is divided by.
fn operand(kind: RecipeKind, scale: f32) -> f32 {
    match kind {
        RecipeKind::Vllm => rcp_full(scale),
        RecipeKind::Deepgemm | RecipeKind::Ue8m0 => 1.0 / scale,
        RecipeKind::PrimeRl => scale,
    }
}

fn code(kind: RecipeKind, x: f32, by: f32) -> u8 {
    e4m3_satfinite(match kind {
        RecipeKind::PrimeRl => x / by,
        RecipeKind::Vllm | RecipeKind::Deepgemm | RecipeKind::Ue8m0 => x * by,
    })
}
