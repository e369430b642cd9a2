//! Evaluates a plan for every pipeline stage, starting anew where it declares what was missing.

use std::rc::Rc;

use crate::diag::{Diagnostic, SourceMap};
use crate::error::Error;
use crate::ir::Plan;
use crate::lower::Unit;
use crate::script::{Declared, Outcome, Request, evaluate, explain_late};
use crate::topo::{InferMesh, RankId};

use super::coverage::empty_drops;
use super::{CompileInputs, ModelInput};

pub(super) enum FrontError {
    Early(Error),
    Plan(Vec<Diagnostic>, SourceMap),
}

/// What evaluation gives, for all stages.
pub(super) struct Front {
    pub(super) stages: Vec<Plan>,
    pub(super) mesh: InferMesh,
    pub(super) declared: Declared,
    pub(super) opened: Option<ModelInput>,
}

impl Front {
    pub(super) fn run(inputs: &CompileInputs<'_>) -> std::result::Result<Front, FrontError> {
        let mut front = Front {
            stages: Vec::new(),
            mesh: inputs.mesh.clone().unwrap_or_else(InferMesh::single),
            declared: Declared::default(),
            opened: None,
        };
        let mut mesh_open = inputs.mesh.is_none();
        let mut restarts = 0;
        while (front.stages.len() as u64) < front.mesh.pp {
            let stage = front.stages.len() as u64;
            let outcome = evaluate(&front.request(inputs, stage, mesh_open));
            match outcome {
                Outcome::Restart(declared) => {
                    restarts += 1;
                    if restarts > 4 {
                        let d = Diagnostic::error(
                            "E0307",
                            "the plan declares another input or topology each time it is read",
                        );
                        return Err(FrontError::Early(d.into()));
                    }
                    if let Some(mesh) = declared.infer.filter(|_| mesh_open) {
                        front.mesh = mesh;
                        mesh_open = false;
                    }
                    let missing = inputs.model.is_none() && front.opened.is_none();
                    if let Some(path) = declared.input.filter(|_| missing) {
                        let opened = (inputs.open_model)(&path).map_err(FrontError::Early)?;
                        front.opened = Some(opened);
                    }
                    front.stages.clear();
                }
                Outcome::Done { plan, declared, mut problems, complete } => {
                    if problems.iter().any(Diagnostic::is_error) {
                        let model = front.opened.as_ref().or(inputs.model.as_ref());
                        if let Some(c) = model.and_then(|m| m.catalog.as_deref())
                            && complete
                        {
                            problems.extend(empty_drops(std::slice::from_ref(&*plan), c));
                        }
                        return Err(FrontError::Plan(problems, plan.files));
                    }
                    front.declared = declared;
                    front.stages.push(*plan);
                }
            }
        }
        Ok(front)
    }

    fn request<'a>(
        &'a self,
        inputs: &'a CompileInputs<'_>,
        stage: u64,
        mesh_open: bool,
    ) -> Request<'a> {
        let model = self.opened.as_ref().or(inputs.model.as_ref());
        Request {
            name: inputs.name,
            text: inputs.text,
            modules: Rc::clone(&inputs.modules),
            model: model.map(|m| &m.config),
            mesh: &self.mesh,
            mesh_open,
            at: self.mesh.coords(RankId(stage * self.mesh.tp)),
            options: &inputs.options,
            target: &inputs.target,
            catalog: model.and_then(|m| m.catalog.as_deref()),
            limits: inputs.limits.clone(),
        }
    }

    /// A problem of a unit, at the parameter that it was first needed for.
    pub(super) fn late(&self, unit: &Unit, diagnostic: Diagnostic) -> Late {
        let stage = unit.receivers.first().map_or(0, |r| u64::from(r.rank) / self.mesh.tp);
        let stage = (stage % self.mesh.pp) as usize;
        let params = self.stages[stage].params.iter();
        let event = params.filter(|p| p.name == unit.name).map(|p| p.event).next();
        Late { stage, event, diagnostic }
    }

    /// Adds call chains to what was found after evaluation, stage by stage.
    pub(super) fn explain(
        &self,
        inputs: &CompileInputs<'_>,
        late: Vec<Late>,
    ) -> Vec<Diagnostic> {
        let mut out = Vec::new();
        for stage in 0..self.stages.len() {
            let mine: Vec<(Diagnostic, Option<u32>)> = late
                .iter()
                .filter(|l| l.stage == stage)
                .map(|l| (l.diagnostic.clone(), l.event))
                .collect();
            if !mine.is_empty() {
                out.extend(explain_late(&self.request(inputs, stage as u64, false), mine));
            }
        }
        out
    }
}

/// A problem found after evaluation, with the event of the script that it belongs to.
pub(super) struct Late {
    pub(super) stage: usize,
    /// None where no single call is to blame.
    pub(super) event: Option<u32>,
    pub(super) diagnostic: Diagnostic,
}
