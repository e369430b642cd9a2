//! An inference rank: takes messages as they come, stores what they hold, passes on what others
//! get from it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use crate::diag::Diagnostic;
use crate::graph::Graph;
use crate::lower::{Part, Target, Unit};
use crate::shard::{Window, contiguous, row_major};
use crate::topo::{Peer, RankId};

use super::run::{Failure, Shared, wait};
use super::{Sink, Strided, eval};

/// Flows of one bucket and sender, in the sender's staging memory.
#[derive(Clone)]
pub(super) struct Message {
    /// Number of each flow, and where it begins in the memory.
    pub flows: Vec<(u32, usize)>,
    pub load: Arc<Load>,
}

/// A bucket's bytes on their way; the last rank to let go hands the memory back.
pub(super) struct Load {
    pub bytes: Vec<u8>,
    pub home: Sender<Vec<u8>>,
}

impl Drop for Load {
    fn drop(&mut self) {
        // The trainer may be gone already; the memory then just goes.
        let _ = self.home.try_send(std::mem::take(&mut self.bytes));
    }
}

/// Runs a rank to its end; gives the bytes that it received.
pub(super) fn inference_rank(
    shared: &Shared<'_>,
    rank: usize,
    sink: &dyn Sink,
    inbox: &Receiver<Message>,
    wires: &[Sender<Message>],
) -> u64 {
    let own = RankId(rank as u64);
    let program_rank = rank % shared.program.ranks.len().max(1);
    let mut received = 0;
    let mut missing: BTreeMap<u32, ()> = expected(shared.graph, own);
    if let Err(d) = constants(shared, program_rank, sink) {
        shared.fail(Failure::Refused(d));
        return received;
    }
    while let Some((next, ())) = missing.first_key_value() {
        shared.waits_for(Peer::Rank(own), Some(sender(shared.graph, *next, own)));
        let message = match wait(shared, inbox) {
            Ok(message) => message,
            // Another rank has failed and said why.
            Err(RecvTimeoutError::Disconnected) => return received,
            Err(RecvTimeoutError::Timeout) => {
                shared.fail(late(shared, *next, own));
                return received;
            }
        };
        shared.waits_for(Peer::Rank(own), None);
        if let Err(failure) = relay(shared, own, &message, wires) {
            shared.fail(failure);
            return received;
        }
        for (flow, start) in &message.flows {
            missing.remove(flow);
            received += shared.graph.flows[*flow as usize].bytes;
            let bytes = &message.load.bytes[*start..];
            if let Err(d) = store(shared, program_rank, *flow, sink, bytes) {
                shared.fail(Failure::Refused(d));
                return received;
            }
        }
    }
    shared.ended(Peer::Rank(own));
    received
}

/// Numbers of all flows that reach a rank.
fn expected(graph: &Graph, rank: RankId) -> BTreeMap<u32, ()> {
    let reach = |r: &crate::graph::Route| {
        r.entries.contains(&rank) || r.relays.iter().any(|(_, to)| *to == rank)
    };
    let routes: Vec<bool> = graph.routes.iter().map(reach).collect();
    let flows = graph.flows.iter().enumerate();
    flows.filter(|(_, f)| routes[f.route as usize]).map(|(i, _)| (i as u32, ())).collect()
}

/// Who sends a flow to a rank.
fn sender(graph: &Graph, flow: u32, rank: RankId) -> Peer {
    let flow = &graph.flows[flow as usize];
    let relay = graph.route(flow).relays.iter().find(|(_, to)| *to == rank);
    relay.map_or(Peer::Trainer(flow.from), |(from, _)| Peer::Rank(*from))
}

/// A flow did not come: who should have sent it, or whom that one waits for.
fn late(shared: &Shared<'_>, flow: u32, rank: RankId) -> Failure {
    let bucket = shared.graph.buckets.partition_point(|b| b.flows.end <= flow);
    let sender = sender(shared.graph, flow, rank);
    let who = shared.behind(sender);
    let step = match who == sender {
        true => format!("send bucket {bucket} to rank {rank}"),
        false => format!("do its part of bucket {bucket} for rank {rank}"),
    };
    shared.late(&who.to_string(), &step)
}

/// Passes flows on, one message to each rank that gets some.
fn relay(
    shared: &Shared<'_>,
    own: RankId,
    message: &Message,
    wires: &[Sender<Message>],
) -> Result<(), Failure> {
    let mut next: BTreeMap<RankId, Vec<(u32, usize)>> = BTreeMap::new();
    for (flow, start) in &message.flows {
        let f = &shared.graph.flows[*flow as usize];
        for (_, to) in shared.graph.route(f).relays.iter().filter(|(from, _)| *from == own) {
            next.entry(*to).or_default().push((*flow, *start));
            shared.counts.relayed.fetch_add(f.bytes, Ordering::Relaxed);
        }
    }
    for (to, flows) in next {
        let message = Message { flows, load: Arc::clone(&message.load) };
        if wires[to.0 as usize].send(message).is_err() {
            return Err(shared.late(&format!("rank {to}"), "take what is passed on to it"));
        }
    }
    Ok(())
}

