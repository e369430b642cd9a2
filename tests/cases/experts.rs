//! Packed experts, the order of gate and up, and experts that do not spread evenly.

use crate::world::{
    C, FULL, bf16s, compiled, differences, folder, problems, receiver, run, said, shape,
};

/// Both spellings of the same experts; `order` joins the halves.
fn plan(packed: bool, order: &str, [e, i, h]: [u64; 3]) -> String {
    let sources = if packed {
        format!(
            r#"
let gate_up = mlp.src("experts.gate_up_proj", [{e}, {}, {h}]);
let gate = gate_up.slice(1, 0..{i});
let up = gate_up.slice(1, {i}..{});
let down = mlp.src("experts.down_proj", [{e}, {h}, {i}]);"#,
            2 * i,
            2 * i
        )
    } else {
        format!(
            r#"
let gate = stack(0..{e}, |e| mlp.src(`experts.${{e}}.gate_proj`, [{i}, {h}]));
let up = stack(0..{e}, |e| mlp.src(`experts.${{e}}.up_proj`, [{i}, {h}]));
let down = stack(0..{e}, |e| mlp.src(`experts.${{e}}.down_proj`, [{h}, {i}]));"#
        )
    };
    format!(
        r#"
let mlp = at("mlp");{sources}
mlp["w13"] = cat([{order}], 1).experts(ep).quantize(fp8::vllm);
mlp["w2"] = down.experts(ep).quantize(fp8::vllm);
"#
    )
}

#[test]
fn both_spellings_give_the_real_shapes() {
    for packed in [true, false] {
        let plan = compiled(&plan(packed, "gate, up", [128, 768, 2048]), "tp=8,ep=8");
        for rank in [0, 7] {
            assert_eq!(shape(&plan, rank, "mlp.w13"), [16, 1536, 2048]);
            assert_eq!(shape(&plan, rank, "mlp.w13_scale_inv"), [16, 12, 16]);
            assert_eq!(shape(&plan, rank, "mlp.w2"), [16, 2048, 768]);
            assert_eq!(shape(&plan, rank, "mlp.w2_scale_inv"), [16, 16, 6]);
        }
    }
}

#[test]
fn spellings_agree_and_the_order_is_the_plans() {
    // 16 experts of 256 over 128 behave like 128 of 768 over 2048.
    let (e, i, h) = (16, 256, 128);
    let packed = folder(&[
        bf16s("mlp.experts.gate_up_proj", &[e, 2 * i, h], |k| {
            if k / h % (2 * i) < i { 1.0 } else { 2.0 }
        }),
        bf16s("mlp.experts.down_proj", &[e, h, i], |k| (k % 5) as f32),
    ]);
    let mut single = Vec::new();
    for expert in 0..e {
        // Names of a test live as long as the process.
        let name =
            |part: &str| -> &'static str { format!("mlp.experts.{expert}.{part}_proj").leak() };
        single.push(bf16s(name("gate"), &[i, h], |_| 1.0));
        single.push(bf16s(name("up"), &[i, h], |_| 2.0));
        single.push(bf16s(name("down"), &[h, i], |k| ((expert * h * i + k) % 5) as f32));
    }
    let single = folder(&single);
    let sizes = [e as u64, i as u64, h as u64];
    let axes = "tp=8,ep=8";
    for (order, halves) in [("gate, up", [C, 0x3B92_4925]), ("up, gate", [0x3B92_4925, C])] {
        let one = run(&plan(true, order, sizes), packed.path(), axes).done();
        let two = run(&plan(false, order, sizes), single.path(), axes).done();
        for rank in 0..8 {
            for name in ["mlp.w13", "mlp.w13_scale_inv", "mlp.w2", "mlp.w2_scale_inv"] {
                assert_eq!(one.get(rank, name).bytes, two.get(rank, name).bytes, "{name}");
            }
            let scales = one.get(rank, "mlp.w13_scale_inv");
            assert_eq!(scales.shape, [2, 4, 1]);
            let [first, second] = halves;
            assert_eq!(scales.bits(), [first, first, second, second].repeat(2));
            assert!(one.get(rank, "mlp.w13").bytes.iter().all(|c| *c == FULL));
        }
    }
}

