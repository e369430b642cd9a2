//! The program: tables of sources and targets, and the units that turn one into the other.

use crate::diag::Span;
use crate::dtype::DType;
use crate::ir::{Dims, Quant, Type};
use crate::shard::{Expr, Piece, TilesFrom};
use crate::topo::{Coords, RankId};

/// Where a trainer tensor's elements are, as one storage (scales are a storage of their own).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ProgramSource {
    pub name: String,
    pub dtype: DType,
    pub shape: Dims,
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
    /// Index of the unit that makes it; none for derived parameters and aliases.
    pub unit: Option<usize>,
    /// Names of the trainer tensors that flow into it on this rank, in order.
    pub sources: Vec<String>,
    /// Recipe that makes its codes; none if they pass through or there are none.
    pub recipe: Option<&'static str>,
    /// Pieces of a derived parameter over landed storages.
    pub derived: Vec<Piece>,
}

/// What one rank holds, in the plan's order.
#[derive(Clone, Debug, PartialEq)]
pub struct RankProgram {
    pub rank: RankId,
    pub coords: Coords,
    pub targets: Vec<Target>,
}

impl RankProgram {
    /// Bytes of everything the update writes on this rank.
    pub fn bytes(&self) -> u64 {
        let written = self.targets.iter().filter(|t| t.kind == TargetKind::Parameter);
        written.flat_map(|t| &t.storages).map(TargetStorage::bytes).sum()
    }
}

/// A distinct value that the trainer side makes once, whoever needs it.
#[derive(Clone, Debug, PartialEq)]
pub struct Unit {
    /// Name of the first parameter that holds it, for messages.
    pub name: String,
    pub span: Span,
    pub shape: Dims,
    pub dtype: DType,
    pub quant: Option<Quant>,
    pub pieces: Vec<Piece>,
    /// (index of the rank in the program, index of the target on it).
    pub receivers: Vec<(usize, usize)>,
}

impl Unit {
    pub fn value_type(&self) -> Type {
        Type { shape: self.shape.clone(), dtype: self.dtype, quant: self.quant }
    }

    /// Bytes of values and scales.
    pub fn bytes(&self) -> u64 {
        let t = self.value_type();
        let scales = t.scale_shape().map_or(0, |s| s.iter().product::<u64>());
        t.bytes() + scales * t.scale_dtype().map_or(0, DType::size)
    }
}

/// Everything that one update does, before it is cut into buckets.
#[derive(Clone, Debug, PartialEq)]
pub struct Program {
    pub sources: Vec<ProgramSource>,
    pub ranks: Vec<RankProgram>,
    pub units: Vec<Unit>,
}

impl Program {
    /// Bytes of the distinct trainer tensors that are read.
    pub fn source_bytes(&self) -> u64 {
        self.sources.iter().map(ProgramSource::bytes).sum()
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
