//! Every rank's targets, and the distinct units that make them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::rc::Rc;
use std::sync::Arc;

use crate::diag::Diagnostic;
use crate::dtype::DType;
use crate::ir::{Dims, NodeId, Param, Place, SourceFormat, Type, first_source, infer_all};
use crate::lower::{
    Part, Placed, ProgramSource, RankProgram, Receiver, Target, TargetKind, TargetStorage,
    Unit, recipe_of,
};
use crate::shard::{MOST_BOXES, Piece, Resolver, Storage, Unsaid, row_major};
use crate::topo::{Layout, RankId};

use super::CompileInputs;
use super::axes::{Axes, axes_of};
use super::derived::derived_view;
use super::front::{Front, Late};
use super::placements::{PlacementKey, Placements};

pub(super) struct Lowering<'a> {
    pub(super) inputs: &'a CompileInputs<'a>,
    pub(super) front: &'a Front,
    placements: Placements<'a>,
    /// Equal layouts are one.
    layouts: HashMap<(Dims, PlacementKey), Arc<Layout>>,
    /// Types of each stage's nodes on a mesh of one rank.
    full: Vec<Rc<Vec<Option<Type>>>>,
    pub(super) sources: Vec<ProgramSource>,
    pub(super) source_ids: HashMap<String, u32>,
    pub(super) units: Vec<Unit>,
    /// Units by the hash of expression and shape: the same expression is the same value.
    unit_ids: HashMap<u64, Vec<u32>>,
    hasher: RandomState,
    /// Targets by stage, parameter and the rank's index on the axes that the parameter uses.
    targets: HashMap<(usize, usize, [u64; 5]), Arc<Target>>,
    pub(super) ranks: Vec<RankProgram>,
    pub(super) used: BTreeSet<String>,
    pub(super) problems: Vec<Late>,
}

/// Types of a stage's nodes at one place.
struct StageTypes {
    types: Vec<Option<Type>>,
    full: Rc<Vec<Option<Type>>>,
}

/// What all ranks of a pipeline stage share.
struct Stage {
    index: usize,
    /// For each source: storage of its elements and, if quantized, of its scales.
    storages: Vec<(u32, Option<u32>)>,
    /// Parameters that land, by node.
    landed: BTreeMap<NodeId, u32>,
    /// For each node the mesh axes on which its value depends.
    axes: Vec<Axes>,
}

impl<'a> Lowering<'a> {
    pub(super) fn new(inputs: &'a CompileInputs<'a>, front: &'a Front) -> Self {
        let full: Vec<Rc<Vec<Option<Type>>>> = (front.stages.iter())
            .map(|plan| Rc::new(infer_all(plan, &Place::whole(&front.mesh)).0))
            .collect();
        let types: Vec<&[Option<Type>]> = full.iter().map(|t| t.as_slice()).collect();
        let placements = match inputs.placements {
            Some(manifest) => Placements::given(manifest),
            None => Placements::rules(&inputs.train, &front.stages, &types),
        };
        Lowering {
            inputs,
            front,
            placements,
            layouts: HashMap::new(),
            full,
            sources: Vec::new(),
            source_ids: HashMap::new(),
            units: Vec::new(),
            unit_ids: HashMap::new(),
            hasher: RandomState::new(),
            targets: HashMap::new(),
            ranks: Vec::new(),
            used: BTreeSet::new(),
            problems: Vec::new(),
        }
    }

    /// Number of trainer ranks.
    pub(super) fn trainers(&self) -> u32 {
        self.placements.world() as u32
    }

    pub(super) fn lower(&mut self) {
        self.check_expert_map();
        if !self.problems.is_empty() {
            return;
        }
        let stages: Vec<Stage> = (0..self.front.stages.len()).map(|s| self.stage(s)).collect();
        let mut cache: HashMap<(usize, u64), Rc<StageTypes>> = HashMap::new();
        for rank in self.front.mesh.ranks() {
            let coords = self.front.mesh.coords(rank);
            let place = Place::of(&self.front.mesh, coords);
            let stage = coords.pp as usize;
            // Only the number of expert slots tells ranks of a stage apart in their types.
            let key = (stage, if self.front.mesh.eplb { 0 } else { coords.ep });
            let types = match cache.get(&key) {
                Some(types) => Rc::clone(types),
                None => {
                    let types = Rc::new(self.stage_types(stage, &place));
                    cache.insert(key, Rc::clone(&types));
                    types
                }
            };
            self.rank(rank, &stages[stage], &place, &types);
        }
        if self.front.mesh.eplb {
            self.mapped_last();
        }
    }

