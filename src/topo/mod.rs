//! Ranks: the inference mesh, the trainer mesh, and who sits where. Knows nothing of tensors.

mod infer;
mod train;

pub use infer::{Axis, Coords, InferMesh, RankId};
pub use train::TrainMesh;
