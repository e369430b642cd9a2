//! Which mesh axes a value depends on: ranks that differ on no other hold the same.

use crate::ir::{Op, Place, Plan};
use crate::topo::Axis;

/// A set of mesh axes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Axes {
    used: [bool; 5],
    /// True if logical experts are placed on slots.
    experts: bool,
}

impl Axes {
    fn add(&mut self, other: Axes) {
        self.used.iter_mut().zip(other.used).for_each(|(a, b)| *a |= b);
        self.experts |= other.experts;
    }

    /// A place's index on each axis of the set, 0 on the others.
    pub(super) fn indices(self, place: &Place) -> [u64; 5] {
        Axis::ALL.map(|a| if self.used[a as usize] { place.index(a) } else { 0 })
    }

    pub(super) fn experts(self) -> bool {
        self.experts
    }
}

/// The axes of every node. Inputs stand before the nodes that use them.
pub(super) fn axes_of(plan: &Plan) -> Vec<Axes> {
    let mut all: Vec<Axes> = Vec::with_capacity(plan.nodes.len());
    for node in &plan.nodes {
        let mut axes = Axes::default();
        node.inputs.iter().for_each(|i| axes.add(all[i.0 as usize]));
        match node.op {
            Op::Shard { axis, .. } | Op::Heads { axis, .. } => axes.used[axis as usize] = true,
            Op::Experts { axis } => {
                axes.used[axis as usize] = true;
                axes.experts = true;
            }
            _ => {}
        }
        all.push(axes);
    }
    all
}
