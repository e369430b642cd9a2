//! A plan with random source tensors, cut over a trainer's ranks, updated and compared.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use kernelcast::backend::cpu::{FiniteCheck, Options, Report};
use kernelcast::backend::reference::{Oracle, SourceBytes};
use kernelcast::compile::{CompileInputs, Compiled, ModelInput, compile};
use kernelcast::diag::Diagnostic;
use kernelcast::dtype::DType;
use kernelcast::error::{Error, Result};
use kernelcast::fp8::codec::{f32_to_bf16, f32_to_f16};
use kernelcast::io::SourceManifest;
use kernelcast::ir::Place;
use kernelcast::lower::{Part, TargetKind};
use kernelcast::memory::{Sources, Targets, update};
use kernelcast::script::{Catalog, CatalogEntry, Limits, NoModules};
use kernelcast::topo::{InferMesh, RankId, TrainMesh};

/// Type, shape and bytes.
type Tensor = (DType, Vec<u64>, Arc<Vec<u8>>);
/// What a trainer rank holds: name, type, local shape, bytes.
pub type Local = (String, DType, Vec<u64>, Vec<u8>);
/// What each inference rank holds, by name; what an update leaves unwritten stays 0xa5.
pub type Memory = BTreeMap<(u64, String), Vec<u8>>;

/// Source tensors by name.
#[derive(Clone, Default)]
pub struct World(pub BTreeMap<String, Tensor>);

impl SourceBytes for World {
    fn read(&self, name: &str) -> Result<Arc<Vec<u8>>> {
        let found = self.0.get(name).map(|t| Arc::clone(&t.2));
        found.ok_or_else(|| Diagnostic::error("E0401", format!("no tensor {name}")).into())
    }
}

impl Catalog for World {
    fn find(&self, name: &str) -> Option<CatalogEntry> {
        self.0.get(name).map(|(dtype, shape, _)| CatalogEntry {
            dtype: Some(*dtype),
            dtype_name: dtype.safetensors_name().to_owned(),
            shape: shape.as_slice().into(),
        })
    }

    fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }
}

/// One update: a plan, both sides' meshes, and the sources.
#[derive(Clone)]
pub struct Case {
    pub text: String,
    pub infer: String,
    pub train: String,
    /// Mesh sizes, and for each tensor its placements; the rules for `train` without one.
    pub manifest: Option<SourceManifest>,
    pub world: World,
    pub staging: u64,
    seed: u64,
}

impl Case {
    /// A plan over no tensors yet; `b` is the root module.
    pub fn new(text: &str, train: &str, infer: &str) -> Case {
        Case {
            text: format!("let b = at(\"\");\n{text}"),
            infer: infer.to_owned(),
            train: train.to_owned(),
            manifest: None,
            world: World::default(),
            staging: 1 << 20,
            seed: 1,
        }
    }

