//! `engine simulate`: time and traffic of an update on a cluster, from shapes alone.

mod table;
mod timeline;

use crate::compile::Compiled;
use crate::diag::Diagnostic;
use crate::error::Error;
use crate::exec::traffic_of;
use crate::io::read_cluster;
use crate::simulate::simulate;
use crate::topo::Cluster;

use super::args::{ReportFormat, SimulateArgs};
use super::inputs::{self, Weights};
use super::{Failure, print, report};
use table::render;
use timeline::Timeline;

pub(super) fn run(args: &SimulateArgs) -> Result<(), Failure> {
    let cluster = match &args.cluster {
        Some(path) => read_cluster(path)?,
        None => Cluster::default(),
    };
    let loaded = inputs::load(&args.inputs, Weights::Optional)?;
    let compiled = &loaded.compiled;
    let json = args.format == ReportFormat::Json;
    report(&compiled.notes, compiled.files(), json);
    let fail = |error: Error| Failure { error, files: compiled.files().clone() };
    let traffic = traffic_of(compiled, &cluster, args.staging).map_err(fail)?;
    let mut timeline = args.timeline.as_ref().map(|_| Timeline::new(&traffic));
    let found = simulate(&traffic, &cluster, &mut |transfer| {
        timeline.iter_mut().for_each(|t| t.add(&transfer));
    });
    let title = title(compiled);
    if let (Some(path), Some(timeline)) = (&args.timeline, &timeline) {
        std::fs::write(path, timeline.html(&title, &found)).map_err(|e| {
            Diagnostic::error("E0601", format!("cannot write {}: {e}", path.display()))
        })?;
    }
    print(&match json {
        true => serde_json::to_string(&found).unwrap_or_default() + "\n",
        false => render(&title, &found),
    })
}

/// Plan and both meshes.
fn title(compiled: &Compiled) -> String {
    let plan = compiled.files().files().next().map_or("", |(name, _)| name);
    let name: String = plan.chars().filter(|c| !c.is_control()).collect();
    format!("{name} · trainer {} · inference {}", compiled.train, compiled.mesh)
}
