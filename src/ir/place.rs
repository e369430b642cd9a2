//! One position on a mesh, as numbers: axis sizes, the index on each, and expert slots.

use crate::topo::{Axis, Coords, InferMesh};

/// Axis sizes and one index on each axis. [`Place::whole`] is the mesh of one rank, on which
/// every expression has its full shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    sizes: [u64; 5],
    index: [u64; 5],
    redundant_experts: u64,
    eplb: bool,
}

impl Place {
    /// The place of one rank.
    pub fn of(mesh: &InferMesh, at: Coords) -> Self {
        Place {
            sizes: Axis::ALL.map(|a| mesh.size(a)),
            index: Axis::ALL.map(|a| at.index(a)),
            redundant_experts: mesh.redundant_experts,
            eplb: mesh.eplb,
        }
    }

    /// A mesh of one rank that keeps the redundant experts.
    pub fn whole(mesh: &InferMesh) -> Self {
        Place {
            sizes: [1; 5],
            index: [0; 5],
            redundant_experts: mesh.redundant_experts,
            eplb: mesh.eplb,
        }
    }

    pub fn size(&self, axis: Axis) -> u64 {
        self.sizes[axis as usize]
    }

    pub fn index(&self, axis: Axis) -> u64 {
        self.index[axis as usize]
    }

    /// Physical slots for `experts` logical ones: the redundant ones come on top.
    pub fn physical_experts(&self, experts: u64) -> u64 {
        experts + self.redundant_experts
    }

    /// First physical slot and number of slots here. Linear placement: with P slots over n
    /// ranks the first P mod n ranks hold one more. None if load balancing is on and P mod n
    /// is not 0 (vLLM refuses that).
    pub fn expert_slots(&self, axis: Axis, experts: u64) -> Option<(u64, u64)> {
        let (size, index) = (self.size(axis), self.index(axis));
        let slots = self.physical_experts(experts);
        let (base, rest) = (slots / size, slots % size);
        if self.eplb && rest != 0 {
            return None;
        }
        Some((index * base + index.min(rest), base + u64::from(index < rest)))
    }
}