    /// Adds a tensor of random finite values of ordinary size.
    pub fn with(mut self, name: &str, dtype: DType, shape: &[u64]) -> Case {
        let count = shape.iter().product::<u64>();
        let mut bytes = Vec::new();
        for _ in 0..count {
            self.seed ^= self.seed << 13;
            self.seed ^= self.seed >> 7;
            self.seed ^= self.seed << 17;
            let word = (self.seed.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32;
            let float = (word & 0x807f_ffff) | ((118 + word % 11) << 23);
            let value = f32::from_bits(float);
            match dtype {
                DType::F32 => bytes.extend(float.to_le_bytes()),
                DType::Bf16 => bytes.extend(f32_to_bf16(value).to_le_bytes()),
                DType::F16 => bytes.extend(f32_to_f16(value).to_le_bytes()),
                DType::E4m3 => bytes.push((word >> 24) as u8 & 0xf7),
                _ => bytes.push((120 + word % 10) as u8),
            }
        }
        self.world.0.insert(name.to_owned(), (dtype, shape.to_vec(), Arc::new(bytes)));
        self
    }

    /// Places the tensors as a manifest says: `R`, `S(0)`, `SS(0,2)`, one an axis.
    pub fn placed(mut self, mesh: &[(&str, u64)], placements: &[(&str, &str)]) -> Case {
        let tensors = placements.iter().map(|(name, text)| {
            let (dtype, shape, _) = &self.world.0[*name];
            let one = |p: &str| p.to_owned().try_into().expect("a placement");
            kernelcast::io::SourceTensor {
                name: (*name).to_owned(),
                dtype: *dtype,
                shape: shape.clone(),
                placements: text.split(' ').map(one).collect(),
                on: BTreeMap::new(),
            }
        });
        let tensors = tensors.collect();
        let mesh = mesh.iter().map(|(name, n)| ((*name).to_owned(), *n)).collect();
        self.manifest = Some(SourceManifest { schema: 1, mesh, tensors });
        self
    }

    /// Overwrites an element.
    pub fn set(&mut self, name: &str, at: &[u64], element: &[u8]) {
        let (_, shape, bytes) = self.world.0.get_mut(name).expect("a tensor of the case");
        let flat = at.iter().zip(shape.iter()).fold(0, |n, (i, size)| n * size + i) as usize;
        Arc::make_mut(bytes)[flat * element.len()..][..element.len()].copy_from_slice(element);
    }

    pub fn compile(&self) -> std::result::Result<Compiled, Vec<Diagnostic>> {
        let train = TrainMesh::parse(&self.train).expect("a trainer mesh");
        self.compile_for(train, self.manifest.as_ref())
    }

    fn compile_for(
        &self,
        train: TrainMesh,
        placements: Option<&SourceManifest>,
    ) -> std::result::Result<Compiled, Vec<Diagnostic>> {
        let config = serde_json::json!({
            "quantization_config": {"weight_block_size": [128, 128]}
        });
        let catalog: Option<Box<dyn Catalog>> = Some(Box::new(self.world.clone()));
        compile(CompileInputs {
            name: "sharded.rhai",
            text: &self.text,
            modules: Rc::new(NoModules),
            model: Some(ModelInput { config, catalog }),
            open_model: &|_| Err(Error::refused(Vec::new())),
            mesh: Some(InferMesh::parse(&self.infer).expect("an inference mesh")),
            train,
            placements,
            options: BTreeMap::new(),
            target: BTreeMap::new(),
            experts: BTreeMap::new(),
            limits: Limits::default(),
        })
        .map_err(|e| e.error.diagnostics)
    }

    /// The codes of a plan that is refused.
    pub fn refused(&self) -> Vec<&'static str> {
        self.compile().err().unwrap_or_default().iter().map(|d| d.code).collect()
    }

    pub fn run(&self, compiled: &Compiled, finite: FiniteCheck) -> Result<(Memory, Report)> {
        let local: Vec<Vec<Local>> =
            (0..compiled.program.trainers).map(|t| shards(compiled, &self.world, t)).collect();
        let trainers = local.iter().map(|tensors| {
            let mut sources = Sources::default();
            for (name, dtype, shape, bytes) in tensors {
                sources.add(name, *dtype, shape, bytes).expect("shards fit");
            }
            sources
        });
        let trainers: Vec<Sources<'_>> = trainers.collect();
        let mut memory = room(compiled);
        let mut targets = Targets::default();
        for ((rank, name), bytes) in &mut memory {
            targets.bind(RankId(*rank), name, bytes);
        }
        let timeout = Duration::from_secs(20);
        let options = Options { finite, timeout, progress: &|_| {} };
        let report = update(compiled, &trainers, &mut targets, self.staging, &options)?;
        drop(targets);
        Ok((memory, report))
    }

    /// What one trainer rank that holds all would write.
    pub fn unsharded(&self, finite: FiniteCheck) -> (Memory, Report) {
        let compiled = self.compile_for(TrainMesh::single(), None).expect("the plan is right");
        self.run(&compiled, finite).expect("it runs")
    }

    /// Updates, and compares with the oracle and with the unsharded update; every rank receives
    /// the distinct bytes that it holds and no others.
    pub fn check(&self) -> Report {
        let compiled = self.compile().unwrap_or_else(|e| panic!("{e:#?}"));
        let (memory, report) = self.run(&compiled, FiniteCheck::During).expect("it runs");
        same(&memory, &self.unsharded(FiniteCheck::During).0, "the unsharded update");
        same(&memory, &self.oracle(&compiled), "the oracle");
        check_received(&compiled, &report);
        report
    }

