//! Distinct values by who holds and who needs them: millions of them, few such pairs.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::sync::Arc;

use crate::topo::RankId;

/// Bytes that must move whatever the schedule is, grouped by holders and receivers.
#[derive(Clone, Debug, Default)]
pub struct Values {
    holders: Sets<u32>,
    needed_by: Sets<RankId>,
    /// By index of both sets.
    bytes: BTreeMap<(u32, u32), u64>,
}

/// Values with the same holders and receivers.
pub(super) struct Group<'a> {
    pub bytes: u64,
    pub holders: &'a [u32],
    pub needed_by: &'a [RankId],
}

impl Values {
    /// Adds a value: its bytes, the trainer ranks of which each holds all of it (at least one),
    /// and the inference ranks that need it, both in ascending order.
    pub fn add(&mut self, bytes: u64, holders: &[u32], needed_by: &[RankId]) {
        let key = (self.holders.index(holders), self.needed_by.index(needed_by));
        *self.bytes.entry(key).or_default() += bytes;
    }

    pub(super) fn groups(&self) -> impl Iterator<Item = Group<'_>> {
        self.bytes.iter().map(|((holders, needed_by), bytes)| Group {
            bytes: *bytes,
            holders: &self.holders.all[*holders as usize],
            needed_by: &self.needed_by.all[*needed_by as usize],
        })
    }
}

/// Distinct lists, each kept once.
#[derive(Clone, Debug)]
struct Sets<T> {
    all: Vec<Arc<[T]>>,
    index: HashMap<Arc<[T]>, u32>,
}

impl<T> Default for Sets<T> {
    fn default() -> Self {
        Sets { all: Vec::new(), index: HashMap::new() }
    }
}

impl<T: Clone + Eq + Hash> Sets<T> {
    fn index(&mut self, list: &[T]) -> u32 {
        if let Some(index) = self.index.get(list) {
            return *index;
        }
        let (index, list) = (self.all.len() as u32, Arc::<[T]>::from(list));
        self.all.push(list.clone());
        self.index.insert(list, index);
        index
    }
}
