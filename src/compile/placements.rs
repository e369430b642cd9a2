//! Where each source tensor is on the trainer's mesh: as a manifest says, or by the default
//! rules, for which the plan itself tells experts and tensor-parallel dimensions apart.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use crate::io::{SourceManifest, SourceTensor};
use crate::ir::{NodeId, Op, Plan, SourceFormat, Type};
use crate::topo::{Axis, Cut, ExpertRole, Layout, Placement, SourceRole, TrainMesh};

/// Layouts by source tensor.
pub(super) enum Placements<'a> {
    Rules { train: &'a TrainMesh, roles: HashMap<String, SourceRole> },
    Given { mesh: &'a [(String, u64)], tensors: HashMap<&'a str, &'a SourceTensor> },
}

impl<'a> Placements<'a> {
    pub(super) fn given(manifest: &'a SourceManifest) -> Self {
        let tensors = manifest.tensors.iter().map(|t| (t.name.as_str(), t)).collect();
        Placements::Given { mesh: &manifest.mesh, tensors }
    }

    /// The default rules for the sources of all stages; `full` are the types of each stage's
    /// nodes on a mesh of one rank.
    pub(super) fn rules(
        train: &'a TrainMesh,
        stages: &[Plan],
        full: &[&[Option<Type>]],
    ) -> Self {
        let mut roles: HashMap<String, SourceRole> = HashMap::new();
        if train.world() > 1 {
            for (plan, types) in stages.iter().zip(full) {
                let found = Roles::of(plan, types).roles;
                for (source, role) in plan.sources.iter().zip(found) {
                    if let SourceFormat::Quantized { scale, .. } = &source.format {
                        let role = SourceRole { scales: true, ..role };
                        roles.entry(scale.name.clone()).or_insert(role);
                    }
                    roles.entry(source.name.clone()).or_insert(role);
                }
            }
            stages_of(train, &mut roles);
        }
        Placements::Rules { train, roles }
    }

    /// Number of trainer ranks.
    pub(super) fn world(&self) -> u64 {
        match self {
            Placements::Rules { train, .. } => train.world(),
            Placements::Given { mesh, .. } => mesh.iter().map(|(_, size)| size).product(),
        }
    }

    /// What tensors of the same key share.
    pub(super) fn key(&self, name: &str) -> PlacementKey {
        match self {
            Placements::Rules { roles, .. } => {
                PlacementKey::Role(roles.get(name).copied().unwrap_or_default())
            }
            Placements::Given { tensors, .. } => PlacementKey::Given(
                tensors.get(name).map(|t| (t.placements.clone(), t.on.clone())),
            ),
        }
    }

    pub(super) fn layout(&self, name: &str, shape: &[u64]) -> Layout {
        match self {
            Placements::Rules { train, .. } if train.world() == 1 => {
                Layout::whole(shape, Arc::from([0]))
            }
            Placements::Rules { train, roles } => {
                train.layout(shape, &roles.get(name).copied().unwrap_or_default())
            }
            Placements::Given { mesh, tensors } => match tensors.get(name) {
                Some(tensor) => given(mesh, self.world(), tensor, shape),
                // Names were checked against the manifest when they were declared.
                None => Layout::whole(shape, (0..self.world() as u32).collect()),
            },
        }
    }
}

/// What tells layouts of equal shapes apart.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum PlacementKey {
    Role(SourceRole),
    /// Placements, and the axes of which one index alone holds the tensor; none for a tensor that
    /// the manifest does not list.
    Given(Option<(Vec<Placement>, BTreeMap<String, u64>)>),
}

/// Ranks are numbered row-major over the mesh.
fn given(mesh: &[(String, u64)], world: u64, tensor: &SourceTensor, shape: &[u64]) -> Layout {
    let inner = |axis: usize| mesh[axis + 1..].iter().map(|(_, n)| n).product::<u64>();
    let index = |axis: usize| {
        let (inner, size) = (inner(axis), mesh[axis].1);
        move |rank: u32| u64::from(rank) / inner % size
    };
    let cuts = tensor.placements.iter().enumerate().map(|(axis, placement)| Cut {
        size: mesh[axis].1,
        index: Box::new(index(axis)),
        placement: *placement,
    });
    let cuts: Vec<Cut> = cuts.collect();
    let holds = |rank: &u32| {
        mesh.iter().enumerate().all(|(axis, (name, _))| {
            tensor.on.get(name).is_none_or(|only| index(axis)(*rank) == *only)
        })
    };
    Layout::of(shape, &cuts, (0..world as u32).filter(holds))
}

