//! From parts of units to jobs: what is copied, computed or quantized, and where it goes.

use crate::diag::Diagnostic;
use crate::dtype::DType;
use crate::fp8::ScaleFormat;
use crate::lower::Unit;
use crate::shard::{Expr, Made, Piece, Tiles, TilesFrom, View, Window};

use super::Fallible;
use super::place::Plane;
use super::table::{SCRATCH, Table};
use super::tiles::{ScalesTo, TileWork};

/// Finds what an expression reads in a GPU's memory.
pub trait Reader {
    /// Parts of a window of an expression, each of which lies evenly spaced in all that it reads.
    ///
    /// # Errors
    /// E0502 for a window that the rank does not hold.
    fn cut(&self, expr: &Expr, window: &Window) -> Fallible<Vec<Window>>;

    /// Address of a view's element at `lo`, and the view's strides there.
    ///
    /// # Errors
    /// E0502 for an element that the rank does not hold.
    fn view(&self, view: &View, lo: &[u64]) -> Fallible<Plane>;
}

/// Where a unit's values (or codes) and scales go, by the unit's own indices.
#[derive(Clone, Debug)]
pub struct Destination {
    pub values: Plane,
    pub scales: Option<Plane>,
}

/// A box of tiles whose maxima were agreed before, and where they lie in row-major order.
#[derive(Clone, Debug)]
pub struct Agreed {
    pub tiles: Window,
    pub address: u64,
}

/// Jobs of one launch after another: those of a level read what earlier levels made.
pub struct Lowering<'a> {
    pub reader: &'a dyn Reader,
    pub levels: Vec<Table>,
    /// Bytes of scratch memory in use.
    pub scratch: u64,
    pub(super) unit: u32,
    pub(super) agreed: Vec<Agreed>,
}

impl<'a> Lowering<'a> {
    pub fn new(reader: &'a dyn Reader) -> Self {
        Lowering { reader, levels: Vec::new(), scratch: 0, unit: 0, agreed: Vec::new() }
    }

    /// The table of a level.
    pub(super) fn level(&mut self, level: usize) -> &mut Table {
        while self.levels.len() <= level {
            self.levels.push(Table::default());
        }
        &mut self.levels[level]
    }

    /// Room in scratch memory.
    pub(super) fn scratch(&mut self, bytes: u64) -> u64 {
        let at = self.scratch.next_multiple_of(64);
        self.scratch = at + bytes;
        SCRATCH + at
    }

    /// Adds what makes a window of a unit.
    ///
    /// # Errors
    /// E0501 for an expression that no job computes, E0502 for a bug of the compiler.
    pub fn part(
        &mut self,
        id: u32,
        unit: &Unit,
        window: &Window,
        to: &Destination,
        agreed: &[Agreed],
    ) -> Fallible<()> {
        self.unit = id;
        self.agreed = agreed.to_vec();
        match (&unit.expr, unit.quant) {
            (Expr::Tiles(tiles), Some(quant)) => {
                self.quantized(unit, tiles, window, to, quant.scales)
            }
            (expr, _) => self.plain(expr, unit.dtype, window, &to.values),
        }
    }

    /// Adds what fills a tensor from pieces of landed ones.
    ///
    /// # Errors
    /// As [`Lowering::part`].
    pub fn pieces(
        &mut self,
        id: u32,
        pieces: &[Piece],
        dtype: DType,
        to: &Plane,
    ) -> Fallible<()> {
        self.unit = id;
        self.agreed.clear();
        for piece in pieces {
            let window = Window::whole(&piece.at.len);
            self.plain(&piece.expr, dtype, &window, &to.moved(&piece.at.lo))?;
        }
        Ok(())
    }

    fn quantized(
        &mut self,
        unit: &Unit,
        tiles: &Tiles,
        window: &Window,
        to: &Destination,
        format: ScaleFormat,
    ) -> Fallible<()> {
        let entries = unit.scales_of(window).filter(|e| !e.is_empty());
        match &tiles.from {
            TilesFrom::Made(made) => {
                let scales = to.scales.as_ref().zip(entries).map(|(plane, entries)| ScalesTo {
                    plane: plane.clone(),
                    entries,
                    fine: tiles.refined,
                    phase: tiles.phase,
                    format,
                });
                self.tiles(&TileWork {
                    made,
                    phase: tiles.phase,
                    window: window.clone(),
                    codes: Some(to.values.clone()),
                    scales,
                })
            }
            TilesFrom::Stored(stored) => {
                let codes = Expr::Load(stored.codes.clone());
                self.values(&codes, DType::E4m3, window, &to.values)?;
                let Some((plane, entries)) = to.scales.as_ref().zip(entries) else {
                    return Ok(());
                };
                let scales = Expr::Scales {
                    dtype: format.dtype(),
                    tiles: Box::new(tiles.clone()),
                    of: unit.shape.clone(),
                };
                self.values(&scales, format.dtype(), &entries, plane)
            }
        }
    }

