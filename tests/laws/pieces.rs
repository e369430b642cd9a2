//! Evaluates what sharding gives, piece by piece and element by element: as slow as it gets.

use kernelcast::backend::reference::Stored;
use kernelcast::compile::Compiled;
use kernelcast::dtype::DType;
use kernelcast::fp8::codec;
use kernelcast::fp8::rcp::rcp_full;
use kernelcast::fp8::{Recipe, RecipeKind};
use kernelcast::lower::{Part, Target, TargetKind};
use kernelcast::shard::{Expr, Piece, Storage, Tiles, TilesFrom, View, Window};

use crate::world::World;

/// All targets of all ranks, in the plan's order.
pub fn evaluate(compiled: &Compiled, world: &World) -> Vec<Vec<Option<Stored>>> {
    (0..compiled.program.ranks.len()).map(|rank| of_rank(compiled, world, rank)).collect()
}

fn of_rank(compiled: &Compiled, world: &World, rank: usize) -> Vec<Option<Stored>> {
    let targets = &compiled.program.ranks[rank].targets;
    let mut memory = Memory { compiled, world, landed: vec![None; targets.len()] };
    for (i, target) in targets.iter().enumerate() {
        if target.kind == TargetKind::Parameter {
            let pieces: Vec<Piece> = (target.places.iter())
                .map(|place| {
                    let unit = &compiled.program.units[place.unit as usize];
                    let at = Window { lo: place.lo.clone(), len: unit.shape.clone() };
                    Piece { at, expr: unit.expr.clone() }
                })
                .collect();
            memory.landed[i] = Some(memory.target(target, &pieces));
        }
    }
    for (i, target) in targets.iter().enumerate() {
        if target.kind != TargetKind::Parameter {
            memory.landed[i] = Some(memory.target(target, &target.derived));
        }
    }
    memory.landed
}

struct Memory<'a> {
    compiled: &'a Compiled,
    world: &'a World,
    landed: Vec<Option<Stored>>,
}

/// Elements of a box in row-major order; for a quantized value codes, and each one's scale.
struct Filled {
    bits: Vec<u32>,
    scales: Option<Vec<u32>>,
}

