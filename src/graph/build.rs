//! Cuts a program's units by owner, packs the parts into buckets and gives each a route.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::diag::Diagnostic;
use crate::ir::Dims;
use crate::lower::{Program, Unit};
use crate::shard::{Apart, Layouts, Leaf, Share, Window};
use crate::topo::{Cluster, RankId};

use super::owners::{operands_apart, owned, receivers, tiles_are_whole};
use super::routes::{Fan, Router};
use super::shared::{Made, shared_tiles};
use super::{Bucket, Flow, Graph, Part, SharedTiles};

/// How much memory an update may use for staging, and how it is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Cap on all buckets in flight of a rank, in bytes.
    pub staging: u64,
    /// Buckets in flight.
    pub in_flight: u64,
    /// Cap on one bucket, in bytes.
    pub bucket: u64,
}

impl Bounds {
    /// Buckets of at most 16 MiB, four in flight: what CPU threads make from their caches.
    pub fn with_staging(staging: u64) -> Self {
        Bounds { staging, in_flight: 4, bucket: 16 << 20 }
    }

    /// Two buckets of at most 128 MiB in flight: messages that fill a NIC.
    pub fn for_links(staging: u64) -> Self {
        Bounds { staging, in_flight: 2, bucket: 128 << 20 }
    }

    fn limit(&self) -> u64 {
        (self.staging / self.in_flight).clamp(1, self.bucket)
    }
}

/// Builds the graph of some units of a program for a number of replicas. Deterministic: buckets follow the order
/// of parameters, and of ranks within one.
///
/// # Errors
/// E0308 where operands of one element, or a tile that is quantized twice on different grids,
/// lie on several trainer ranks.
pub fn build(
    program: &Program,
    units: std::ops::Range<u32>,
    replicas: u32,
    cluster: &Cluster,
    fan: Fan,
    bounds: Bounds,
) -> Result<Graph, Vec<Diagnostic>> {
    let mut work = Build::new(program, replicas, cluster, fan, bounds);
    let mut order: Vec<u32> = units.collect();
    // What all ranks hold comes before what each holds alone, so that buckets are alike: a relay
    // of one bucket then takes no longer than the making of another.
    order.sort_by_key(|u| {
        let unit = &program.units[*u as usize];
        let first = unit.receivers.first();
        (Reverse(unit.receivers.len()), first.map(|r| (r.target, r.place, r.rank)))
    });
    for unit in order {
        work.unit(unit);
    }
    work.finish()
}

struct Build<'a> {
    program: &'a Program,
    replicas: u32,
    router: Router<'a>,
    limit: u64,
    graph: Graph,
    /// Parts of the open bucket by sender and route.
    open: BTreeMap<(u32, u32), Vec<Part>>,
    /// Bytes of the open bucket that each trainer rank makes and each inference rank receives.
    made: Vec<u64>,
    received: Vec<u64>,
    /// Bytes that each trainer rank sends in all, by which replicas share the work.
    sent: Vec<u64>,
    largest: u64,
    receivers: HashMap<Vec<u32>, Arc<[RankId]>>,
    problems: Vec<Diagnostic>,
}

impl<'a> Build<'a> {
    fn new(
        program: &'a Program,
        replicas: u32,
        cluster: &'a Cluster,
        fan: Fan,
        bounds: Bounds,
    ) -> Self {
        let trainers = program.trainers;
        let ranks = program.ranks.len() as u32 * replicas;
        Build {
            program,
            replicas,
            router: Router::new(cluster, trainers, ranks, fan),
            limit: bounds.limit(),
            graph: Graph { trainers, ranks, in_flight: bounds.in_flight, ..Graph::default() },
            open: BTreeMap::new(),
            made: vec![0; trainers as usize],
            received: vec![0; ranks as usize],
            sent: vec![0; trainers as usize],
            largest: 0,
            receivers: HashMap::new(),
            problems: Vec::new(),
        }
    }

