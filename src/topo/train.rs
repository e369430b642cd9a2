//! The trainer side's mesh: pp × dp_replicate × fsdp × tp, with ep inside fsdp, and its rules.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::diag::Diagnostic;

use super::layout::chunk_of;
use super::{Cut, Layout, Placement, stage_layers};

/// The trainer mesh. One rank that holds all by default. Ranks are numbered as torchtitan does:
/// pp outermost, then dp_replicate, fsdp and tp; an fsdp index is (index among the fsdp/ep ranks)
/// × ep + (ep rank).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<String, u64>")]
pub struct TrainMesh {
    pub dp_replicate: u64,
    pub fsdp: u64,
    pub tp: u64,
    pub ep: u64,
    pub pp: u64,
    /// What the fsdp/ep ranks of an expert block cut: 1 the first dimension of each expert, 0 the
    /// block's experts.
    pub expert_fsdp_dim: u64,
}

impl TryFrom<BTreeMap<String, u64>> for TrainMesh {
    type Error = String;

    fn try_from(axes: BTreeMap<String, u64>) -> Result<Self, String> {
        if let Some(name) = axes.keys().find(|n| !AXES.contains(&n.as_str())) {
            return Err(format!("there is no trainer axis `{name}`"));
        }
        TrainMesh::from_axes(&axes).map_err(|d| d.message)
    }
}

/// Which expert a source tensor is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ExpertRole {
    /// It belongs to no expert.
    #[default]
    None,
    /// One expert of several.
    One { index: u64, of: u64 },
    /// All of them, along dimension 0.
    Dim0,
}

/// What the default rules need to know of a source tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SourceRole {
    pub expert: ExpertRole,
    /// The dimension that tensor parallelism cuts.
    pub tp_dim: Option<usize>,
    /// The trainer's pipeline stage.
    pub stage: u64,
    /// True for block scales: held whole by every rank that may hold some of the codes.
    pub scales: bool,
}

const AXES: [&str; 6] = ["dp_replicate", "fsdp", "tp", "ep", "pp", "expert_fsdp_dim"];
/// Most trainer ranks.
pub const MAX_TRAINERS: u64 = 1 << 20;

impl TrainMesh {
    /// One rank that holds every source tensor whole.
    pub fn single() -> Self {
        TrainMesh { dp_replicate: 1, fsdp: 1, tp: 1, ep: 1, pp: 1, expert_fsdp_dim: 1 }
    }

    /// Parses `fsdp=8,ep=4,...`.
    ///
    /// # Errors
    /// E0307 for an unknown or repeated axis, a zero size, and an ep that does not divide fsdp.
    pub fn parse(text: &str) -> Result<Self, Diagnostic> {
        TrainMesh::from_axes(&parse_axes(text, &AXES)?)
    }

    fn from_axes(axes: &BTreeMap<String, u64>) -> Result<Self, Diagnostic> {
        let get = |name: &str| axes.get(name).copied().unwrap_or(1);
        let mesh = TrainMesh {
            dp_replicate: get("dp_replicate"),
            fsdp: get("fsdp"),
            tp: get("tp"),
            ep: get("ep"),
            pp: get("pp"),
            expert_fsdp_dim: get("expert_fsdp_dim"),
        };
        if mesh.expert_fsdp_dim > 1 {
            return Err(Diagnostic::error("E0307", "expert_fsdp_dim is 0 or 1"));
        }
        if axes.iter().any(|(name, size)| *size == 0 && name != "expert_fsdp_dim") {
            return Err(Diagnostic::error("E0307", "a trainer axis has size 0"));
        }
        if !mesh.fsdp.is_multiple_of(mesh.ep) {
            return Err(Diagnostic::error(
                "E0307",
                format!("trainer ep={} does not divide fsdp={}", mesh.ep, mesh.fsdp),
            ));
        }
        let sizes = [mesh.dp_replicate, mesh.fsdp, mesh.tp, mesh.pp];
        let world = sizes.iter().try_fold(1u64, |a, b| a.checked_mul(*b));
        if world.is_none_or(|w| w > MAX_TRAINERS) {
            let text = format!("the trainer mesh has more than {MAX_TRAINERS} ranks");
            return Err(Diagnostic::error("E0307", text));
        }
        Ok(mesh)
    }

    /// Number of trainer ranks.
    pub fn world(&self) -> u64 {
        self.dp_replicate * self.fsdp * self.tp * self.pp
    }

