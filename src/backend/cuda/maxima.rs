//! The amax exchange: holders of a shared tile measure their parts, one collects, all take the
//! result.

use std::collections::BTreeMap;

use smallvec::smallvec;

use crate::diag::Diagnostic;
use crate::dtype::DType;
use crate::graph::SharedTiles;
use crate::shard::Window;

use super::Fallible;
use super::build::Build;
use super::parts::{Agreed, Lowering};
use super::place::Plane;
use super::program::{Flag, Instruction, Lane};
use super::reader::TrainerReader;
use super::seats::Seat;
use super::table::Table;

/// Words of one box of tiles that one trainer rank gives another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Words {
    /// Places in words among those of the holder and of the collector.
    holder: (u32, u64),
    collector: (u32, u64),
    count: u64,
}

impl Build<'_> {
    /// Adds the exchange; nothing if no tile is shared. `mapped` says that GPUs see one another's
    /// memory.
    pub(super) fn agree(&mut self, mapped: bool) -> Fallible<()> {
        if self.graph.shared.is_empty() {
            return Ok(());
        }
        let mine: Vec<u32> = self.seats.trainers_on(self.seat).collect();
        self.measure(&mine)?;
        let words = self.shared_words()?;
        let pairs = by_seats(self, &words);
        match mapped {
            true => self.exchange_mapped(&pairs),
            false => self.exchange_sent(&pairs),
        }
    }

    fn measure(&mut self, mine: &[u32]) -> Fallible<()> {
        for trainer in mine {
            let bytes = 4 * self.words(*trainer);
            if bytes == 0 {
                continue;
            }
            let address = self.memory.maxima(*trainer)?;
            self.out.push(Instruction::Clear { lane: Lane::Make, address, bytes });
        }
        for trainer in mine.iter().copied() {
            let tensors = self.memory.sources(trainer);
            let reader = TrainerReader { program: self.program, rank: trainer, tensors };
            let mut lowering = Lowering::new(&reader);
            let graph = self.graph;
            let held = |s: &&SharedTiles| graph.holders_of(s).contains(&trainer);
            for shared in graph.shared.iter().filter(held) {
                self.measure_box(trainer, shared, &mut lowering)?;
            }
            let (levels, scratch) = (lowering.levels, lowering.scratch);
            self.out.launch(Lane::Make, levels, scratch);
        }
        Ok(())
    }

    fn measure_box(
        &self,
        trainer: u32,
        shared: &SharedTiles,
        lowering: &mut Lowering<'_>,
    ) -> Fallible<()> {
        let unit = &self.program.units[shared.unit as usize];
        let leaf = unit
            .expr
            .leaf()
            .ok_or_else(|| Diagnostic::error("E0502", "a unit without tiles shares some"))?;
        let all = leaf.made.elements_of(&shared.tiles);
        let shares = self
            .program
            .input_shares(leaf.made, &all)
            .map_err(|_| Diagnostic::error("E0502", "shared operands lie apart"))?;
        let own = shares
            .into_iter()
            .filter(|s| s.holders.as_ref().is_none_or(|h| h.binary_search(&trainer).is_ok()));
        let windows: Vec<Window> = own.map(|s| s.window).collect();
        let address = self.memory.maxima(trainer)? + 4 * self.word_of(trainer, shared)?;
        let tiles = Agreed { tiles: shared.tiles.clone(), address };
        lowering.maxima(shared.unit, leaf.made, &tiles, &windows)
    }

    /// What each holder gives the collector of each box.
    fn shared_words(&self) -> Fallible<Vec<Words>> {
        let mut out = Vec::new();
        for shared in &self.graph.shared {
            let [first, others @ ..] = self.graph.holders_of(shared) else { continue };
            let count = shared.tiles.len.iter().product();
            for other in others {
                out.push(Words {
                    holder: (*other, self.word_of(*other, shared)?),
                    collector: (*first, self.word_of(*first, shared)?),
                    count,
                });
            }
        }
        Ok(out)
    }

    fn word(&self, (trainer, word): (u32, u64)) -> Fallible<u64> {
        Ok(self.memory.maxima(trainer)? + 4 * word)
    }

    /// Each GPU reads the others' words where they lie.
    fn exchange_mapped(&mut self, pairs: &BTreeMap<(Seat, Seat), Vec<Words>>) -> Fallible<()> {
        let (me, lane) = (self.seat, Lane::Make);
        let others = |key: fn(&(Seat, Seat)) -> (Seat, Seat)| -> Vec<Seat> {
            let own = pairs.keys().map(key).filter(|(a, b)| *a == me && *b != me);
            own.map(|(_, b)| b).collect()
        };
        // Keys are (holder, collector).
        let (collectors, holders) = (others(|k| *k), others(|k| (k.1, k.0)));
        let value = 1;
        for to in &collectors {
            let to = *to;
            self.out.push(Instruction::Signal { lane, to, flag: Flag::Measured, value });
        }
        for from in &holders {
            let from = *from;
            self.out.push(Instruction::Await { lane, from, flag: Flag::Measured, value });
        }
        // One holder after another: two may raise the same word.
        for words in self.collected(pairs)? {
            let mut table = Table::default();
            for w in words {
                table.maximum(self.word(w.holder)?, self.word(w.collector)?, w.count);
            }
            self.out.launch(lane, vec![table], 0);
        }
        for to in &holders {
            let to = *to;
            self.out.push(Instruction::Signal { lane, to, flag: Flag::Agreed, value });
        }
        for from in &collectors {
            let from = *from;
            self.out.push(Instruction::Await { lane, from, flag: Flag::Agreed, value });
        }
        let mut table = Table::default();
        for ((holder, _), words) in pairs {
            for w in words.iter().filter(|_| *holder == me) {
                copy_words(&mut table, self.word(w.collector)?, self.word(w.holder)?, w.count);
            }
        }
        self.out.launch(lane, vec![table], 0);
        Ok(())
    }

    /// Words that this GPU collects, such that no word stands twice in one list.
    fn collected(
        &self,
        pairs: &BTreeMap<(Seat, Seat), Vec<Words>>,
    ) -> Fallible<Vec<Vec<Words>>> {
        let mut rounds: Vec<Vec<Words>> = Vec::new();
        let mut next: BTreeMap<(u32, u64), usize> = BTreeMap::new();
        for ((_, collector), words) in pairs {
            for w in words.iter().filter(|_| *collector == self.seat) {
                let round = next.entry(w.collector).or_default();
                if rounds.len() == *round {
                    rounds.push(Vec::new());
                }
                rounds[*round].push(*w);
                *round += 1;
            }
        }
        Ok(rounds)
    }

    /// Words travel packed; each GPU has a place for what it exchanges with each other.
    fn exchange_sent(&mut self, pairs: &BTreeMap<(Seat, Seat), Vec<Words>>) -> Fallible<()> {
        let me = self.seat;
        let mut at = self.memory.staging().maxima;
        let mut places: BTreeMap<(Seat, Seat), u64> = BTreeMap::new();
        for (pair, words) in pairs.iter().filter(|(p, _)| away(p, me)) {
            places.insert(*pair, at);
            at += bytes_of(words);
        }
        self.pack_words(pairs, &places, true)?;
        self.swap_words(pairs, &places, true);
        for words in self.collected(pairs)? {
            let mut table = Table::default();
            for w in words {
                let from = match self.packed_word(pairs, &places, &w) {
                    Some(address) => address,
                    None => self.word(w.holder)?,
                };
                table.maximum(from, self.word(w.collector)?, w.count);
            }
            self.out.launch(Lane::Make, vec![table], 0);
        }
        self.pack_words(pairs, &places, false)?;
        self.swap_words(pairs, &places, false);
        let mut table = Table::default();
        for ((holder, _), words) in pairs {
            for w in words.iter().filter(|_| *holder == me) {
                let from = match self.packed_word(pairs, &places, w) {
                    Some(address) => address,
                    None => self.word(w.collector)?,
                };
                copy_words(&mut table, from, self.word(w.holder)?, w.count);
            }
        }
        self.out.launch(Lane::Make, vec![table], 0);
        Ok(())
    }

    /// Packs what this GPU sends: as a holder on the way to collectors, or back.
    fn pack_words(
        &mut self,
        pairs: &BTreeMap<(Seat, Seat), Vec<Words>>,
        places: &BTreeMap<(Seat, Seat), u64>,
        there: bool,
    ) -> Fallible<()> {
        let mut table = Table::default();
        for ((holder, collector), at) in places {
            if (if there { *holder } else { *collector }) != self.seat {
                continue;
            }
            let mut to = *at;
            for w in &pairs[&(*holder, *collector)] {
                let from = self.word(if there { w.holder } else { w.collector })?;
                copy_words(&mut table, from, to, w.count);
                to += 4 * w.count;
            }
        }
        self.out.launch(Lane::Make, vec![table], 0);
        Ok(())
    }

    fn swap_words(
        &mut self,
        pairs: &BTreeMap<(Seat, Seat), Vec<Words>>,
        places: &BTreeMap<(Seat, Seat), u64>,
        there: bool,
    ) {
        if places.is_empty() {
            return;
        }
        self.out.after(Lane::Move, Lane::Make);
        self.out.push(Instruction::GroupStart);
        for (pair, address) in places {
            let (from, to) = if there { *pair } else { (pair.1, pair.0) };
            let (address, bytes) = (*address, bytes_of(&pairs[pair]));
            self.out.push(match from == self.seat {
                true => Instruction::Send { to, address, bytes },
                false => Instruction::Receive { from, address, bytes },
            });
        }
        self.out.push(Instruction::GroupEnd);
        self.out.after(Lane::Make, Lane::Move);
    }

    /// Where a box's words lie packed; none if they never leave this GPU.
    fn packed_word(
        &self,
        pairs: &BTreeMap<(Seat, Seat), Vec<Words>>,
        places: &BTreeMap<(Seat, Seat), u64>,
        wanted: &Words,
    ) -> Option<u64> {
        let pair =
            (self.seats.of_trainer(wanted.holder.0), self.seats.of_trainer(wanted.collector.0));
        let before = pairs.get(&pair)?.iter().take_while(|w| *w != wanted);
        Some(places.get(&pair)? + before.map(|w| 4 * w.count).sum::<u64>())
    }
}

