//! From an expression over strided boxes to operations on each of its elements.

use smallvec::smallvec;

use crate::diag::Diagnostic;
use crate::dtype::DType;
use crate::fp8::codec::{
    bf16_to_f32, e4m3_decode, e4m3_satfinite, e8m0_decode, e8m0_encode, f16_to_f32,
    f32_to_bf16, f32_to_f16,
};
use crate::ir::Dims;
use crate::shard::{Expr, Tiles, TilesFrom, View, Window};

use super::Fallible;
use super::jobs::{self, Op};
use super::parts::Lowering;
use super::place::{Plane, Strides};

/// Elements that an operation reads, by the index in the window that it is of.
#[derive(Clone, Debug)]
pub(super) struct Read {
    pub address: u64,
    pub strides: Strides,
    /// Of the first element of the window inside a block of entries.
    pub phase: [u64; 2],
    /// Elements for each index, and of each entry.
    pub step: u64,
    pub block: u64,
    pub dtype: DType,
}

/// A window and how each of its elements is made.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub window: Window,
    pub ops: Vec<Op>,
    pub reads: Vec<Read>,
    pub flags: u32,
}

impl Part {
    /// The one read of a part that is a copy.
    pub fn copied(&self) -> Option<&Read> {
        match (&self.ops[..], &self.reads[..]) {
            ([Op { what: jobs::RAW_LOAD | jobs::LOAD, .. }], [read]) if read.block == 1 => {
                Some(read)
            }
            _ => None,
        }
    }
}

/// Operations as they are found.
#[derive(Default)]
struct Code {
    ops: Vec<Op>,
    reads: Vec<Read>,
    depth: usize,
}

