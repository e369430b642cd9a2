//! What all ranks agree on before an update: the graphs, in two parts.

use std::borrow::Cow;
use std::time::Instant;

use crate::compile::Compiled;
use crate::diag::Diagnostic;
use crate::error::{Error, Result};
use crate::graph::{Bounds, Graph, Setup, build, check, each_value};
use crate::lower::Program;
use crate::shard::ExpertMap;
use crate::simulate::{Traffic, Values};
use crate::topo::Cluster;

/// What all ranks agree on before the first update: who makes and sends what, in which order.
///
/// What follows the expert map is a graph of its own: a changed map leaves the other as it is.
#[derive(Clone, Debug)]
pub struct Schedule {
    pub fixed: Graph,
    pub mapped: Graph,
    /// The expert map that it is for.
    experts: ExpertMap,
    /// Hash of what does not follow the map; none where there is no map to change.
    rest: Option<u128>,
}

impl Schedule {
    /// Builds and verifies the schedule of a compiled plan for a number of replicas.
    ///
    /// # Errors
    /// E0502, a bug of the compiler.
    pub fn of(compiled: &Compiled, setup: &Setup<'_>) -> Result<Schedule> {
        Schedule::of_program(&compiled.program, &compiled.experts, setup)
    }

    pub(super) fn of_program(
        program: &Program,
        experts: &ExpertMap,
        setup: &Setup<'_>,
    ) -> Result<Schedule> {
        let mapped = program.mapped();
        let fixed = graph_of(program, 0..mapped.start, setup)?;
        let rest = (!mapped.is_empty() || !experts.is_empty()).then(|| program.fixed_digest());
        let mapped = graph_of(program, mapped, setup)?;
        Ok(Schedule { fixed, mapped, experts: experts.clone(), rest })
    }

    /// The schedule of the same plan for another expert map: only the experts' part is new.
    ///
    /// # Errors
    /// E0305 if more than the map has changed.
    pub fn remap(&self, compiled: &Compiled, setup: &Setup<'_>) -> Result<Schedule> {
        let program = &compiled.program;
        let mapped = program.mapped();
        if self.rest.is_none_or(|rest| rest != program.fixed_digest())
            || check(program, 0..mapped.start, &self.fixed).is_err()
        {
            let text = "more than the expert map has changed since the schedule was agreed";
            return Err(Diagnostic::error("E0305", text)
                .hint("agree on a new schedule")
                .into());
        }
        let mapped = graph_of(program, mapped, setup)?;
        let fixed = self.fixed.clone();
        Ok(Schedule { fixed, mapped, experts: compiled.experts.clone(), rest: self.rest })
    }

    /// Refuses a plan that was compiled for another expert map.
    ///
    /// # Errors
    /// E0305 with the first layer that differs.
    pub fn fits(&self, compiled: &Compiled) -> Result<()> {
        let layers = self.experts.keys().chain(compiled.experts.keys());
        let differs = |l: &&String| self.experts.get(*l) != compiled.experts.get(*l);
        match layers.min_by_key(|l| (!differs(l), *l)).filter(differs) {
            Some(layer) => Err(Diagnostic::error(
                "E0305",
                format!("the expert map of {layer} has changed since the schedule was agreed"),
            )
            .hint("remap the schedule on every rank, then update")
            .into()),
            None => Ok(()),
        }
    }

    /// The whole schedule as one graph.
    pub fn joined(&self) -> Cow<'_, Graph> {
        match self.mapped.buckets.is_empty() {
            true => Cow::Borrowed(&self.fixed),
            false => Cow::Owned(self.fixed.then(&self.mapped)),
        }
    }

    /// Its graphs that have something to do: what is captured apart.
    pub fn parts(self) -> Vec<Graph> {
        match self.mapped.buckets.is_empty() {
            true => vec![self.fixed],
            false => vec![self.fixed, self.mapped],
        }
    }

    /// Hash of the whole schedule: equal on all ranks that agree.
    pub fn digest(&self) -> String {
        format!("{:032x}", self.joined().digest)
    }
}

fn graph_of(
    program: &Program,
    units: std::ops::Range<u32>,
    setup: &Setup<'_>,
) -> Result<Graph> {
    let started = Instant::now();
    let graph = build(program, units.clone(), setup).map_err(Error::refused)?;
    tracing::debug!(parts = graph.parts.len(), took = ?started.elapsed(), "schedule built");
    // A part of a graph covers a part of the units.
    if setup.only.is_none() {
        check(program, units, &graph)?;
    }
    Ok(graph)
}

/// What a simulation sees of a compiled plan's schedule: buckets for links of the cluster's kind.
///
/// # Errors
/// As [`Schedule::of`].
pub fn traffic_of(compiled: &Compiled, cluster: &Cluster, staging: u64) -> Result<Traffic> {
    let (program, replicas) = (&compiled.program, compiled.mesh.replicas as u32);
    let setup = Setup::new(replicas, cluster, Bounds::for_links(staging));
    let schedule = Schedule::of(compiled, &setup)?;
    let graph = schedule.joined().into_owned();
    let mut values = Values::default();
    each_value(program, replicas, &mut |bytes, holders, needed_by| {
        values.add(bytes, holders, needed_by);
    });
    Ok(Traffic {
        trainers: graph.trainers,
        ranks: graph.ranks,
        in_flight: graph.in_flight,
        staging_bytes: graph.staging_bytes,
        buckets: graph.buckets.len(),
        amax: graph.amax_bytes(),
        values,
        messages: Box::new(move |bucket| graph.messages(bucket)),
    })
}
