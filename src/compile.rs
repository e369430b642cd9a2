//! The front of the pipeline: a plan script becomes a checked program for every rank.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

use serde_json::Value;

use crate::diag::{Diagnostic, SourceMap};
use crate::error::{Error, Result};
use crate::ir::{
    NodeId, Param, Place, Plan, SourceFormat, Type, first_source, infer_all, show_shape,
};
use crate::lower::{
    Part, Program, ProgramSource, RankProgram, Target, TargetKind, TargetStorage, Unit,
    recipe_of,
};
use crate::script::{
    Catalog, Declared, Limits, ModuleFiles, Outcome, Request, evaluate, explain_late,
};
use crate::shard::{ExpertMap, Expr, Piece, Resolver, Storage, row_major};
use crate::topo::{InferMesh, RankId, TrainMesh};

/// The model side of a compilation: its config, and what its files hold.
pub struct ModelInput {
    pub config: Value,
    /// None in a dry run from a bare config: sources then count as unquantized.
    pub catalog: Option<Box<dyn Catalog>>,
}

/// What a compilation depends on.
pub struct CompileInputs<'a> {
    /// Name of the plan file as shown to a person.
    pub name: &'a str,
    pub text: &'a str,
    pub modules: Rc<dyn ModuleFiles>,
    /// The model as given from outside; else the plan's own `input(path)` is opened.
    pub model: Option<ModelInput>,
    /// Opens the path of a plan's `input(path)`.
    pub open_model: &'a dyn Fn(&str) -> Result<ModelInput>,
    /// The topology as given from outside; else the plan's own, else one rank.
    pub mesh: Option<InferMesh>,
    pub train: TrainMesh,
    pub options: BTreeMap<String, String>,
    pub target: BTreeMap<String, String>,
    pub experts: ExpertMap,
    pub limits: Limits,
}

/// A checked plan for every rank of replica 0.
pub struct Compiled {
    /// The plan of each pipeline stage.
    pub stages: Vec<Plan>,
    pub mesh: InferMesh,
    pub train: TrainMesh,
    pub declared: Declared,
    pub model: Option<ModelInput>,
    pub program: Program,
    /// Warnings and notes.
    pub notes: Vec<Diagnostic>,
    /// Hex digest of everything that the schedule depends on.
    pub digest: String,
}

impl Compiled {
    /// The plan files, for messages.
    pub fn files(&self) -> &SourceMap {
        &self.stages[0].files
    }
}

/// An error with the plan files that its spans point into.
pub struct CompileError {
    pub error: Error,
    pub files: SourceMap,
}

/// Compiles a plan: evaluate, check, shard for every rank, find distinct units.
///
/// # Errors
/// Every problem of the plan and its inputs, together; nothing has been touched.
pub fn compile(inputs: CompileInputs<'_>) -> std::result::Result<Compiled, CompileError> {
    let mut files = SourceMap::default();
    files.add(inputs.name, inputs.text);
    let early = |error: Error| CompileError { error, files: files.clone() };
    let front = Front::run(&inputs).map_err(|e| match e {
        FrontError::Early(error) => early(error),
        FrontError::Plan(problems, files) => {
            CompileError { error: Error::refused(problems), files }
        }
    })?;
    let mut work = Lowering::new(&inputs, &front);
    work.lower();
    let files = front.stages[0].files.clone();
    let mut problems = front.explain(&inputs, std::mem::take(&mut work.problems));
    let model = front.opened.as_ref().or(inputs.model.as_ref());
    let refused = problems.iter().any(Diagnostic::is_error);
    if let Some(catalog) = model.and_then(|m| m.catalog.as_deref()) {
        problems.extend(empty_drops(&front.stages, catalog));
        // What a refused parameter would have read is not known.
        if !refused {
            problems.extend(unused_sources(&front.stages, catalog, &work.used));
        }
    }
    if problems.iter().any(Diagnostic::is_error) {
        return Err(CompileError { error: Error::refused(problems), files });
    }
    let program = Program { sources: work.sources, ranks: work.ranks, units: work.units };
    let digest = digest(&inputs, &front, &program);
    let mut notes: Vec<Diagnostic> =
        front.stages.iter().flat_map(|p| p.notes.iter().cloned()).collect();
    notes.dedup();
    notes.extend(problems);
    Ok(Compiled {
        mesh: front.mesh,
        train: inputs.train,
        declared: front.declared,
        model: front.opened.or(inputs.model),
        stages: front.stages,
        program,
        notes,
        digest,
    })
}

