//! Where each element of a node comes from, operation by operation.

use std::collections::HashMap;
use std::sync::Arc;

use crate::diag::Diagnostic;
use crate::dtype::DType;
use crate::error::Result;
use crate::ir::{Dims, Node, NodeId, Op, Plan, SourceFormat, SourceId, Type};
use crate::lower::Part;

use super::number::{cast, constant, pack, result, unpack, widen};
use super::tile::Tile;
use super::{Band, Loaded, Oracle, matrix};

/// The evaluation of one band.
pub(super) struct Walk<'o, 'a> {
    pub oracle: &'o Oracle<'a>,
    pub loaded: &'o Loaded<'o>,
    pub experts: Option<&'o [u64]>,
    pub held: HashMap<(SourceId, Part), Arc<Vec<u8>>>,
    pub tiles: HashMap<(NodeId, Dims), Arc<Tile>>,
}

impl<'a> Walk<'_, 'a> {
    pub(super) fn band(
        &mut self,
        name: &str,
        node: NodeId,
        t: &Type,
        band: Band<'_>,
    ) -> Result<()> {
        let (_, cols) = matrix(&t.shape);
        let size = t.dtype.size() as usize;
        let mut row = vec![0; cols as usize];
        let mut index = band.first_row;
        for out in band.values.chunks_exact_mut(cols as usize * size) {
            self.fill(node, Part::Values, &row_start(&t.shape, index), &mut row)?;
            pack(&row, size, out);
            index += 1;
        }
        let (Some(q), Some(dtype)) = (t.quant, t.scale_dtype()) else { return Ok(()) };
        // Every element of a tile has the tile's scale; the first and the last row stand for all.
        let mut last = row.clone();
        self.fill(node, Part::Scales, &row_start(&t.shape, band.first_row), &mut row)?;
        self.fill(node, Part::Scales, &row_start(&t.shape, index - 1), &mut last)?;
        let size = dtype.size() as usize;
        let tiles = row.chunks(q.block as usize).zip(last.chunks(q.block as usize));
        for ((top, bottom), out) in tiles.zip(band.scales.chunks_exact_mut(size)) {
            if top.iter().chain(bottom).any(|s| *s != top[0]) {
                let text = format!("{name}: one tile of the result has several scales");
                return Err(Diagnostic::error("E0606", text).about(name).into());
            }
            pack(&[cast(DType::F32, dtype, top[0])], size, out);
        }
        Ok(())
    }

    fn shape(&self, id: NodeId) -> &[u64] {
        &self.oracle.type_of(id).shape
    }

    /// Elements of a node from `at` on along its last dimension: their bits in the node's type,
    /// or for each the bits of its scale as f32.
    pub(super) fn fill(
        &mut self,
        id: NodeId,
        part: Part,
        at: &[u64],
        out: &mut [u32],
    ) -> Result<()> {
        let oracle = self.oracle;
        let plan: &'a Plan = oracle.plan;
        let node = plan.node(id);
        let place = &oracle.place;
        let input = |i: usize| oracle.type_of(node.inputs[i]);
        match &node.op {
            Op::Source(source) => self.source(*source, part, at, out),
            Op::Cat { dim } => self.cat(node, *dim, part, at, out),
            Op::Stack => self.stack(node, part, at, out),
            Op::Slice { dim, start, .. } => {
                self.fill(node.inputs[0], part, &moved(at, *dim, *start), out)
            }
            Op::Shard { dim, axis } => {
                let each = input(0).shape[*dim] / place.size(*axis);
                let first = place.index(*axis) * each;
                self.fill(node.inputs[0], part, &moved(at, *dim, first), out)
            }
            Op::Heads { axis, heads } => {
                // With more ranks than heads this rounds down: neighbours share a head.
                let first_head = place.index(*axis) * heads / place.size(*axis);
                let first = first_head * (input(0).shape[0] / heads);
                self.fill(node.inputs[0], part, &moved(at, 0, first), out)
            }
            Op::Experts { axis } => {
                let count = input(0).shape[0];
                let first = place.expert_slots(*axis, count).map_or(0, |slots| slots.0);
                self.slots(node.inputs[0], count, first, part, at, out)
            }
            Op::Reshape { .. } => self.reshape(id, node.inputs[0], part, at, out),
            Op::Permute { dims } => self.permute(node.inputs[0], dims, part, at, out),
            Op::Pad { dim, value, .. } => {
                let inside = inside(input(0).shape[*dim], *dim, at, out.len());
                let (kept, padding) = out.split_at_mut(inside);
                padding.fill(constant(oracle.type_of(id).dtype, *value));
                match kept.is_empty() {
                    true => Ok(()),
                    false => self.fill(node.inputs[0], part, at, kept),
                }
            }
            Op::Cast { dtype } => self.cast(node.inputs[0], *dtype, at, out),
            Op::Scale { factor } => {
                let dtype = input(0).dtype;
                let factor = *factor as f32;
                self.fill(node.inputs[0], part, at, out)?;
                out.iter_mut().for_each(|x| *x = result(dtype, widen(dtype, *x) * factor));
                Ok(())
            }
            Op::Add => {
                let dtype = input(0).dtype;
                let mut right = vec![0; out.len()];
                self.fill(node.inputs[0], part, at, out)?;
                self.fill(node.inputs[1], part, at, &mut right)?;
                for (x, y) in out.iter_mut().zip(right) {
                    *x = result(dtype, widen(dtype, *x) + widen(dtype, y));
                }
                Ok(())
            }
            Op::Quantize { recipe, .. } if input(0).quant.is_none() => {
                self.quantize(id, node.inputs[0], recipe, part, at, out)
            }
            Op::Quantize { .. } | Op::Refine { .. } => self.fill(node.inputs[0], part, at, out),
            Op::Codes => self.fill(node.inputs[0], Part::Values, at, out),
            Op::Scales => self.scales(id, node.inputs[0], at, out),
            Op::Dequantize { dtype } if input(0).quant.is_some() => {
                let mut scales = vec![0; out.len()];
                self.fill(node.inputs[0], Part::Values, at, out)?;
                self.fill(node.inputs[0], Part::Scales, at, &mut scales)?;
                for (x, scale) in out.iter_mut().zip(scales) {
                    *x = result(*dtype, widen(DType::E4m3, *x) * f32::from_bits(scale));
                }
                Ok(())
            }
            Op::Dequantize { dtype } => self.cast(node.inputs[0], *dtype, at, out),
        }
    }

    /// Scales along a row of the grid: those of the first element of each tile.
    fn scales(&mut self, id: NodeId, input: NodeId, at: &[u64], out: &mut [u32]) -> Result<()> {
        let dtype = self.oracle.type_of(id).dtype;
        let tile = self.oracle.type_of(input).quant.map_or(1, |q| q.block);
        let mut first: Dims = at.into();
        let m = first.len() - 2;
        (first[m], first[m + 1]) = (at[m] * tile, at[m + 1] * tile);
        for scale in out {
            let mut one = [0];
            self.fill(input, Part::Scales, &first, &mut one)?;
            *scale = cast(DType::F32, dtype, one[0]);
            first[m + 1] += tile;
        }
        Ok(())
    }

    fn source(&mut self, id: SourceId, part: Part, at: &[u64], out: &mut [u32]) -> Result<()> {
        let source = self.oracle.plan.source(id);
        let (name, dtype, shape) = match (&source.format, part) {
            (SourceFormat::Plain(dtype), _) => (&source.name, *dtype, &source.shape),
            (SourceFormat::Quantized { .. }, Part::Values) => {
                (&source.name, DType::E4m3, &source.shape)
            }
            (SourceFormat::Quantized { scale, .. }, Part::Scales) => {
                (&scale.name, scale.dtype, &scale.shape)
            }
        };
        let key = (id, part);
        let data = match self.held.get(&key) {
            Some(data) => data,
            None => {
                let bytes = shape.iter().product::<u64>() * dtype.size();
                let data = self.loaded.get(key, name, bytes)?;
                self.held.entry(key).or_insert(data)
            }
        };
        let size = dtype.size() as usize;
        match (&source.format, part) {
            (SourceFormat::Quantized { block, .. }, Part::Scales) => {
                for (i, out) in out.iter_mut().enumerate() {
                    let mut tile = moved(at, at.len() - 1, i as u64);
                    tile.iter_mut().rev().take(2).for_each(|n| *n /= block);
                    unpack(
                        &data[flat(shape, &tile) as usize * size..],
                        size,
                        std::slice::from_mut(out),
                    );
                    *out = widen(dtype, *out).to_bits();
                }
            }
            _ => unpack(&data[flat(shape, at) as usize * size..], size, out),
        }
        Ok(())
    }

    fn cat(
        &mut self,
        node: &Node,
        dim: usize,
        part: Part,
        at: &[u64],
        out: &mut [u32],
    ) -> Result<()> {
        let mut start = 0;
        let mut done = 0;
        for id in &node.inputs {
            let size = self.shape(*id)[dim];
            let along = dim + 1 == at.len();
            let first = at[dim] + if along { done as u64 } else { 0 };
            if done < out.len() && (start..start + size).contains(&first) {
                let mut from: Dims = at.into();
                from[dim] = first - start;
                let room = if along { (start + size - first) as usize } else { usize::MAX };
                let count = room.min(out.len() - done);
                self.fill(*id, part, &from, &mut out[done..done + count])?;
                done += count;
            }
            start += size;
        }
        Ok(())
    }

    fn stack(&mut self, node: &Node, part: Part, at: &[u64], out: &mut [u32]) -> Result<()> {
        if at.len() > 1 {
            return self.fill(node.inputs[at[0] as usize], part, &at[1..], out);
        }
        // A stack of scalars: each element is another part.
        for (id, out) in node.inputs[at[0] as usize..].iter().zip(out) {
            self.fill(*id, part, &[], std::slice::from_mut(out))?;
        }
        Ok(())
    }

    fn slots(
        &mut self,
        input: NodeId,
        count: u64,
        first: u64,
        part: Part,
        at: &[u64],
        out: &mut [u32],
    ) -> Result<()> {
        let map = self.experts;
        let logical = |slot: u64| -> Result<u64> {
            let Some(map) = map else { return Ok(slot % count) };
            let found = map.get(slot as usize).copied().filter(|e| *e < count);
            found.ok_or_else(|| {
                let text = format!("the expert map has no expert of {count} for slot {slot}");
                Diagnostic::error("E0305", text).into()
            })
        };
        if at.len() > 1 {
            let mut from: Dims = at.into();
            from[0] = logical(first + at[0])?;
            return self.fill(input, part, &from, out);
        }
        for (i, out) in out.iter_mut().enumerate() {
            let expert = logical(first + at[0] + i as u64)?;
            self.fill(input, part, &[expert], std::slice::from_mut(out))?;
        }
        Ok(())
    }

    fn reshape(
        &mut self,
        id: NodeId,
        input: NodeId,
        part: Part,
        at: &[u64],
        out: &mut [u32],
    ) -> Result<()> {
        let oracle = self.oracle;
        let old = &oracle.type_of(input).shape;
        let mut element = flat(self.shape(id), at);
        let mut done = 0;
        while done < out.len() {
            let from = unflat(old, element);
            let room = old.last().map_or(1, |n| n - from[from.len() - 1]);
            let count = (room as usize).min(out.len() - done);
            self.fill(input, part, &from, &mut out[done..done + count])?;
            done += count;
            element += count as u64;
        }
        Ok(())
    }

    fn permute(
        &mut self,
        input: NodeId,
        dims: &[usize],
        part: Part,
        at: &[u64],
        out: &mut [u32],
    ) -> Result<()> {
        let mut from: Dims = at.into();
        for (new, old) in dims.iter().enumerate() {
            from[*old] = at[new];
        }
        match dims.last() {
            Some(last) if last + 1 != dims.len() => {
                for out in out {
                    self.fill(input, part, &from, std::slice::from_mut(out))?;
                    from[*last] += 1;
                }
                Ok(())
            }
            _ => self.fill(input, part, &from, out),
        }
    }

    fn cast(&mut self, input: NodeId, to: DType, at: &[u64], out: &mut [u32]) -> Result<()> {
        let from = self.oracle.type_of(input).dtype;
        self.fill(input, Part::Values, at, out)?;
        out.iter_mut().for_each(|x| *x = cast(from, to, *x));
        Ok(())
    }
}

/// The first element of a row, counted over all dimensions but the last.
fn row_start(shape: &[u64], row: u64) -> Dims {
    let mut at = match shape.split_last() {
        Some((_, lead)) => unflat(lead, row),
        None => return Dims::new(),
    };
    at.push(0);
    at
}

/// How many of `count` elements from `at` on lie before `size` along `dim`.
fn inside(size: u64, dim: usize, at: &[u64], count: usize) -> usize {
    let room = size.saturating_sub(at[dim]);
    match dim + 1 == at.len() {
        true => count.min(room as usize),
        false if room == 0 => 0,
        false => count,
    }
}

pub(super) fn moved(at: &[u64], dim: usize, by: u64) -> Dims {
    let mut at: Dims = at.into();
    at[dim] += by;
    at
}

/// Place of an element in row-major order.
fn flat(shape: &[u64], at: &[u64]) -> u64 {
    shape.iter().zip(at).fold(0, |n, (size, i)| n * size + i)
}

/// The inverse of [`flat`].
fn unflat(shape: &[u64], mut n: u64) -> Dims {
    let mut at: Dims = shape.into();
    for (i, size) in at.iter_mut().zip(shape).rev() {
        *i = n % size;
        n /= size;
    }
    at
}