impl Memory<'_> {
    fn target(&self, target: &Target, pieces: &[Piece]) -> Stored {
        let values = &target.storages[0];
        let filled = self.dense(pieces, &values.shape);
        let mut out = Stored { values: packed(&filled.bits, values.dtype), scales: None };
        let grid = target.storages.iter().find(|s| s.part == Part::Scales);
        if let Some(grid) = grid {
            let scales = filled.scales.unwrap_or_default();
            let block = self.block(target, pieces);
            let mut found = vec![None; grid.shape.iter().product::<u64>() as usize];
            for (at, scale) in indices(&values.shape).zip(scales) {
                let tile = tile_of(&at, [0, 0], block);
                let slot = &mut found[flat(&grid.shape, &tile) as usize];
                assert!(
                    slot.is_none_or(|s| s == scale),
                    "{}: two scales in tile {tile:?}",
                    target.name
                );
                *slot = Some(scale);
            }
            let bits: Vec<u32> = found
                .into_iter()
                .map(|s| s.expect("every tile has elements"))
                .map(|s| match grid.dtype {
                    DType::E8m0 => u32::from(codec::e8m0_encode(f32::from_bits(s))),
                    _ => s,
                })
                .collect();
            out.scales = Some(packed(&bits, grid.dtype));
        }
        out
    }

    /// Tile size of a target's scales.
    fn block(&self, target: &Target, pieces: &[Piece]) -> u64 {
        let first = target.places.first();
        let unit = first.and_then(|p| self.compiled.program.units[p.unit as usize].quant);
        let refined = pieces.iter().find_map(|p| match &p.expr {
            Expr::Tiles(tiles) => Some(tiles.refined),
            _ => None,
        });
        let block = unit.map(|q| q.block).or(refined);
        block.unwrap_or(1)
    }

    /// A whole tensor out of pieces, which must cover each element exactly once.
    fn dense(&self, pieces: &[Piece], shape: &[u64]) -> Filled {
        let count = shape.iter().product::<u64>() as usize;
        let mut times = vec![0u32; count];
        let mut out = Filled { bits: vec![0; count], scales: None };
        for piece in pieces {
            let part = self.eval(&piece.expr, &piece.at.len);
            for (i, off) in indices(&piece.at.len).enumerate() {
                let at: Vec<u64> = off.iter().zip(&piece.at.lo).map(|(a, b)| a + b).collect();
                assert!(at.iter().zip(shape).all(|(a, n)| a < n), "{at:?} outside {shape:?}");
                let place = flat(shape, &at) as usize;
                times[place] += 1;
                out.bits[place] = part.bits[i];
                if let Some(scales) = &part.scales {
                    out.scales.get_or_insert_with(|| vec![0; count])[place] = scales[i];
                }
            }
        }
        assert!(times.iter().all(|n| *n == 1), "pieces cover {shape:?} {times:?} times");
        out
    }

    fn eval(&self, expr: &Expr, len: &[u64]) -> Filled {
        let plain = |bits: Vec<u32>| Filled { bits, scales: None };
        match expr {
            Expr::Load(view) => plain(indices(len).map(|at| self.load(view, &at)).collect()),
            Expr::Fill { dtype, bits } => {
                let value = constant(*dtype, f64::from_bits(*bits));
                plain(vec![value; len.iter().product::<u64>() as usize])
            }
            Expr::Cast { dtype, value } => {
                let from = value.dtype();
                let bits = self.eval(value, len).bits.into_iter();
                plain(bits.map(|x| cast(from, *dtype, x)).collect())
            }
            Expr::Scale { factor, value } => {
                let (dtype, k) = (value.dtype(), f64::from_bits(*factor) as f32);
                let bits = self.eval(value, len).bits.into_iter();
                plain(bits.map(|x| result(dtype, widen(dtype, x) * k)).collect())
            }
            Expr::Add { left, right } => {
                let dtype = left.dtype();
                assert_eq!(dtype, right.dtype());
                let (a, b) = (self.eval(left, len).bits, self.eval(right, len).bits);
                let sum = |(a, b)| result(dtype, widen(dtype, a) + widen(dtype, b));
                plain(a.into_iter().zip(b).map(sum).collect())
            }
            Expr::Tiles(tiles) => self.tiles(tiles, len),
            Expr::Codes(tiles) => plain(self.tiles(tiles, len).bits),
            Expr::Scales { dtype, tiles, of } => {
                let scales = self.tiles(tiles, of).scales.expect("tiles have scales");
                let (m, tile) = (of.len() - 2, tiles.refined as usize);
                let (rows, cols) = (of[m] as usize, of[m + 1] as usize);
                let first = scales.chunks(rows * cols).flat_map(|matrix| {
                    let rows = matrix.chunks(cols).step_by(tile);
                    rows.flat_map(|row| row.iter().copied().step_by(tile)).collect::<Vec<_>>()
                });
                plain(first.map(|s| cast(DType::F32, *dtype, s)).collect())
            }
            Expr::Dequantize { dtype, tiles } => {
                let value = self.tiles(tiles, len);
                let scales = value.scales.expect("tiles have scales");
                let product = |(code, scale): (u32, u32)| {
                    result(*dtype, codec::e4m3_decode(code as u8) * f32::from_bits(scale))
                };
                plain(value.bits.into_iter().zip(scales).map(product).collect())
            }
        }
    }

    fn tiles(&self, tiles: &Tiles, len: &[u64]) -> Filled {
        match &tiles.from {
            TilesFrom::Stored(stored) => {
                let bits = indices(len).map(|at| self.load(&stored.codes, &at)).collect();
                let view = &stored.scales.view;
                let scale = |at: Vec<u64>| {
                    let tile = tile_of(&at, tiles.phase, stored.scales.block);
                    widen(view.dtype, self.load(view, &tile)).to_bits()
                };
                Filled { bits, scales: Some(indices(len).map(scale).collect()) }
            }
            TilesFrom::Made(made) => {
                let dtype = made.input.first().map_or(DType::F32, |p| p.expr.dtype());
                let input = self.dense(&made.input, &made.extent).bits;
                let block = u64::from(made.recipe.block);
                let grid = tile_of(&made.extent, [block - 1; 2], block);
                let mut amax = vec![0u32; grid.iter().product::<u64>() as usize];
                for (at, x) in indices(&made.extent).zip(&input) {
                    let tile = flat(&grid, &tile_of(&at, [0, 0], block)) as usize;
                    amax[tile] = amax[tile].max(widen(dtype, *x).to_bits() & 0x7fff_ffff);
                }
                let mut out = Filled { bits: Vec::new(), scales: Some(Vec::new()) };
                for mut at in indices(len) {
                    let m = at.len() - 2;
                    at[m] += tiles.phase[0];
                    at[m + 1] += tiles.phase[1];
                    let tile = flat(&grid, &tile_of(&at, [0, 0], block)) as usize;
                    let scale = made.recipe.scale_of(amax[tile]);
                    let x = widen(dtype, input[flat(&made.extent, &at) as usize]);
                    out.bits.push(u32::from(code(&made.recipe, x, scale)));
                    out.scales.as_mut().expect("set above").push(scale.to_bits());
                }
                out
            }
        }
    }

    fn load(&self, view: &View, at: &[u64]) -> u32 {
        let landed = |i: u32| self.landed[i as usize].as_ref().expect("it has landed");
        let bytes: &[u8] = match view.storage {
            Storage::Source(i) => {
                let source = &self.compiled.program.sources[i as usize];
                let (dtype, _, bytes) = &self.world.tensors[&source.name];
                assert_eq!(*dtype, view.dtype, "{}", source.name);
                bytes
            }
            Storage::Landed(i) => &landed(i).values,
            Storage::LandedScale(i) => landed(i).scales.as_deref().expect("it has scales"),
        };
        assert_eq!(at.len(), view.strides.len());
        let place = view.start + at.iter().zip(&view.strides).map(|(i, s)| i * s).sum::<u64>();
        let size = view.dtype.size() as usize;
        let element = &bytes[place as usize * size..][..size];
        element.iter().rev().fold(0, |n, b| n << 8 | u32::from(*b))
    }
}

