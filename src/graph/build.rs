//! Cuts a program's units by owner, packs the parts into buckets and gives each a route.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::sync::Arc;

use crate::diag::Diagnostic;
use crate::ir::Dims;
use crate::lower::{Program, Unit};
use crate::shard::Window;
use crate::topo::{Cluster, Peer, RankId};

use super::cuts::{Cuts, Digest, Owned, OwnedPart, Slices};
use super::fan;
use super::owners::receivers;
use super::routes::{Fan, Router};
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

    pub(super) fn limit(&self) -> u64 {
        (self.staging / self.in_flight).clamp(1, self.bucket)
    }

    /// The bytes of what is cut at most from one unit at once.
    fn slice(&self) -> u64 {
        (self.limit() / 64).max(1)
    }
}

/// What a graph is built for.
#[derive(Clone, Copy, Debug)]
pub struct Setup<'a> {
    pub replicas: u32,
    pub cluster: &'a Cluster,
    /// None for the one that the cost model finds faster.
    pub fan: Option<Fan>,
    pub bounds: Bounds,
    /// One process, of which alone the parts and messages are wanted: the decisions, and so the
    /// digest, are those of all.
    pub only: Option<Peer>,
}

impl<'a> Setup<'a> {
    /// All ranks of some replicas, fed as the cost model finds best.
    pub fn new(replicas: u32, cluster: &'a Cluster, bounds: Bounds) -> Self {
        Setup { replicas, cluster, fan: None, bounds, only: None }
    }

    /// The same for threads of one process, which no NIC slows: every byte leaves the trainer
    /// ranks once.
    pub fn for_threads(replicas: u32, cluster: &'a Cluster, bounds: Bounds) -> Self {
        Setup { fan: Some(Fan::Chain), ..Setup::new(replicas, cluster, bounds) }
    }
}

/// Builds the graph of some units of a program. Deterministic: buckets follow the order of
/// parameters, and of ranks within one.
///
/// # Errors
/// E0308 where operands of one element, or a tile that is quantized twice on different grids,
/// lie on several trainer ranks; E0209 for an update larger than any machine's.
pub fn build(
    program: &Program,
    units: std::ops::Range<u32>,
    setup: &Setup<'_>,
) -> Result<Graph, Vec<Diagnostic>> {
    few_slices(program, units.clone(), setup.bounds)?;
    let mut work = Build::new(program, setup);
    let mut order: Vec<u32> = units.collect();
    // What all ranks hold comes before what each holds alone, so that buckets are alike: a relay
    // of one bucket then takes no longer than the making of another.
    let key = |u: &u32| {
        let unit = &program.units[*u as usize];
        let first = unit.receivers.first();
        (Reverse(unit.receivers.len()), first.map(|r| (r.target, r.place)))
    };
    order.sort_by_key(|u| {
        (key(u), program.units[*u as usize].receivers.first().map(|r| r.rank))
    });
    order.chunk_by(|a, b| key(a) == key(b)).for_each(|units| work.units(units));
    work.finish()
}

/// Most slices of one update, which are all kept in memory.
const MOST_SLICES: u64 = 1 << 24;

/// Refuses sizes that are a slip of the plan before the memory for their slices runs out.
fn few_slices(
    program: &Program,
    units: std::ops::Range<u32>,
    bounds: Bounds,
) -> Result<(), Vec<Diagnostic>> {
    let units = || program.units[units.start as usize..units.end as usize].iter();
    let all = units().fold(0u64, |all, u| all.saturating_add(u.bytes()));
    let (slice, most) = (bounds.slice(), units().max_by_key(|u| u.bytes()));
    match most {
        Some(unit) if all / slice > MOST_SLICES => {
            let why = format!(
                "an update of {all} bytes, in slices of {slice}, has more than {MOST_SLICES}"
            );
            let d = Diagnostic::error("E0209", why).at(unit.span);
            let d = d.label(format!("{} takes {} bytes alone", unit.name, unit.bytes()));
            Err(vec![d.hint("is a size of the plan a slip? Else raise --staging")])
        }
        _ => Ok(()),
    }
}

