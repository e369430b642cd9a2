//! The program: tables of sources and targets, and the units that turn one into the other.

use std::fmt::Write;
use std::sync::Arc;

use xxhash_rust::xxh3::Xxh3;

use crate::diag::Span;
use crate::dtype::DType;
use crate::ir::{Dims, Quant, Type};
use crate::shard::{Apart, Expr, Layouts, Made, Piece, Share, TilesFrom, Window};
use crate::topo::{Coords, Layout, RankId};

/// Where a trainer tensor's elements are, as one storage (scales are a storage of their own).
#[derive(Clone, Debug, PartialEq)]
pub struct ProgramSource {
    pub name: String,
    pub dtype: DType,
    pub shape: Dims,
    /// Which trainer ranks hold what of it.
    pub layout: Arc<Layout>,
}

impl ProgramSource {
    pub fn bytes(&self) -> u64 {
        self.shape.iter().product::<u64>() * self.dtype.size()
    }
}

/// Which of a parameter's storages is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// The elements, or the codes of a quantized value.
    Values,
    Scales,
}

/// How a target comes to hold its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetKind {
    /// Written by the update.
    Parameter,
    /// Computed by the receiver from a parameter that has landed, into storage of its own.
    Derived,
    /// A view of a parameter's own memory: up to date as soon as that is.
    Alias,
}

/// One storage of a target, as the receiver names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetStorage {
    pub part: Part,
    pub name: String,
    pub dtype: DType,
    pub shape: Dims,
    /// In elements; row-major unless the target is a view.
    pub strides: Dims,
}

impl TargetStorage {
    pub fn bytes(&self) -> u64 {
        self.shape.iter().product::<u64>() * self.dtype.size()
    }

    /// Bytes from its first element to the end of its last one: more than [`Self::bytes`] where
    /// a view leaves gaps.
    pub fn span(&self) -> u64 {
        if self.shape.contains(&0) {
            return 0;
        }
        let last: u64 = self.shape.iter().zip(&self.strides).map(|(n, s)| (n - 1) * s).sum();
        (last + 1) * self.dtype.size()
    }
}

/// A target parameter on one rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    pub name: String,
    pub kind: TargetKind,
    pub span: Span,
    pub storages: Vec<TargetStorage>,
    /// Shape on a mesh of one rank, where the expression has one.
    pub full_shape: Option<Dims>,
    /// The units that fill it, box by box; none for derived parameters and aliases.
    pub places: Vec<Placed>,
    /// Names of the trainer tensors that flow into it on this rank, in order.
    pub sources: Vec<String>,
    /// Recipe that makes its codes; none if they pass through or there are none.
    pub recipe: Option<&'static str>,
    /// Pieces of a derived parameter over landed storages.
    pub derived: Vec<Piece>,
}

/// A unit's box in a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Index in the program.
    pub unit: u32,
    /// First element of the box.
    pub lo: Dims,
}

/// What one rank holds, in the plan's order. Ranks share the targets in which they do not differ.
#[derive(Clone, Debug, PartialEq)]
pub struct RankProgram {
    pub rank: RankId,
    pub coords: Coords,
    pub targets: Vec<Arc<Target>>,
}

impl RankProgram {
    /// Bytes of everything the update writes on this rank.
    pub fn bytes(&self) -> u64 {
        let written = self.targets.iter().filter(|t| t.kind == TargetKind::Parameter);
        written.flat_map(|t| &t.storages).map(TargetStorage::bytes).sum()
    }
}

/// A distinct value that the trainer side makes once, whoever needs it: a box of a target and
/// the expression that fills it.
#[derive(Clone, Debug, PartialEq)]
pub struct Unit {
    /// Name of the first parameter that holds it, for messages.
    pub name: String,
    pub span: Span,
    pub shape: Dims,
    pub dtype: DType,
    pub quant: Option<Quant>,
    pub expr: Expr,
    /// True if the expert map says which ranks hold it.
    pub mapped: bool,
    pub receivers: Vec<Receiver>,
}

/// One box that a unit fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receiver {
    /// Index of the rank in the program.
    pub rank: u32,
    /// Index of the target on the rank.
    pub target: u32,
    /// Index into the target's places.
    pub place: u32,
}

impl Unit {
    pub fn value_type(&self) -> Type {
        Type { shape: self.shape.clone(), dtype: self.dtype, quant: self.quant }
    }

    /// Bytes of values and scales.
    pub fn bytes(&self) -> u64 {
        let window = Window::whole(&self.shape);
        let (values, scales) = self.bytes_of(&window);
        values + scales
    }

