//! A plan with everything that a compilation needs, in memory.

use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

use kernelcast::compile::{CompileError, CompileInputs, Compiled, ModelInput, compile};
use kernelcast::diag::Diagnostic;
use kernelcast::dtype::DType;
use kernelcast::error::Result;
use kernelcast::load::FolderModules;
use kernelcast::script::{Catalog, CatalogEntry, Limits};
use kernelcast::shard::ExpertMap;
use kernelcast::topo::{InferMesh, TrainMesh};
use serde_json::Value;

/// Source tensors by name; the form `NAME DTYPE [SIZE, ..]` is that of a test's header.
#[derive(Clone, Debug, Default)]
pub struct Tensors(BTreeMap<String, CatalogEntry>);

impl Tensors {
    /// Adds the tensor of a line such as `a.weight BF16 [256, 256]`.
    pub fn add(&mut self, line: &str) {
        let (name, rest) = line.trim().split_once(' ').expect("NAME DTYPE SHAPE");
        let (dtype, shape) = rest.trim().split_once(' ').expect("DTYPE SHAPE");
        let shape: Vec<u64> = serde_json::from_str(shape).expect("a list of sizes");
        let entry = CatalogEntry {
            dtype: DType::ALL.into_iter().find(|d| d.safetensors_name() == dtype),
            dtype_name: dtype.to_owned(),
            shape: shape.into(),
        };
        self.0.insert(name.to_owned(), entry);
    }
}

impl Catalog for Tensors {
    fn find(&self, name: &str) -> Option<CatalogEntry> {
        self.0.get(name).cloned()
    }

    fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }
}

/// What one compilation is given. Without tensors the model is a bare config.
#[derive(Clone, Debug)]
pub struct Setup {
    pub name: String,
    pub text: String,
    pub config: Option<Value>,
    pub tensors: Option<Tensors>,
    pub infer: Option<String>,
    pub train: Option<String>,
    pub options: BTreeMap<String, String>,
    pub target: BTreeMap<String, String>,
    pub experts: ExpertMap,
    pub operations: u64,
}

impl Setup {
    /// A plan's text for an empty config on one rank.
    pub fn new(name: &str, text: &str) -> Self {
        Setup {
            name: name.to_owned(),
            text: text.to_owned(),
            config: Some(serde_json::json!({})),
            tensors: None,
            infer: None,
            train: None,
            options: BTreeMap::new(),
            target: BTreeMap::new(),
            experts: BTreeMap::new(),
            operations: Limits::default().operations,
        }
    }

    /// Compiles the plan; its modules lie beside the file that it is named after.
    pub fn compile(&self) -> std::result::Result<Compiled, CompileError> {
        let catalog = self.tensors.clone().map(|t| Box::new(t) as Box<dyn Catalog>);
        let model = self.config.clone().map(|config| ModelInput { config, catalog });
        let mesh = match self.infer.as_deref().map(InferMesh::parse).transpose() {
            Ok(mesh) => mesh,
            Err(d) => return Err(early(d)),
        };
        let train = match self.train.as_deref().map(TrainMesh::parse).transpose() {
            Ok(train) => train.unwrap_or_else(TrainMesh::single),
            Err(d) => return Err(early(d)),
        };
        compile(CompileInputs {
            name: &self.name,
            text: &self.text,
            modules: Rc::new(FolderModules::beside(Path::new(&self.name))),
            model,
            open_model: &no_model,
            mesh,
            train,
            placements: None,
            options: self.options.clone(),
            target: self.target.clone(),
            experts: self.experts.clone(),
            limits: Limits { operations: self.operations, ..Limits::default() },
        })
    }
}

fn early(d: Diagnostic) -> CompileError {
    CompileError { error: d.into(), files: Default::default() }
}

fn no_model(path: &str) -> Result<ModelInput> {
    Err(Diagnostic::error("E0417", format!("there is no folder {path}")).into())
}
