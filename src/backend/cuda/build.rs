//! Builds a GPU's program from the schedule: what both paths share.

use std::collections::BTreeMap;

use crate::diag::Diagnostic;
use crate::graph::{Graph, Part as GraphPart, SharedTiles};
use crate::lower::{Part, Program, Unit};
use crate::topo::RankId;

use super::Fallible;
use super::land::{self, constants, derived};
use super::parts::{Agreed, Destination, Lowering};
use super::place::Tensor;
use super::program::{Lane, SeatProgram};
use super::reader::{LandedReader, TrainerReader};
use super::seats::{Parcel, Seat, Seats, parcels};

/// Where everything lies that a GPU's jobs may touch. Addresses of other GPUs' memory are as
/// this one sees them.
pub trait Addresses {
    /// The shards of a trainer rank on this GPU, by source.
    fn sources(&self, trainer: u32) -> &[Option<Tensor>];

    /// A storage of a target of an inference rank (of any replica).
    ///
    /// # Errors
    /// E0605 for a rank whose memory this GPU does not see.
    fn target(&self, rank: RankId, target: u32, part: Part) -> Fallible<u64>;

    /// The words in which a trainer rank has the maxima of its shared tiles.
    ///
    /// # Errors
    /// E0605 for a rank whose memory this GPU does not see.
    fn maxima(&self, trainer: u32) -> Fallible<u64>;

    /// Staging memory: two buffers for what is sent, two for what is received, and one for the
    /// maxima that are sent and received.
    fn staging(&self) -> Staging;
}

/// Addresses of staging buffers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Staging {
    pub sent: [u64; 2],
    pub received: [u64; 2],
    pub maxima: u64,
}

/// What a GPU's program is built from.
pub struct Build<'a> {
    pub program: &'a Program,
    pub graph: &'a Graph,
    pub seats: &'a Seats,
    pub seat: Seat,
    pub memory: &'a dyn Addresses,
    /// Whether the plan's constants are filled before, and derived parameters computed after.
    pub constants: bool,
    pub derived: bool,
    pub(super) parcels: Vec<Parcel>,
    /// By trainer rank and unit: boxes of shared tiles, and the place of their first word.
    shared: BTreeMap<(u32, u32), Vec<(SharedTiles, u64)>>,
    /// Words of each trainer rank.
    words: BTreeMap<u32, u64>,
    pub(super) out: SeatProgram,
}

impl<'a> Build<'a> {
    pub fn new(
        program: &'a Program,
        graph: &'a Graph,
        seats: &'a Seats,
        seat: Seat,
        memory: &'a dyn Addresses,
    ) -> Self {
        let (shared, words) = shared_words(graph);
        let parcels = parcels(graph, seats);
        let out = SeatProgram::default();
        let (constants, derived) = (true, true);
        Build {
            program,
            graph,
            seats,
            seat,
            memory,
            constants,
            derived,
            parcels,
            shared,
            words,
            out,
        }
    }

    /// Words of a trainer rank's maxima.
    pub(super) fn words(&self, trainer: u32) -> u64 {
        self.words.get(&trainer).copied().unwrap_or(0)
    }

    /// Where a trainer rank has the maxima of a box of tiles, in words.
    pub(super) fn word_of(&self, trainer: u32, tiles: &SharedTiles) -> Fallible<u64> {
        let own = self.shared.get(&(trainer, tiles.unit)).map(Vec::as_slice).unwrap_or(&[]);
        let found = own.iter().find(|(t, _)| t == tiles).map(|(_, at)| *at);
        found.ok_or_else(|| Diagnostic::error("E0502", "a box of shared tiles is unknown"))
    }

    /// Agreed maxima of a unit on a trainer rank.
    pub(super) fn agreed(&self, trainer: u32, unit: u32) -> Fallible<Vec<Agreed>> {
        let Some(own) = self.shared.get(&(trainer, unit)) else { return Ok(Vec::new()) };
        let base = self.memory.maxima(trainer)?;
        let agreed = own
            .iter()
            .map(|(shared, at)| Agreed { tiles: shared.tiles.clone(), address: base + 4 * at });
        Ok(agreed.collect())
    }

    /// Parts of a flow.
    pub(super) fn parts(&self, flow: u32) -> (u32, &'a [GraphPart]) {
        let graph = self.graph;
        let flow = &graph.flows[flow as usize];
        (flow.from, graph.parts_of(flow))
    }

