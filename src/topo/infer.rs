//! The inference side's axes (tp, dp, ep, pp, replicas, redundant experts) and each rank's place.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::diag::Diagnostic;

/// A mesh axis that a plan can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Axis {
    Tp,
    Dp,
    Ep,
    /// Cuts inside experts: dp × tp when ep is off, else of size 1 (vLLM's flattened MoE tp).
    Etp,
    Pp,
}

impl Axis {
    pub const ALL: [Axis; 5] = [Axis::Tp, Axis::Dp, Axis::Ep, Axis::Etp, Axis::Pp];

    pub const fn name(self) -> &'static str {
        match self {
            Axis::Tp => "tp",
            Axis::Dp => "dp",
            Axis::Ep => "ep",
            Axis::Etp => "etp",
            Axis::Pp => "pp",
        }
    }
}

impl fmt::Display for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A global inference rank: `((replica * dp + dp_rank) * pp + pp_rank) * tp + tp_rank`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct RankId(pub u64);

impl fmt::Display for RankId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Layers of a pipeline stage: L / pp each; the remainder goes one each to the stages from the
/// second-last backwards (vLLM's get_pp_indices: 61 over 2 gives 31 and 30).
pub fn stage_layers(layers: u64, pp: u64, stage: u64) -> std::ops::Range<u64> {
    let (base, rest) = (layers / pp, layers % pp);
    // The last stage holds norm and head and gets no extra layer; nor does the first before all
    // between have theirs.
    let extra = |stage: u64| u64::from(stage + 1 < pp && stage + 1 + rest >= pp);
    let start = (0..stage).map(|s| base + extra(s)).sum();
    start..start + base + extra(stage)
}

/// The inference mesh. Every size is at least 1 and the world fits 64 bits.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<String, u64>")]
pub struct InferMesh {
    pub tp: u64,
    pub dp: u64,
    pub ep: u64,
    pub pp: u64,
    pub redundant_experts: u64,
    /// True if expert load balancing runs: physical slots must then divide over the ranks.
    #[serde(serialize_with = "as_number")]
    pub eplb: bool,
    pub replicas: u64,
}

fn as_number<S: serde::Serializer>(flag: &bool, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_u64(u64::from(*flag))
}

impl TryFrom<BTreeMap<String, u64>> for InferMesh {
    type Error = String;

    fn try_from(axes: BTreeMap<String, u64>) -> Result<Self, String> {
        InferMesh::from_axes(axes).map_err(|d| d.message)
    }
}

/// A rank's index on each axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Coords {
    pub replica: u64,
    pub tp: u64,
    pub dp: u64,
    pub ep: u64,
    pub etp: u64,
    pub pp: u64,
}

impl Coords {
    pub fn index(&self, axis: Axis) -> u64 {
        match axis {
            Axis::Tp => self.tp,
            Axis::Dp => self.dp,
            Axis::Ep => self.ep,
            Axis::Etp => self.etp,
            Axis::Pp => self.pp,
        }
    }
}

const AXES: [&str; 7] = ["tp", "dp", "ep", "pp", "redundant_experts", "eplb", "replicas"];
const MAX_WORLD: u64 = 1 << 20;

impl InferMesh {
    /// One rank that holds everything.
    pub fn single() -> Self {
        InferMesh { tp: 1, dp: 1, ep: 1, pp: 1, redundant_experts: 0, eplb: false, replicas: 1 }
    }

    /// Parses `tp=8,dp=2,ep=16,...`; an axis left out is 1 (redundant_experts 0).
    ///
    /// # Errors
    /// E0307 for an unknown or repeated axis, a size that is not a positive integer, an ep that
    /// is neither 1 nor dp × tp, and redundant experts without eplb.
    pub fn parse(text: &str) -> Result<Self, Diagnostic> {
        InferMesh::from_axes(InferMesh::axes(text)?)
    }

    /// The names and sizes alone: text that is well formed may still be no mesh.
    pub fn axes(text: &str) -> Result<BTreeMap<String, u64>, Diagnostic> {
        super::train::parse_axes(text, &AXES)
    }

