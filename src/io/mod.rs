//! Files in and out: safetensors checkpoints, rank files, JSON manifests.
//! Knows nothing of plans, shards or devices.

mod checkpoint;
mod checksum;
mod cluster;
mod config;
mod fault;
mod header;
mod index;
mod json;
mod manifest;
mod output;
mod place;
mod rank_file;
mod rows;

pub(crate) use fault::read_whole;

pub use checkpoint::{Checkpoint, TensorEntry};
pub use checksum::checksum_tensor;
pub use cluster::read_cluster;
pub use config::{read_config, read_json};
pub use manifest::{
    Alias, ExpertMapFile, ParamEntry, ReceiverManifest, ReceiverTopology, SourceManifest,
    SourceTensor,
};
pub use output::{OutputDir, rank_file};
pub use rank_file::RankFile;