#[test]
fn another_rank_of_dimensions_is_named() {
    let plan = compiled(&plan(true, "gate, up", [128, 768, 2048]), "tp=8,ep=8");
    let held: [(&str, &str, &[u64]); 4] = [
        ("mlp.w13", "float8_e4m3fn", &[16, 16, 1536, 128]),
        ("mlp.w13_scale_inv", "float32", &[16, 12, 16]),
        ("mlp.w2", "float8_e4m3fn", &[16, 2048, 768]),
        ("mlp.w2_scale_inv", "float32", &[16, 16, 6]),
    ];
    let found = differences(&plan, &[receiver(0, &held, &[])]);
    let text = said(&found);
    assert_eq!(found.len(), 1, "{text}");
    assert!(text.contains("E0409") && text.contains("4 dimensions against 3"), "{text}");
    // The operation for the layout is in the language: columns in slabs of 128.
    let plan = compiled(
        r#"
let a = at("");
a["w13"] = a.src("w13", [128, 1536, 2048]).experts(ep).reshape([-1, 1536, 16, 128]).permute([0, 2, 1, 3]);
"#,
        "tp=8,ep=8",
    );
    assert_eq!(shape(&plan, 0, "w13"), [16, 16, 1536, 128]);
}

const SIXTY: &str = r#"
let a = at("");
a["w13"] = a.src("w13", [60, 2816, 2048]).experts(ep).quantize(fp8::vllm);
"#;

/// Sixty experts of one value each, in matrices that are cheap to move.
const SIXTY_SMALL: &str = r#"at("")["w"] = at("").src("w", [60, 4, 2]).experts(ep);"#;

fn experts_of(done: &crate::world::Run, rank: usize) -> Vec<f32> {
    done.get(rank, "w").values().chunks_exact(8).map(|expert| expert[0]).collect()
}

#[test]
fn plain_placement_gives_the_first_ranks_one_more() {
    let plan = compiled(SIXTY, "tp=8,ep=8");
    let model = folder(&[bf16s("w", &[60, 4, 2], |i| (i / 8) as f32)]);
    let done = run(SIXTY_SMALL, model.path(), "tp=8,ep=8").done();
    let counts = [8, 8, 8, 8, 7, 7, 7, 7];
    let firsts = [0, 8, 16, 24, 32, 39, 46, 53];
    for rank in 0..8 {
        let (count, first) = (counts[rank], firsts[rank]);
        assert_eq!(shape(&plan, rank, "w13"), [count, 2816, 2048]);
        assert_eq!(shape(&plan, rank, "w13_scale_inv"), [count, 22, 16]);
        let wanted: Vec<f32> = (first..first + count).map(|e| e as f32).collect();
        assert_eq!(experts_of(&done, rank), wanted);
    }
}

#[test]
fn redundant_experts_are_copies() {
    let axes = "tp=8,ep=8,redundant_experts=4";
    assert_eq!(shape(&compiled(SIXTY, axes), 7, "w13"), [8, 2816, 2048]);
    let model = folder(&[bf16s("w", &[60, 4, 2], |i| (i / 8) as f32)]);
    let done = run(SIXTY_SMALL, model.path(), axes).done();
    assert_eq!(experts_of(&done, 7), [56.0, 57.0, 58.0, 59.0, 0.0, 1.0, 2.0, 3.0]);
    let (first, last) = (done.get(0, "w"), done.get(7, "w"));
    assert_eq!(first.part(0, 2), last.part(1, 2));
}

#[test]
fn load_balancing_needs_equal_counts() {
    let text = said(&problems(SIXTY, "tp=8,ep=8,eplb=1"));
    assert!(text.contains("E0303") && text.contains("60"), "{text}");
    assert!(text.contains("smallest redundant_experts that divides is 4"), "{text}");
}

#[test]
fn one_rank_with_a_slot_less_is_found() {
    let plan = compiled(SIXTY, "tp=8,ep=8,redundant_experts=4");
    let receivers: Vec<_> = (0..8)
        .map(|rank| {
            let slots = if rank == 7 { 7 } else { 8 };
            let held: [(&str, &str, &[u64]); 2] = [
                ("w13", "float8_e4m3fn", &[slots, 2816, 2048]),
                ("w13_scale_inv", "float32", &[slots, 22, 16]),
            ];
            receiver(rank, &held, &[])
        })
        .collect();
    let found = differences(&plan, &receivers);
    assert!(!found.is_empty());
    for d in &found {
        assert_eq!(d.code, "E0409");
        assert!(d.notes.iter().any(|n| n.starts_with("rank 7,")), "{:?}", d.notes);
    }
}
