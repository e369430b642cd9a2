//! Codes and scales against the vectors that the originals made on a GPU, bit for bit.

use kernelcast::fp8::codec::{
    bf16_to_f32, e4m3_eager, e4m3_satfinite, e8m0_decode, f16_to_f32, f32_to_bf16, f32_to_f16,
};
use kernelcast::fp8::rcp::rcp_full;
use kernelcast::fp8::tile::{
    dequantize_matrix, grid_of, quantize_matrix, quantize_tile_bf16, quantize_tile_f16,
    quantize_tile_f32,
};
use kernelcast::fp8::{Recipe, RecipeKind, ScaleFormat, Values};
use proptest::prelude::*;
use safetensors::{Dtype, SafeTensors};

/// A golden file's input, in its own type.
enum Input {
    Bf16(Vec<u16>),
    F32(Vec<f32>),
}

impl Input {
    fn values(&self) -> Values<'_> {
        match self {
            Input::Bf16(bits) => Values::Bf16(bits),
            Input::F32(numbers) => Values::F32(numbers),
        }
    }
}

/// Codes and the bits of scales.
#[derive(PartialEq)]
struct Quantized {
    codes: Vec<u8>,
    scales: Vec<u32>,
}

fn read(name: &str) -> Vec<u8> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/fp8/");
    std::fs::read(format!("{folder}{name}.safetensors")).expect("the golden file is there")
}

fn u16s(bytes: &[u8]) -> Vec<u16> {
    bytes.as_chunks().0.iter().map(|&b| u16::from_le_bytes(b)).collect()
}

fn u32s(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks().0.iter().map(|&b| u32::from_le_bytes(b)).collect()
}

fn input_of(file: &SafeTensors<'_>) -> (Input, usize, usize) {
    let view = file.tensor("input").expect("every file has an input");
    let input = match view.dtype() {
        Dtype::BF16 => Input::Bf16(u16s(view.data())),
        _ => Input::F32(u32s(view.data()).into_iter().map(f32::from_bits).collect()),
    };
    (input, view.shape()[0], view.shape()[1])
}

fn golden(file: &SafeTensors<'_>, recipe: &str) -> Quantized {
    let tensor =
        |part| file.tensor(&format!("{recipe}.{part}")).expect("every recipe is there");
    Quantized { codes: tensor("codes").data().to_vec(), scales: u32s(tensor("scales").data()) }
}

fn quantize(recipe: &Recipe, input: Values<'_>, rows: usize, cols: usize) -> Quantized {
    let (grid_rows, grid_cols) = grid_of(recipe, rows, cols);
    let mut codes = vec![0; rows * cols];
    let mut scales = vec![0.0; grid_rows * grid_cols];
    quantize_matrix(recipe, input, rows, cols, &mut codes, &mut scales);
    Quantized { codes, scales: scales.into_iter().map(f32::to_bits).collect() }
}

/// vLLM's load path: quantize with f32 scales, dequantize to f32, quantize with UE8M0.
fn two_steps(input: Values<'_>, rows: usize, cols: usize) -> Quantized {
    let first = Recipe::new(RecipeKind::Vllm);
    let Quantized { codes, scales } = quantize(&first, input, rows, cols);
    let scales: Vec<f32> = scales.into_iter().map(f32::from_bits).collect();
    let mut wide = vec![0.0; rows * cols];
    dequantize_matrix(&first, &codes, &scales, rows, cols, &mut wide);
    quantize(&Recipe::new(RecipeKind::Ue8m0), Values::F32(&wide), rows, cols)
}

fn assert_same(ours: &Quantized, golden: &Quantized, what: &str) {
    assert_eq!(ours.scales, golden.scales, "{what}: scales");
    let differ = ours.codes.iter().zip(&golden.codes).filter(|(a, b)| a != b).count();
    assert_eq!((differ, ours.codes.len()), (0, golden.codes.len()), "{what}: codes");
}

fn check_file(name: &str, recipes: &[(&str, RecipeKind)]) {
    let bytes = read(name);
    let file = SafeTensors::deserialize(&bytes).expect("the golden file is safetensors");
    let (input, rows, cols) = input_of(&file);
    for &(golden_name, kind) in recipes {
        let ours = quantize(&Recipe::new(kind), input.values(), rows, cols);
        assert_same(&ours, &golden(&file, golden_name), &format!("{name}, {golden_name}"));
    }
}