    /// Puts the units that follow the expert map behind all others, whose numbers then stay when
    /// the map changes.
    fn mapped_last(&mut self) {
        let units = std::mem::take(&mut self.units);
        let mut order: Vec<usize> = (0..units.len()).collect();
        order.sort_by_key(|u| units[*u].mapped);
        let mut number = vec![0; units.len()];
        order.iter().enumerate().for_each(|(new, old)| number[*old] = new as u32);
        let mut units: Vec<Option<Unit>> = units.into_iter().map(Some).collect();
        self.units = order.into_iter().filter_map(|old| units[old].take()).collect();
        let mut renumbered: HashMap<*const Target, Arc<Target>> = HashMap::new();
        for target in self.ranks.iter_mut().flat_map(|r| &mut r.targets) {
            let new = renumbered.entry(Arc::as_ptr(target)).or_insert_with(|| {
                let mut new = Target::clone(target);
                new.places.iter_mut().for_each(|p| p.unit = number[p.unit as usize]);
                Arc::new(new)
            });
            *target = Arc::clone(new);
        }
    }

    fn stage(&mut self, index: usize) -> Stage {
        let plan = &self.front.stages[index];
        let landed = plan.params.iter().enumerate().filter(|(_, p)| !p.derived);
        Stage {
            index,
            storages: self.stage_storages(index),
            landed: landed.map(|(i, p)| (p.node, i as u32)).collect(),
            axes: axes_of(plan),
        }
    }

    /// Registers the sources of a stage; the same name is the same storage on every stage.
    fn stage_storages(&mut self, stage: usize) -> Vec<(u32, Option<u32>)> {
        let sources = &self.front.stages[stage].sources;
        sources
            .iter()
            .map(|s| match &s.format {
                SourceFormat::Plain(dtype) => (self.source(&s.name, *dtype, &s.shape), None),
                SourceFormat::Quantized { scale, .. } => (
                    self.source(&s.name, DType::E4m3, &s.shape),
                    Some(self.source(&scale.name, scale.dtype, &scale.shape)),
                ),
            })
            .collect()
    }

    fn source(&mut self, name: &str, dtype: DType, shape: &Dims) -> u32 {
        if let Some(id) = self.source_ids.get(name) {
            return *id;
        }
        let id = self.sources.len() as u32;
        let key = (shape.clone(), self.placements.key(name));
        let layout = match self.layouts.get(&key) {
            Some(layout) => Arc::clone(layout),
            None => {
                let layout = Arc::new(self.placements.layout(name, shape));
                self.layouts.insert(key, Arc::clone(&layout));
                layout
            }
        };
        self.sources.push(ProgramSource {
            name: name.to_owned(),
            dtype,
            shape: shape.clone(),
            layout,
        });
        self.source_ids.insert(name.to_owned(), id);
        id
    }

    fn stage_types(&mut self, stage: usize, place: &Place) -> StageTypes {
        let plan = &self.front.stages[stage];
        let (types, errors) = infer_all(plan, place);
        for (index, e) in errors {
            let node = &plan.nodes[index];
            let mut d = e.at(node.span);
            d.subject = first_source(&plan.nodes, &plan.sources, NodeId(index as u32));
            self.problems.push(Late { stage, event: Some(node.event), diagnostic: d });
        }
        StageTypes { types, full: Rc::clone(&self.full[stage]) }
    }

    fn rank(&mut self, rank: RankId, stage: &Stage, place: &Place, types: &StageTypes) {
        let plan = &self.front.stages[stage.index];
        let resolver = Resolver {
            plan,
            types: &types.types,
            place,
            experts: &self.inputs.experts,
            storages: &stage.storages,
            landed: &stage.landed,
        };
        let this = self.ranks.len() as u32;
        let mut targets: Vec<Arc<Target>> = Vec::with_capacity(plan.params.len());
        for (index, param) in plan.params.iter().enumerate() {
            let axes = stage.axes[param.node.0 as usize];
            let key = (stage.index, index, axes.indices(place));
            let target = match self.targets.get(&key) {
                Some(target) => Arc::clone(target),
                None => {
                    let Some(target) = self.target(&resolver, stage.index, param, types, axes)
                    else {
                        continue;
                    };
                    let target = Arc::new(target);
                    self.targets.insert(key, Arc::clone(&target));
                    target
                }
            };
            for (place, placed) in target.places.iter().enumerate() {
                self.units[placed.unit as usize].receivers.push(Receiver {
                    rank: this,
                    target: targets.len() as u32,
                    place: place as u32,
                });
            }
            targets.push(target);
        }
        self.ranks.push(RankProgram { rank, coords: self.front.mesh.coords(rank), targets });
    }