/// Pipeline stages: a layer's by its number; of the rest the embedding is on the first and what
/// follows the layers on the last, told apart by name.
fn stages_of(train: &TrainMesh, roles: &mut HashMap<String, SourceRole>) {
    let number = |name: &str| name.split('.').find_map(|word| word.parse::<u64>().ok());
    let layers = roles.keys().filter_map(|n| number(n)).max().map_or(0, |n| n + 1);
    for (name, role) in roles {
        role.stage = match number(name) {
            Some(layer) => train.stage_of(layer, layers),
            None if name.contains("embed") => 0,
            None => train.pp - 1,
        };
    }
}

/// What is asked of the values under a node.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Cuts {
    Tp,
    Experts,
}

/// Follows the dimensions that `.shard(dim, tp)`, `.heads` and `.experts` cut, down to sources.
struct Roles<'a> {
    plan: &'a Plan,
    types: &'a [Option<Type>],
    seen: HashSet<(NodeId, usize, Cuts)>,
    roles: Vec<SourceRole>,
}

impl<'a> Roles<'a> {
    fn of(plan: &'a Plan, types: &'a [Option<Type>]) -> Self {
        let roles = vec![SourceRole::default(); plan.sources.len()];
        let mut found = Roles { plan, types, seen: HashSet::new(), roles };
        for node in &plan.nodes {
            match node.op {
                Op::Shard { dim, axis: Axis::Tp | Axis::Etp } => {
                    found.follow(node.inputs[0], dim, Cuts::Tp);
                }
                Op::Heads { .. } => found.follow(node.inputs[0], 0, Cuts::Tp),
                Op::Experts { .. } => found.follow(node.inputs[0], 0, Cuts::Experts),
                _ => {}
            }
        }
        found
    }

    fn follow(&mut self, id: NodeId, dim: usize, cuts: Cuts) {
        if !self.seen.insert((id, dim, cuts)) {
            return;
        }
        let node = self.plan.node(id);
        match &node.op {
            Op::Source(source) => self.found(source.0 as usize, dim, cuts),
            Op::Stack if dim == 0 => {
                if cuts == Cuts::Experts {
                    let of = node.inputs.len() as u64;
                    for (index, input) in node.inputs.iter().enumerate() {
                        self.one(*input, ExpertRole::One { index: index as u64, of });
                    }
                }
            }
            Op::Stack => self.inputs(id, dim - 1, cuts),
            Op::Permute { dims } => self.follow(node.inputs[0], dims[dim], cuts),
            Op::Reshape { .. } => {
                if let Some(dim) = self.before_reshape(node.inputs[0], id, dim) {
                    self.follow(node.inputs[0], dim, cuts);
                }
            }
            _ => self.inputs(id, dim, cuts),
        }
    }

    fn inputs(&mut self, id: NodeId, dim: usize, cuts: Cuts) {
        let plan = self.plan;
        plan.node(id).inputs.iter().for_each(|input| self.follow(*input, dim, cuts));
    }

    /// All sources under one entry of a stack belong to one expert.
    fn one(&mut self, id: NodeId, role: ExpertRole) {
        let node = self.plan.node(id);
        if let Op::Source(source) = node.op {
            let own = &mut self.roles[source.0 as usize].expert;
            if *own == ExpertRole::None {
                *own = role;
            }
        }
        let plan = self.plan;
        plan.node(id).inputs.iter().for_each(|input| self.one(*input, role));
    }

    fn found(&mut self, source: usize, dim: usize, cuts: Cuts) {
        let role = &mut self.roles[source];
        match cuts {
            Cuts::Tp => role.tp_dim = role.tp_dim.or(Some(dim)),
            Cuts::Experts if dim == 0 && role.expert == ExpertRole::None => {
                role.expert = ExpertRole::Dim0;
            }
            Cuts::Experts => {}
        }
    }

    /// The dimension that began at the same element before a reshape.
    fn before_reshape(&self, input: NodeId, id: NodeId, dim: usize) -> Option<usize> {
        let shape = |id: NodeId| Some(&self.types[id.0 as usize].as_ref()?.shape);
        let (old, new) = (shape(input)?, shape(id)?);
        let outer: u64 = new[..dim].iter().product();
        (0..old.len()).find(|d| old[..*d].iter().product::<u64>() == outer)
    }
}