enum FrontError {
    Early(Error),
    Plan(Vec<Diagnostic>, SourceMap),
}

/// What evaluation gives, for all stages.
struct Front {
    stages: Vec<Plan>,
    mesh: InferMesh,
    declared: Declared,
    opened: Option<ModelInput>,
}

impl Front {
    fn run(inputs: &CompileInputs<'_>) -> std::result::Result<Front, FrontError> {
        let mut front = Front {
            stages: Vec::new(),
            mesh: inputs.mesh.clone().unwrap_or_else(InferMesh::single),
            declared: Declared::default(),
            opened: None,
        };
        let mut mesh_open = inputs.mesh.is_none();
        let mut restarts = 0;
        while (front.stages.len() as u64) < front.mesh.pp {
            let stage = front.stages.len() as u64;
            let outcome = evaluate(&front.request(inputs, stage, mesh_open));
            match outcome {
                Outcome::Restart(declared) => {
                    restarts += 1;
                    if restarts > 4 {
                        let d = Diagnostic::error(
                            "E0307",
                            "the plan declares another input or topology each time it is read",
                        );
                        return Err(FrontError::Early(d.into()));
                    }
                    if let Some(mesh) = declared.infer.filter(|_| mesh_open) {
                        front.mesh = mesh;
                        mesh_open = false;
                    }
                    let missing = inputs.model.is_none() && front.opened.is_none();
                    if let Some(path) = declared.input.filter(|_| missing) {
                        let opened = (inputs.open_model)(&path).map_err(FrontError::Early)?;
                        front.opened = Some(opened);
                    }
                    front.stages.clear();
                }
                Outcome::Done { plan, declared, mut problems, complete } => {
                    if problems.iter().any(Diagnostic::is_error) {
                        let model = front.opened.as_ref().or(inputs.model.as_ref());
                        if let Some(c) = model.and_then(|m| m.catalog.as_deref())
                            && complete
                        {
                            problems.extend(empty_drops(std::slice::from_ref(&*plan), c));
                        }
                        return Err(FrontError::Plan(problems, plan.files));
                    }
                    front.declared = declared;
                    front.stages.push(*plan);
                }
            }
        }
        Ok(front)
    }

    fn request<'a>(
        &'a self,
        inputs: &'a CompileInputs<'_>,
        stage: u64,
        mesh_open: bool,
    ) -> Request<'a> {
        let model = self.opened.as_ref().or(inputs.model.as_ref());
        Request {
            name: inputs.name,
            text: inputs.text,
            modules: Rc::clone(&inputs.modules),
            model: model.map(|m| &m.config),
            mesh: &self.mesh,
            mesh_open,
            at: self.mesh.coords(RankId(stage * self.mesh.tp)),
            options: &inputs.options,
            target: &inputs.target,
            catalog: model.and_then(|m| m.catalog.as_deref()),
            limits: inputs.limits.clone(),
        }
    }

    /// Adds call chains to what was found after evaluation, stage by stage.
    fn explain(&self, inputs: &CompileInputs<'_>, late: Vec<Late>) -> Vec<Diagnostic> {
        let mut out = Vec::new();
        for stage in 0..self.stages.len() {
            let mine: Vec<(Diagnostic, Option<u32>)> = late
                .iter()
                .filter(|l| l.stage == stage)
                .map(|l| (l.diagnostic.clone(), l.event))
                .collect();
            if !mine.is_empty() {
                out.extend(explain_late(&self.request(inputs, stage as u64, false), mine));
            }
        }
        out
    }
}

/// A problem found after evaluation, with the event of the script that it belongs to.
struct Late {
    stage: usize,
    /// None where no single call is to blame.
    event: Option<u32>,
    diagnostic: Diagnostic,
}

/// A unit's identity: same pieces over the same shape is the same value.
type UnitKey = (Vec<Piece>, crate::ir::Dims);

struct Lowering<'a> {
    inputs: &'a CompileInputs<'a>,
    front: &'a Front,
    sources: Vec<ProgramSource>,
    source_ids: HashMap<String, u32>,
    units: Vec<Unit>,
    unit_ids: HashMap<UnitKey, usize>,
    ranks: Vec<RankProgram>,
    used: BTreeSet<String>,
    problems: Vec<Late>,
}

