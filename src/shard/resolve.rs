//! Walks an expression for one rank, from the wanted window down to boxes of sources.

use std::collections::BTreeMap;

use smallvec::SmallVec;

use crate::dtype::DType;
use crate::ir::{Dims, NodeId, Op, Place, Plan, SourceFormat, Type};

use super::boxes::{Window, row_major, through_reshape};
use super::budget;
use super::moves::{permute_pieces, reshape_pieces};
use super::piece::{Expr, Made, Piece, ScaleView, Storage, Stored, Tiles, TilesFrom, View};

/// Physical → logical expert ids by layer (`model.layers.3`); layers that are not named have
/// vLLM's initial map.
pub type ExpertMap = BTreeMap<String, Vec<u64>>;

/// Why an expression has no pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsaid {
    /// At this node elements leave their tiles.
    Tiles(NodeId),
    /// It would take more than [`super::MOST_BOXES`].
    Boxes,
}

/// Resolves expressions of one plan at one place.
pub struct Resolver<'a> {
    pub plan: &'a Plan,
    /// Type of every node at the place.
    pub types: &'a [Option<Type>],
    pub place: &'a Place,
    pub experts: &'a ExpertMap,
    /// For each source of the plan: storage of its elements and, if quantized, of its scales.
    pub storages: &'a [(u32, Option<u32>)],
    /// Which node is which parameter of this rank; for derived parameters only.
    pub landed: &'a BTreeMap<NodeId, u32>,
}

type Pieces = Result<Vec<Piece>, Unsaid>;

/// What one walk needs beside the resolver.
struct Walk<'a> {
    /// Physical → logical map of the parameter's layer, if one is given.
    map: Option<&'a [u64]>,
    derived: bool,
}