    fn plain(
        &mut self,
        expr: &Expr,
        dtype: DType,
        window: &Window,
        to: &Plane,
    ) -> Fallible<()> {
        match expr {
            Expr::Codes(tiles) => match &tiles.from {
                TilesFrom::Made(made) => self.tiles(&TileWork {
                    made,
                    phase: tiles.phase,
                    window: window.clone(),
                    codes: Some(to.clone()),
                    scales: None,
                }),
                TilesFrom::Stored(_) => self.values(expr, dtype, window, to),
            },
            Expr::Scales { dtype, tiles, of } => match &tiles.from {
                TilesFrom::Made(made) => self.tiles(&TileWork {
                    made,
                    phase: tiles.phase,
                    window: under(window, tiles.refined, of),
                    codes: None,
                    scales: Some(ScalesTo {
                        plane: to.clone(),
                        entries: window.clone(),
                        fine: tiles.refined,
                        phase: tiles.phase,
                        format: ScaleFormat::of(*dtype),
                    }),
                }),
                TilesFrom::Stored(_) => self.values(expr, *dtype, window, to),
            },
            Expr::Tiles(_) => Err(Diagnostic::error("E0502", "codes without their scales")),
            _ => self.values(expr, dtype, window, to),
        }
    }

    /// Quantizes a window into scratch memory. Gives its codes from its first element on, and the
    /// scales from that element's tile on.
    pub(super) fn scratch_tiles(
        &mut self,
        made: &Made,
        phase: [u64; 2],
        window: &Window,
    ) -> Fallible<(Plane, Plane)> {
        let m = window.lo.len() - 2;
        let block = u64::from(made.recipe.block);
        let mut touched = window.clone();
        for (k, phase) in phase.iter().enumerate() {
            let d = m + k;
            touched.lo[d] = (window.lo[d] + phase) / block;
            touched.len[d] =
                (window.lo[d] + window.len[d] + phase).div_ceil(block) - touched.lo[d];
        }
        let count = |w: &Window| w.len.iter().product::<u64>();
        let codes = Plane::packed(self.scratch(count(window)), window, 1);
        let scales = Plane::packed(self.scratch(4 * count(&touched)), &touched, 4);
        self.tiles(&TileWork {
            made,
            phase,
            window: window.clone(),
            codes: Some(codes.clone()),
            scales: Some(ScalesTo {
                plane: scales.clone(),
                entries: touched.clone(),
                fine: block,
                phase: [0, 0],
                format: ScaleFormat::F32,
            }),
        })?;
        Ok((codes.moved(&window.lo), scales.moved(&touched.lo)))
    }
}

/// The elements of a window of tiles.
fn under(window: &Window, tile: u64, of: &[u64]) -> Window {
    let mut out = window.clone();
    for (d, size) in of.iter().enumerate().skip(of.len() - 2) {
        out.lo[d] = window.lo[d] * tile;
        out.len[d] = (window.len[d] * tile).min(size - out.lo[d]);
    }
    out
}

/// Launches that must come before those of an expression.
pub(super) fn depth(expr: &Expr) -> usize {
    match expr {
        Expr::Load(_) | Expr::Fill { .. } => 0,
        Expr::Cast { value, .. } | Expr::Scale { value, .. } => depth(value),
        Expr::Add { left, right } => depth(left).max(depth(right)),
        Expr::Dequantize { tiles, .. } => match &tiles.from {
            TilesFrom::Stored(_) => 0,
            TilesFrom::Made(made) => 1 + depth_of(made),
        },
        Expr::Tiles(tiles) | Expr::Codes(tiles) | Expr::Scales { tiles, .. } => {
            match &tiles.from {
                TilesFrom::Stored(_) => 0,
                TilesFrom::Made(made) => depth_of(made),
            }
        }
    }
}

/// The same of a recipe: steps on one grid are one.
pub(super) fn depth_of(made: &Made) -> usize {
    if let Some((inner, _)) = made.same_grid()
        && let TilesFrom::Made(first) = &inner.from
    {
        return depth_of(first);
    }
    made.input.iter().map(|p| depth(&p.expr)).max().unwrap_or(0)
}
