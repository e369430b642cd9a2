//! Experts over trainer ranks that become experts over inference ranks.

use kernelcast::dtype::DType;

use crate::world::Case;

const EXPERTS: u64 = 8;

/// Attention with experts: one source an expert, or all in one.
fn mixture(fused: bool, train: &str, infer: &str) -> Case {
    let (w13, w2) = if fused {
        ("m.src(\"w13\", [8, 160, 96])".to_owned(), "m.src(\"w2\", [8, 96, 80])".to_owned())
    } else {
        let stacked = |name: &str, shape: &str| {
            format!("stack(0..8, |e| m.src(`${{e}}.{name}`, {shape}))")
        };
        (stacked("w13", "[160, 96]"), stacked("w2", "[96, 80]"))
    };
    let text = format!(
        "
        let m = at(\"experts\");
        m[\"w13\"] = {w13}.experts(ep).quantize(fp8::vllm);
        m[\"w2\"] = {w2}.experts(ep).quantize(fp8::vllm.block(64));
        b[\"router\"] = b.src(\"router\", [8, 96], f32);
        b[\"qkv\"] = b.src(\"qkv\", [144, 96]).shard(0, tp).quantize(fp8::vllm);"
    );
    let mut case = Case::new(&text, train, infer)
        .with("router", DType::F32, &[EXPERTS, 96])
        .with("qkv", DType::Bf16, &[144, 96]);
    if fused {
        case = case.with("experts.w13", DType::Bf16, &[EXPERTS, 160, 96]);
        return case.with("experts.w2", DType::Bf16, &[EXPERTS, 96, 80]);
    }
    for e in 0..EXPERTS {
        case = case.with(&format!("experts.{e}.w13"), DType::Bf16, &[160, 96]);
        case = case.with(&format!("experts.{e}.w2"), DType::Bf16, &[96, 80]);
    }
    case
}

#[test]
fn experts_over_four_ranks_become_eight_and_eight_become_four() {
    for fused in [false, true] {
        for dim in [0, 1] {
            for (train, infer) in [
                ("fsdp=4,ep=4", "tp=8,ep=8"),
                ("fsdp=8,ep=4", "tp=8,ep=8"),
                ("fsdp=8,ep=8", "tp=4,ep=4"),
                ("fsdp=8,ep=2", "tp=2,dp=2,ep=4"),
                ("fsdp=6,ep=3", "tp=2,ep=2"),
                ("fsdp=4,ep=2,tp=2", "tp=2,ep=2"),
                ("dp_replicate=2,fsdp=4,ep=4", "tp=2"),
            ] {
                let train = format!("{train},expert_fsdp_dim={dim}");
                mixture(fused, &train, infer).check();
            }
        }
    }
}

#[test]
fn the_first_dimension_of_an_expert_is_what_fsdp_shares() {
    // Two ranks share an expert: of w13's tiles of 128 and 32 rows they cut the first, at 80; of
    // w2's of 64 and 32 the first, at 48, twice. Nobody else needs to agree on experts. Rows of
    // qkv are 18 a rank: cuts of its four parts of 36 rows lie at 18.
    let report = mixture(false, "fsdp=8,ep=4,expert_fsdp_dim=1", "tp=4,ep=4").check();
    assert_eq!(report.amax_bytes, 8 * (8 * (1 + 2) + 4));
    // With experts cut again each lies on one rank.
    let report = mixture(false, "fsdp=8,ep=4,expert_fsdp_dim=0", "tp=4,ep=4").check();
    assert_eq!(report.amax_bytes, 8 * 4);
    let report = mixture(true, "fsdp=8,ep=4,expert_fsdp_dim=0", "tp=4,ep=4").check();
    assert_eq!(report.amax_bytes, 8 * 4);
}

#[test]
fn data_parallel_inference_has_attention_twice_and_each_expert_once() {
    for train in ["fsdp=5", "fsdp=4,ep=2", "dp_replicate=2,fsdp=2,ep=2", "pp=2,fsdp=2"] {
        for fused in [false, true] {
            let report = mixture(fused, train, "tp=2,dp=2,ep=4").check();
            // Relays carry what more than one rank holds: half of qkv, and the router thrice.
            let qkv = 144 * 96 + 2 * 4;
            assert_eq!(report.relayed_bytes, qkv + 3 * 8 * 96 * 4, "{train}");
        }
    }
}

#[test]
fn experts_that_do_not_divide() {
    for train in ["fsdp=3", "fsdp=3,ep=3", "fsdp=9,ep=3", "fsdp=10,ep=5"] {
        for fused in [false, true] {
            mixture(fused, train, "tp=3,ep=3").check();
        }
    }
}

#[test]
fn quantized_experts_keep_their_codes_wherever_they_are_cut() {
    let text = "
        let m = at(\"experts\");
        m[\"w\"] = m.src(\"w\", [8, 256, 200]).experts(ep).refine(64);
        m[\"v\"] = stack(0..8, |e| m.src(`${e}.v`, [200, 256])).experts(ep).dequantize(bf16);";
    for train in ["fsdp=8,ep=4", "fsdp=6,ep=2,expert_fsdp_dim=0", "fsdp=5", "pp=2,fsdp=4,ep=2"]
    {
        let mut case = Case::new(text, train, "tp=2,ep=2")
            .with("experts.w", DType::E4m3, &[EXPERTS, 256, 200])
            .with("experts.w_scale_inv", DType::F32, &[EXPERTS, 2, 2]);
        for e in 0..EXPERTS {
            case = case.with(&format!("experts.{e}.v"), DType::E4m3, &[200, 256]).with(
                &format!("experts.{e}.v_scale_inv"),
                DType::Bf16,
                &[2, 2],
            );
        }
        assert_eq!(case.check().amax_bytes, 0, "{train}");
    }
}