    fn unit(&mut self, id: u32) {
        let unit = &self.program.units[id as usize];
        // Constants need no trainer.
        if unit.shape.contains(&0) || unit.is_constant() {
            return;
        }
        let receivers = self.receivers_of(unit);
        let leaf = unit.expr.leaf();
        if leaf.is_some_and(|l| !l.sole)
            && let Err(problem) = tiles_are_whole(self.program, unit)
        {
            return self.problems.push(problem);
        }
        let (block, phase) = unit.grid();
        let whole = Window::whole(&unit.shape);
        // What enters a host once is spread over its GPUs slice by slice.
        let limit = (self.limit / if receivers.len() > 8 { 64 } else { 8 }).max(1);
        slabs(&whole, unit.dtype.size(), block, phase, limit, &mut |slice| {
            if let Err(problem) = self.slice(id, leaf.as_ref(), &slice, &receivers) {
                self.problems.push(problem);
            }
        });
    }

    /// Ranks of all replicas that hold a unit, ascending.
    fn receivers_of(&mut self, unit: &Unit) -> Arc<[RankId]> {
        let mut ranks: Vec<u32> = unit.receivers.iter().map(|r| r.rank).collect();
        ranks.dedup();
        if let Some(known) = self.receivers.get(&ranks) {
            return Arc::clone(known);
        }
        let all: Arc<[RankId]> = receivers(self.program, self.replicas, &ranks).into();
        self.receivers.insert(ranks, Arc::clone(&all));
        all
    }

    /// Gives each part of a slice its owner, its place in a bucket and its route.
    fn slice(
        &mut self,
        id: u32,
        leaf: Option<&Leaf<'_>>,
        slice: &Window,
        receivers: &[RankId],
    ) -> Result<(), Diagnostic> {
        let program = self.program;
        let unit = &program.units[id as usize];
        let of = |source: u32| &*program.sources[source as usize].layout;
        let layouts = Layouts { of: &of };
        let apart = |a: Apart| operands_apart(unit, &a.0);
        let shares = layouts.shares(&unit.expr, slice).map_err(apart)?;
        let choice = self.replica(unit, &shares);
        let mut parts: Vec<(u32, Window)> = owned(&shares, choice);
        // What one rank makes is one part, however many sources it comes from.
        if parts.iter().all(|p| p.0 == parts[0].0) {
            parts = vec![(parts[0].0, slice.clone())];
        }
        if let Some(leaf) = leaf {
            let region = leaf.region(slice);
            let shares = layouts.input_shares(leaf.made, &region).map_err(apart)?;
            let inputs = owned(&shares, choice);
            self.shared(id, leaf, &parts, inputs);
        }
        self.pack(id, parts, receivers);
        Ok(())
    }

    /// Which of the replicas of a slice's parts sends them: the one whose ranks have sent least.
    fn replica(&self, unit: &Unit, shares: &[Share]) -> usize {
        let held = || shares.iter().filter_map(|s| Some((s, s.holders.as_deref()?)));
        let replicas = held().map(|(_, h)| h.len()).max().unwrap_or(1);
        let load = |choice: &usize| -> u64 {
            let of = |(s, h): (&Share, &[u32])| {
                let (values, scales) = unit.bytes_of(&s.window);
                self.sent[h[choice % h.len()] as usize] + values + scales
            };
            held().map(of).max().unwrap_or(0)
        };
        (0..replicas).min_by_key(load).unwrap_or(0)
    }

    fn shared(
        &mut self,
        id: u32,
        leaf: &Leaf<'_>,
        parts: &[(u32, Window)],
        inputs: Vec<(u32, Window)>,
    ) {
        let mut made: Vec<Made> =
            inputs.into_iter().map(|(owner, window)| Made { window, owner }).collect();
        // Who makes a part needs its tiles' maxima, whether or not it holds all of their rows.
        for (owner, window) in parts {
            let window = leaf.elements(window);
            let known = |m: &Made| m.owner == *owner && m.window.contains(&window);
            if !made.iter().any(known) {
                made.push(Made { window, owner: *owner });
            }
        }
        let graph = &mut self.graph;
        let block = u64::from(leaf.made.recipe.block);
        shared_tiles(&made, &leaf.made.extent, block, &mut |tiles, owners| {
            let start = graph.holders.len() as u32;
            graph.holders.extend(owners);
            let holders = start..graph.holders.len() as u32;
            graph.shared.push(SharedTiles { unit: id, tiles, holders });
        });
    }

