//! How long a schedule takes on a cluster, and which links it fills: integers and a clock for
//! each link, no bytes, no GPU.

mod links;
mod roofline;
#[cfg(test)]
mod tests;
mod values;

use std::collections::{HashMap, VecDeque};

use serde::Serialize;

use crate::graph::Message;
use crate::topo::{Cluster, Peer, RankId};

use links::Links;
use roofline::Roofline;
pub use values::Values;

/// Version of the report's JSON.
pub const SCHEMA: u32 = 1;

/// What a simulation sees of a schedule.
pub struct Traffic {
    /// Number of trainer ranks.
    pub trainers: u32,
    /// Number of inference ranks, all replicas.
    pub ranks: u32,
    /// Buckets in flight; at least 1.
    pub in_flight: u64,
    /// The most that staging ever holds on any rank, in bytes.
    pub staging_bytes: u64,
    /// Number of buckets.
    pub buckets: usize,
    /// The messages of a bucket: those of trainer ranks first, then relays in an order in which
    /// each sender has what it sends. Asked for once a bucket, so that they need not all exist.
    pub messages: Box<dyn Fn(usize) -> Vec<Message>>,
    /// Bytes that each trainer rank sends and receives in the amax exchange; may be empty.
    pub amax: Vec<(u64, u64)>,
    /// What must move, whatever the schedule does.
    pub values: Values,
}

/// A message as it was simulated, in seconds from the start of the update.
#[derive(Clone, Copy, Debug)]
pub struct Transfer<'a> {
    pub bucket: usize,
    pub message: &'a Message,
    pub start_s: f64,
    pub arrival_s: f64,
}

/// The result of a simulation; serialized, the JSON of `engine simulate`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    pub schema: u32,
    /// When the last message has arrived, in seconds.
    pub predicted_s: f64,
    /// No schedule is faster than this, in seconds.
    pub roofline_s: f64,
    /// Largest over mean of the bytes that a trainer rank sends.
    pub imbalance: f64,
    pub staging_peak_bytes: u64,
    pub bytes: Totals,
    /// Seconds that the amax exchange takes before the first bucket.
    pub amax_s: f64,
    /// The classes of links that carry anything.
    pub links: Vec<LinkClass>,
    /// Trainer ranks, then inference ranks.
    pub ranks: Vec<RankBytes>,
}

/// Bytes of a whole update.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// From trainer ranks to inference ranks.
    pub wire: u64,
    /// From inference rank to inference rank.
    pub relayed: u64,
    /// Between trainer ranks, in the amax exchange.
    pub amax: u64,
}

/// Links of one kind and direction over the whole cluster.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LinkClass {
    pub class: &'static str,
    /// Over all links of the class.
    pub bytes: u64,
    /// The fewest bytes that they could carry, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub least_bytes: Option<u64>,
    /// Of the link that carries the most.
    pub busiest_bytes: u64,
    /// Seconds that the busiest link needs at its full rate.
    pub busiest_s: f64,
    /// The fewest seconds in which a host's links of this class could do it, where known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub least_s: Option<f64>,
}

/// Which side of an update a process is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    Trainer,
    Inference,
}

/// What one process sends and receives in its buckets, in bytes; the amax exchange is apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct RankBytes {
    pub side: Side,
    pub rank: u64,
    /// Relays included.
    pub sent: u64,
    pub received: u64,
    /// The part of `sent` that came from elsewhere.
    pub relayed: u64,
}

/// Runs a schedule against the clock of each link; `watch` sees every message in turn.
///
/// Step `s` sends hop `h` of bucket `s - h`. A message within a host uses the NVLink of both GPUs,
/// any other the NICs of both. It is ready a latency after its sender has what it carries and both
/// ends are done with the step whose staging it takes; a link serves its messages one after the
/// other, in the schedule's order.
pub fn simulate(
    traffic: &Traffic,
    cluster: &Cluster,
    watch: &mut dyn FnMut(Transfer),
) -> Report {
    let amax_s = amax_seconds(traffic, cluster);
    let mut run = Run::new(traffic, cluster, amax_s);
    let mut open: VecDeque<Open> = VecDeque::new();
    let mut step = 0;
    while step < traffic.buckets || !open.is_empty() {
        if step < traffic.buckets {
            open.push_back(Open::new(step, (traffic.messages)(step)));
        }
        run.step(step, &mut open, watch);
        while open.front().is_some_and(|b| b.next == b.messages.len()) {
            open.pop_front();
        }
        step += 1;
    }
    let roofline = Roofline::of(traffic, cluster);
    Report {
        schema: SCHEMA,
        predicted_s: run.last_s,
        roofline_s: roofline.seconds(),
        imbalance: imbalance(&run.ranks[..traffic.trainers as usize]),
        staging_peak_bytes: traffic.staging_bytes,
        bytes: Totals {
            wire: sum(&run.ranks, |r| r.sent - r.relayed),
            relayed: sum(&run.ranks, |r| r.relayed),
            amax: traffic.amax.iter().map(|(sent, _)| sent).sum(),
        },
        amax_s,
        links: run.links.classes(&roofline),
        ranks: run.ranks,
    }
}

fn sum(ranks: &[RankBytes], of: impl Fn(&RankBytes) -> u64) -> u64 {
    ranks.iter().map(of).sum()
}

