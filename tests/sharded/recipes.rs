//! Quantized values whose tiles lie on several trainer ranks.

use kernelcast::dtype::DType;

use crate::matrix;
use crate::world::Case;

const RECIPES: [&str; 4] = ["vllm", "deepgemm", "prime_rl", "ue8m0"];

/// Ranks of 60 rows: each of the two tiles in a column of 300 rows lies on three.
fn over_shared_tiles(expression: &str, dtype: DType) {
    let text = format!("b[\"p\"] = b.src(\"w\", [300, 200], {dtype}){expression};");
    for train in ["fsdp=5", "fsdp=2,tp=3"] {
        for infer in ["tp=1", "tp=2,dp=2"] {
            let case = Case::new(&text, train, infer).with("w", dtype, &[300, 200]);
            case.check();
        }
    }
}

#[test]
fn every_recipe_and_type() {
    for recipe in RECIPES {
        for dtype in [DType::Bf16, DType::F32, DType::F16] {
            over_shared_tiles(&format!(".quantize(fp8::{recipe})"), dtype);
        }
        over_shared_tiles(&format!(".quantize(fp8::{recipe}.block(32))"), DType::Bf16);
    }
    over_shared_tiles(".shard(1, tp).quantize(fp8::ue8m0.scales(e8m0))", DType::Bf16);
    over_shared_tiles(".quantize(fp8::ue8m0.scales(e8m0))", DType::F32);
}

#[test]
fn a_second_step_on_the_same_grid_needs_no_second_exchange() {
    for first in RECIPES {
        for second in RECIPES {
            let steps =
                format!(".quantize(fp8::{first}).dequantize(f32).quantize(fp8::{second})");
            over_shared_tiles(&steps, DType::Bf16);
            let case = matrix(&steps, [300, 200], "fsdp=5", "tp=1");
            // Cuts at 60, 120, 180 and 240, in two columns.
            assert_eq!(case.check().amax_bytes, 8 * 4 * 2, "{steps}");
        }
    }
    let rounded = ".quantize(fp8::prime_rl).dequantize(bf16).quantize(fp8::ue8m0)";
    over_shared_tiles(rounded, DType::Bf16);
}

#[test]
fn a_second_step_on_another_grid_needs_whole_tiles() {
    let steps = ".quantize(fp8::vllm).dequantize(f32).quantize(fp8::vllm.block(64))";
    assert_eq!(matrix(steps, [300, 200], "fsdp=5", "tp=1").refused(), ["E0308"]);
    assert_eq!(matrix(steps, [512, 200], "fsdp=4", "tp=1").check().amax_bytes, 0);
}

#[test]
fn refined_scales_codes_and_scales_alone() {
    for recipe in RECIPES {
        over_shared_tiles(&format!(".quantize(fp8::{recipe}).refine(32)"), DType::Bf16);
        over_shared_tiles(&format!(".quantize(fp8::{recipe}).codes()"), DType::Bf16);
        over_shared_tiles(&format!(".quantize(fp8::{recipe}).scales()"), DType::Bf16);
        let refined = format!(".quantize(fp8::{recipe}).refine(64).scales()");
        over_shared_tiles(&refined, DType::F32);
        let back = format!(".quantize(fp8::{recipe}).dequantize(bf16)");
        over_shared_tiles(&back, DType::Bf16);
    }
    over_shared_tiles(".quantize(fp8::ue8m0.scales(e8m0)).refine(64)", DType::Bf16);
    over_shared_tiles(".quantize(fp8::ue8m0.scales(e8m0)).scales()", DType::Bf16);
}

/// A quantized checkpoint in memory: codes with a scale a block.
fn stored(expression: &str, rows: u64, train: &str) -> Case {
    let text = format!("b[\"p\"] = b.src(\"w\", [{rows}, 200]){expression};");
    Case::new(&text, train, "tp=1").with("w", DType::E4m3, &[rows, 200]).with(
        "w_scale_inv",
        DType::F32,
        &[rows.div_ceil(128), 2],
    )
}

#[test]
fn quantized_sources_are_cut_between_blocks_or_refused() {
    let sharded = [("w", "S(0)"), ("w_scale_inv", "S(0)")];
    let whole = [("w", "S(0)"), ("w_scale_inv", "R")];
    for expression in ["", ".dequantize(bf16)", ".refine(32)"] {
        // 256 rows a rank, and two rows of scales.
        stored(expression, 512, "").placed(&[("fsdp", 2)], &sharded).check();
        // 192 rows a rank, of which the second tile's scale is the first rank's.
        let inside = stored(expression, 384, "").placed(&[("fsdp", 2)], &sharded);
        assert_eq!(inside.refused(), ["E0308"], "{expression}");
        // Scales that every rank holds go with any cut, and so they do by the rules.
        stored(expression, 384, "").placed(&[("fsdp", 2)], &whole).check();
        stored(expression, 384, "fsdp=5").check();
        stored(expression, 384, "fsdp=2,tp=2").check();
    }
    let again = ".dequantize(f32).quantize(fp8::ue8m0)";
    stored(again, 384, "fsdp=5").check();
    stored(".codes()", 384, "").placed(&[("fsdp", 2)], &sharded).check();
    stored(".scales()", 384, "").placed(&[("fsdp", 2)], &sharded).check();
}

#[test]
fn operands_of_one_element_have_one_placement() {
    let text = "b[\"p\"] = (b.src(\"x\", [30, 20]) + b.src(\"y\", [30, 20]) * 0.5);";
    let both = Case::new(text, "fsdp=4", "tp=1").with("x", DType::Bf16, &[30, 20]).with(
        "y",
        DType::Bf16,
        &[30, 20],
    );
    both.check();
    let apart = both.clone().placed(&[("fsdp", 2)], &[("x", "S(0)"), ("y", "S(1)")]);
    assert_eq!(apart.refused(), ["E0308"]);
    both.placed(&[("fsdp", 2)], &[("x", "S(0)"), ("y", "R")]).check();
}

#[test]
fn parts_of_several_sources_in_one_tile() {
    // The halves of a fused matrix do not end on the grid, and lie on two meshes' ranks.
    let text = "
        let x = b.src(\"x\", [100, 140]);
        let y = b.src(\"y\", [60, 140]);
        b[\"p\"] = cat([x, y]).pad_to(0, 128).quantize(fp8::vllm);";
    let case = Case::new(text, "fsdp=3", "tp=1").with("x", DType::Bf16, &[100, 140]).with(
        "y",
        DType::Bf16,
        &[60, 140],
    );
    case.check();
    case.clone().placed(&[("fsdp", 3)], &[("x", "S(1)"), ("y", "S(0)")]).check();
    case.placed(&[("fsdp", 4)], &[("x", "R"), ("y", "S(0)")]).check();
}
