//! A trainer rank: agrees on maxima, then makes and sends its parts, bucket by bucket.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crossbeam_channel::{Receiver, Sender, bounded};
use rayon::prelude::*;

use crate::diag::Diagnostic;
use crate::graph::{Part, SharedTiles, slabs};
use crate::lower::Unit;
use crate::shard::Window;
use crate::topo::{Peer, RankId};

use super::partial::{Agreed, Partial, maxima};
use super::rank::{Load, Message};
use super::run::{Failure, Shared, wait};
use super::{Rows, eval};

type Fallible<T> = Result<T, Failure>;

/// Bytes of a slab that keep its input and output in a core's cache.
const SLAB: u64 = 256 << 10;

/// Ways to all other ranks.
pub(super) struct Wires {
    pub ranks: Vec<Sender<Message>>,
    pub trainers: Vec<Sender<Note>>,
}

/// Maxima on their way between trainer ranks.
pub(super) struct Note {
    from: u32,
    /// True for agreed maxima, false for those of one rank's parts.
    agreed: bool,
    amax: Vec<u32>,
}

struct Trainer<'a> {
    shared: &'a Shared<'a>,
    rank: u32,
    rows: &'a dyn Rows,
    wires: &'a Wires,
    mailbox: &'a Receiver<Note>,
    /// Notes that came before they were waited for.
    early: HashMap<(u32, bool), Vec<u32>>,
    /// By unit.
    agreed: HashMap<u32, Vec<Agreed>>,
}

pub(super) fn trainer_rank(
    shared: &Shared<'_>,
    rank: u32,
    rows: &dyn Rows,
    mailbox: &Receiver<Note>,
    wires: &Wires,
) {
    let (early, agreed) = (HashMap::new(), HashMap::new());
    let mut trainer = Trainer { shared, rank, rows, wires, mailbox, early, agreed };
    let done = trainer.agree().and_then(|()| trainer.buckets());
    if let Err(failure) = done {
        shared.fail(failure);
    }
}