    fn no_lowering(&mut self, stage: usize, param: &Param, why: Unsaid) {
        let (code, what, hint) = match why {
            Unsaid::Tiles(_) => (
                "E0501",
                "a reshape or permute takes elements out of their tiles".to_owned(),
                "reshape and permute before .quantize",
            ),
            Unsaid::Boxes => (
                "E0105",
                format!("its moves take more than the limit of {MOST_BOXES} boxes"),
                "moves of rows, then of columns, then of rows again split it into single elements",
            ),
        };
        let d = Diagnostic::error(code, format!("{}: {what}", param.name))
            .at(param.span)
            .hint(hint)
            .about(&param.name);
        self.problems.push(Late { stage, event: Some(param.event), diagnostic: d });
    }

    fn target(
        &mut self,
        resolver: &Resolver<'_>,
        stage: usize,
        param: &Param,
        types: &StageTypes,
        axes: Axes,
    ) -> Option<Target> {
        let t = types.types[param.node.0 as usize].clone()?;
        let pieces = match resolver.param(&param.name, param.node, param.derived) {
            Ok(pieces) => pieces,
            Err(why) => {
                self.no_lowering(stage, param, why);
                return None;
            }
        };
        let full = types.full[param.node.0 as usize].as_ref();
        let mut target = Target {
            name: param.name.clone(),
            kind: TargetKind::Parameter,
            span: param.span,
            storages: storages_of(param, &t),
            full_shape: full.map(|t| t.shape.clone()),
            places: Vec::new(),
            recipe: recipe_of(&pieces),
            sources: self.sources_of(&pieces),
            derived: Vec::new(),
        };
        if param.derived {
            let (kind, strides) = derived_view(&pieces, &t);
            target.kind = kind;
            target.storages[0].strides = strides;
            target.derived = pieces;
        } else {
            let mapped = self.front.mesh.eplb && axes.experts();
            let places = pieces.into_iter().map(|p| self.placed(param, &t, p, mapped));
            target.places = places.collect();
        }
        Some(target)
    }

    /// The unit of a piece, new or known.
    fn placed(&mut self, param: &Param, t: &Type, piece: Piece, mapped: bool) -> Placed {
        let Piece { at, expr } = piece;
        let key = self.hasher.hash_one((&expr, &at.len));
        let known = self.unit_ids.entry(key).or_default();
        let same = |id: &&u32| {
            let unit = &self.units[**id as usize];
            (&unit.expr, &unit.shape, unit.quant, unit.mapped)
                == (&expr, &at.len, t.quant, mapped)
        };
        let unit = match known.iter().find(same) {
            Some(id) => *id,
            None => {
                let id = self.units.len() as u32;
                known.push(id);
                self.units.push(Unit {
                    name: param.name.clone(),
                    span: param.span,
                    shape: at.len,
                    dtype: t.dtype,
                    quant: t.quant,
                    expr,
                    mapped,
                    receivers: Vec::new(),
                });
                id
            }
        };
        Placed { unit, lo: at.lo }
    }

    /// Names of the sources that some pieces read, in order of first use.
    fn sources_of(&mut self, pieces: &[Piece]) -> Vec<String> {
        let mut seen = BTreeSet::new();
        let mut order = Vec::new();
        for piece in pieces {
            piece.expr.views(&mut |view| {
                if let Storage::Source(id) = view.storage
                    && seen.insert(id)
                {
                    order.push(id);
                }
            });
        }
        let names = order.into_iter().map(|id| self.sources[id as usize].name.clone());
        let names: Vec<String> = names.collect();
        self.used.extend(names.iter().cloned());
        names
    }
}

/// Values (or codes) and, of a quantized value, scales.
fn storages_of(param: &Param, t: &Type) -> Vec<TargetStorage> {
    let mut storages = vec![TargetStorage {
        part: Part::Values,
        name: param.name.clone(),
        dtype: t.dtype,
        shape: t.shape.clone(),
        strides: row_major(&t.shape),
    }];
    if let (Some(q), Some(shape), Some(dtype)) = (t.quant, t.scale_shape(), t.scale_dtype()) {
        storages.push(TargetStorage {
            part: Part::Scales,
            name: format!("{}{}", param.name, q.scale_name.suffix()),
            dtype,
            strides: row_major(&shape),
            shape,
        });
    }
    storages
}