impl Resolver<'_> {
    /// The pieces of a whole parameter, in order of its dimensions.
    ///
    /// # Errors
    /// Why it has none.
    pub fn param(&self, name: &str, node: NodeId, derived: bool) -> Pieces {
        let Some(t) = &self.types[node.0 as usize] else { return Err(Unsaid::Tiles(node)) };
        let walk = Walk { map: self.map_of(name), derived };
        let window = Window::whole(&t.shape);
        if window.is_empty() {
            return Ok(Vec::new());
        }
        let pieces = budget::within(|| self.walk(node, &window, &walk));
        pieces.unwrap_or(Err(Unsaid::Boxes))
    }

    /// The expert map of the layer that a parameter lies in.
    fn map_of(&self, name: &str) -> Option<&[u64]> {
        let dots = name.match_indices('.').map(|(i, _)| &name[..i]);
        dots.filter_map(|layer| self.experts.get(layer)).next_back().map(Vec::as_slice)
    }

    fn shape(&self, node: NodeId) -> &[u64] {
        self.types[node.0 as usize].as_ref().map_or(&[], |t| &t.shape)
    }

    fn walk(&self, id: NodeId, window: &Window, walk: &Walk<'_>) -> Pieces {
        let node = self.plan.node(id);
        let inner = |i: usize, w: &Window| self.walk(node.inputs[i], w, walk);
        let shape_of = |i: usize| self.shape(node.inputs[i]);
        match &node.op {
            Op::Source(source) => Ok(vec![self.source(source.0 as usize, window)]),
            Op::Cat { dim } => self.cat(node.inputs.as_slice(), *dim, window, walk),
            Op::Stack => self.stack(node.inputs.as_slice(), window, walk),
            Op::Slice { dim, start, .. } => inner(0, &shifted(window, *dim, *start)),
            Op::Shard { dim, axis } => {
                let first = self.place.index(*axis) * self.shape(id)[*dim];
                inner(0, &shifted(window, *dim, first))
            }
            Op::Heads { axis, heads } => {
                let ranks = self.place.size(*axis);
                let repeat = if heads.is_multiple_of(ranks) { 1 } else { ranks / heads };
                let first = self.place.index(*axis) / repeat * self.shape(id)[0];
                inner(0, &shifted(window, 0, first))
            }
            Op::Experts { axis } => {
                let count = shape_of(0)[0];
                let first = self.place.expert_slots(*axis, count).map_or(0, |s| s.0);
                self.experts(node.inputs[0], count, first, window, walk)
            }
            Op::Reshape { .. } => self.reshape(id, node.inputs[0], window, walk),
            Op::Permute { dims } => {
                let mut w = window.clone();
                for (new, old) in dims.iter().enumerate() {
                    (w.lo[*old], w.len[*old]) = (window.lo[new], window.len[new]);
                }
                permute_pieces(&inner(0, &w)?, dims).ok_or(Unsaid::Tiles(id))
            }
            Op::Pad { dim, value, .. } => {
                let dtype = self.dtype(id);
                pad(window, *dim, shape_of(0)[*dim], *value, dtype, |w| inner(0, w))
            }
            Op::Cast { dtype } => self.cast(node.inputs[0], *dtype, window, walk),
            Op::Scale { factor } => {
                let factor = factor.to_bits();
                Ok(wrap(inner(0, window)?, |value| Expr::Scale { factor, value }))
            }
            Op::Add => Ok(add(inner(0, window)?, &inner(1, window)?)),
            Op::Quantize { recipe, .. } => {
                if self.is_quantized(node.inputs[0]) {
                    return inner(0, window);
                }
                let (region, phase) = whole_tiles(window, shape_of(0), u64::from(recipe.block));
                let input = inner(0, &region)?;
                let matrices = apart(&input, window);
                let made = Made { recipe: *recipe, extent: region.len, input };
                let refined = u64::from(recipe.block);
                let tiles = Tiles { from: TilesFrom::Made(made), refined, phase };
                let expr = Expr::Tiles(Box::new(tiles));
                let part = |at: Window| Piece { expr: expr.crop(&at.lo, &at.len), at };
                Ok(matrices.into_iter().map(part).collect())
            }
            Op::Refine { block } => {
                let mut pieces = inner(0, window)?;
                for piece in &mut pieces {
                    if let Expr::Tiles(tiles) = &mut piece.expr {
                        tiles.refined = *block;
                    }
                }
                Ok(pieces)
            }
            Op::Codes => {
                let mut pieces = inner(0, window)?;
                for piece in &mut pieces {
                    if let Expr::Tiles(tiles) = &piece.expr {
                        piece.expr = Expr::Codes(tiles.clone());
                    }
                }
                Ok(pieces)
            }
            Op::Scales => self.scales(id, node.inputs[0], window, walk),
            Op::Dequantize { dtype } => self.dequantize(node.inputs[0], *dtype, window, walk),
        }
    }

    fn dtype(&self, id: NodeId) -> DType {
        self.types[id.0 as usize].as_ref().map_or(DType::F32, |t| t.dtype)
    }

    fn is_quantized(&self, id: NodeId) -> bool {
        self.types[id.0 as usize].as_ref().is_some_and(|t| t.quant.is_some())
    }

    fn source(&self, index: usize, window: &Window) -> Piece {
        let source = &self.plan.sources[index];
        let (data, scale) = self.storages[index];
        let dtype = match &source.format {
            SourceFormat::Plain(dtype) => *dtype,
            SourceFormat::Quantized { .. } => DType::E4m3,
        };
        let storage = Storage::Source(data);
        let view = whole_view(storage, dtype, &source.shape).crop(&window.lo);
        let expr = match (&source.format, scale) {
            (SourceFormat::Quantized { block, scale: s }, Some(scale)) => {
                let scales = whole_view(Storage::Source(scale), s.dtype, &s.shape);
                Expr::Tiles(Box::new(stored(view, scales, *block, *block, window)))
            }
            _ => Expr::Load(view),
        };
        at_origin(window, expr)
    }

    fn cat(&self, parts: &[NodeId], dim: usize, window: &Window, walk: &Walk<'_>) -> Pieces {
        let mut out = Vec::new();
        let mut start = 0;
        for part in parts {
            let size = self.shape(*part)[dim];
            let (lo, hi) = (window.lo[dim], window.lo[dim] + window.len[dim]);
            let (from, to) = (lo.max(start), hi.min(start + size));
            if from < to {
                let mut w = window.clone();
                (w.lo[dim], w.len[dim]) = (from - start, to - from);
                out.extend(placed(self.walk(*part, &w, walk)?, dim, from - lo));
            }
            start += size;
        }
        Ok(out)
    }

    fn stack(&self, parts: &[NodeId], window: &Window, walk: &Walk<'_>) -> Pieces {
        let inner = Window { lo: window.lo[1..].into(), len: window.len[1..].into() };
        let mut out = Vec::new();
        for i in 0..window.len[0] {
            let part = parts[(window.lo[0] + i) as usize];
            for piece in self.walk(part, &inner, walk)? {
                out.push(unsqueezed(piece, i));
            }
        }
        Ok(out)
    }

    fn experts(
        &self,
        input: NodeId,
        count: u64,
        first: u64,
        window: &Window,
        walk: &Walk<'_>,
    ) -> Pieces {
        let logical = |slot: u64| match walk.map {
            Some(map) => map[slot as usize],
            None => slot % count,
        };
        let mut out = Vec::new();
        // One expert at a time: ranks that hold the same expert then hold the same pieces.
        for i in 0..window.len[0] {
            let mut w = window.clone();
            (w.lo[0], w.len[0]) = (logical(first + window.lo[0] + i), 1);
            out.extend(placed(self.walk(input, &w, walk)?, 0, i));
        }
        Ok(out)
    }

    fn reshape(&self, id: NodeId, input: NodeId, window: &Window, walk: &Walk<'_>) -> Pieces {
        let (old, new) = (self.shape(input), self.shape(id));
        let mut out = Vec::new();
        for pair in through_reshape(old, new, window) {
            let inner = self.walk(input, &pair.old, walk)?;
            let pieces =
                reshape_pieces(inner, &pair.old.len, &pair.new.len).ok_or(Unsaid::Tiles(id))?;
            for mut piece in pieces {
                for d in 0..new.len() {
                    piece.at.lo[d] += pair.new.lo[d] - window.lo[d];
                }
                out.push(piece);
            }
        }
        Ok(out)
    }

    fn cast(&self, input: NodeId, dtype: DType, window: &Window, walk: &Walk<'_>) -> Pieces {
        let pieces = self.walk(input, window, walk)?;
        if self.dtype(input) == dtype {
            return Ok(pieces);
        }
        Ok(wrap(pieces, |value| Expr::Cast { dtype, value }))
    }

    fn dequantize(
        &self,
        input: NodeId,
        dtype: DType,
        window: &Window,
        walk: &Walk<'_>,
    ) -> Pieces {
        if walk.derived
            && let Some(param) = self.landed.get(&input)
        {
            return Ok(vec![self.landed_piece(input, *param, dtype, window)]);
        }
        if !self.is_quantized(input) {
            return self.cast(input, dtype, window, walk);
        }
        let mut pieces = self.walk(input, window, walk)?;
        for piece in &mut pieces {
            if let Expr::Tiles(tiles) = &piece.expr {
                piece.expr = Expr::Dequantize { dtype, tiles: tiles.clone() };
            }
        }
        Ok(pieces)
    }

    /// A window of the grid, from the elements of the value under it.
    fn scales(&self, id: NodeId, input: NodeId, window: &Window, walk: &Walk<'_>) -> Pieces {
        let t = self.types[input.0 as usize].as_ref();
        let tile = t.and_then(|t| t.quant).map_or(1, |q| q.block);
        let (shape, m) = (self.shape(input), window.lo.len() - 2);
        let mut under = window.clone();
        for (d, size) in shape.iter().enumerate().skip(m) {
            under.lo[d] = window.lo[d] * tile;
            under.len[d] = (window.len[d] * tile).min(size - under.lo[d]);
        }
        let mut pieces = self.walk(input, &under, walk)?;
        for piece in &mut pieces {
            let of = piece.at.len.clone();
            for d in m..of.len() {
                piece.at.lo[d] /= tile;
                piece.at.len[d] = of[d].div_ceil(tile);
            }
            if let Expr::Tiles(tiles) = &piece.expr {
                piece.expr = Expr::Scales { dtype: self.dtype(id), tiles: tiles.clone(), of };
            }
        }
        Ok(pieces)
    }

    /// A window of a parameter that has landed on this rank, in its own contiguous storage.
    fn landed_piece(&self, id: NodeId, param: u32, dtype: DType, window: &Window) -> Piece {
        let t = self.types[id.0 as usize].clone().unwrap_or(Type::plain(Dims::new(), dtype));
        let view = whole_view(Storage::Landed(param), t.dtype, &t.shape).crop(&window.lo);
        let scales = t.scale_shape().zip(t.scale_dtype());
        let expr = match (t.quant, scales) {
            (Some(q), Some((shape, kind))) => {
                let scales = whole_view(Storage::LandedScale(param), kind, &shape);
                let tiles = Box::new(stored(view, scales, q.block, q.block, window));
                Expr::Dequantize { dtype, tiles }
            }
            _ if t.dtype != dtype => Expr::Cast { dtype, value: Box::new(Expr::Load(view)) },
            _ => Expr::Load(view),
        };
        at_origin(window, expr)
    }
}