    /// Bytes of a window's values, and of the scales that come with it.
    pub fn bytes_of(&self, window: &Window) -> (u64, u64) {
        let values = window.len.iter().product::<u64>() * self.dtype.size();
        let scales = self.scales_of(window).map_or(0, |s| s.len.iter().product());
        let size = self.value_type().scale_dtype().map_or(0, DType::size);
        (values, scales * size)
    }

    /// The scales that come with a window, in tiles: those whose first element lies in it.
    pub fn scales_of(&self, window: &Window) -> Option<Window> {
        let block = self.quant?.block;
        let mut tiles = window.clone();
        let m = window.len.len().checked_sub(2)?;
        for d in m..window.len.len() {
            tiles.lo[d] = window.lo[d].div_ceil(block);
            tiles.len[d] = (window.lo[d] + window.len[d]).div_ceil(block) - tiles.lo[d];
        }
        Some(tiles)
    }

    /// Tile size at which rows may be cut, if they may not be cut anywhere, and how many rows of
    /// its first tile come before it.
    pub fn grid(&self) -> (Option<u64>, u64) {
        match (self.expr.leaf(), &self.expr) {
            // A number a tile: any cut is between tiles.
            (_, Expr::Scales { .. }) => (None, 0),
            (Some(leaf), _) => (Some(u64::from(leaf.made.recipe.block)), leaf.phase[0]),
            _ => (self.quant.map(|q| q.block), 0),
        }
    }

    /// True if a window begins where a tile of the unit's scales does.
    pub fn on_grid(&self, window: &Window) -> bool {
        let Some(block) = self.quant.map(|q| q.block) else { return true };
        window.lo.iter().rev().take(2).all(|lo| lo.is_multiple_of(block))
    }

    /// True if it holds nothing of the trainer's: every rank makes it itself.
    pub fn is_constant(&self) -> bool {
        self.expr.is_constant()
    }

    /// Indices of the ranks that hold it, ascending.
    pub fn ranks(&self) -> Vec<u32> {
        let mut ranks: Vec<u32> = self.receivers.iter().map(|r| r.rank).collect();
        ranks.dedup();
        ranks
    }
}

/// Everything that one update does, before it is cut into buckets.
#[derive(Clone, Debug, PartialEq)]
pub struct Program {
    pub sources: Vec<ProgramSource>,
    /// Replica 0's ranks; the others hold the same.
    pub ranks: Vec<RankProgram>,
    pub units: Vec<Unit>,
    /// Number of trainer ranks.
    pub trainers: u32,
}

impl Program {
    /// Who holds what a window of an expression is made of; see [`Layouts::shares`].
    ///
    /// # Errors
    /// A part for which no rank holds all operands.
    pub fn shares(&self, expr: &Expr, window: &Window) -> Result<Vec<Share>, Apart> {
        Layouts { of: &|id| &*self.sources[id as usize].layout }.shares(expr, window)
    }

    /// The same of a window of what a recipe quantizes.
    ///
    /// # Errors
    /// A part for which no rank holds all operands.
    pub fn input_shares(&self, made: &Made, window: &Window) -> Result<Vec<Share>, Apart> {
        Layouts { of: &|id| &*self.sources[id as usize].layout }.input_shares(made, window)
    }

    /// Numbers of all units.
    pub fn all(&self) -> std::ops::Range<u32> {
        0..self.units.len() as u32
    }

    /// Numbers of the units that follow the expert map; they stand behind all others.
    pub fn mapped(&self) -> std::ops::Range<u32> {
        let first = self.units.partition_point(|u| !u.mapped);
        first as u32..self.units.len() as u32
    }

    /// Hash of all that does not follow the expert map: of sources and units.
    pub fn fixed_digest(&self) -> u128 {
        let mut text = Hashed(Xxh3::new());
        let units = &self.units[..self.mapped().start as usize];
        // A hasher takes all that is written.
        let _ = write!(text, "{:?} {units:?}", self.sources);
        text.0.digest128()
    }

    /// Bytes of the distinct trainer tensors that are read.
    pub fn source_bytes(&self) -> u64 {
        self.sources.iter().map(ProgramSource::bytes).sum()
    }
}

/// Text that is hashed as it is written.
struct Hashed(Xxh3);

impl Write for Hashed {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.0.update(text.as_bytes());
        Ok(())
    }
}

/// The recipe that makes a value's codes; none if they pass through.
pub(crate) fn recipe_of(pieces: &[Piece]) -> Option<&'static str> {
    pieces.iter().find_map(|p| match &p.expr {
        Expr::Tiles(tiles) => match &tiles.from {
            TilesFrom::Made(made) => Some(made.recipe.kind.name()),
            TilesFrom::Stored(_) => None,
        },
        _ => None,
    })
}