    /// Builds a mesh from named sizes, as [`InferMesh::parse`] does.
    pub fn from_axes(axes: BTreeMap<String, u64>) -> Result<Self, Diagnostic> {
        let bad = |message: String| Diagnostic::error("E0307", message);
        if let Some(name) = axes.keys().find(|n| !AXES.contains(&n.as_str())) {
            return Err(bad(format!("there is no inference axis `{name}`"))
                .hint(format!("axes are {}", AXES.join(", "))));
        }
        let get = |name: &str, default: u64| axes.get(name).copied().unwrap_or(default);
        let mesh = InferMesh {
            tp: get("tp", 1),
            dp: get("dp", 1),
            ep: get("ep", 1),
            pp: get("pp", 1),
            redundant_experts: get("redundant_experts", 0),
            eplb: get("eplb", u64::from(get("redundant_experts", 0) > 0)) != 0,
            replicas: get("replicas", 1),
        };
        for (name, size) in [
            ("tp", mesh.tp),
            ("dp", mesh.dp),
            ("ep", mesh.ep),
            ("pp", mesh.pp),
            ("replicas", mesh.replicas),
        ] {
            if size == 0 {
                return Err(bad(format!("the size of axis {name} is 0"))
                    .hint("every axis has at least one rank"));
            }
        }
        if mesh.redundant_experts > MAX_WORLD {
            return Err(bad(format!("more than {MAX_WORLD} redundant experts")));
        }
        if get("eplb", 0) > 1 {
            return Err(bad("eplb is a switch: 0 or 1".to_owned()));
        }
        let world = [mesh.tp, mesh.dp, mesh.pp, mesh.replicas]
            .iter()
            .try_fold(1u64, |a, b| a.checked_mul(*b))
            .filter(|w| *w <= MAX_WORLD);
        if world.is_none() {
            return Err(bad(format!("the inference mesh has more than {MAX_WORLD} ranks")));
        }
        if mesh.ep != 1 && mesh.ep != mesh.dp * mesh.tp {
            return Err(bad(format!(
                "ep={} is neither 1 nor dp*tp={}",
                mesh.ep,
                mesh.dp * mesh.tp
            ))
            .note("vLLM spreads experts over all ranks of dp × tp, or over none"));
        }
        if mesh.redundant_experts > 0 && !mesh.eplb {
            return Err(bad("redundant experts need eplb=1".to_owned()));
        }
        if mesh.eplb && mesh.ep == 1 {
            return Err(
                bad("eplb needs expert parallelism over more than one rank".to_owned())
                    .hint("give ep = dp * tp"),
            );
        }
        Ok(mesh)
    }

    /// Number of ranks of one replica.
    pub fn replica_world(&self) -> u64 {
        self.tp * self.dp * self.pp
    }

    /// Size of an axis.
    pub fn size(&self, axis: Axis) -> u64 {
        match axis {
            Axis::Tp => self.tp,
            Axis::Dp => self.dp,
            Axis::Ep => self.ep,
            Axis::Etp if self.ep == 1 => self.dp * self.tp,
            Axis::Etp => 1,
            Axis::Pp => self.pp,
        }
    }

    /// A rank's index on each axis.
    pub fn coords(&self, rank: RankId) -> Coords {
        let tp = rank.0 % self.tp;
        let pp = rank.0 / self.tp % self.pp;
        let dp = rank.0 / (self.tp * self.pp) % self.dp;
        let flat = dp * self.tp + tp;
        Coords {
            replica: rank.0 / self.replica_world(),
            tp,
            dp,
            ep: if self.ep == 1 { 0 } else { flat },
            etp: if self.ep == 1 { flat } else { 0 },
            pp,
        }
    }

    /// The ranks of replica 0 in order.
    pub fn ranks(&self) -> impl Iterator<Item = RankId> + use<> {
        (0..self.replica_world()).map(RankId)
    }

    /// vLLM's default for sequence-parallel MoE: expert parallel with both tp and dp in use.
    pub fn sequence_parallel_moe(&self) -> bool {
        self.ep > 1 && self.tp > 1 && self.dp > 1
    }
}

impl fmt::Display for InferMesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut axes = vec![format!("tp={}", self.tp)];
        for (name, size) in [("dp", self.dp), ("ep", self.ep), ("pp", self.pp)] {
            if size > 1 {
                axes.push(format!("{name}={size}"));
            }
        }
        if self.eplb {
            axes.push(format!("redundant_experts={},eplb=1", self.redundant_experts));
        }
        if self.replicas > 1 {
            axes.push(format!("replicas={}", self.replicas));
        }
        f.write_str(&axes.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_follow_the_launch_order_of_vllm() {
        let mesh = InferMesh::parse("tp=2,dp=2,ep=4").unwrap();
        let c = mesh.coords(RankId(3));
        assert_eq!((c.tp, c.dp, c.ep, c.etp), (1, 1, 3, 0));
        let mesh = InferMesh::parse("tp=2,dp=2").unwrap();
        assert_eq!(mesh.size(Axis::Etp), 4);
        assert_eq!(mesh.coords(RankId(2)).etp, 2);
        let mesh = InferMesh::parse("tp=2,pp=2,replicas=3").unwrap();
        let c = mesh.coords(RankId(4 + 3));
        assert_eq!((c.replica, c.pp, c.tp), (1, 1, 1));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "tp=0",
            "xp=2",
            "tp=2,tp=4",
            "tp",
            "tp=2,ep=4",
            "tp=-1",
            "redundant_experts=2,eplb=0",
            "tp=2,redundant_experts=2",
        ] {
            assert_eq!(InferMesh::parse(text).unwrap_err().code, "E0307", "{text}");
        }
        assert!(InferMesh::parse("tp=4000000000,dp=4000000000,ep=1").is_err());
    }
}
