//! A given expert map against the experts of the plan.

use std::collections::BTreeSet;

use crate::diag::Diagnostic;
use crate::ir::{NodeId, Op, Place, Plan, Type, infer_all};
use crate::topo::RankId;

use super::front::Late;
use super::lowering::Lowering;

impl Lowering<'_> {
    /// A given expert map must name layers of the plan, and give each slot an expert and each
    /// expert a slot.
    pub(super) fn check_expert_map(&mut self) {
        if self.inputs.experts.is_empty() {
            return;
        }
        let mesh = &self.front.mesh;
        let first = |stage: usize| mesh.coords(RankId(stage as u64 * mesh.tp));
        let types: Vec<Vec<Option<Type>>> = (self.front.stages.iter().enumerate())
            .map(|(stage, plan)| infer_all(plan, &Place::of(mesh, first(stage))).0)
            .collect();
        for (layer, map) in &self.inputs.experts {
            let mut found = false;
            for (stage, (plan, types)) in self.front.stages.iter().zip(&types).enumerate() {
                let prefix = format!("{layer}.");
                for param in plan.params.iter().filter(|p| p.name.starts_with(&prefix)) {
                    for count in expert_counts(plan, types, param.node) {
                        found = true;
                        if let Some(why) = self.bad_map(map, count) {
                            let d = Diagnostic::error(
                                "E0305",
                                format!("the expert map of {layer} does not fit: {why}"),
                            )
                            .at(param.span)
                            .about(&param.name);
                            self.problems.push(Late {
                                stage,
                                event: Some(param.event),
                                diagnostic: d,
                            });
                        }
                    }
                }
            }
            if !found {
                let d = Diagnostic::error(
                    "E0305",
                    format!("the expert map names {layer}, where the plan has no experts"),
                )
                .hint("keys are module paths such as model.layers.3");
                self.problems.push(Late { stage: 0, event: None, diagnostic: d });
            }
        }
    }

    fn bad_map(&self, map: &[u64], experts: u64) -> Option<String> {
        let slots = experts + self.front.mesh.redundant_experts;
        if map.len() as u64 != slots {
            return Some(format!("{} entries for {slots} physical slots", map.len()));
        }
        if let Some(slot) = map.iter().position(|e| *e >= experts) {
            return Some(format!("slot {slot} holds expert {}, of {experts}", map[slot]));
        }
        let held: BTreeSet<u64> = map.iter().copied().collect();
        let lost = (0..experts).find(|e| !held.contains(e))?;
        Some(format!("expert {lost} is in no slot"))
    }
}

/// Sizes of dimension 0 before every `.experts` under a node.
fn expert_counts(plan: &Plan, types: &[Option<Type>], node: NodeId) -> BTreeSet<u64> {
    let mut out = BTreeSet::new();
    let mut queue = vec![node];
    let mut seen = BTreeSet::new();
    while let Some(id) = queue.pop() {
        if !seen.insert(id) {
            continue;
        }
        let n = plan.node(id);
        if matches!(n.op, Op::Experts { .. }) {
            let input = types[n.inputs[0].0 as usize].as_ref();
            out.extend(input.and_then(|t| t.shape.first()));
        }
        queue.extend(&n.inputs);
    }
    out
}
