//! Ranks: the inference mesh, the trainer mesh, who holds what of a tensor, and the machines
//! under them. Knows shapes, but no expressions.

mod cluster;
mod infer;
mod layout;
mod placement;
mod train;

pub use cluster::{Cluster, Peer};
pub use infer::{Axis, Coords, InferMesh, RankId, stage_layers};
pub use layout::{Cut, Held, Layout};
pub use placement::Placement;
pub use train::{ExpertRole, MAX_TRAINERS, SourceRole, TrainMesh};