fn code(recipe: &Recipe, x: f32, scale: f32) -> u8 {
    codec::e4m3_satfinite(match recipe.kind {
        RecipeKind::Vllm => x * rcp_full(scale),
        RecipeKind::Deepgemm | RecipeKind::Ue8m0 => x * (1.0 / scale),
        RecipeKind::PrimeRl => x / scale,
    })
}

fn widen(dtype: DType, bits: u32) -> f32 {
    match dtype {
        DType::F32 => f32::from_bits(bits),
        DType::Bf16 => codec::bf16_to_f32(bits as u16),
        DType::F16 => codec::f16_to_f32(bits as u16),
        DType::E8m0 => codec::e8m0_decode(bits as u8),
        DType::E4m3 | DType::I32 | DType::U8 => panic!("no arithmetic on {dtype}"),
    }
}

fn result(dtype: DType, x: f32) -> u32 {
    narrow(dtype, if x.is_nan() { f32::from_bits(codec::GPU_NAN_BITS) } else { x })
}

fn narrow(dtype: DType, x: f32) -> u32 {
    match dtype {
        DType::F32 => x.to_bits(),
        DType::Bf16 => u32::from(codec::f32_to_bf16(x)),
        DType::F16 => u32::from(codec::f32_to_f16(x)),
        DType::E4m3 => u32::from(codec::e4m3_satfinite(x)),
        DType::E8m0 => u32::from(codec::e8m0_encode(x)),
        DType::I32 | DType::U8 => panic!("no result in {dtype}"),
    }
}

fn cast(from: DType, to: DType, bits: u32) -> u32 {
    match to {
        DType::F32 => widen(from, bits).to_bits(),
        _ => narrow(to, widen(from, bits)),
    }
}

fn constant(dtype: DType, value: f64) -> u32 {
    match dtype {
        DType::I32 => value as i32 as u32,
        DType::U8 => u32::from(value as u8),
        _ => narrow(dtype, value as f32),
    }
}

fn packed(bits: &[u32], dtype: DType) -> Vec<u8> {
    bits.iter().flat_map(|b| b.to_le_bytes().into_iter().take(dtype.size() as usize)).collect()
}

/// Every index of a box in row-major order.
fn indices(len: &[u64]) -> impl Iterator<Item = Vec<u64>> {
    let len = len.to_vec();
    (0..len.iter().product::<u64>()).map(move |mut n| {
        let mut at = len.clone();
        for (i, size) in at.iter_mut().zip(&len).rev() {
            *i = n % size;
            n /= size;
        }
        at
    })
}

fn flat(shape: &[u64], at: &[u64]) -> u64 {
    shape.iter().zip(at).fold(0, |n, (size, i)| n * size + i)
}

fn tile_of(at: &[u64], phase: [u64; 2], block: u64) -> Vec<u64> {
    let m = at.len() - 2;
    let mut tile = at.to_vec();
    tile[m] = (at[m] + phase[0]) / block;
    tile[m + 1] = (at[m + 1] + phase[1]) / block;
    tile
}