    /// Where a source tensor is by the default rules: a dense one cut on dimension 0 over all of
    /// fsdp; experts in blocks over ep, each cut further by the fsdp/ep ranks that share it; and
    /// over tp on the dimension that the role names.
    pub fn layout(&self, shape: &[u64], role: &SourceRole) -> Layout {
        let (tp, fsdp, ep) = (self.tp, self.fsdp, self.ep);
        let (stage_ranks, outer) = (self.world() / self.pp, fsdp / ep);
        let fsdp_of = move |rank: u32| u64::from(rank) / tp % fsdp;
        let mut cuts = Vec::new();
        let mut add = |size: u64, index: Box<dyn Fn(u32) -> u64>, placement| {
            cuts.push(Cut { size, index, placement });
        };
        let tp_dim = role.tp_dim.filter(|d| *d < shape.len() && tp > 1);
        let over = |dim: usize| match tp_dim == Some(dim) {
            true => Placement::StridedShard { dim: dim as u64, split: tp },
            false => Placement::Shard(dim as u64),
        };
        let among = Box::new(move |rank| fsdp_of(rank) / ep);
        let within = Box::new(move |rank| fsdp_of(rank) % ep);
        match role.expert {
            _ if shape.is_empty() => {}
            // A block scale is wherever some of its expert's codes may be.
            ExpertRole::Dim0 if role.scales => {
                add(ep, within, Placement::Shard(0));
                if self.expert_fsdp_dim == 0 {
                    add(outer, among, Placement::Shard(0));
                }
            }
            _ if role.scales => {}
            ExpertRole::None => add(fsdp, Box::new(fsdp_of), over(0)),
            ExpertRole::One { .. } if self.expert_fsdp_dim == 1 => add(outer, among, over(0)),
            ExpertRole::One { .. } => {}
            ExpertRole::Dim0 => {
                add(ep, within, Placement::Shard(0));
                let dim = (self.expert_fsdp_dim as usize).min(shape.len() - 1);
                add(outer, among, if dim == 0 { Placement::Shard(0) } else { over(dim) });
            }
        }
        if let Some(dim) = tp_dim.filter(|_| !role.scales) {
            let index = Box::new(move |rank| u64::from(rank) % tp);
            cuts.push(Cut { size: tp, index, placement: Placement::Shard(dim as u64) });
        }
        let first = (role.stage.min(self.pp - 1) * stage_ranks) as u32;
        let stage = first..first + stage_ranks as u32;
        Layout::of(shape, &cuts, stage.filter(|rank| self.holds(role.expert, fsdp_of(*rank))))
    }

    /// True if a rank with this index on fsdp holds some of an expert.
    fn holds(&self, expert: ExpertRole, fsdp: u64) -> bool {
        let ExpertRole::One { index, of } = expert else { return true };
        let block = chunk_of(of, self.ep, index);
        let first = block * of.div_ceil(self.ep);
        let members = of.div_ceil(self.ep).min(of - first);
        let outer = self.fsdp / self.ep;
        let own = chunk_of(members, outer, index - first);
        fsdp % self.ep == block && (self.expert_fsdp_dim == 1 || fsdp / self.ep == own)
    }