impl Trainer<'_> {
    /// The amax exchange: each holder's maxima go to a box's first holder, and come back agreed.
    fn agree(&mut self) -> Fallible<()> {
        let graph = self.shared.graph;
        let own = |s: &&SharedTiles| graph.holders_of(s).contains(&self.rank);
        let mine: Vec<&SharedTiles> = graph.shared.iter().filter(own).collect();
        let (shared, rank, rows) = (self.shared, self.rank, self.rows);
        let found: Result<Vec<(Agreed, bool)>, Diagnostic> =
            mine.par_iter().map(|s| partial(shared, rank, rows, s)).collect();
        let (mut boxes, finite): (Vec<Agreed>, Vec<bool>) =
            found.map_err(Failure::Refused)?.into_iter().unzip();
        let bad = mine.iter().zip(finite).filter(|(_, fine)| !fine);
        self.shared.suspect(bad.map(|(s, _)| s.unit as usize))?;
        // Boxes that others collect, by collector; boxes collected here, by other holder.
        let (mut sent, mut collected) = (BTreeMap::new(), BTreeMap::new());
        for (i, s) in mine.iter().enumerate() {
            match graph.holders_of(s) {
                [first, others @ ..] if *first == rank => {
                    others.iter().for_each(|o| push(&mut collected, *o, i));
                }
                [first, ..] => push(&mut sent, *first, i),
                [] => {}
            }
        }
        for (to, indices) in &sent {
            self.tell(*to, false, indices, &boxes)?;
        }
        for (from, indices) in &collected {
            let amax = self.hear(*from, false)?;
            spread(indices, &amax, &mut boxes, |own, other| *own = (*own).max(other));
        }
        for (to, indices) in &collected {
            self.tell(*to, true, indices, &boxes)?;
        }
        for (from, indices) in &sent {
            let amax = self.hear(*from, true)?;
            spread(indices, &amax, &mut boxes, |own, other| *own = other);
        }
        for (s, agreed) in mine.iter().zip(boxes) {
            self.agreed.entry(s.unit).or_default().push(agreed);
        }
        Ok(())
    }

    fn tell(&self, to: u32, agreed: bool, indices: &[usize], boxes: &[Agreed]) -> Fallible<()> {
        let amax: Vec<u32> =
            indices.iter().flat_map(|i| boxes[*i].amax.iter().copied()).collect();
        self.shared.counts.amax.fetch_add(4 * amax.len() as u64, Ordering::Relaxed);
        let note = Note { from: self.rank, agreed, amax };
        let gone =
            |_| self.shared.late(&format!("trainer {to}"), "take part in the amax exchange");
        self.wires.trainers[to as usize].send(note).map_err(gone)
    }

    fn hear(&mut self, from: u32, agreed: bool) -> Fallible<Vec<u32>> {
        loop {
            if let Some(amax) = self.early.remove(&(from, agreed)) {
                return Ok(amax);
            }
            let (own, other) = (Peer::Trainer(self.rank), Peer::Trainer(from));
            self.shared.waits_for(own, Some(other));
            let Ok(note) = wait(self.shared, self.mailbox) else {
                let who = self.shared.behind(other).to_string();
                return Err(self.shared.late(&who, "answer in the amax exchange"));
            };
            self.shared.waits_for(own, None);
            self.early.insert((note.from, note.agreed), note.amax);
        }
    }

    fn buckets(&self) -> Fallible<()> {
        let graph = self.shared.graph;
        let (home, free) = bounded::<Vec<u8>>(graph.in_flight.max(1) as usize);
        for _ in 0..graph.in_flight.max(1) {
            let _ = home.try_send(Vec::new());
        }
        for bucket in 0..graph.buckets.len() {
            if self.shared.stopped() {
                break;
            }
            let own: Vec<u32> = (graph.flows_of(bucket))
                .filter(|(_, f)| f.from == self.rank)
                .map(|(i, _)| i)
                .collect();
            if own.is_empty() {
                continue;
            }
            let (load, starts) = self.launch(bucket, &own, &free, &home)?;
            self.send(bucket, &own, &starts, &load)?;
        }
        Ok(())
    }

    /// Makes a bucket's parts, in parallel, in staging memory that no rank still reads. Gives the
    /// memory, and where each flow begins in it.
    fn launch(
        &self,
        bucket: usize,
        own: &[u32],
        free: &Receiver<Vec<u8>>,
        home: &Sender<Vec<u8>>,
    ) -> Fallible<(Arc<Load>, Vec<usize>)> {
        let (shared, graph) = (self.shared, self.shared.graph);
        let me = Peer::Trainer(self.rank);
        shared.waits_for_memory(self.rank);
        let Ok(mut bytes) = wait(shared, free) else {
            let who = match shared.behind(me) {
                Peer::Rank(rank) => format!("rank {rank}"),
                Peer::Trainer(_) => "an inference rank".to_owned(),
            };
            return Err(shared.late(&who, &format!("let go of memory for bucket {bucket}")));
        };
        shared.waits_for(me, None);
        let mut starts = Vec::with_capacity(own.len());
        let mut total = 0;
        for flow in own {
            starts.push(total);
            total += graph.flows[*flow as usize].bytes as usize;
        }
        bytes.resize(total, 0);
        let parts = own.iter().flat_map(|f| graph.parts_of(&graph.flows[*f as usize]));
        let mut jobs = Vec::new();
        let mut rest = bytes.as_mut_slice();
        for part in parts {
            let (mine, others) = rest.split_at_mut(part.bytes() as usize);
            rest = others;
            jobs.extend(self.jobs(part, mine));
        }
        let made: Result<Vec<(u32, bool)>, Diagnostic> =
            jobs.into_par_iter().map(|job| Ok((job.id, self.make(job)?))).collect();
        let made = made.map_err(Failure::Refused)?;
        shared.suspect(made.iter().filter(|m| !m.1).map(|m| m.0 as usize))?;
        shared.counts.made.fetch_add(total as u64, Ordering::Relaxed);
        (shared.options.progress)(total as u64);
        Ok((Arc::new(Load { bytes, home: home.clone() }), starts))
    }

    /// Cuts a part into slabs, each with its places among the part's bytes.
    fn jobs<'b>(&self, part: &Part, bytes: &'b mut [u8]) -> Vec<Job<'b>> {
        let unit = &self.shared.program.units[part.unit as usize];
        let (mut values, mut scales) = bytes.split_at_mut(part.value_bytes as usize);
        let (block, phase) = unit.grid();
        let mut jobs = Vec::new();
        slabs(&part.window, unit.dtype.size(), block, phase, SLAB, &mut |window| {
            let (value_bytes, scale_bytes) = unit.bytes_of(&window);
            let (v, rest) = std::mem::take(&mut values).split_at_mut(value_bytes as usize);
            values = rest;
            let (s, rest) = std::mem::take(&mut scales).split_at_mut(scale_bytes as usize);
            scales = rest;
            jobs.push(Job { id: part.unit, window, values: v, scales: s });
        });
        jobs
    }

    /// Makes a slab: values (or codes), then scales. False if something read is not finite.
    fn make(&self, job: Job<'_>) -> Result<bool, Diagnostic> {
        let unit = &self.shared.program.units[job.id as usize];
        let inputs = eval::Inputs::new(self.rows);
        let agreed = self.agreed_for(unit, job.id, &job.window);
        if agreed.is_empty() && unit.on_grid(&job.window) {
            eval::window(&inputs, unit, &job.window, job.values, job.scales)?;
            return Ok(inputs.all_finite());
        }
        let partial = Partial { inputs: &inputs, agreed };
        partial.window(unit, &job.window, job.values, job.scales)?;
        Ok(inputs.all_finite())
    }

    /// Agreed maxima of tiles that a window of a unit touches.
    fn agreed_for(&self, unit: &Unit, id: u32, window: &Window) -> Vec<&Agreed> {
        let Some(all) = self.agreed.get(&id) else { return Vec::new() };
        let Some(leaf) = unit.expr.leaf() else { return Vec::new() };
        let region = leaf.tiles(&leaf.region(window));
        all.iter().filter(|a| a.tiles.intersect(&region).is_some()).collect()
    }

    /// One message to each rank that this one feeds.
    fn send(
        &self,
        bucket: usize,
        own: &[u32],
        starts: &[usize],
        load: &Arc<Load>,
    ) -> Fallible<()> {
        let graph = self.shared.graph;
        let mut messages: BTreeMap<RankId, Vec<(u32, usize)>> = BTreeMap::new();
        for (flow, start) in own.iter().zip(starts) {
            let f = &graph.flows[*flow as usize];
            for to in &graph.route(f).entries {
                messages.entry(*to).or_default().push((*flow, *start));
                self.shared.counts.sent.fetch_add(f.bytes, Ordering::Relaxed);
            }
        }
        for (to, flows) in messages {
            let message = Message { flows, load: Arc::clone(load) };
            let gone =
                |_| self.shared.late(&format!("rank {to}"), &format!("take bucket {bucket}"));
            self.wires.ranks[to.0 as usize].send(message).map_err(gone)?;
        }
        Ok(())
    }
}