    fn oracle(&self, compiled: &Compiled) -> Memory {
        let mut out = Memory::new();
        let (experts, world) = (BTreeMap::new(), compiled.program.ranks.len() as u64);
        for rank in &compiled.program.ranks {
            let plan = &compiled.stages[rank.coords.pp as usize];
            let place = Place::of(&compiled.mesh, rank.coords);
            let oracle = Oracle::new(plan, place, &experts, &self.world).expect("it compiled");
            for (param, target) in plan.params.iter().zip(&rank.targets) {
                let stored = oracle.param(param).expect("every source is there");
                for s in &target.storages {
                    let bytes = match s.part {
                        Part::Values => stored.values.clone(),
                        Part::Scales => stored.scales.clone().expect("it is quantized"),
                    };
                    for replica in 0..compiled.mesh.replicas {
                        let key = (replica * world + rank.rank.0, s.name.clone());
                        out.insert(key, bytes.clone());
                    }
                }
            }
        }
        out
    }
}

/// Memory for the parameters of all ranks of all replicas.
fn room(compiled: &Compiled) -> Memory {
    let world = compiled.program.ranks.len() as u64;
    let mut memory = Memory::new();
    for replica in 0..compiled.mesh.replicas {
        for rank in &compiled.program.ranks {
            let targets = rank.targets.iter().filter(|t| t.kind != TargetKind::Alias);
            for s in targets.flat_map(|t| &t.storages) {
                let key = (replica * world + rank.rank.0, s.name.clone());
                memory.insert(key, vec![0xa5; s.bytes() as usize]);
            }
        }
    }
    memory
}

/// What a trainer rank holds, cut out row by row.
pub fn shards(compiled: &Compiled, world: &World, trainer: u32) -> Vec<Local> {
    let mut out = Vec::new();
    for source in &compiled.program.sources {
        let (dtype, shape, bytes) = &world.0[&source.name];
        let Some(held) = source.layout.held(trainer) else { continue };
        let size = dtype.size() as usize;
        let mut runs = vec![(0u64, 1u64)];
        for (ranges, n) in held.iter().zip(shape) {
            let parts = |(at, _): &(u64, u64)| {
                ranges.iter().map(|r| (at * n + r.start, r.end - r.start)).collect::<Vec<_>>()
            };
            let single = |(at, len): (u64, u64)| (at..at + len).map(|i| (i, 1));
            runs = runs.iter().flat_map(|r| single(*r)).flat_map(|r| parts(&r)).collect();
        }
        let run = |(at, n): &(u64, u64)| &bytes[*at as usize * size..][..*n as usize * size];
        let local = held.iter().map(|r| r.iter().map(|r| r.end - r.start).sum()).collect();
        let cut = runs.iter().flat_map(run).copied().collect();
        out.push((source.name.clone(), *dtype, local, cut));
    }
    out
}

/// Says where memories differ, not what they all are.
pub fn same(found: &Memory, expected: &Memory, what: &str) {
    assert!(found.keys().eq(expected.keys()), "names of {what}");
    for ((rank, name), bytes) in found {
        let wanted = &expected[&(*rank, name.clone())];
        assert_eq!(bytes.len(), wanted.len(), "length of {name} on rank {rank}");
        let differ = (0..bytes.len()).filter(|i| bytes[*i] != wanted[*i]);
        let (first, count) = (differ.clone().next(), differ.count());
        assert_eq!((first, count), (None, 0), "{name} on rank {rank} is not that of {what}");
    }
}

fn check_received(compiled: &Compiled, report: &Report) {
    let program = &compiled.program;
    for (rank, received) in report.received_bytes.iter().enumerate() {
        let rank = rank % program.ranks.len();
        let places = program.ranks[rank].targets.iter().flat_map(|t| &t.places);
        let units: BTreeSet<u32> = places.map(|p| p.unit).collect();
        let units = units.iter().map(|u| &program.units[*u as usize]);
        let wanted: u64 = units.filter(|u| !u.is_constant()).map(|u| u.bytes()).sum();
        assert_eq!(*received, wanted, "bytes of rank {rank}");
    }
    let all: u64 = program.units.iter().filter(|u| !u.is_constant()).map(|u| u.bytes()).sum();
    assert_eq!((report.sent_bytes, report.made_bytes), (all, all), "bytes of the trainers");
    let received: u64 = report.received_bytes.iter().sum();
    assert_eq!(report.sent_bytes + report.relayed_bytes, received);
}
