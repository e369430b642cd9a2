//! Fewer KV heads than tensor-parallel ranks.

use crate::world::{
    bf16s, compiled, differences, folder, problems, receiver, run, said, shape,
};

/// 32 query heads and 4 key-value heads of 128 rows.
fn qkv(hidden: u64) -> String {
    format!(
        r#"
let a = at("");
a["qkv"] = cat([
    a.src("q", [4096, {hidden}]).heads(tp, 32),
    a.src("k", [512, {hidden}]).heads(tp, 4),
    a.src("v", [512, {hidden}]).heads(tp, 4),
]);
"#
    )
}

/// The number of a row's head, which bf16 holds exactly, plus an offset that tells q, k and v.
fn head_of(columns: usize, offset: usize) -> impl FnMut(usize) -> f32 {
    move |i| (offset + i / columns / 128) as f32
}

#[test]
fn key_value_heads_repeat_whole() {
    let quantized = qkv(2048).replace("]);\n", "]).quantize(fp8::vllm);\n");
    let plan = compiled(&quantized, "tp=8");
    assert_eq!(shape(&plan, 7, "qkv"), [768, 2048]);
    assert_eq!(shape(&plan, 7, "qkv_scale_inv"), [6, 16]);
    assert_eq!(shape(&compiled(&quantized, "tp=16"), 15, "qkv"), [512, 2048]);
    let text = said(&problems(&quantized, "tp=3"));
    assert!(text.contains("E0302") && text.contains("32 heads of 128 rows"), "{text}");

    let model = folder(&[
        bf16s("q", &[4096, 2], head_of(2, 0)),
        bf16s("k", &[512, 2], head_of(2, 100)),
        bf16s("v", &[512, 2], head_of(2, 200)),
    ]);
    for (tp, each) in [(8, 4), (16, 2)] {
        let done = run(&qkv(2), model.path(), &format!("tp={tp}")).done();
        let part = |t: usize| done.get(t, "qkv");
        for t in 0..tp {
            let values = part(t).values();
            let heads: Vec<f32> = values.chunks_exact(256).map(|head| head[0]).collect();
            assert!(values.chunks_exact(256).all(|head| head.iter().all(|v| *v == head[0])));
            let kv = t * 4 / tp;
            let q = (each * t..each * (t + 1)).map(|h| h as f32);
            let wanted = q.chain([(100 + kv) as f32, (200 + kv) as f32]);
            assert_eq!(heads, wanted.collect::<Vec<_>>(), "rank {t} of {tp}");
        }
        // Ranks 2j and 2j + 1 hold the same k and v.
        let kv_bytes = |t: usize| part(t).bytes.split_off(each * 128 * 4);
        assert_eq!(kv_bytes(6), kv_bytes(7));
    }
}

#[test]
fn half_a_head_does_not_fit_the_receiver() {
    // A plain column split gives 64 rows of k; the receiver holds a whole head of 128.
    let plan =
        compiled(r#"let a = at(""); a["k"] = a.src("k", [512, 2048]).shard(0, tp);"#, "tp=8");
    let held: [(&str, &str, &[u64]); 1] = [("k", "bfloat16", &[128, 2048])];
    let text = said(&differences(&plan, &[receiver(0, &held, &[])]));
    assert!(text.contains("E0409") && text.contains("[128, 2048]"), "{text}");
    assert!(text.contains("[64, 2048]"), "{text}");
    // With the rule for heads, a count that does not fit names the size of a head.
    let rule = r#"let a = at(""); a["k"] = a.src("k", [512, 2048]).heads(tp, 4);"#;
    let text = said(&problems(rule, "tp=6"));
    assert!(text.contains("4 heads of 128 rows"), "{text}");
}

#[test]
fn norms_over_heads_repeat_like_their_heads() {
    let plan = r#"
let a = at("");
a["q_norm"] = a.src("q_norm", [6144]).heads(tp, 48);
a["k_norm"] = a.src("k_norm", [1024]).heads(tp, 8);
"#;
    let model = folder(&[
        bf16s("q_norm", &[6144], head_of(1, 0)),
        bf16s("k_norm", &[1024], head_of(1, 0)),
    ]);
    let done = run(plan, model.path(), "tp=16").done();
    for t in 0..16 {
        let heads = |name: &str| -> Vec<f32> {
            done.get(t, name).values().chunks_exact(128).map(|head| head[0]).collect()
        };
        assert_eq!(heads("q_norm"), [3 * t, 3 * t + 1, 3 * t + 2].map(|h| h as f32));
        assert_eq!(heads("k_norm"), [(t / 2) as f32]);
    }
}

#[test]
fn biases_follow_the_order_of_the_fused_weight() {
    let plan = r#"
let a = at("");
a["qkv.bias"] = cat([
    a.src("q", [12288]).heads(tp, 96),
    a.src("k", [1024]).heads(tp, 8),
    a.src("v", [1024]).heads(tp, 8),
]);
"#;
    let model = folder(&[
        bf16s("q", &[12288], head_of(1, 0)),
        bf16s("k", &[1024], head_of(1, 100)),
        bf16s("v", &[1024], head_of(1, 200)),
    ]);
    let done = run(plan, model.path(), "tp=8").done();
    for t in 0..8 {
        let bias = done.get(t, "qkv.bias");
        assert_eq!(bias.shape, [1792]);
        let heads: Vec<f32> = bias.values().chunks_exact(128).map(|head| head[0]).collect();
        let q = (12 * t..12 * t + 12).map(|h| h as f32);
        let wanted: Vec<f32> = q.chain([(100 + t) as f32, (200 + t) as f32]).collect();
        assert_eq!(heads, wanted);
    }
    let text = said(&problems(&plan.replace("]);", "]).quantize(fp8::vllm);"), "tp=8"));
    assert!(text.contains("E0206"), "a bias is never quantized: {text}");
}