const F32_SCALES: [(&str, RecipeKind); 3] = [
    ("vllm", RecipeKind::Vllm),
    ("deepgemm", RecipeKind::Deepgemm),
    ("prime_rl", RecipeKind::PrimeRl),
];
const UE8M0: [(&str, RecipeKind); 2] =
    [("vllm_ue8m0", RecipeKind::Ue8m0), ("deepgemm_ue8m0", RecipeKind::Ue8m0)];

#[test]
fn every_recipe_gives_the_golden_codes_and_scales() {
    for name in ["dev_bf16", "dev_f32", "dev_grid_f32"] {
        check_file(name, &F32_SCALES);
        check_file(name, &UE8M0);
    }
}

#[test]
fn two_steps_give_what_vllm_holds_after_loading() {
    for name in ["dev_bf16", "dev_f32", "dev_grid_f32"] {
        let bytes = read(name);
        let file = SafeTensors::deserialize(&bytes).expect("the golden file is safetensors");
        let (input, rows, cols) = input_of(&file);
        let ours = two_steps(input.values(), rows, cols);
        assert_same(&ours, &golden(&file, "vllm_ue8m0_two_step"), name);
    }
}

#[test]
fn non_finite_weights_spread_as_in_the_originals() {
    check_file("nonfinite_bf16", &F32_SCALES);
}

#[test]
fn non_finite_weights_are_reported() {
    let bytes = read("nonfinite_bf16");
    let file = SafeTensors::deserialize(&bytes).expect("the golden file is safetensors");
    let (input, rows, cols) = input_of(&file);
    let recipe = Recipe::new(RecipeKind::Vllm);
    let (grid_rows, grid_cols) = grid_of(&recipe, rows, cols);
    let mut codes = vec![0; rows * cols];
    let mut scales = vec![0.0; grid_rows * grid_cols];
    let amax = quantize_matrix(&recipe, input.values(), rows, cols, &mut codes, &mut scales);
    assert_eq!(amax, 0x7fc0_0000);
}

#[test]
fn both_casts_of_every_bf16_are_the_golden_ones() {
    let bytes = read("e4m3_of_every_bf16");
    let file = SafeTensors::deserialize(&bytes).expect("the golden file is safetensors");
    let tensor = |name| file.tensor(name).expect("the casts are there").data().to_vec();
    let patterns = u16s(&tensor("bf16"));
    assert_eq!(patterns.len(), 65_536);
    let casts = tensor("eager").into_iter().zip(tensor("satfinite"));
    for (bits, (eager, satfinite)) in patterns.into_iter().zip(casts) {
        let x = bf16_to_f32(bits);
        assert_eq!(e4m3_eager(x), eager, "{bits:#06x}");
        assert_eq!(e4m3_satfinite(x), satfinite, "{bits:#06x}");
    }
}

#[test]
fn the_grid_file_tells_the_two_reciprocals_apart() {
    let bytes = read("dev_grid_f32");
    let file = SafeTensors::deserialize(&bytes).expect("the golden file is safetensors");
    let (vllm, deepgemm) = (golden(&file, "vllm").codes, golden(&file, "deepgemm").codes);
    assert_eq!(vllm.iter().zip(&deepgemm).filter(|(a, b)| a != b).count(), 19_784);
}

#[test]
fn e8m0_bytes_are_the_ue8m0_scales() {
    let bytes = read("dev_bf16");
    let file = SafeTensors::deserialize(&bytes).expect("the golden file is safetensors");
    let recipe = Recipe::new(RecipeKind::Ue8m0).with_scales(ScaleFormat::E8m0);
    let recipe = recipe.expect("UE8M0 scales are powers of two");
    for bits in golden(&file, "vllm_ue8m0").scales {
        let byte = recipe.scale_byte(f32::from_bits(bits));
        assert_eq!(e8m0_decode(byte).to_bits(), bits);
    }
}

/// The definition of a recipe, element by element, in the words of its documentation.
fn defined(recipe: &Recipe, x: &[f32], rows: usize, cols: usize) -> Quantized {
    let block = recipe.block as usize;
    let (grid_rows, grid_cols) = grid_of(recipe, rows, cols);
    let mut amax = vec![0u32; grid_rows * grid_cols];
    let tile_of = |i: usize| i / cols / block * grid_cols + i % cols / block;
    for (i, x) in x.iter().enumerate() {
        let tile = &mut amax[tile_of(i)];
        *tile = (*tile).max(x.abs().to_bits());
    }
    let scales: Vec<f32> = amax.into_iter().map(|bits| recipe.scale_of(bits)).collect();
    let codes = x.iter().enumerate().map(|(i, &x)| {
        let s = scales[tile_of(i)];
        e4m3_satfinite(match recipe.kind {
            RecipeKind::Vllm => x * rcp_full(s),
            RecipeKind::Deepgemm | RecipeKind::Ue8m0 => x * (1.0 / s),
            RecipeKind::PrimeRl => x / s,
        })
    });
    Quantized { codes: codes.collect(), scales: scales.iter().map(|s| s.to_bits()).collect() }
}