struct Build<'a> {
    program: &'a Program,
    setup: &'a Setup<'a>,
    router: Router<'a>,
    cuts: Cuts<'a>,
    limit: u64,
    graph: Graph,
    digest: Digest,
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
    fn new(program: &'a Program, setup: &'a Setup<'a>) -> Self {
        let trainers = program.trainers;
        let ranks = program.ranks.len() as u32 * setup.replicas;
        let in_flight = setup.bounds.in_flight;
        let fan = setup.fan.unwrap_or_else(|| {
            fan::choose(program, setup.replicas, setup.cluster, setup.bounds)
        });
        let mut digest = Digest::default();
        format!("{fan:?} {:?}", setup.cluster).hash(&mut digest);
        Build {
            program,
            setup,
            router: Router::new(setup.cluster, trainers, ranks, fan),
            cuts: Cuts::new(program),
            limit: setup.bounds.limit(),
            graph: Graph { trainers, ranks, in_flight, ..Graph::default() },
            digest,
            open: BTreeMap::new(),
            made: vec![0; trainers as usize],
            received: vec![0; ranks as usize],
            sent: vec![0; trainers as usize],
            largest: 0,
            receivers: HashMap::new(),
            problems: Vec::new(),
        }
    }

    /// Packs units of different ranks side by side, so that all ranks are busy in every bucket.
    fn units(&mut self, ids: &[u32]) {
        let cut: Vec<(u32, Slices, Arc<[RankId]>)> =
            ids.iter().filter_map(|id| self.cut(*id)).collect();
        let most = cut.iter().map(|(_, slices, _)| slices.len()).max().unwrap_or(0);
        for i in 0..most {
            for (id, slices, receivers) in &cut {
                let Some(slice) = slices.get(i) else { continue };
                let mut slice = slice.borrow_mut();
                let choice = slice.choose(&self.sent);
                let owned = slice.owned(choice, &self.program.units[*id as usize]);
                self.pack(*id, choice, slice.bytes, &owned, receivers);
            }
        }
    }

    /// The slices of a unit and who needs them.
    fn cut(&mut self, id: u32) -> Option<(u32, Slices, Arc<[RankId]>)> {
        let unit = &self.program.units[id as usize];
        // Constants need no trainer.
        if unit.shape.contains(&0) || unit.is_constant() {
            return None;
        }
        let receivers = self.receivers_of(unit);
        // Small enough to spread what enters a host over its GPUs, and to stay in a cache.
        match self.cuts.of(unit, self.setup.bounds.slice()) {
            Ok((key, slices)) => {
                (id, key, &receivers[..]).hash(&mut self.digest);
                Some((id, slices, receivers))
            }
            Err(problem) => {
                self.problems.push(problem);
                None
            }
        }
    }

    /// Ranks of all replicas that hold a unit, ascending.
    fn receivers_of(&mut self, unit: &Unit) -> Arc<[RankId]> {
        let ranks = unit.ranks();
        if let Some(known) = self.receivers.get(&ranks) {
            return Arc::clone(known);
        }
        let all: Arc<[RankId]> = receivers(self.program, self.setup.replicas, &ranks).into();
        self.receivers.insert(ranks, Arc::clone(&all));
        all
    }

    /// Gives each part of a slice its place in a bucket and its route.
    fn pack(
        &mut self,
        unit: u32,
        choice: usize,
        bytes: u64,
        owned: &Owned,
        receivers: &[RankId],
    ) {
        let room = |used: u64, more: u64| used == 0 || used + more <= self.limit;
        let fits = receivers.iter().all(|r| room(self.received[r.0 as usize], bytes))
            && owned.loads.iter().all(|(t, load)| room(self.made[*t as usize], *load));
        if !fits {
            self.close();
        }
        receivers.iter().for_each(|r| self.received[r.0 as usize] += bytes);
        let heads = self.router.heads(receivers, bytes);
        (choice, self.graph.buckets.len()).hash(&mut self.digest);
        heads.iter().for_each(|(head, _)| head.hash(&mut self.digest));
        let entries = self.router.entries(&heads);
        for (owner, load) in &owned.loads {
            self.made[*owner as usize] += load;
            self.sent[*owner as usize] += load * entries;
        }
        let taken = match self.setup.only {
            Some(Peer::Rank(rank)) => receivers.contains(&rank),
            _ => true,
        };
        let wanted = |owner: u32| match self.setup.only {
            Some(Peer::Trainer(only)) => owner == only,
            _ => taken,
        };
        let mut routes: Vec<Option<u32>> = vec![None; heads.len()];
        for part in owned.parts.iter().filter(|p| wanted(p.owner)) {
            let first = self.router.first(part.owner, &heads);
            let route = *routes[first].get_or_insert_with(|| self.router.route(first, &heads));
            let OwnedPart { window, value_bytes, scale_bytes, .. } = part;
            self.open.entry((part.owner, route)).or_default().push(Part {
                unit,
                window: window.clone(),
                value_bytes: *value_bytes,
                scale_bytes: *scale_bytes,
            });
        }
        for (tiles, owners) in &owned.shared {
            if owners.iter().any(|o| self.setup.only.is_none_or(|p| p == Peer::Trainer(*o))) {
                let start = self.graph.holders.len() as u32;
                self.graph.holders.extend(owners);
                let holders = start..self.graph.holders.len() as u32;
                self.graph.shared.push(SharedTiles { unit, tiles: tiles.clone(), holders });
            }
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
        graph.buckets.push(Bucket { flows: first..graph.flows.len() as u32 });
        let loads = self.made.iter_mut().chain(&mut self.received);
        for load in loads {
            self.largest = self.largest.max(std::mem::take(load));
        }
    }

    fn finish(mut self) -> Result<Graph, Vec<Diagnostic>> {
        if self.received.iter().any(|bytes| *bytes > 0) {
            self.close();
        }
        if !self.problems.is_empty() {
            return Err(self.problems);
        }
        let mut graph = self.graph;
        graph.routes = self.router.routes;
        graph.shared.sort_by_key(|s| s.unit);
        graph.staging_bytes = self.largest * graph.in_flight.min(graph.buckets.len() as u64);
        (graph.trainers, graph.ranks, graph.staging_bytes).hash(&mut self.digest);
        graph.digest = self.digest.0.digest128();
        Ok(graph)
    }
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