/// Types of a stage's nodes at one place.
struct StageTypes {
    types: Vec<Option<Type>>,
    full: Rc<Vec<Option<Type>>>,
}

impl<'a> Lowering<'a> {
    fn new(inputs: &'a CompileInputs<'a>, front: &'a Front) -> Self {
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

    fn lower(&mut self) {
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
                    self.source(&s.name, crate::dtype::DType::E4m3, &s.shape),
                    Some(self.source(&scale.name, scale.dtype, &scale.shape)),
                ),
            })
            .collect()
    }

    fn source(
        &mut self,
        name: &str,
        dtype: crate::dtype::DType,
        shape: &crate::ir::Dims,
    ) -> u32 {
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
            let mut d = Diagnostic::error(e.code, e.message).at(node.span);
            d.label = e.label;
            d.hint = e.hint;
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
        full_shape: Option<crate::ir::Dims>,
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

    /// A given expert map must name layers of the plan, and give each slot an expert and each
    /// expert a slot.
    fn check_expert_map(&mut self) {
        if self.inputs.experts.is_empty() {
            return;
        }
        let mesh = &self.front.mesh;
        let first = |stage: usize| mesh.coords(RankId(stage as u64 * mesh.tp));
        let types: Vec<Vec<Option<Type>>> = (self.front.stages.iter().enumerate())
            .map(|(stage, plan)| infer_all(plan, &Place::of(mesh, first(stage))).0)
            .collect();
        for (layer, map) in &self.inputs.experts {
            let mut found = false;
            for stage in 0..self.front.stages.len() {
                let plan = &self.front.stages[stage];
                let prefix = format!("{layer}.");
                for param in plan.params.iter().filter(|p| p.name.starts_with(&prefix)) {
                    for count in expert_counts(plan, &types[stage], param.node) {
                        found = true;
                        if let Some(why) = self.bad_map(map, count) {
                            let d = Diagnostic::error(
                                "E0305",
                                format!("the expert map of {layer} does not fit: {why}"),
                            )
                            .at(param.span)
                            .about(&param.name);
                            self.problems.push(Late {
                                stage,
                                event: Some(param.event),
                                diagnostic: d,
                            });
                        }
                    }
                }
            }
            if !found {
                let d = Diagnostic::error(
                    "E0305",
                    format!("the expert map names {layer}, where the plan has no experts"),
                )
                .hint("keys are module paths such as model.layers.3");
                self.problems.push(Late { stage: 0, event: None, diagnostic: d });
            }
        }
    }

    fn bad_map(&self, map: &[u64], experts: u64) -> Option<String> {
        let slots = experts + self.front.mesh.redundant_experts;
        if map.len() as u64 != slots {
            return Some(format!("{} entries for {slots} physical slots", map.len()));
        }
        if let Some(slot) = map.iter().position(|e| *e >= experts) {
            return Some(format!("slot {slot} holds expert {}, of {experts}", map[slot]));
        }
        let held: BTreeSet<u64> = map.iter().copied().collect();
        let lost = (0..experts).find(|e| !held.contains(e))?;
        Some(format!("expert {lost} is in no slot"))
    }
}

/// Sizes of dimension 0 before every `.experts` under a node.
fn expert_counts(plan: &Plan, types: &[Option<Type>], node: NodeId) -> BTreeSet<u64> {
    let mut out = BTreeSet::new();
    let mut queue = vec![node];
    let mut seen = BTreeSet::new();
    while let Some(id) = queue.pop() {
        if !seen.insert(id) {
            continue;
        }
        let n = plan.node(id);
        if matches!(n.op, crate::ir::Op::Experts { .. }) {
            let input = types[n.inputs[0].0 as usize].as_ref();
            out.extend(input.and_then(|t| t.shape.first()));
        }
        queue.extend(&n.inputs);
    }
    out
}