/// Puts a flow's parts into the parameters of this rank that hold them.
fn store(
    shared: &Shared<'_>,
    rank: usize,
    flow: u32,
    sink: &dyn Sink,
    bytes: &[u8],
) -> Result<(), Diagnostic> {
    let mut start = 0;
    for part in shared.graph.parts_of(&shared.graph.flows[flow as usize]) {
        // What is left would be torn anyhow.
        if shared.stopped() {
            break;
        }
        let unit = &shared.program.units[part.unit as usize];
        let (values, end) = (start + part.value_bytes as usize, start + part.bytes() as usize);
        let own = unit.receivers.iter().filter(|r| r.rank as usize == rank);
        for receiver in own {
            let target = &shared.program.ranks[rank].targets[receiver.target as usize];
            let lo = &target.places[receiver.place as usize].lo;
            let made = Boxed { unit, window: &part.window, lo, target };
            made.write(
                sink,
                receiver.target as usize,
                &bytes[start..values],
                &bytes[values..end],
            )?;
        }
        start = end;
    }
    Ok(())
}

/// A window of a unit, and where the unit begins in a target.
struct Boxed<'a> {
    unit: &'a Unit,
    window: &'a Window,
    lo: &'a [u64],
    target: &'a Target,
}

impl Boxed<'_> {
    fn write(
        &self,
        sink: &dyn Sink,
        target: usize,
        values: &[u8],
        scales: &[u8],
    ) -> Result<(), Diagnostic> {
        let at =
            |lo: &[u64]| -> Vec<u64> { self.lo.iter().zip(lo).map(|(a, b)| a + b).collect() };
        let storage = &self.target.storages[0];
        let window =
            Window { lo: at(&self.window.lo)[..].into(), len: self.window.len.clone() };
        let size = storage.dtype.size();
        write_box(sink, target, Part::Values, &window, &storage.shape, size, values)?;
        let grid = self.unit.scales_of(self.window).filter(|g| !g.is_empty());
        let (Some(mut grid), Some(quant)) = (grid, self.unit.quant) else { return Ok(()) };
        for (d, lo) in self.lo.iter().enumerate() {
            let in_matrix = d + 2 >= self.lo.len();
            grid.lo[d] += if in_matrix { lo / quant.block } else { *lo };
        }
        let Some(storage) = self.target.storages.get(1) else { return Ok(()) };
        let size = storage.dtype.size();
        write_box(sink, target, Part::Scales, &grid, &storage.shape, size, scales)
    }
}

/// Writes a box of a row-major storage as evenly spaced rows.
fn write_box(
    sink: &dyn Sink,
    target: usize,
    part: Part,
    window: &Window,
    shape: &[u64],
    size: u64,
    bytes: &[u8],
) -> Result<(), Diagnostic> {
    let strides = row_major(shape);
    let (inner, run) = contiguous(window, shape);
    let start = window.lo.iter().zip(&strides).map(|(i, s)| i * s).sum::<u64>() * size;
    let Some(rows) = inner.checked_sub(1) else {
        let all = Strided { offset: start, row_bytes: run * size, stride: 0, rows: 1 };
        return sink.write(target, part, all, bytes);
    };
    let count = window.len[rows];
    let block = (count * run * size) as usize;
    for (i, bytes) in bytes.chunks_exact(block.max(1)).enumerate() {
        let mut left = i as u64;
        let mut offset = start;
        for d in (0..rows).rev() {
            offset += left % window.len[d] * strides[d] * size;
            left /= window.len[d];
        }
        let stride = strides[rows] * size;
        let strided = Strided { offset, row_bytes: run * size, stride, rows: count };
        sink.write(target, part, strided, bytes)?;
    }
    Ok(())
}

/// Fills what is made of the plan's constants alone, which no trainer rank sends.
fn constants(shared: &Shared<'_>, rank: usize, sink: &dyn Sink) -> Result<(), Diagnostic> {
    for (index, target) in shared.program.ranks[rank].targets.iter().enumerate() {
        for place in &target.places {
            let unit = &shared.program.units[place.unit as usize];
            if !unit.is_constant() || unit.shape.contains(&0) {
                continue;
            }
            let window = Window::whole(&unit.shape);
            let (values, scales) = unit.bytes_of(&window);
            let mut bytes = vec![0; (values + scales) as usize];
            let (codes, grid) = bytes.split_at_mut(values as usize);
            eval::whole(unit, codes, grid)?;
            let made = Boxed { unit, window: &window, lo: &place.lo, target };
            made.write(sink, index, codes, grid)?;
        }
    }
    Ok(())
}
