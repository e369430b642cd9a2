//! The shape table as data: what each rank gets, from what, how large. Schema 1 of dry-run's JSON.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::compile::Compiled;
use crate::ir::Rule;
use crate::lower::{RankProgram, Target, TargetKind};
use crate::topo::{InferMesh, RankId, TrainMesh};

/// Version of the JSON form; keys may be added under the same number.
pub const SCHEMA: u32 = 1;

/// `engine dry-run --format json`.
#[derive(Clone, Debug, Serialize)]
pub struct ShapeTable {
    pub schema: u32,
    pub plan: String,
    pub plan_digest: String,
    pub model: Option<String>,
    pub infer: InferMesh,
    pub train: TrainMesh,
    pub options: BTreeMap<String, String>,
    pub ranks: Vec<RankRow>,
    pub kept: Vec<RuleRow>,
    pub dropped: Vec<RuleRow>,
    pub totals: Totals,
}

/// One inference rank.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RankRow {
    pub rank: u64,
    pub replica: u64,
    pub tp_rank: u64,
    pub dp_rank: u64,
    pub pp_rank: u64,
    pub ep_rank: u64,
    pub params: Vec<ParamRow>,
}

/// One storage of one parameter on one rank.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ParamRow {
    pub name: String,
    pub kind: &'static str,
    pub dtype: &'static str,
    pub shape: Vec<u64>,
    /// In elements; only where the target is not contiguous.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stride: Option<Vec<u64>>,
    pub bytes: u64,
    pub sources: Vec<String>,
    pub recipe: Option<&'static str>,
    pub at: String,
}

/// A keep or drop rule and its place in the plan.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RuleRow {
    pub pattern: String,
    pub at: String,
}

/// Sums over the ranks of the table.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Totals {
    pub params: u64,
    pub bytes: u64,
    /// Bytes of the distinct trainer tensors that are read.
    pub source_bytes: u64,
}

impl ShapeTable {
    /// The table of some ranks of replica 0.
    pub fn of(compiled: &Compiled, ranks: &[RankId]) -> Self {
        let wanted = compiled.program.ranks.iter().filter(|r| ranks.contains(&r.rank));
        let rows: Vec<RankRow> = wanted.map(|r| rank_row(compiled, r)).collect();
        let written = rows.iter().flat_map(|r| &r.params).filter(|p| p.kind != "derived");
        let (params, bytes) =
            written.fold((0, 0), |(count, bytes), p| (count + 1, bytes + p.bytes));
        let config = compiled.model.as_ref().map(|m| &m.config);
        let model = config.and_then(|c| c.get("model_type")?.as_str().map(str::to_owned));
        let first = &compiled.stages[0];
        ShapeTable {
            schema: SCHEMA,
            plan: first.name.clone(),
            plan_digest: compiled.digest.clone(),
            model,
            infer: compiled.mesh.clone(),
            train: compiled.train.clone(),
            options: first.options.clone(),
            kept: rule_rows(compiled, |p| &p.keep),
            dropped: rule_rows(compiled, |p| &p.drop),
            ranks: rows,
            totals: Totals { params, bytes, source_bytes: compiled.program.source_bytes() },
        }
    }
}

fn rule_rows(
    compiled: &Compiled,
    rules: impl Fn(&crate::ir::Plan) -> &Vec<Rule>,
) -> Vec<RuleRow> {
    let mut rows: Vec<RuleRow> = Vec::new();
    for plan in &compiled.stages {
        for rule in rules(plan) {
            let at = plan.files.show(rule.span);
            let row = RuleRow { pattern: rule.pattern.text().to_owned(), at };
            if !rows.contains(&row) {
                rows.push(row);
            }
        }
    }
    rows
}

fn rank_row(compiled: &Compiled, rank: &RankProgram) -> RankRow {
    let c = rank.coords;
    RankRow {
        rank: rank.rank.0,
        replica: c.replica,
        tp_rank: c.tp,
        dp_rank: c.dp,
        pp_rank: c.pp,
        ep_rank: c.ep,
        params: rank.targets.iter().flat_map(|t| param_rows(compiled, rank, t)).collect(),
    }
}

fn param_rows(compiled: &Compiled, rank: &RankProgram, target: &Target) -> Vec<ParamRow> {
    let files = &compiled.stages[rank.coords.pp as usize].files;
    target
        .storages
        .iter()
        .map(|s| ParamRow {
            name: s.name.clone(),
            kind: match target.kind {
                TargetKind::Parameter => "parameter",
                TargetKind::Derived | TargetKind::Alias => "derived",
            },
            dtype: s.dtype.torch_name(),
            shape: s.shape.to_vec(),
            stride: (s.strides != crate::shard::row_major(&s.shape))
                .then(|| s.strides.to_vec()),
            bytes: s.bytes(),
            sources: target.sources.clone(),
            recipe: target.recipe,
            at: files.show(target.span),
        })
        .collect()
}
