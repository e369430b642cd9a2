//! Source tensors in memory, and how a case is compiled over them.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use kernelcast::backend::reference::SourceBytes;
use kernelcast::compile::{CompileInputs, Compiled, ModelInput, compile};
use kernelcast::diag::Diagnostic;
use kernelcast::dtype::DType;
use kernelcast::error::{Error, Result};
use kernelcast::io::SourceManifest;
use kernelcast::script::{Catalog, CatalogEntry, Limits, NoModules};
use kernelcast::topo::{InferMesh, TrainMesh};

use crate::cases::{Case, SourceTensor};
use crate::train::Train;

/// Type, shape and bytes of a tensor.
type Tensor = (DType, Vec<u64>, Arc<Vec<u8>>);

/// What the trainer holds.
#[derive(Clone, Default)]
pub struct World {
    pub tensors: BTreeMap<String, Tensor>,
}

/// Whether source values may be NaN and infinite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    Finite,
    Any,
}

impl World {
    pub fn random(tensors: &[SourceTensor], seed: u64, values: Values) -> World {
        let mut state = seed | 1;
        let mut word = || next(&mut state);
        let mut world = World::default();
        for t in tensors {
            let count = t.shape.iter().product::<u64>();
            let mut bytes = Vec::new();
            for _ in 0..count {
                let bits = element(t.dtype, word(), word(), values);
                bytes.extend(&bits.to_le_bytes()[..t.dtype.size() as usize]);
            }
            world.insert(&t.name, t.dtype, &t.shape, bytes);
        }
        world
    }

    /// Random words of a seed.
    pub fn noise(seed: u64, count: usize) -> Vec<u32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        (0..count).map(|_| next(&mut state)).collect()
    }

    pub fn insert(&mut self, name: &str, dtype: DType, shape: &[u64], bytes: Vec<u8>) {
        self.tensors.insert(name.to_owned(), (dtype, shape.to_vec(), Arc::new(bytes)));
    }
}

fn next(state: &mut u64) -> u32 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32
}

/// A weight of ordinary size, or in one of some hundred cases anything at all.
fn element(dtype: DType, a: u32, b: u32, values: Values) -> u32 {
    let anything = b.is_multiple_of(251);
    // Two to the power of -12 to 3, any mantissa and sign.
    let float = (a & 0x807f_ffff) | ((115 + (b >> 8) % 16) << 23);
    let bits = match dtype {
        DType::F32 if anything => a,
        DType::F32 => float,
        DType::Bf16 if anything => a >> 16,
        DType::Bf16 => float >> 16,
        DType::F16 if anything => a >> 16,
        DType::F16 => u32::from(half(float)),
        DType::E4m3 => a >> 24,
        DType::E8m0 if anything => a >> 24,
        DType::E8m0 => 110 + a % 20,
        DType::I32 => a,
        DType::U8 => a >> 24,
    };
    let special = match dtype {
        DType::F32 => bits & 0x7f80_0000 == 0x7f80_0000,
        DType::Bf16 => bits & 0x7f80 == 0x7f80,
        DType::F16 => bits & 0x7c00 == 0x7c00,
        DType::E4m3 => bits & 0x7f == 0x7f,
        DType::E8m0 => bits == 255,
        DType::I32 | DType::U8 => false,
    };
    if special && values == Values::Finite { 0 } else { bits }
}

fn half(float: u32) -> u16 {
    kernelcast::fp8::codec::f32_to_f16(f32::from_bits(float))
}

impl SourceBytes for World {
    fn read(&self, name: &str) -> Result<Arc<Vec<u8>>> {
        match self.tensors.get(name) {
            Some((_, _, bytes)) => Ok(Arc::clone(bytes)),
            None => Err(Diagnostic::error("E0401", format!("no tensor {name}")).into()),
        }
    }
}

impl Catalog for World {
    fn find(&self, name: &str) -> Option<CatalogEntry> {
        self.tensors.get(name).map(|(dtype, shape, _)| CatalogEntry {
            dtype: Some(*dtype),
            dtype_name: dtype.safetensors_name().to_owned(),
            shape: shape.as_slice().into(),
        })
    }

    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }
}

/// Compiles a case over the tensors of a world, for one trainer rank.
pub fn compile_case(
    case: &Case,
    world: &World,
) -> std::result::Result<Compiled, Vec<Diagnostic>> {
    compile_placed(case, world, TrainMesh::single(), None)
}

/// Compiles a case for its own trainer mesh.
pub fn compile_sharded(
    case: &Case,
    world: &World,
) -> std::result::Result<Compiled, Vec<Diagnostic>> {
    let (mesh, placements) = match &case.train {
        Train::Rules(mesh) => {
            let mesh = TrainMesh::parse(mesh).expect("a case has a valid trainer mesh");
            return compile_placed(case, world, mesh, None);
        }
        Train::Manifest { mesh, placements } => (mesh, placements),
    };
    let tensors = case.sources.iter().zip(placements).map(|(s, placements)| {
        kernelcast::io::SourceTensor {
            name: s.name.clone(),
            dtype: s.dtype,
            shape: s.shape.clone(),
            placements: placements.clone(),
            on: BTreeMap::new(),
        }
    });
    let mesh = mesh.iter().enumerate();
    let manifest = SourceManifest {
        schema: 1,
        mesh: mesh.map(|(i, n)| (format!("axis{i}"), *n)).collect(),
        tensors: tensors.collect(),
    };
    compile_placed(case, world, TrainMesh::single(), Some(&manifest))
}

fn compile_placed(
    case: &Case,
    world: &World,
    train: TrainMesh,
    placements: Option<&SourceManifest>,
) -> std::result::Result<Compiled, Vec<Diagnostic>> {
    let config = serde_json::json!({
        "quantization_config": {"weight_block_size": [case.block, case.block]}
    });
    let catalog: Option<Box<dyn Catalog>> = Some(Box::new(world.clone()));
    compile(CompileInputs {
        name: "law.rhai",
        text: &case.text,
        modules: Rc::new(NoModules),
        model: Some(ModelInput { config, catalog }),
        open_model: &|_| Err(Error::refused(Vec::new())),
        mesh: Some(InferMesh::parse(&case.infer).expect("a case has a valid mesh")),
        train,
        placements,
        options: BTreeMap::new(),
        target: BTreeMap::new(),
        experts: case.experts.clone(),
        limits: Limits::default(),
    })
    .map_err(|e| e.error.diagnostics)
}
