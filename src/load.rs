//! Opens what a plan needs from disk: its modules, the model's config, the checkpoint.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use crate::compile::ModelInput;
use crate::diag::Diagnostic;
use crate::error::Result;
use crate::io::{Checkpoint, SourceManifest, read_config, read_whole};
use crate::script::{Catalog, CatalogEntry, ModuleFiles};

/// The largest plan or module that is read, in bytes.
const MOST_PLAN: u64 = 16 << 20;

/// Reads a plan file.
///
/// # Errors
/// E0601 with the reason of the operating system; E0101 for text that is not UTF-8.
pub fn read_plan(path: &Path) -> Result<String> {
    let bytes = read_whole(path, MOST_PLAN).map_err(|e| {
        Diagnostic::error("E0601", format!("cannot read the plan {}: {e}", path.display()))
            .hint("the first argument is a plan file, such as plans/quickstart.rhai")
    })?;
    String::from_utf8(bytes).map_err(|_| {
        Diagnostic::error("E0101", format!("{} is not UTF-8 text", path.display())).into()
    })
}

/// The modules of a plan: files below the folder that the plan lies in.
pub struct FolderModules {
    root: PathBuf,
}

impl FolderModules {
    pub fn beside(plan: &Path) -> Self {
        FolderModules { root: folder_of(plan) }
    }
}

impl ModuleFiles for FolderModules {
    fn read(&self, path: &str) -> std::result::Result<Option<(String, String)>, String> {
        let full = self.root.join(path);
        // A link may lead out of the folder, which the path's own check cannot see.
        let Ok(real) = full.canonicalize() else { return Ok(None) };
        let root = self.root.canonicalize().map_err(|e| e.to_string())?;
        if !real.starts_with(&root) {
            return Err("it leads out of the plan's folder".to_owned());
        }
        let bytes = read_whole(&real, MOST_PLAN).map_err(|e| e.to_string())?;
        let text = String::from_utf8(bytes).map_err(|_| "it is not UTF-8 text".to_owned())?;
        Ok(Some((full.display().to_string(), text)))
    }
}

/// The folder of a file; the working folder for a bare name.
pub fn folder_of(file: &Path) -> PathBuf {
    match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// A path that a plan names, seen from the plan's folder, without the `..` in it.
pub fn beside(plan: &Path, path: &str) -> PathBuf {
    let mut out = PathBuf::new();
    for part in folder_of(plan).join(path).components() {
        match part {
            // Above a link `..` would lead elsewhere; plans name paths in their own tree.
            Component::ParentDir
                if matches!(out.components().next_back(), Some(Component::Normal(_))) =>
            {
                out.pop();
            }
            Component::CurDir => {}
            part => out.push(part),
        }
    }
    if out.as_os_str().is_empty() { PathBuf::from(".") } else { out }
}

/// A model as opened from disk.
#[derive(Clone)]
pub struct OpenModel {
    /// The folder or config.json that was named.
    pub path: PathBuf,
    pub config: serde_json::Value,
    /// None where only a config.json was named.
    pub checkpoint: Option<Arc<Checkpoint>>,
}

impl OpenModel {
    /// Opens a model folder (config.json and safetensors) or a bare config.json.
    ///
    /// # Errors
    /// Everything that is wrong with the folder, together.
    pub fn open(path: &Path) -> Result<Self> {
        let (config, _) = read_config(path)?;
        let checkpoint = match path.is_dir() {
            true => Some(Arc::new(Checkpoint::open(path)?)),
            false => None,
        };
        Ok(OpenModel { path: path.to_owned(), config, checkpoint })
    }

    /// The same model without a look at its weights: for a dry run on a folder that has none.
    pub fn open_config(path: &Path) -> Result<Self> {
        let (config, _) = read_config(path)?;
        Ok(OpenModel { path: path.to_owned(), config, checkpoint: None })
    }

    /// What the compiler sees of it. A source manifest, if given, stands in for the files.
    pub fn input(&self, manifest: Option<&SourceManifest>) -> ModelInput {
        let catalog: Option<Box<dyn Catalog>> = match (manifest, &self.checkpoint) {
            (Some(manifest), _) => Some(Box::new(ManifestCatalog(manifest.clone()))),
            (None, Some(c)) => Some(Box::new(CheckpointCatalog(Arc::clone(c)))),
            (None, None) => None,
        };
        ModelInput { config: self.config.clone(), catalog }
    }
}

struct CheckpointCatalog(Arc<Checkpoint>);

impl Catalog for CheckpointCatalog {
    fn find(&self, name: &str) -> Option<CatalogEntry> {
        self.0.get(name).map(|t| CatalogEntry {
            dtype: t.dtype,
            dtype_name: t.dtype_name.clone(),
            shape: t.shape.as_slice().into(),
        })
    }

    fn names(&self) -> Vec<String> {
        self.0.entries().map(|t| t.name.clone()).collect()
    }
}

struct ManifestCatalog(SourceManifest);

impl Catalog for ManifestCatalog {
    fn find(&self, name: &str) -> Option<CatalogEntry> {
        self.0.tensors.iter().find(|t| t.name == name).map(|t| CatalogEntry {
            dtype: Some(t.dtype),
            dtype_name: t.dtype.safetensors_name().to_owned(),
            shape: t.shape.as_slice().into(),
        })
    }

    fn names(&self) -> Vec<String> {
        self.0.tensors.iter().map(|t| t.name.clone()).collect()
    }
}