    pub(super) fn unit(&self, part: &GraphPart) -> &'a Unit {
        &self.program.units[part.unit as usize]
    }

    /// All places of a unit on the ranks of a GPU, those of the first rank first.
    pub(super) fn places(&self, unit: &Unit, seat: Seat) -> Fallible<Vec<Destination>> {
        let world = self.program.ranks.len() as u64;
        let mut out = Vec::new();
        let mut ranks: Vec<u32> = unit.ranks();
        ranks.sort_unstable();
        for replica in 0..u64::from(self.graph.ranks) / world.max(1) {
            for rank in &ranks {
                let id = RankId(replica * world + u64::from(*rank));
                if self.seats.of_rank(id) == seat {
                    let address = |t: u32, p: Part| self.memory.target(id, t, p);
                    out.extend(land::places(self.program, unit, *rank as usize, &address)?);
                }
            }
        }
        Ok(out)
    }

    /// Adds jobs that make the parts of some flows, each at the place that `to` gives.
    pub(super) fn make(
        &mut self,
        flows: &[u32],
        to: &mut dyn FnMut(&Unit, &GraphPart) -> Fallible<Destination>,
    ) -> Fallible<bool> {
        let mut by_trainer: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for flow in flows {
            by_trainer.entry(self.parts(*flow).0).or_default().push(*flow);
        }
        let mut levels = Vec::new();
        let mut scratch = 0;
        for (trainer, flows) in by_trainer {
            let tensors = self.memory.sources(trainer);
            let reader = TrainerReader { program: self.program, rank: trainer, tensors };
            let mut lowering = Lowering { levels, scratch, ..Lowering::new(&reader) };
            for part in flows.iter().flat_map(|f| self.parts(*f).1) {
                let unit = self.unit(part);
                let agreed = self.agreed(trainer, part.unit)?;
                let place = to(unit, part)?;
                lowering.part(part.unit, unit, &part.window, &place, &agreed)?;
            }
            (levels, scratch) = (lowering.levels, lowering.scratch);
        }
        Ok(self.out.launch(Lane::Make, levels, scratch))
    }

    /// Adds what the inference ranks here make of constants.
    pub(super) fn fill_constants(&mut self) -> Fallible<()> {
        if self.constants { self.own(&constants) } else { Ok(()) }
    }

    /// Adds what the inference ranks here make of what has landed.
    pub(super) fn derive(&mut self) -> Fallible<()> {
        if self.derived { self.own(&derived) } else { Ok(()) }
    }

    fn own(&mut self, work: OwnWork<'_>) -> Fallible<()> {
        for id in self.seats.ranks_on(self.seat) {
            let rank = (id.0 % self.program.ranks.len().max(1) as u64) as usize;
            let address = |t: u32, p: Part| self.memory.target(id, t, p);
            let reader = LandedReader { program: self.program, rank, address: &address };
            let mut lowering = Lowering::new(&reader);
            work(self.program, rank, &address, &mut lowering)?;
            let (levels, scratch) = (lowering.levels, lowering.scratch);
            self.out.launch(Lane::Make, levels, scratch);
        }
        Ok(())
    }
}

type OwnWork<'a> = &'a dyn Fn(
    &Program,
    usize,
    super::reader::AddressOf<'_>,
    &mut Lowering<'_>,
) -> Fallible<()>;

type SharedWords = BTreeMap<(u32, u32), Vec<(SharedTiles, u64)>>;

/// Gives every trainer rank a word for each shared tile that it holds a part of.
fn shared_words(graph: &Graph) -> (SharedWords, BTreeMap<u32, u64>) {
    let mut boxes: SharedWords = BTreeMap::new();
    let mut words: BTreeMap<u32, u64> = BTreeMap::new();
    for shared in &graph.shared {
        for holder in graph.holders_of(shared) {
            let at = words.entry(*holder).or_default();
            boxes.entry((*holder, shared.unit)).or_default().push((shared.clone(), *at));
            *at += shared.tiles.len.iter().product::<u64>();
        }
    }
    (boxes, words)
}

/// Words of the maxima of each trainer rank that has some.
pub fn words_of(graph: &Graph) -> BTreeMap<u32, u64> {
    shared_words(graph).1
}