    fn pack(&mut self, id: u32, parts: Vec<(u32, Window)>, receivers: &[RankId]) {
        let unit = &self.program.units[id as usize];
        let parts: Vec<(u32, Part)> = parts
            .into_iter()
            .map(|(owner, window)| {
                let (value_bytes, scale_bytes) = unit.bytes_of(&window);
                (owner, Part { unit: id, window, value_bytes, scale_bytes })
            })
            .collect();
        let bytes: u64 = parts.iter().map(|p| p.1.bytes()).sum();
        let room = |used: u64, more: u64| used == 0 || used + more <= self.limit;
        let fits = receivers.iter().all(|r| room(self.received[r.0 as usize], bytes))
            && parts.iter().all(|(t, _)| room(self.made[*t as usize], bytes_of(&parts, *t)));
        if !fits {
            self.close();
        }
        receivers.iter().for_each(|r| self.received[r.0 as usize] += bytes);
        let heads = self.router.heads(receivers, bytes);
        for (owner, part) in parts {
            let route = self.router.route(owner, &heads);
            let entries = self.router.routes[route as usize].entries.len() as u64;
            self.made[owner as usize] += part.bytes();
            self.sent[owner as usize] += part.bytes() * entries;
            self.open.entry((owner, route)).or_default().push(part);
        }
    }

    /// Ends the open bucket.
    fn close(&mut self) {
        let graph = &mut self.graph;
        let first = graph.flows.len() as u32;
        for ((from, route), parts) in std::mem::take(&mut self.open) {
            let start = graph.parts.len() as u32;
            let bytes = parts.iter().map(Part::bytes).sum();
            graph.parts.extend(parts);
            let parts = start..graph.parts.len() as u32;
            graph.flows.push(Flow { from, route, parts, bytes });
        }
        if graph.flows.len() as u32 > first {
            graph.buckets.push(Bucket { flows: first..graph.flows.len() as u32 });
        }
        let loads = self.made.iter_mut().chain(&mut self.received);
        for load in loads {
            self.largest = self.largest.max(std::mem::take(load));
        }
    }

    fn finish(mut self) -> Result<Graph, Vec<Diagnostic>> {
        self.close();
        if !self.problems.is_empty() {
            return Err(self.problems);
        }
        let mut graph = self.graph;
        graph.routes = self.router.routes;
        graph.shared.sort_by_key(|s| s.unit);
        graph.staging_bytes = self.largest * graph.in_flight.min(graph.buckets.len() as u64);
        Ok(graph)
    }
}

fn bytes_of(parts: &[(u32, Part)], owner: u32) -> u64 {
    parts.iter().filter(|p| p.0 == owner).map(|p| p.1.bytes()).sum()
}

/// An index or a length with its last two dimensions counted in tiles, rounded up.
pub(crate) fn tiles(dims: &[u64], block: u64) -> Dims {
    let m = dims.len().saturating_sub(2);
    dims.iter().enumerate().map(|(d, n)| if d >= m { n.div_ceil(block) } else { *n }).collect()
}

/// Cuts a window into contiguous parts of at most `limit` bytes, in order: along the first
/// dimension, and one dimension deeper where one index alone is too large. Rows of tiles (of
/// size `block`, the first of which began `phase` rows before the window's tensor) stay whole.
pub(crate) fn slabs(
    window: &Window,
    size: u64,
    block: Option<u64>,
    phase: u64,
    limit: u64,
    emit: &mut impl FnMut(Window),
) {
    slab(window, 0, size, block.map(|b| (b, phase)), limit, emit);
}

fn slab(
    window: &Window,
    dim: usize,
    size: u64,
    grid: Option<(u64, u64)>,
    limit: u64,
    emit: &mut impl FnMut(Window),
) {
    let dims = window.len.len();
    let bytes = window.len.iter().product::<u64>() * size;
    // Columns of a tile row are not contiguous with their scales: never cut them.
    let last = if grid.is_some() { dims.saturating_sub(1) } else { dims };
    if bytes <= limit || dim >= last {
        return emit(window.clone());
    }
    let (step, phase) = grid.filter(|_| dim + 2 == dims).unwrap_or((1, 0));
    let one = bytes / window.len[dim].max(1);
    let count = (limit / (one * step).max(1)).max(1) * step;
    let end = window.lo[dim] + window.len[dim];
    let mut lo = window.lo[dim];
    while lo < end {
        let next = ((lo + phase) / step * step + count - phase).min(end);
        let mut part = window.clone();
        (part.lo[dim], part.len[dim]) = (lo, next - lo);
        if part.len[dim] <= step && one * part.len[dim] > limit {
            slab(&part, dim + 1, size, grid, limit, emit);
        } else {
            emit(part);
        }
        lo = next;
    }
}