    /// Pipeline stage of a layer, by the rule of [`stage_layers`].
    pub fn stage_of(&self, layer: u64, layers: u64) -> u64 {
        let holds = |stage: &u64| stage_layers(layers, self.pp, *stage).contains(&layer);
        (0..self.pp).find(holds).unwrap_or(self.pp - 1)
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
        f.write_str(&text.join(","))?;
        f.write_str(if self.expert_fsdp_dim == 0 { ",expert_fsdp_dim=0" } else { "" })
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

#[cfg(test)]
mod tests {
    use super::*;

    fn mesh(text: &str) -> TrainMesh {
        TrainMesh::parse(text).unwrap_or_else(|d| panic!("{text}: {}", d.message))
    }

    /// What each rank holds, as `lo..hi` of each dimension; `-` for nothing.
    fn held(text: &str, shape: &[u64], role: SourceRole) -> Vec<String> {
        let mesh = mesh(text);
        let layout = mesh.layout(shape, &role);
        let show = |r: &Vec<std::ops::Range<u64>>| {
            let all: Vec<String> =
                r.iter().map(|r| format!("{}..{}", r.start, r.end)).collect();
            all.join("+")
        };
        let rank = |rank| match layout.held(rank) {
            Some(h) => h.iter().map(show).collect::<Vec<_>>().join(" "),
            None => "-".to_owned(),
        };
        (0..mesh.world() as u32).map(rank).collect()
    }

    fn one_of(index: u64, of: u64) -> SourceRole {
        SourceRole { expert: ExpertRole::One { index, of }, ..SourceRole::default() }
    }

    #[test]
    fn dense_tensors_are_cut_over_all_of_fsdp() {
        let dense = SourceRole::default();
        assert_eq!(
            held("fsdp=4,ep=2", &[5, 2], dense),
            ["0..2 0..2", "2..4 0..2", "4..5 0..2", "-"]
        );
        assert_eq!(
            held("dp_replicate=2,fsdp=2", &[6], dense),
            ["0..3", "3..6", "0..3", "3..6"]
        );
        assert_eq!(held("fsdp=2,tp=2", &[], dense), ["", "", "", ""]);
        let last = SourceRole { stage: 1, ..dense };
        assert_eq!(held("pp=2,fsdp=2", &[4], last), ["-", "-", "0..2", "2..4"]);
    }

    #[test]
    fn tensor_parallelism_is_inside_fsdp() {
        let on = |dim| SourceRole { tp_dim: Some(dim), ..SourceRole::default() };
        // tp has 0..4 and 4..7; fsdp halves each.
        assert_eq!(held("fsdp=2,tp=2", &[7], on(0)), ["0..2", "4..6", "2..4", "6..7"]);
        assert_eq!(
            held("fsdp=2,tp=2", &[4, 6], on(1)),
            ["0..2 0..3", "0..2 3..6", "2..4 0..3", "2..4 3..6"]
        );
    }

    #[test]
    fn experts_lie_in_blocks_over_ep() {
        // Ten experts over four: 3, 3, 3, 1.
        let ranks = |index| -> Vec<usize> {
            let held = held("fsdp=4,ep=4", &[6, 2], one_of(index, 10));
            (0..4).filter(|r| held[*r] == "0..6 0..2").collect()
        };
        let all: Vec<Vec<usize>> = (0..10).map(ranks).collect();
        assert_eq!(all, [[0], [0], [0], [1], [1], [1], [2], [2], [2], [3]]);
        let dim0 = SourceRole { expert: ExpertRole::Dim0, ..SourceRole::default() };
        assert_eq!(
            held("fsdp=4,ep=4", &[10, 2], dim0),
            ["0..3 0..2", "3..6 0..2", "6..9 0..2", "9..10 0..2"]
        );
    }

    #[test]
    fn the_ranks_of_a_block_cut_each_expert_or_the_block() {
        // fsdp index = index among the fsdp/ep ranks x 2 + ep rank.
        let (rows, block) = ("fsdp=4,ep=2", "fsdp=4,ep=2,expert_fsdp_dim=0");
        assert_eq!(held(rows, &[6], one_of(3, 5)), ["-", "0..3", "-", "3..6"]);
        // Block 0 is experts 0, 1 and 2, of which two go to the first rank.
        assert_eq!(held(block, &[6], one_of(1, 5)), ["0..6", "-", "-", "-"]);
        assert_eq!(held(block, &[6], one_of(2, 5)), ["-", "-", "0..6", "-"]);
        assert_eq!(held(block, &[6], one_of(4, 5)), ["-", "-", "-", "0..6"]);
        let dim0 = SourceRole { expert: ExpertRole::Dim0, ..SourceRole::default() };
        assert_eq!(
            held(rows, &[5, 4], dim0),
            ["0..3 0..2", "3..5 0..2", "0..3 2..4", "3..5 2..4"]
        );
        assert_eq!(
            held(block, &[5, 4], dim0),
            ["0..2 0..4", "3..4 0..4", "2..3 0..4", "4..5 0..4"]
        );
    }

    #[test]
    fn scales_are_whole_where_codes_may_be() {
        let scales = |role| SourceRole { scales: true, tp_dim: Some(0), ..role };
        assert_eq!(
            held("fsdp=2,tp=2", &[3, 1], scales(SourceRole::default())),
            ["0..3 0..1"; 4]
        );
        assert_eq!(
            held("fsdp=4,ep=2", &[3, 1], scales(one_of(3, 5))),
            ["-", "0..3 0..1", "-", "0..3 0..1"]
        );
    }

    #[test]
    fn what_no_trainer_has_is_refused() {
        for text in [
            "expert_fsdp_dim=2",
            "fsdp=6,ep=4",
            "tp=0",
            "fsdp=1048576,pp=2",
            "dp_replicate=4294967296,fsdp=4294967296",
        ] {
            assert_eq!(TrainMesh::parse(text).map_err(|d| d.code), Err("E0307"), "{text}");
        }
        assert_eq!(mesh("fsdp=4,expert_fsdp_dim=0").to_string(), "fsdp=4,expert_fsdp_dim=0");
        assert_eq!(mesh("fsdp=4,expert_fsdp_dim=1").to_string(), "fsdp=4");
    }
}
