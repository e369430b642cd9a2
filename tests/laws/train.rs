//! Random trainer sides: a mesh with the default rules, or a manifest of placements.

use kernelcast::topo::Placement;

use crate::cases::{SourceTensor, Tape};

/// Most trainer ranks of a case.
const WORLD: u64 = 16;

/// Where a trainer has the sources.
#[derive(Clone, Debug)]
pub enum Train {
    /// By the default rules for a mesh, as `--train` has it.
    Rules(String),
    /// A mesh, and one placement an axis for each source.
    Manifest { mesh: Vec<u64>, placements: Vec<Vec<Placement>> },
}

impl Default for Train {
    fn default() -> Self {
        Train::Manifest { mesh: Vec::new(), placements: Vec::new() }
    }
}

pub fn make(tape: &mut Tape, sources: &[SourceTensor]) -> Train {
    match tape.one_in(2) {
        true => rules(tape),
        false => manifest(tape, sources),
    }
}

fn rules(tape: &mut Tape) -> Train {
    let mut room = WORLD;
    let mut axis = |sizes: &[u64]| {
        let size = tape.pick(sizes).min(room);
        room /= size;
        size
    };
    let fsdp = axis(&[2, 3, 1, 4, 5, 6, 8, 16]);
    let tp = axis(&[1, 1, 2, 3, 4]);
    let (copies, pp) = (axis(&[1, 1, 2]), axis(&[1, 1, 2, 3]));
    let divisors: Vec<u64> = (1..=fsdp).filter(|d| fsdp.is_multiple_of(*d)).collect();
    let ep = tape.pick(&divisors);
    let dim = 1 - tape.below(2);
    Train::Rules(format!(
        "fsdp={fsdp},tp={tp},dp_replicate={copies},pp={pp},ep={ep},expert_fsdp_dim={dim}"
    ))
}

/// Mostly one style for all sources, as trainers have; sometimes each its own.
fn manifest(tape: &mut Tape, sources: &[SourceTensor]) -> Train {
    let axes = 1 + tape.below(3);
    let mut room = WORLD;
    let mut mesh = Vec::new();
    for _ in 0..axes {
        let size = tape.pick(&[2, 3, 1, 4, 5, 8, 16]).min(room);
        room /= size;
        mesh.push(size);
    }
    let mixed = tape.one_in(4);
    let style: Vec<u32> = (0..axes).map(|_| tape.below(6) as u32).collect();
    let placements = sources.iter().map(|s| {
        let dims = s.shape.len() as u64;
        let axis = |axis: usize| {
            let kind = if mixed { tape.below(6) as u32 } else { style[axis] };
            match kind {
                _ if dims == 0 || s.name.ends_with("_scale_inv") => Placement::Replicate,
                0..=2 => Placement::Shard(0),
                3 => Placement::Replicate,
                4 => Placement::Shard(1 % dims),
                _ => {
                    let split = mesh.get(axis + 1).copied().unwrap_or(2);
                    Placement::StridedShard { dim: 0, split }
                }
            }
        };
        (0..mesh.len()).map(axis).collect()
    });
    let placements = placements.collect();
    Train::Manifest { mesh, placements }
}
