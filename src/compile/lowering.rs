//! Every rank's targets, and the distinct units that make them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

use crate::diag::Diagnostic;
use crate::dtype::DType;
use crate::ir::{Dims, NodeId, Param, Place, SourceFormat, Type, first_source, infer_all};
use crate::lower::{
    Part, ProgramSource, RankProgram, Target, TargetKind, TargetStorage, Unit, recipe_of,
};
use crate::shard::{Piece, Resolver, Storage, row_major};
use crate::topo::RankId;

use super::CompileInputs;
use super::derived::derived_view;
use super::front::{Front, Late};

/// A unit's identity: same pieces over the same shape is the same value.
type UnitKey = (Vec<Piece>, Dims);

pub(super) struct Lowering<'a> {
    pub(super) inputs: &'a CompileInputs<'a>,
    pub(super) front: &'a Front,
    pub(super) sources: Vec<ProgramSource>,
    pub(super) source_ids: HashMap<String, u32>,
    pub(super) units: Vec<Unit>,
    pub(super) unit_ids: HashMap<UnitKey, usize>,
    pub(super) ranks: Vec<RankProgram>,
    pub(super) used: BTreeSet<String>,
    pub(super) problems: Vec<Late>,
}

/// Types of a stage's nodes at one place.
struct StageTypes {
    types: Vec<Option<Type>>,
    full: Rc<Vec<Option<Type>>>,
}

impl<'a> Lowering<'a> {
    pub(super) fn new(inputs: &'a CompileInputs<'a>, front: &'a Front) -> Self {
        Lowering {
            inputs,
            front,
            sources: Vec::new(),
            source_ids: HashMap::new(),
            units: Vec::new(),
            unit_ids: HashMap::new(),
            ranks: Vec::new(),
            used: BTreeSet::new(),
            problems: Vec::new(),
        }
    }

    pub(super) fn lower(&mut self) {
        self.check_expert_map();
        if !self.problems.is_empty() {
            return;
        }
        let full: Vec<Rc<Vec<Option<Type>>>> = self
            .front
            .stages
            .iter()
            .map(|plan| Rc::new(infer_all(plan, &Place::whole(&self.front.mesh)).0))
            .collect();
        let storages: Vec<Vec<(u32, Option<u32>)>> =
            (0..self.front.stages.len()).map(|s| self.stage_storages(s)).collect();
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
                    let types = Rc::new(self.stage_types(stage, &place, &full[stage]));
                    cache.insert(key, Rc::clone(&types));
                    types
                }
            };
            self.rank(rank, stage, &place, &types, &storages[stage]);
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
        self.sources.push(ProgramSource { name: name.to_owned(), dtype, shape: shape.clone() });
        self.source_ids.insert(name.to_owned(), id);
        id
    }

    fn stage_types(
        &mut self,
        stage: usize,
        place: &Place,
        full: &Rc<Vec<Option<Type>>>,
    ) -> StageTypes {
        let plan = &self.front.stages[stage];
        let (types, errors) = infer_all(plan, place);
        for (index, e) in errors {
            let node = &plan.nodes[index];
            let mut d = e.at(node.span);
            d.subject = first_source(&plan.nodes, &plan.sources, NodeId(index as u32));
            self.problems.push(Late { stage, event: Some(node.event), diagnostic: d });
        }
        StageTypes { types, full: Rc::clone(full) }
    }

    fn rank(
        &mut self,
        rank: RankId,
        stage: usize,
        place: &Place,
        types: &StageTypes,
        storages: &[(u32, Option<u32>)],
    ) {
        let plan = &self.front.stages[stage];
        let landed: BTreeMap<NodeId, u32> = plan
            .params
            .iter()
            .enumerate()
            .filter(|(_, p)| !p.derived)
            .map(|(i, p)| (p.node, i as u32))
            .collect();
        let resolver = Resolver {
            plan,
            types: &types.types,
            place,
            experts: &self.inputs.experts,
            storages,
            landed: &landed,
        };
        let this = self.ranks.len();
        let mut targets = Vec::with_capacity(plan.params.len());
        for param in &plan.params {
            let Some(t) = types.types[param.node.0 as usize].clone() else { continue };
            let pieces = match resolver.param(&param.name, param.node, param.derived) {
                Ok(pieces) => pieces,
                Err(_) => {
                    self.no_lowering(stage, param);
                    continue;
                }
            };
            let full = types.full[param.node.0 as usize].as_ref().map(|t| t.shape.clone());
            targets.push(self.target(this, targets.len(), param, t, full, pieces));
        }
        self.ranks.push(RankProgram { rank, coords: self.front.mesh.coords(rank), targets });
    }

    fn no_lowering(&mut self, stage: usize, param: &Param) {
        let d = Diagnostic::error(
            "E0501",
            format!("{}: a reshape or permute takes elements out of their tiles", param.name),
        )
        .at(param.span)
        .hint("reshape and permute before .quantize")
        .about(&param.name);
        self.problems.push(Late { stage, event: Some(param.event), diagnostic: d });
    }

    fn target(
        &mut self,
        rank: usize,
        index: usize,
        param: &Param,
        t: Type,
        full_shape: Option<Dims>,
        pieces: Vec<Piece>,
    ) -> Target {
        let sources = self.sources_of(&pieces);
        let mut storages = vec![TargetStorage {
            part: Part::Values,
            name: param.name.clone(),
            dtype: t.dtype,
            shape: t.shape.clone(),
            strides: row_major(&t.shape),
        }];
        if let (Some(q), Some(shape), Some(dtype)) = (t.quant, t.scale_shape(), t.scale_dtype())
        {
            storages.push(TargetStorage {
                part: Part::Scales,
                name: format!("{}{}", param.name, q.scale_name.suffix()),
                dtype,
                strides: row_major(&shape),
                shape,
            });
        }
        let mut target = Target {
            name: param.name.clone(),
            kind: TargetKind::Parameter,
            span: param.span,
            storages,
            full_shape,
            unit: None,
            recipe: recipe_of(&pieces),
            sources,
            derived: Vec::new(),
        };
        if param.derived {
            let (kind, strides) = derived_view(&pieces, &t);
            target.kind = kind;
            target.storages[0].strides = strides;
            target.derived = pieces;
        } else {
            target.unit = Some(self.unit(rank, index, param, &t, pieces));
        }
        target
    }

    fn unit(
        &mut self,
        rank: usize,
        index: usize,
        param: &Param,
        t: &Type,
        pieces: Vec<Piece>,
    ) -> usize {
        let key = (pieces, t.shape.clone());
        if let Some(id) = self.unit_ids.get(&key) {
            self.units[*id].receivers.push((rank, index));
            return *id;
        }
        let id = self.units.len();
        self.units.push(Unit {
            name: param.name.clone(),
            span: param.span,
            shape: t.shape.clone(),
            dtype: t.dtype,
            quant: t.quant,
            pieces: key.0.clone(),
            receivers: vec![(rank, index)],
        });
        self.unit_ids.insert(key, id);
        id
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