fn check_defined(recipe: &Recipe, bits: &[u32], rows: usize, cols: usize) {
    let wide: Vec<f32> = bits.iter().map(|&b| f32::from_bits(b)).collect();
    let bf16: Vec<u16> = bits.iter().map(|&b| (b >> 16) as u16).collect();
    let f16: Vec<u16> = bits.iter().map(|&b| b as u16).collect();
    let sources = [
        (Values::F32(&wide), wide.clone()),
        (Values::Bf16(&bf16), bf16.iter().map(|&b| bf16_to_f32(b)).collect()),
        (Values::F16(&f16), f16.iter().map(|&b| f16_to_f32(b)).collect()),
    ];
    for (values, numbers) in sources {
        let what = format!("{recipe}, block {}, {rows} x {cols}", recipe.block);
        let ours = quantize(recipe, values, rows, cols);
        assert_same(&ours, &defined(recipe, &numbers, rows, cols), &what);
    }
}

#[test]
fn smaller_blocks_follow_the_definition() {
    for name in ["dev_bf16", "dev_f32", "dev_grid_f32"] {
        let bytes = read(name);
        let file = SafeTensors::deserialize(&bytes).expect("the golden file is safetensors");
        let (input, rows, cols) = input_of(&file);
        let numbers: Vec<f32> = match &input {
            Input::Bf16(bits) => bits.iter().map(|&b| bf16_to_f32(b)).collect(),
            Input::F32(numbers) => numbers.clone(),
        };
        for (kind, block) in RecipeKind::ALL.into_iter().flat_map(|k| [(k, 64), (k, 32)]) {
            let recipe = Recipe::new(kind).with_block(block).expect("the block exists");
            let ours = quantize(&recipe, input.values(), rows, cols);
            let golden = defined(&recipe, &numbers, rows, cols);
            assert_same(&ours, &golden, &format!("{name}, {recipe}, block {block}"));
        }
    }
}

#[test]
fn the_documented_example_holds() {
    let recipe = Recipe::new(RecipeKind::Vllm);
    let mut codes = [0; 2];
    let tile = quantize_tile_f32(&recipe, &[448.0, 1.0], 2, 1, 2, &mut codes, 2);
    assert_eq!((tile.scale, codes), (1.0, [0x7e, 0x38]));
    let bf16 = [448.0, 1.0].map(f32_to_bf16);
    assert_eq!(quantize_tile_bf16(&recipe, &bf16, 2, 1, 2, &mut codes, 2), tile);
    let f16 = [448.0, 1.0].map(f32_to_f16);
    assert_eq!(quantize_tile_f16(&recipe, &f16, 2, 1, 2, &mut codes, 2), tile);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any shape and any bits, not only finite ones.
    #[test]
    fn any_matrix_follows_the_definition(
        kind in 0usize..4,
        block in 0usize..3,
        (rows, cols, bits) in (1usize..80, 1usize..200).prop_flat_map(|(rows, cols)| {
            (Just(rows), Just(cols), prop::collection::vec(any::<u32>(), rows * cols))
        }),
    ) {
        let recipe = Recipe::new(RecipeKind::ALL[kind]).with_block(Recipe::BLOCKS[block]);
        check_defined(&recipe.expect("the block exists"), &bits, rows, cols);
    }

    /// Finite numbers of like size, of which most codes are neither zero nor the largest.
    #[test]
    fn any_weight_follows_the_definition(
        kind in 0usize..4,
        (rows, cols, bits) in (1usize..80, 1usize..200).prop_flat_map(|(rows, cols)| {
            let bits = any::<u32>().prop_map(|b| b & 0x87ff_bbff | 0x3800_2000);
            (Just(rows), Just(cols), prop::collection::vec(bits, rows * cols))
        }),
    ) {
        check_defined(&Recipe::new(RecipeKind::ALL[kind]), &bits, rows, cols);
    }
}
