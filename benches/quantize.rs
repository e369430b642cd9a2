//! Block quantization from memory to memory, beside a plain copy of the same bytes.
//!
//! The copy reads two bytes and writes one for each element, as bf16 to e4m3fn does. All
//! buffers are far larger than the caches.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kernelcast::fp8::tile::quantize_matrix;
use kernelcast::fp8::{Recipe, RecipeKind, Values};
use rayon::prelude::*;

const ROWS: usize = 16_384;
const COLS: usize = 8_192;
const BLOCK: usize = 128;
const GRID_COLS: usize = COLS / BLOCK;
/// Elements of a band, the piece that one thread takes: a row of tiles.
const BAND: usize = BLOCK * COLS;

/// A matrix of 256 MiB of bf16 bits, and where its codes and scales go.
struct Buffers {
    input: Vec<u16>,
    codes: Vec<u8>,
    scales: Vec<f32>,
}

fn buffers() -> Buffers {
    let mut state = 1u32;
    let input = (0..ROWS * COLS).map(|_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        // Either sign, magnitudes from 2^-15 to 2: the spread of weights.
        (state >> 16) as u16 & 0x87ff | 0x3800
    });
    Buffers {
        input: input.collect(),
        // Not zero, so that every page is there before the clock runs.
        codes: vec![1; ROWS * COLS],
        scales: vec![1.0; ROWS / BLOCK * GRID_COLS],
    }
}

fn copy_band(input: &[u16], codes: &mut [u8]) {
    for (code, &x) in codes.iter_mut().zip(input) {
        *code = x as u8;
    }
}

fn copy(b: &mut Buffers, parallel: bool) {
    if parallel {
        let bands = b.codes.par_chunks_mut(BAND).zip(b.input.par_chunks(BAND));
        bands.for_each(|(codes, input)| copy_band(input, codes));
    } else {
        copy_band(&b.input, &mut b.codes);
    }
}

fn quantize(recipe: &Recipe, b: &mut Buffers, parallel: bool) {
    let band = |input: &[u16], codes: &mut [u8], scales: &mut [f32]| {
        let rows = input.len() / COLS;
        quantize_matrix(recipe, Values::Bf16(input), rows, COLS, codes, scales)
    };
    if parallel {
        let bands = b.codes.par_chunks_mut(BAND).zip(b.input.par_chunks(BAND));
        let bands = bands.zip(b.scales.par_chunks_mut(GRID_COLS));
        let amax = bands.map(|((codes, input), scales)| band(input, codes, scales)).max();
        black_box(amax);
    } else {
        black_box(band(&b.input, &mut b.codes, &mut b.scales));
    }
}

/// The shortest of eleven copies and of as many quantizations, run in turn, so that other work
/// on the machine disturbs both alike.
fn shortest(recipe: &Recipe, b: &mut Buffers, parallel: bool) -> (Duration, Duration) {
    let mut best = (Duration::MAX, Duration::MAX);
    for _ in 0..11 {
        let start = Instant::now();
        copy(b, parallel);
        best.0 = best.0.min(start.elapsed());
        let start = Instant::now();
        quantize(recipe, b, parallel);
        best.1 = best.1.min(start.elapsed());
    }
    best
}

fn compare(c: &mut Criterion) {
    let mut b = buffers();
    let bytes = (ROWS * COLS * 3) as u64;
    let threads = rayon::current_num_threads();
    for (label, parallel) in
        [("one thread".to_string(), false), (format!("{threads} threads"), true)]
    {
        let speed = |time: Duration| bytes as f64 / time.as_secs_f64() / 1e9;
        let mut group = c.benchmark_group(format!("quantize, {label}"));
        group.throughput(Throughput::Bytes(bytes)).sample_size(10);
        group.bench_function("copy", |bench| bench.iter(|| copy(&mut b, parallel)));
        for kind in RecipeKind::ALL {
            let recipe = Recipe::new(kind);
            let (copy_time, time) = shortest(&recipe, &mut b, parallel);
            let ratio = copy_time.as_secs_f64() / time.as_secs_f64();
            println!(
                "{label}: {recipe} {:.1} GB/s, {ratio:.2} of the speed of a copy ({:.1} GB/s)",
                speed(time),
                speed(copy_time)
            );
            group.bench_function(recipe.name(), |bench| {
                bench.iter(|| quantize(&recipe, &mut b, parallel));
            });
        }
    }
}

criterion_group!(benches, compare);
criterion_main!(benches);