impl Lowering<'_> {
    /// Cuts a window of an expression where what it reads is cut, and compiles each part.
    /// `measured` says that a recipe's maximum will see what is loaded.
    pub(super) fn segments(
        &mut self,
        expr: &Expr,
        window: &Window,
        measured: bool,
    ) -> Fallible<Vec<Part>> {
        let mut parts = Vec::new();
        for window in self.reader.cut(expr, window)? {
            parts.push(self.segment(expr, window, measured)?);
        }
        Ok(parts)
    }

    fn segment(&mut self, expr: &Expr, window: Window, measured: bool) -> Fallible<Part> {
        let mut code = Code::default();
        let raw = !measured && self.raw(expr, &window, &mut code)?;
        if !raw {
            self.number(expr, &window, &mut code)?;
        }
        let mut flags = 0;
        if raw {
            flags |= jobs::RAW;
        }
        if !measured {
            flags |= jobs::WATCHED;
        }
        if !expr.is_constant() && !measured {
            flags |= jobs::NOT_CONSTANT;
        }
        Ok(Part { window, ops: code.ops, reads: code.reads, flags })
    }

    /// Values that are bits of another tensor's elements, or of a constant.
    fn raw(&mut self, expr: &Expr, window: &Window, code: &mut Code) -> Fallible<bool> {
        match expr {
            Expr::Load(view) => self.load(view, window, jobs::RAW_LOAD, code)?,
            Expr::Fill { dtype, bits } => {
                let arg = fill_bits(*dtype, f64::from_bits(*bits));
                code.ops.push(Op { what: jobs::RAW_FILL, arg });
            }
            Expr::Codes(tiles) => match &tiles.from {
                TilesFrom::Stored(stored) => {
                    self.load(&stored.codes, window, jobs::RAW_LOAD, code)?;
                }
                TilesFrom::Made(_) => return Ok(false),
            },
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The value in f32, after the rounding that the expression's own type asks for.
    fn number(&mut self, expr: &Expr, window: &Window, code: &mut Code) -> Fallible<()> {
        match expr {
            Expr::Load(view) => self.load(view, window, jobs::LOAD, code),
            Expr::Fill { dtype, bits } => {
                let value = decode(*dtype, fill_bits(*dtype, f64::from_bits(*bits)));
                code.ops.push(Op { what: jobs::FILL, arg: value.to_bits() });
                Ok(())
            }
            Expr::Cast { dtype, value } => {
                self.number(value, window, code)?;
                round(*dtype, code);
                Ok(())
            }
            Expr::Scale { factor, value } => {
                self.number(value, window, code)?;
                let arg = (f64::from_bits(*factor) as f32).to_bits();
                code.ops.push(Op { what: jobs::MULTIPLY, arg });
                round(expr.dtype(), code);
                Ok(())
            }
            Expr::Add { left, right } => {
                self.number(left, window, code)?;
                code.depth += 1;
                if code.depth > jobs::DEPTH {
                    return Err(Diagnostic::error("E0501", "sums are nested too deeply")
                        .note(format!("at most {} sums inside a right operand", jobs::DEPTH))
                        .hint("write a + (b + (c + d)) as ((a + b) + c) + d"));
                }
                code.ops.push(Op { what: jobs::PUSH, arg: 0 });
                self.number(right, window, code)?;
                code.depth -= 1;
                code.ops.push(Op { what: jobs::ADD, arg: 0 });
                round(expr.dtype(), code);
                Ok(())
            }
            Expr::Dequantize { dtype, tiles } => {
                self.dequantize(tiles, window, code)?;
                round(*dtype, code);
                Ok(())
            }
            Expr::Scales { tiles, .. } => self.stored_scale(tiles, window, code),
            Expr::Tiles(_) | Expr::Codes(_) => Err(unexpected()),
        }
    }

    fn load(&self, view: &View, window: &Window, what: u32, code: &mut Code) -> Fallible<()> {
        let plane = self.reader.view(view, &window.lo)?;
        read(plane, view.dtype, [0, 0], 1, 1, what, code);
        Ok(())
    }

    fn dequantize(&mut self, tiles: &Tiles, window: &Window, code: &mut Code) -> Fallible<()> {
        let block = tiles.block();
        let m = window.lo.len() - 2;
        let at = [window.lo[m] + tiles.phase[0], window.lo[m + 1] + tiles.phase[1]];
        let phase = at.map(|a| a % block);
        let (codes, scales) = match &tiles.from {
            TilesFrom::Stored(stored) => {
                let mut tile = window.lo.clone();
                (tile[m], tile[m + 1]) = (at[0] / block, at[1] / block);
                let view = &stored.scales.view;
                let codes = self.reader.view(&stored.codes, &window.lo)?;
                (codes, (self.reader.view(view, &tile)?, view.dtype))
            }
            TilesFrom::Made(made) => {
                let (codes, scales) = self.scratch_tiles(made, tiles.phase, window)?;
                (codes, (scales, DType::F32))
            }
        };
        read(codes, DType::E4m3, [0, 0], 1, 1, jobs::LOAD, code);
        read(scales.0, scales.1, phase, 1, block, jobs::LOAD_MULTIPLY, code);
        Ok(())
    }

    /// The stored scale of each tile of a grid, or of each tile of a finer one.
    fn stored_scale(&self, tiles: &Tiles, window: &Window, code: &mut Code) -> Fallible<()> {
        let TilesFrom::Stored(stored) = &tiles.from else { return Err(unexpected()) };
        let (view, block) = (&stored.scales.view, stored.scales.block);
        let mut tile = window.lo.clone();
        let m = tile.len() - 2;
        let at = |k: usize| window.lo[m + k] * tiles.refined + tiles.phase[k];
        (tile[m], tile[m + 1]) = (at(0) / block, at(1) / block);
        let plane = self.reader.view(view, &tile)?;
        let phase = [at(0) % block, at(1) % block];
        read(plane, view.dtype, phase, tiles.refined, block, jobs::LOAD, code);
        Ok(())
    }
}

fn read(
    plane: Plane,
    dtype: DType,
    phase: [u64; 2],
    step: u64,
    block: u64,
    what: u32,
    code: &mut Code,
) {
    code.ops.push(Op { what, arg: code.reads.len() as u32 });
    let Plane { address, strides } = plane;
    // A block that each index enters anew is no block.
    let (phase, step, block) = if step == block { (phase, 1, 1) } else { (phase, step, block) };
    code.reads.push(Read { address, strides, phase, step, block, dtype });
}

fn round(dtype: DType, code: &mut Code) {
    if dtype != DType::F32 {
        code.ops.push(Op { what: jobs::ROUND, arg: u32::from(jobs::number(dtype)) });
    }
}

fn unexpected() -> Diagnostic {
    Diagnostic::error("E0502", "a quantized value where numbers are wanted")
}

/// The bits of a constant in a type.
fn fill_bits(dtype: DType, value: f64) -> u32 {
    if value.to_bits() == 0 {
        return 0;
    }
    let x = value as f32;
    match dtype {
        DType::I32 => (value as i32) as u32,
        DType::U8 => u32::from(value as u8),
        DType::E4m3 => u32::from(e4m3_satfinite(x)),
        DType::E8m0 => u32::from(e8m0_encode(x)),
        DType::Bf16 => u32::from(f32_to_bf16(x)),
        DType::F16 => u32::from(f32_to_f16(x)),
        DType::F32 => x.to_bits(),
    }
}

fn decode(dtype: DType, bits: u32) -> f32 {
    match dtype {
        DType::Bf16 => bf16_to_f32(bits as u16),
        DType::F16 => f16_to_f32(bits as u16),
        DType::E4m3 => e4m3_decode(bits as u8),
        DType::E8m0 => e8m0_decode(bits as u8),
        _ => f32::from_bits(bits),
    }
}

impl Read {
    /// The same for the window that begins `by` further on.
    pub fn moved(&self, by: &[u64]) -> Read {
        let mut out = self.clone();
        let m = by.len().saturating_sub(2);
        for (d, by) in by.iter().enumerate() {
            let entries = match d.checked_sub(m).filter(|_| by_blocks(self)) {
                Some(k) => {
                    let at = self.phase[k] + by * self.step;
                    out.phase[k] = at % self.block;
                    at / self.block
                }
                None => *by,
            };
            let off = (entries as i64).wrapping_mul(self.strides[d]);
            out.address = out.address.wrapping_add_signed(off);
        }
        out
    }
}

fn by_blocks(read: &Read) -> bool {
    read.block != 1
}

/// A window of at least two dimensions: with ones in front.
pub(super) fn matrix(window: &Window) -> Window {
    let missing = 2usize.saturating_sub(window.lo.len());
    let pad = |dims: &Dims, with: u64| -> Dims {
        let mut out: Dims = smallvec![with; missing];
        out.extend_from_slice(dims);
        out
    };
    Window { lo: pad(&window.lo, 0), len: pad(&window.len, 1) }
}

/// Strides for such a window.
pub(super) fn matrix_strides(strides: &Strides) -> Strides {
    let missing = 2usize.saturating_sub(strides.len());
    let mut out: Strides = smallvec![0; missing];
    out.extend_from_slice(strides);
    out
}
