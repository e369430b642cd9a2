//! A value that is not finite, in the shard of any one trainer rank.

use kernelcast::backend::cpu::FiniteCheck;
use kernelcast::dtype::DType;

use crate::world::{Case, same};

/// Ranks of 300 rows: tiles of rows 256 to 384 and 512 to 640 lie on two each.
fn case() -> Case {
    let text = "
        b[\"before\"] = b.src(\"u\", [90, 40]).quantize(fp8::vllm);
        b[\"p\"] = b.src(\"w\", [900, 130]).quantize(fp8::vllm);
        b[\"after\"] = b.src(\"v\", [90], f32);";
    Case::new(text, "fsdp=3", "tp=2")
        .with("u", DType::Bf16, &[90, 40])
        .with("w", DType::Bf16, &[900, 130])
        .with("v", DType::F32, &[90])
}

/// First, middle and last rank; inside and outside of tiles that they share.
const PLACES: [[u64; 2]; 6] =
    [[10, 3], [299, 0], [300, 129], [450, 64], [600, 128], [899, 129]];
const NAN: [u8; 2] = 0x7fc0u16.to_le_bytes();
const MINUS_INF: [u8; 2] = 0xff80u16.to_le_bytes();

fn refused(case: &Case, message: &str) {
    let compiled = case.compile().expect("the plan is right");
    for finite in [FiniteCheck::During, FiniteCheck::Before] {
        let e = case.run(&compiled, finite).expect_err("it is not finite");
        assert_eq!((e.exit_code(), e.diagnostics.len()), (1, 1), "{finite:?}");
        let found = &e.diagnostics[0];
        assert_eq!((found.code, found.message.as_str()), ("E0602", message), "{finite:?}");
    }
}

#[test]
fn any_one_shard_refuses_the_update_and_gives_the_global_index() {
    for at in PLACES {
        let mut one = case();
        one.set("w", &at, &NAN);
        refused(&one, &format!("w has 1 non-finite value: NaN at {at:?}"));
        one.set("w", &at, &MINUS_INF);
        refused(&one, &format!("w has 1 non-finite value: -Inf at {at:?}"));
    }
    let mut vector = case();
    vector.set("v", &[61], &f32::INFINITY.to_le_bytes());
    refused(&vector, "v has 1 non-finite value: +Inf at [61]");
}

#[test]
fn values_of_several_ranks_are_counted_together() {
    let mut all = case();
    PLACES.iter().for_each(|at| all.set("w", at, &NAN));
    refused(&all, "w has 6 non-finite values, the first NaN at [10, 3]");
}

#[test]
fn a_strided_or_column_shard_gives_the_global_index_too() {
    let [row, column] = [257u64, 131];
    for placement in ["S(1)", "SS(0,2)"] {
        let mut one = Case::new(
            "b[\"p\"] = b.src(\"w\", [301, 200], f16).quantize(fp8::prime_rl);",
            "",
            "tp=1",
        )
        .with("w", DType::F16, &[301, 200])
        .placed(&[("fsdp", 3)], &[("w", placement)]);
        one.set("w", &[row, column], &0x7e00u16.to_le_bytes());
        refused(&one, &format!("w has 1 non-finite value: NaN at [{row}, {column}]"));
    }
}

#[test]
fn what_is_let_through_is_that_of_the_unsharded_update() {
    let halves = "
        let w = b.src(\"w\", [900, 130]);
        b[\"a\"] = w.quantize(fp8::deepgemm).scales();
        b[\"b\"] = w.quantize(fp8::prime_rl).dequantize(f32).quantize(fp8::vllm);
        b[\"c\"] = w.quantize(fp8::ue8m0.scales(e8m0)).refine(64);
        b[\"d\"] = w.shard(1, tp).quantize(fp8::vllm).dequantize(bf16);
        b[\"e\"] = w.shard(0, tp).to(f32);
        drop(\"u\"); drop(\"v\");";
    for at in PLACES {
        for bits in [NAN, MINUS_INF, 0xffb1u16.to_le_bytes()] {
            let mut plain = case();
            plain.set("w", &at, &bits);
            let mut other = plain.clone();
            other.text = format!("let b = at(\"\");{halves}");
            for one in [plain, other] {
                let compiled = one.compile().unwrap_or_else(|e| panic!("{e:#?}"));
                let (memory, report) =
                    one.run(&compiled, FiniteCheck::Allow).expect("it is let through");
                let (expected, single) = one.unsharded(FiniteCheck::Allow);
                same(&memory, &expected, "the unsharded update");
                assert_eq!(report.non_finite, single.non_finite);
                assert_eq!(report.non_finite[0].first, at);
            }
        }
    }
}