/// Bytes of staging memory for the maxima of a GPU that does not see others' memory.
pub fn staging_bytes(build: &Build<'_>) -> Fallible<u64> {
    let pairs = by_seats(build, &build.shared_words()?);
    let away = pairs.iter().filter(|(p, _)| away(p, build.seat));
    Ok(away.map(|(_, words)| bytes_of(words)).sum())
}

fn away(pair: &(Seat, Seat), me: Seat) -> bool {
    pair.0 != pair.1 && (pair.0 == me || pair.1 == me)
}

fn bytes_of(words: &[Words]) -> u64 {
    (4 * words.iter().map(|w| w.count).sum::<u64>()).next_multiple_of(64)
}

/// By the GPU of the holder and that of the collector.
fn by_seats(build: &Build<'_>, words: &[Words]) -> BTreeMap<(Seat, Seat), Vec<Words>> {
    let seat = |t: u32| build.seats.of_trainer(t);
    let mut out: BTreeMap<(Seat, Seat), Vec<Words>> = BTreeMap::new();
    for w in words {
        out.entry((seat(w.holder.0), seat(w.collector.0))).or_default().push(*w);
    }
    out
}

/// As integers: a maximum may be that of NaN, which its own tile reports.
fn copy_words(table: &mut Table, from: u64, to: u64, count: u64) {
    let plane = |address| Plane { address, strides: smallvec![4] };
    table.copy(0, DType::I32, &[count], &plane(from), &plane(to));
}