/// Largest over mean of bytes sent; 1 if nothing is.
fn imbalance(trainers: &[RankBytes]) -> f64 {
    let all = sum(trainers, |r| r.sent);
    let most = trainers.iter().map(|r| r.sent).max().unwrap_or(0);
    if all == 0 { 1.0 } else { most as f64 * trainers.len() as f64 / all as f64 }
}

/// The maxima go to their owners and come back: two messages one after the other.
fn amax_seconds(traffic: &Traffic, cluster: &Cluster) -> f64 {
    let most = traffic.amax.iter().map(|(sent, received)| sent + received).max().unwrap_or(0);
    if most == 0 {
        return 0.0;
    }
    2.0 * cluster.latency_us * 1e-6 + most as f64 / (cluster.nic_gb_s * 1e9)
}

/// A bucket of which some messages are still to be sent.
struct Open {
    index: usize,
    /// By hop.
    messages: Vec<Message>,
    next: usize,
    relays: bool,
    /// When each flow is at each rank; asked for by relays only.
    landed: HashMap<(RankId, u32), f64>,
}

impl Open {
    fn new(index: usize, messages: Vec<Message>) -> Self {
        let relays = messages.last().is_some_and(|m| m.hop > 0);
        Open { index, messages, next: 0, relays, landed: HashMap::new() }
    }
}

/// The state of a simulation between two steps.
struct Run<'a> {
    cluster: &'a Cluster,
    trainers: u32,
    /// When the first bucket may start.
    begin_s: f64,
    in_flight: usize,
    links: Links<'a>,
    /// For each process and place in staging: when it was last free.
    free_s: Vec<f64>,
    ranks: Vec<RankBytes>,
    last_s: f64,
}

impl<'a> Run<'a> {
    fn new(traffic: &Traffic, cluster: &'a Cluster, begin_s: f64) -> Self {
        let processes = traffic.trainers as usize + traffic.ranks as usize;
        // More places than buckets would never be used.
        let in_flight = traffic.in_flight.clamp(1, traffic.buckets.max(1) as u64) as usize;
        let row = |side, rank| RankBytes { side, rank, sent: 0, received: 0, relayed: 0 };
        let trainers = (0..u64::from(traffic.trainers)).map(|t| row(Side::Trainer, t));
        let ranks = (0..u64::from(traffic.ranks)).map(|r| row(Side::Inference, r));
        Run {
            cluster,
            trainers: traffic.trainers,
            begin_s,
            in_flight,
            links: Links::new(cluster, processes),
            free_s: vec![begin_s; processes * in_flight],
            ranks: trainers.chain(ranks).collect(),
            last_s: begin_s,
        }
    }

    fn step(
        &mut self,
        step: usize,
        open: &mut VecDeque<Open>,
        watch: &mut dyn FnMut(Transfer),
    ) {
        let mut done: Vec<(usize, f64)> = Vec::new();
        for bucket in open.iter_mut() {
            let hop = (step - bucket.index) as u32;
            while let Some(message) = bucket.messages.get(bucket.next).filter(|m| m.hop == hop)
            {
                let ready = self.ready(step, message, &bucket.landed);
                let (from, to) = self.ends(message);
                let (start_s, arrival_s) =
                    self.links.carry(from as u64, to as u64, message.bytes, ready);
                if bucket.relays {
                    let flows = message.flows.iter();
                    bucket.landed.extend(flows.map(|f| ((message.to, *f), arrival_s)));
                }
                self.count(message);
                watch(Transfer { bucket: bucket.index, message, start_s, arrival_s });
                done.extend([(from, arrival_s), (to, arrival_s)]);
                self.last_s = self.last_s.max(arrival_s);
                bucket.next += 1;
            }
        }
        // Only now: the messages of a step share one place.
        for (process, arrival_s) in done {
            let place = self.place(process, step);
            self.free_s[place] = self.free_s[place].max(arrival_s);
        }
    }

    /// When the first byte of a message could arrive, were the links free.
    fn ready(
        &self,
        step: usize,
        message: &Message,
        landed: &HashMap<(RankId, u32), f64>,
    ) -> f64 {
        let (from, to) = self.ends(message);
        let free = [from, to].map(|process| self.free_s[self.place(process, step)]);
        let held = match message.from {
            Peer::Trainer(_) => self.begin_s,
            // The verifier of a graph has proved that it has them.
            Peer::Rank(rank) => {
                let at = message.flows.iter().filter_map(|f| landed.get(&(rank, *f)));
                at.fold(self.begin_s, |latest, at| latest.max(*at))
            }
        };
        held.max(free[0]).max(free[1]) + self.cluster.latency_us * 1e-6
    }

    /// Both ends as numbers in launch order.
    fn ends(&self, message: &Message) -> (usize, usize) {
        let gpu = |peer| self.cluster.gpu(peer, self.trainers) as usize;
        (gpu(message.from), gpu(Peer::Rank(message.to)))
    }

    fn place(&self, process: usize, step: usize) -> usize {
        process * self.in_flight + step % self.in_flight
    }

    fn count(&mut self, message: &Message) {
        let (from, to) = self.ends(message);
        self.ranks[from].sent += message.bytes;
        if matches!(message.from, Peer::Rank(_)) {
            self.ranks[from].relayed += message.bytes;
        }
        self.ranks[to].received += message.bytes;
    }
}