fn whole_view(storage: Storage, dtype: DType, shape: &[u64]) -> View {
    View { storage, dtype, start: 0, strides: row_major(shape) }
}

/// Stored codes (cropped already) with the scales of the window.
fn stored(codes: View, scales: View, block: u64, refined: u64, window: &Window) -> Tiles {
    let m = window.lo.len() - 2;
    let mut tile = window.lo.clone();
    let phase = [window.lo[m] % block, window.lo[m + 1] % block];
    (tile[m], tile[m + 1]) = (window.lo[m] / block, window.lo[m + 1] / block);
    let scales = ScaleView { view: scales.crop(&tile), block };
    Tiles { from: TilesFrom::Stored(Stored { codes, scales }), refined, phase }
}

fn at_origin(window: &Window, expr: Expr) -> Piece {
    Piece {
        at: Window { lo: SmallVec::from_elem(0, window.lo.len()), len: window.len.clone() },
        expr,
    }
}

fn shifted(window: &Window, dim: usize, by: u64) -> Window {
    let mut w = window.clone();
    w.lo[dim] += by;
    w
}

fn placed(mut pieces: Vec<Piece>, dim: usize, by: u64) -> Vec<Piece> {
    pieces.iter_mut().for_each(|p| p.at.lo[dim] += by);
    pieces
}

