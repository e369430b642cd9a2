//! Plans that would exhaust a later stage are refused where they are written.

use kernelcast::dtype::DType;

use crate::cases::{Case, SourceTensor};
use crate::world::{Values, World, compile_case};

fn check(body: &str, sources: &[(&str, DType, &[u64])], expected: &[&str]) {
    let sources = sources.iter().map(|(name, dtype, shape)| SourceTensor {
        name: format!("m.{name}"),
        dtype: *dtype,
        shape: shape.to_vec(),
    });
    let case = Case {
        text: format!("let b = at(\"m\"); {body} b[\"p\"] = x;"),
        infer: "tp=1".to_owned(),
        block: 32,
        sources: sources.collect(),
        experts: Default::default(),
        train: Default::default(),
    };
    let world = World::random(&case.sources, 1, Values::Finite);
    let problems = compile_case(&case, &world).err().unwrap_or_default();
    let codes: Vec<_> = problems.iter().map(|d| d.code).collect();
    assert_eq!(codes, expected, "{body}");
}

#[test]
fn deep_and_doubled_expressions() {
    let small: &[(&str, DType, &[u64])] = &[("s", DType::Bf16, &[4, 4])];
    let deep = "let x = b.src(\"s\", [4, 4]); for i in 0..9000 { x = x * 1.5; }";
    check(deep, small, &["E0105"]);
    let doubled = "let x = b.src(\"s\", [4, 4]); for i in 0..60 { x = x + x; }";
    check(doubled, small, &["E0105"]);
    check("let x = b.src(\"s\", [4, 4]); for i in 0..200 { x = x * 1.5; }", small, &[]);
}

#[test]
fn block_scales_of_a_vector() {
    let vector: &[(&str, DType, &[u64])] =
        &[("s", DType::E4m3, &[64]), ("s_scale_inv", DType::F32, &[2])];
    check("let x = b.src(\"s\", [64]);", vector, &["E0206"]);
}

#[test]
fn dequantized_values_move_by_rows_and_columns_of_their_tiles() {
    let matrix: &[(&str, DType, &[u64])] =
        &[("s", DType::E4m3, &[96, 64]), ("s_scale_inv", DType::F32, &[3, 2])];
    let moved = |call: &str| format!("let x = b.src(\"s\", [96, 64]).dequantize(bf16).{call};");
    check(&moved("reshape([2, 48, 64]).permute([0, 2, 1])"), matrix, &[]);
    check(&moved("reshape([96, 4, 16])"), matrix, &[]);
    check(&moved("reshape([2, 48, 64]).permute([1, 0, 2])"), matrix, &["E0501"]);
    check(&moved("reshape([-1])"), matrix, &["E0501"]);
}