/// A slab of a part and where its bytes go.
struct Job<'a> {
    id: u32,
    window: Window,
    values: &'a mut [u8],
    scales: &'a mut [u8],
}

fn push(map: &mut BTreeMap<u32, Vec<usize>>, key: u32, index: usize) {
    map.entry(key).or_default().push(index);
}

/// Applies maxima that came end to end to the boxes that they are of.
fn spread(
    indices: &[usize],
    amax: &[u32],
    boxes: &mut [Agreed],
    apply: impl Fn(&mut u32, u32),
) {
    let mut next = amax.iter();
    for i in indices {
        boxes[*i].amax.iter_mut().zip(&mut next).for_each(|(own, other)| apply(own, *other));
    }
}

/// The maxima of a box of tiles over what a rank holds of it, and whether all was finite.
fn partial(
    shared: &Shared<'_>,
    rank: u32,
    rows: &dyn Rows,
    tiles: &SharedTiles,
) -> Result<(Agreed, bool), Diagnostic> {
    let program = shared.program;
    let unit = &program.units[tiles.unit as usize];
    let leaf = unit.expr.leaf();
    let leaf =
        leaf.ok_or_else(|| Diagnostic::error("E0502", "a unit without tiles shares some"))?;
    let shares = program.input_shares(leaf.made, &leaf.made.elements_of(&tiles.tiles));
    let shares = shares.map_err(|_| Diagnostic::error("E0502", "shared operands lie apart"))?;
    let own = shares
        .into_iter()
        .filter(|s| s.holders.as_ref().is_none_or(|h| h.binary_search(&rank).is_ok()));
    let windows: Vec<Window> = own.map(|s| s.window).collect();
    let inputs = eval::Inputs::new(rows);
    let amax = maxima(&inputs, leaf.made, &tiles.tiles, &windows)?;
    Ok((Agreed { tiles: tiles.tiles.clone(), amax }, inputs.all_finite()))
}