/// A piece of one stacked part as a piece of the stack.
fn unsqueezed(piece: Piece, index: u64) -> Piece {
    let mut len = piece.at.len.clone();
    len.insert(0, 1);
    let mut lo = piece.at.lo.clone();
    lo.insert(0, index);
    Piece { at: Window { lo, len }, expr: unsqueeze(piece.expr) }
}

fn unsqueeze(expr: Expr) -> Expr {
    let boxed = |e: Box<Expr>| Box::new(unsqueeze(*e));
    match expr {
        Expr::Load(view) => Expr::Load(unsqueeze_view(view)),
        Expr::Fill { .. } => expr,
        Expr::Cast { dtype, value } => Expr::Cast { dtype, value: boxed(value) },
        Expr::Scale { factor, value } => Expr::Scale { factor, value: boxed(value) },
        Expr::Add { left, right } => Expr::Add { left: boxed(left), right: boxed(right) },
        Expr::Tiles(tiles) => Expr::Tiles(Box::new(unsqueeze_tiles(*tiles))),
        Expr::Dequantize { dtype, tiles } => {
            Expr::Dequantize { dtype, tiles: Box::new(unsqueeze_tiles(*tiles)) }
        }
        Expr::Codes(tiles) => Expr::Codes(Box::new(unsqueeze_tiles(*tiles))),
        Expr::Scales { dtype, tiles, mut of } => {
            of.insert(0, 1);
            Expr::Scales { dtype, tiles: Box::new(unsqueeze_tiles(*tiles)), of }
        }
    }
}

fn unsqueeze_view(mut view: View) -> View {
    view.strides.insert(0, 0);
    view
}

