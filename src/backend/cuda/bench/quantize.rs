//! How fast one GPU quantizes.

use serde::Serialize;

use super::{NOISE, noise_bytes, timed};
use crate::backend::cuda::Fallible;
use crate::backend::cuda::driver::{self, Gpu};
use crate::backend::cuda::jobs::{self, Job};
use crate::backend::cuda::kernels::Kernels;
use crate::backend::cuda::table::Table;
use crate::error::{Error, Result};
use crate::fp8::{Recipe, RecipeKind};

/// Quantization on one GPU against a copy of the same bytes read and written.
#[derive(Clone, Debug, Serialize)]
pub struct Quantized {
    pub schema: u32,
    pub card: String,
    pub recipe: &'static str,
    pub rows: u64,
    pub cols: u64,
    pub seconds: f64,
    /// Bytes read and written a second.
    pub rate: f64,
    pub copy_rate: f64,
}

/// Quantizes a bf16 matrix of `rows` x `cols`, multiples of 128, in place of the GPU's memory.
///
/// # Errors
/// E0605 for a GPU, NVRTC or memory that is missing.
pub fn quantize(recipe: RecipeKind, rows: u64, cols: u64) -> Result<Quantized> {
    let measure = || -> Fallible<Quantized> {
        driver::load()?;
        let gpu = Gpu::open(0)?;
        let (kernels, stream) = (Kernels::load(&gpu)?, gpu.stream()?);
        let (read, codes) = (2 * rows * cols, rows * cols);
        let scales = 4 * (rows / 128) * (cols / 128);
        let (from, to) = (gpu.alloc(read)?, gpu.alloc(codes + scales)?);
        let mut filled = NOISE.min(read);
        stream.upload(from.address(), &noise_bytes(filled, 1))?;
        while filled < read {
            let bytes = filled.min(read - filled);
            stream.copy(from.address() + filled, from.address(), bytes)?;
            filled += bytes;
        }
        let table = tiles(recipe, rows, cols, from.address(), to.address());
        let memory = gpu.alloc(table.bytes())?;
        stream.upload(memory.address(), &table.image(memory.address()))?;
        let words = gpu.alloc(4)?;
        let (at, bad, jobs) =
            (memory.address(), words.address(), table.lists().map(<[_]>::len));
        let seconds =
            timed(&gpu, &stream, || kernels.launch(&stream, jobs, at, bad, u32::MAX))?;
        let half = read / 2;
        let copy =
            timed(&gpu, &stream, || stream.copy(from.address() + half, from.address(), half))?;
        let moved = (read + codes + scales) as f64;
        Ok(Quantized {
            schema: 1,
            card: gpu.name().to_owned(),
            recipe: recipe.name(),
            rows,
            cols,
            seconds,
            rate: moved / seconds,
            copy_rate: read as f64 / copy,
        })
    };
    measure().map_err(Error::device)
}

fn tiles(kind: RecipeKind, rows: u64, cols: u64, from: u64, to: u64) -> Table {
    let recipe = Recipe::new(kind);
    let mut table = Table::default();
    for row in 0..rows / 128 {
        for col in 0..cols / 128 {
            table.quantizations.push(Job {
                src: from + 2 * (row * 128 * cols + col * 128),
                dst: to + row * 128 * cols + col * 128,
                aux: to + rows * cols + 4 * (row * (cols / 128) + col),
                src_row: 2 * cols as u32,
                dst_row: cols as u32,
                rows: 128,
                cols: 128,
                kind: jobs::QUANTIZE,
                dtype: jobs::number(crate::dtype::DType::Bf16),
                recipe: jobs::recipe_number(kind),
                scales: jobs::scales_number(recipe.scales),
                ..Job::default()
            });
        }
    }
    table
}
