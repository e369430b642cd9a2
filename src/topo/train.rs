//! The trainer side's mesh: dp_replicate × fsdp × tp × pp, with ep inside fsdp.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::diag::Diagnostic;

/// The trainer mesh. One rank that holds all by default.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TrainMesh {
    pub dp_replicate: u64,
    pub fsdp: u64,
    pub tp: u64,
    pub ep: u64,
    pub pp: u64,
}

const AXES: [&str; 5] = ["dp_replicate", "fsdp", "tp", "ep", "pp"];

impl TrainMesh {
    /// One rank that holds every source tensor whole.
    pub fn single() -> Self {
        TrainMesh { dp_replicate: 1, fsdp: 1, tp: 1, ep: 1, pp: 1 }
    }

    /// Parses `fsdp=8,ep=4,...`.
    ///
    /// # Errors
    /// E0307 for an unknown or repeated axis, a zero size, and an ep that does not divide fsdp.
    pub fn parse(text: &str) -> Result<Self, Diagnostic> {
        let axes = parse_axes(text, &AXES)?;
        let get = |name: &str| axes.get(name).copied().unwrap_or(1);
        let mesh = TrainMesh {
            dp_replicate: get("dp_replicate"),
            fsdp: get("fsdp"),
            tp: get("tp"),
            ep: get("ep"),
            pp: get("pp"),
        };
        if axes.values().any(|s| *s == 0) {
            return Err(Diagnostic::error("E0307", "a trainer axis has size 0"));
        }
        if !mesh.fsdp.is_multiple_of(mesh.ep) {
            return Err(Diagnostic::error(
                "E0307",
                format!("trainer ep={} does not divide fsdp={}", mesh.ep, mesh.fsdp),
            ));
        }
        Ok(mesh)
    }

    /// Number of trainer ranks.
    pub fn world(&self) -> u64 {
        self.dp_replicate * self.fsdp * self.tp * self.pp
    }
}

impl fmt::Display for TrainMesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let axes = [
            ("dp_replicate", self.dp_replicate),
            ("fsdp", self.fsdp),
            ("tp", self.tp),
            ("ep", self.ep),
            ("pp", self.pp),
        ];
        let text: Vec<String> =
            axes.iter().filter(|a| a.1 > 1).map(|(n, s)| format!("{n}={s}")).collect();
        f.write_str(if text.is_empty() { "one rank" } else { "" })?;
        f.write_str(&text.join(","))
    }
}

/// Splits `a=1,b=2` into named sizes; names are checked against `known`.
pub(super) fn parse_axes(
    text: &str,
    known: &[&str],
) -> Result<BTreeMap<String, u64>, Diagnostic> {
    let bad = |message: String| {
        Diagnostic::error("E0307", message).hint(format!(
            "write axes as NAME=SIZE with commas; names are {}",
            known.join(", ")
        ))
    };
    let mut axes = BTreeMap::new();
    for word in text.split(',').map(str::trim).filter(|w| !w.is_empty()) {
        let Some((name, size)) = word.split_once('=') else {
            return Err(bad(format!("`{word}` is not NAME=SIZE")));
        };
        let (name, size) = (name.trim(), size.trim());
        if !known.contains(&name) {
            return Err(bad(format!("there is no axis `{name}`")));
        }
        let Ok(size) = size.parse::<u64>() else {
            return Err(bad(format!(
                "the size of axis {name} is `{size}`, not a whole number"
            )));
        };
        if axes.insert(name.to_owned(), size).is_some() {
            return Err(bad(format!("axis {name} is given twice")));
        }
    }
    Ok(axes)
}
