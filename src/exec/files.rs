//! The two ends of a file run: a checkpoint's tensors, and one file for each inference rank.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::backend::cpu::{Rows, Sink, Strided};
use crate::compile::Compiled;
use crate::diag::Diagnostic;
use crate::dtype::DType;
use crate::error::Result;
use crate::io::{Checkpoint, RankFile, TensorEntry, rank_file};
use crate::lower::{Part, Program, RankProgram, TargetKind};
use crate::shard::Storage;
use crate::topo::{Coords, InferMesh};

/// Whether the run was asked to stop.
#[derive(Clone)]
pub(super) struct Stop(pub(super) Arc<AtomicBool>);

impl Stop {
    pub(super) fn check(&self) -> std::result::Result<(), Diagnostic> {
        if !self.0.load(Ordering::Relaxed) {
            return Ok(());
        }
        let d = Diagnostic::error("E0608", "the run was interrupted");
        Err(d.note("nothing was published; what was written so far is removed"))
    }
}

/// The program's sources as tensors of an open checkpoint.
pub(super) struct FileRows<'a> {
    stop: Stop,
    checkpoint: &'a Checkpoint,
    tensors: Vec<&'a TensorEntry>,
}

impl<'a> FileRows<'a> {
    pub(super) fn bind(
        program: &Program,
        checkpoint: &'a Checkpoint,
        stop: Stop,
    ) -> Result<Self> {
        let found = program.sources.iter().map(|s| {
            let tensor = checkpoint.get(&s.name).ok_or_else(|| missing(&s.name))?;
            let same = s.dtype.reads(&tensor.dtype_name) && tensor.shape[..] == s.shape[..];
            if same { Ok(tensor) } else { Err(missing(&s.name)) }
        });
        let tensors: std::result::Result<Vec<_>, Diagnostic> = found.collect();
        Ok(FileRows { stop, checkpoint, tensors: tensors? })
    }
}

fn missing(name: &str) -> Diagnostic {
    Diagnostic::error(
        "E0401",
        format!("{name} is not in the checkpoint as it was compiled for"),
    )
}

impl Rows for FileRows<'_> {
    fn read(
        &self,
        storage: Storage,
        rows: Strided,
        buf: &mut [u8],
    ) -> std::result::Result<(), Diagnostic> {
        self.stop.check()?;
        let Storage::Source(id) = storage else {
            return Err(Diagnostic::error("E0502", "a file run reads landed parameters"));
        };
        let tensor = self.tensors[id as usize];
        if rows.rows == 1 {
            return self.checkpoint.read_at(tensor, rows.offset, buf);
        }
        self.checkpoint.read_rows(
            tensor,
            rows.offset,
            rows.row_bytes,
            rows.stride,
            rows.rows,
            buf,
        )
    }
}

/// One rank's file, and which tensor of it each storage is.
pub(super) struct FileSink {
    stop: Stop,
    pub(super) file: RankFile,
    /// Path below the output folder.
    pub(super) name: String,
    pub(super) tensors: Vec<(String, DType, Vec<u64>)>,
    /// Index of the rank in the program.
    pub(super) rank: usize,
    /// First tensor of each target; scales follow values.
    first: Vec<usize>,
}

impl FileSink {
    /// Makes a rank's file below an output's staging folder.
    pub(super) fn create(
        staging: &Path,
        compiled: &Compiled,
        rank: &RankProgram,
        stop: Stop,
    ) -> Result<Self> {
        let mut tensors = Vec::new();
        let mut first = Vec::with_capacity(rank.targets.len());
        for target in &rank.targets {
            first.push(tensors.len());
            if target.kind == TargetKind::Parameter {
                let storages = target.storages.iter();
                tensors.extend(storages.map(|s| (s.name.clone(), s.dtype, s.shape.to_vec())));
            }
        }
        let name = file_name(&compiled.mesh, rank.coords);
        let file = rank_file(staging, rank.rank.0, &name, &tensors)?;
        let path = format!("rank-{}/{name}", rank.rank);
        Ok(FileSink { stop, file, name: path, tensors, rank: rank.rank.0 as usize, first })
    }
}

impl Sink for FileSink {
    fn write(
        &self,
        target: usize,
        part: Part,
        rows: Strided,
        bytes: &[u8],
    ) -> std::result::Result<(), Diagnostic> {
        self.stop.check()?;
        let tensor = self.first[target] + usize::from(part == Part::Scales);
        let parts = bytes.chunks_exact((rows.row_bytes as usize).max(1)).enumerate();
        for (i, row) in parts {
            self.file.write_at(tensor, rows.offset + i as u64 * rows.stride, row)?;
        }
        Ok(())
    }
}

/// vLLM's sharded_state file names.
fn file_name(mesh: &InferMesh, at: Coords) -> String {
    match mesh.pp {
        1 => format!("model-rank-{}-part-0.safetensors", at.tp),
        _ => format!("model-pp-{}-tp-{}-part-0.safetensors", at.pp, at.tp),
    }
}
