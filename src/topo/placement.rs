//! What one mesh axis does to a tensor, as PyTorch's DTensor has it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What one mesh axis does to a tensor; written `R`, `S(dim)`, `SS(dim,split)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Placement {
    Replicate,
    Shard(u64),
    /// A shard of what an axis further in has cut into `split` parts before.
    StridedShard {
        dim: u64,
        split: u64,
    },
}

impl Placement {
    /// The dimension that is cut.
    pub fn dim(self) -> Option<u64> {
        match self {
            Placement::Replicate => None,
            Placement::Shard(dim) | Placement::StridedShard { dim, .. } => Some(dim),
        }
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Placement::Replicate => f.write_str("R"),
            Placement::Shard(dim) => write!(f, "S({dim})"),
            Placement::StridedShard { dim, split } => write!(f, "SS({dim},{split})"),
        }
    }
}

impl From<Placement> for String {
    fn from(placement: Placement) -> String {
        placement.to_string()
    }
}

impl TryFrom<String> for Placement {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Placement, String> {
        let body = text.trim();
        let args = |head: &str| -> Option<Vec<u64>> {
            let inner = body.strip_prefix(head)?.strip_prefix('(')?.strip_suffix(')')?;
            inner.split(',').map(|n| n.trim().parse().ok()).collect()
        };
        match (body, args("S").as_deref(), args("SS").as_deref()) {
            ("R", ..) => Ok(Placement::Replicate),
            (_, Some(&[dim]), _) => Ok(Placement::Shard(dim)),
            (_, _, Some(&[dim, split])) if split > 0 => {
                Ok(Placement::StridedShard { dim, split })
            }
            _ => Err(format!("{text:?} is no placement: expected R, S(dim) or SS(dim,split)")),
        }
    }
}