/// Kind and strides of a derived parameter: a view of the parameter's memory where no value
/// changes, else the same view of a dequantized copy of it.
fn derived_view(pieces: &[Piece], t: &Type) -> (TargetKind, crate::ir::Dims) {
    let views = |expr: &Expr| match expr {
        Expr::Load(view) => Some((TargetKind::Alias, view.strides.clone())),
        Expr::Dequantize { tiles, .. } => match &tiles.from {
            crate::shard::TilesFrom::Stored(s) => {
                Some((TargetKind::Derived, s.codes.strides.clone()))
            }
            crate::shard::TilesFrom::Made(_) => None,
        },
        _ => None,
    };
    let first = pieces.first().and_then(|p| views(&p.expr));
    let even = pieces.iter().all(|p| views(&p.expr) == first);
    match first.filter(|_| even) {
        Some((kind, strides)) if pieces.len() == 1 => (kind, strides),
        Some((kind, strides)) => (kind, leading_strides(pieces, strides, t)),
        None => (TargetKind::Derived, row_major(&t.shape)),
    }
}

/// Strides where the pieces are one for each leading index.
fn leading_strides(
    pieces: &[Piece],
    mut strides: crate::ir::Dims,
    t: &Type,
) -> crate::ir::Dims {
    let start = |p: &Piece| {
        let mut found = 0;
        p.expr.views(&mut |v| {
            if !matches!(v.storage, Storage::LandedScale(_)) {
                found = v.start;
            }
        });
        found
    };
    if let [a, b, ..] = pieces
        && t.shape.len() == strides.len()
        && let Some(d) = (0..strides.len()).find(|d| a.at.lo[*d] != b.at.lo[*d])
    {
        strides[d] = start(b).saturating_sub(start(a)) / (b.at.lo[d] - a.at.lo[d]).max(1);
    }
    strides
}

/// Drop rules that match nothing.
fn empty_drops(stages: &[Plan], catalog: &dyn Catalog) -> Vec<Diagnostic> {
    let names = catalog.names();
    let mut rules: Vec<_> = stages.iter().flat_map(|p| &p.drop).collect();
    rules.sort_by_key(|r| (r.span, r.pattern.text().to_owned()));
    rules.dedup_by_key(|r| (r.span, r.pattern.text().to_owned()));
    let empty = rules
        .into_iter()
        .filter(|r| !r.optional && !names.iter().any(|n| r.pattern.matches(n)));
    empty
        .map(|rule| {
            let text = rule.pattern.text();
            Diagnostic::error("E0405", format!("drop(\"{text}\") matches no source tensor"))
                .at(rule.span)
                .hint("where it may match nothing, write drop(pattern, optional)")
        })
        .collect()
}

/// Sources of the catalog that no rank reads and no rule drops.
fn unused_sources(
    stages: &[Plan],
    catalog: &dyn Catalog,
    used: &BTreeSet<String>,
) -> Vec<Diagnostic> {
    let names = catalog.names();
    let mut problems = Vec::new();
    let rules: Vec<_> = stages.iter().flat_map(|p| &p.drop).collect();
    let dropped = |name: &str| rules.iter().any(|r| r.pattern.matches(name));
    let lost: Vec<&String> =
        names.iter().filter(|n| !used.contains(*n) && !dropped(n)).collect();
    if let Some(first) = lost.first() {
        let shown: Vec<&str> = lost.iter().take(5).map(|n| n.as_str()).collect();
        let more = lost.len() - shown.len();
        let entry = catalog.find(first);
        let shape = entry.map_or_else(String::new, |e| format!(" {}", show_shape(&e.shape)));
        let verb = if lost.len() == 1 { "tensor is" } else { "tensors are" };
        problems.push(
            Diagnostic::error(
                "E0404",
                format!("{} source {verb} neither used nor dropped", lost.len()),
            )
            .note(format!(
                "{}{}",
                shown.join(", "),
                if more > 0 { format!(" and {more} more") } else { shape }
            ))
            .hint("map it in the plan, or say drop(\"pattern\")"),
        );
    }
    problems
}

/// Digest of the plan files, options, topology and the whole program.
fn digest(inputs: &CompileInputs<'_>, front: &Front, program: &Program) -> String {
    let mut hash = xxhash_rust::xxh3::Xxh3::new();
    for plan in &front.stages {
        for (name, text) in plan.files.files() {
            hash.update(name.as_bytes());
            hash.update(text.as_bytes());
        }
        hash.update(format!("{:?}", plan.options).as_bytes());
    }
    hash.update(format!("{} | {}", front.mesh, inputs.train).as_bytes());
    hash.update(crate::lower::print_program(program).as_bytes());
    format!("{:032x}", hash.digest128())
}
