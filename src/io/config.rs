//! The model's config.json, and JSON inputs in general.
//! Knows nothing of what a key means.

use std::fs;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::json;
use crate::diag::Diagnostic;
use crate::error::Result;

/// Reads `config.json` of a model folder, or the file itself; also gives the file's path.
pub fn read_config(path: &Path) -> Result<(Value, PathBuf)> {
    let file = if path.is_dir() { path.join("config.json") } else { path.to_path_buf() };
    if fs::metadata(&file).is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound) {
        let text = format!("there is no {}", file.display());
        let hint = "give the model's folder, or the path of its config.json";
        return Err(Diagnostic::error("E0417", text).hint(hint).into());
    }
    if file.extension().is_some_and(|e| e == "safetensors") {
        let text = format!("{} is a weights file, not a model config", file.display());
        let hint = "give the folder that holds it and config.json";
        return Err(Diagnostic::error("E0417", text).hint(hint).into());
    }
    let value: Value = json::read(&file, "model config", "E0417")?;
    if !value.is_object() {
        let text = format!("model config {} is not a JSON object", file.display());
        return Err(Diagnostic::error("E0417", text).into());
    }
    Ok((value, file))
}

/// Reads a JSON input of another kind; `what` names it in messages ("expert map").
pub fn read_json<T: DeserializeOwned>(path: &Path, what: &str) -> Result<T> {
    Ok(json::read(path, what, "E0419")?)
}