fn unsqueeze_tiles(tiles: Tiles) -> Tiles {
    let from = match tiles.from {
        TilesFrom::Stored(s) => TilesFrom::Stored(Stored {
            codes: unsqueeze_view(s.codes),
            scales: ScaleView { view: unsqueeze_view(s.scales.view), ..s.scales },
        }),
        TilesFrom::Made(made) => {
            let mut extent = made.extent;
            extent.insert(0, 1);
            let input = made.input.into_iter().map(|p| unsqueezed(p, 0)).collect();
            TilesFrom::Made(Made { recipe: made.recipe, extent, input })
        }
    };
    Tiles { from, ..tiles }
}

fn wrap(mut pieces: Vec<Piece>, f: impl Fn(Box<Expr>) -> Expr) -> Vec<Piece> {
    for piece in &mut pieces {
        let inner =
            std::mem::replace(&mut piece.expr, Expr::Fill { dtype: DType::U8, bits: 0 });
        piece.expr = f(Box::new(inner));
    }
    pieces
}

fn add(left: Vec<Piece>, right: &[Piece]) -> Vec<Piece> {
    let mut out = Vec::new();
    if !budget::take((left.len() as u64).saturating_mul(right.len() as u64) / 64) {
        return out;
    }
    for l in &left {
        for r in right {
            let Some(at) = l.at.intersect(&r.at) else { continue };
            let part = |p: &Piece| {
                let off: Dims = at.lo.iter().zip(&p.at.lo).map(|(a, b)| a - b).collect();
                Box::new(p.expr.crop(&off, &at.len))
            };
            let expr = Expr::Add { left: part(l), right: part(r) };
            out.push(Piece { at, expr });
        }
    }
    out
}

fn pad(
    window: &Window,
    dim: usize,
    size: u64,
    value: f64,
    dtype: DType,
    inner: impl Fn(&Window) -> Pieces,
) -> Pieces {
    let (lo, hi) = (window.lo[dim], window.lo[dim] + window.len[dim]);
    let mut out = Vec::new();
    if lo < size {
        let mut w = window.clone();
        w.len[dim] = hi.min(size) - lo;
        out = inner(&w)?;
    }
    if hi > size {
        let mut at = Window::whole(&window.len);
        at.lo[dim] = size.max(lo) - lo;
        at.len[dim] = hi - size.max(lo);
        out.push(Piece { at, expr: Expr::Fill { dtype, bits: value.to_bits() } });
    }
    Ok(out)
}

/// Parts of a window of matrices, along the first dimension, that no input piece joins: experts
/// that come from tensors of their own stay values of their own.
fn apart(input: &[Piece], window: &Window) -> Vec<Window> {
    let whole = Window::whole(&window.len);
    if window.len.len() < 3 {
        return vec![whole];
    }
    let mut edges: Vec<u64> = input.iter().map(|p| p.at.lo[0]).collect();
    edges.sort_unstable();
    edges.dedup();
    let joined = |edge: &u64| {
        let spans = |p: &Piece| p.at.lo[0] < *edge && *edge < p.at.lo[0] + p.at.len[0];
        input.iter().any(spans)
    };
    edges.retain(|edge| !joined(edge));
    edges.push(window.len[0]);
    let part = |pair: &[u64]| {
        let mut at = whole.clone();
        (at.lo[0], at.len[0]) = (pair[0], pair[1] - pair[0]);
        at
    };
    edges.windows(2).map(part).collect()
}

/// A window grown to whole tiles of the last two dimensions, and where it began inside them.
fn whole_tiles(window: &Window, shape: &[u64], block: u64) -> (Window, [u64; 2]) {
    let mut region = window.clone();
    let m = shape.len() - 2;
    let mut phase = [0; 2];
    for (k, phase) in phase.iter_mut().enumerate() {
        let d = m + k;
        region.lo[d] = window.lo[d] / block * block;
        *phase = window.lo[d] - region.lo[d];
        let end = (window.lo[d] + window.len[d]).next_multiple_of(block).min(shape[d]);
        region.len[d] = end - region.lo[d];
    }
    (region, phase)
}
