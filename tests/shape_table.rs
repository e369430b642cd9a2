//! What the shape table looks like: folded ranks and layers, scales, derived rows, both styles.

use std::path::Path;
use std::rc::Rc;

use insta::assert_snapshot;
use kernelcast::cli::{PLAIN_WIDTH, TableStyle, render_table};
use kernelcast::compile::{CompileInputs, Compiled, ModelInput, compile};
use kernelcast::dtype::DType;
use kernelcast::load::{FolderModules, read_plan};
use kernelcast::script::{Catalog, CatalogEntry, Limits, ModuleFiles, NoModules};
use kernelcast::topo::{InferMesh, RankId, TrainMesh};
use serde_json::json;

/// Tensors that the trainer holds: name, type, shape.
struct Tensors(Vec<(String, DType, Vec<u64>)>);

impl Catalog for Tensors {
    fn find(&self, name: &str) -> Option<CatalogEntry> {
        self.0.iter().find(|t| t.0 == name).map(|(_, dtype, shape)| CatalogEntry {
            dtype: Some(*dtype),
            dtype_name: dtype.torch_name().to_owned(),
            shape: shape.as_slice().into(),
        })
    }

    fn names(&self) -> Vec<String> {
        self.0.iter().map(|t| t.0.clone()).collect()
    }
}

fn compiled(
    (name, text): (&str, &str),
    modules: Rc<dyn ModuleFiles>,
    model: ModelInput,
    infer: &str,
) -> Compiled {
    let result = compile(CompileInputs {
        name,
        text,
        modules,
        model: Some(model),
        open_model: &|_| unreachable!("the model is given"),
        mesh: Some(InferMesh::parse(infer).unwrap()),
        train: TrainMesh::single(),
        placements: None,
        options: Default::default(),
        target: Default::default(),
        experts: Default::default(),
        limits: Limits::default(),
    });
    result.unwrap_or_else(|e| panic!("{:?}", e.error.diagnostics))
}

/// An inline plan for a model without a config.
fn inline(text: &str, tensors: Option<Tensors>, infer: &str) -> Compiled {
    let catalog = tensors.map(|t| Box::new(t) as Box<dyn Catalog>);
    let model = ModelInput { config: json!({}), catalog };
    compiled(("x.rhai", text), Rc::new(NoModules), model, infer)
}

fn qwen3(infer: &str) -> Compiled {
    let config = json!({
        "model_type": "qwen3", "vocab_size": 1000, "hidden_size": 256,
        "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 64, "tie_word_embeddings": true,
        "quantization_config": { "quant_method": "fp8", "weight_block_size": [128, 128] },
    });
    let path = Path::new("plans/qwen3.rhai");
    let text = read_plan(path).unwrap();
    let modules = Rc::new(FolderModules::beside(path));
    compiled(("plans/qwen3.rhai", &text), modules, ModelInput { config, catalog: None }, infer)
}

/// The table without what changes with every edit of a plan: digests and lines of plan files.
fn settled(compiled: &Compiled, table: &str) -> String {
    let table = table.replace(&compiled.digest[..12], "<digest>");
    let mut out = String::new();
    for line in table.lines() {
        match line.rsplit_once(".rhai:") {
            Some((head, tail)) => {
                let tail = tail.trim_start_matches(|c: char| c.is_ascii_digit());
                out.push_str(&format!("{head}.rhai:<line>{tail}"));
            }
            None => out.push_str(line),
        }
        out.push('\n');
    }
    out
}

fn plain(compiled: &Compiled) -> String {
    settled(compiled, &render_table(compiled, None, TableStyle::Plain, PLAIN_WIDTH))
}

const EXPERTS: &str = r#"
    for i in 0..3 {
        let mlp = at(`model.layers.${i}.mlp`);
        let sources = stack(0..4, |e| cat([
            mlp.src(`experts.${e}.gate_proj.weight`, [128, 256]),
            mlp.src(`experts.${e}.up_proj.weight`, [128, 256]),
        ]));
        mlp["experts.w13_weight"] = sources.experts(ep);
    }
"#;

#[test]
fn equal_layers_and_ranks_are_one() {
    // One key-value head over two ranks: both hold it, so that 384 rows become 2 x 256.
    assert_snapshot!("qwen3_tp2", plain(&qwen3("tp=2")));
}

#[test]
fn markdown_has_the_same_cells() {
    let c = qwen3("tp=2");
    let table = render_table(&c, None, TableStyle::Markdown, PLAIN_WIDTH);
    assert_snapshot!("qwen3_tp2_markdown", settled(&c, &table));
}

#[test]
fn wide_terminals_have_sources_beside_names() {
    let c = qwen3("tp=2");
    let table = render_table(&c, None, TableStyle::Plain, 200);
    assert_snapshot!("qwen3_tp2_wide", settled(&c, &table));
}

#[test]
fn narrow_terminals_still_have_every_fact() {
    let c = qwen3("tp=2");
    let table = render_table(&c, None, TableStyle::Plain, 80);
    assert!(table.lines().all(|l| l.chars().count() <= 80), "{table}");
    assert_snapshot!("qwen3_tp2_narrow", settled(&c, &table));
    let tiny = render_table(&c, None, TableStyle::Plain, 10);
    assert!(tiny.contains("digest"));
}

#[test]
fn uneven_experts_make_two_classes() {
    let c = inline(EXPERTS, None, "dp=3,ep=3");
    assert_snapshot!("experts_ep3", plain(&c));
}

#[test]
fn one_rank_names_its_own_experts() {
    let c = inline(EXPERTS, None, "dp=3,ep=3");
    let table = render_table(&c, Some(&[RankId(2)]), TableStyle::Plain, PLAIN_WIDTH);
    assert!(table.contains("rank 2 (dp 2 · ep 2)"), "{table}");
    assert!(table.contains("mlp.experts.3.{gate,up}_proj.weight"), "{table}");
    assert_eq!(table.matches("full shape").count(), 1, "{table}");
}

#[test]
fn scales_recipes_and_derived_rows() {
    let plan = r#"
        keep("rotary_emb.cos_sin_cache", optional);
        for i in 0..8 {
            let attn = at(`model.layers.${i}.self_attn`);
            attn["o_proj.weight"] = attn.src("o_proj.weight", [512, 256]).shard(1, tp);
            if i % 4 != 0 { continue; }
            let kv_b = attn.src("kv_b_proj.weight", [512, 128]).shard(0, tp).quantize(fp8::vllm);
            attn["kv_b_proj.weight"] = kv_b;
            let w = kv_b.dequantize(bf16).reshape([-1, 64, 128]);
            attn["W_UK"] = w.slice(1, 0..32);
            attn["W_UV"] = w.slice(1, 32..64).permute([0, 2, 1]);
            attn["wk.weight"] = attn.src("wk.weight", [128, 128]).dequantize(bf16);
            attn.copy("k_norm.weight", [128], f32);
        }
        drop("model.layers.8");
    "#;
    let mut tensors = vec![("model.layers.8.eh_proj.weight".to_owned(), DType::Bf16, vec![4])];
    for i in 0..8 {
        let at = |name: &str| format!("model.layers.{i}.self_attn.{name}");
        tensors.push((at("o_proj.weight"), DType::E4m3, vec![512, 256]));
        tensors.push((at("o_proj.weight_scale_inv"), DType::F32, vec![4, 2]));
        if i % 4 == 0 {
            tensors.push((at("kv_b_proj.weight"), DType::Bf16, vec![512, 128]));
            tensors.push((at("wk.weight"), DType::E4m3, vec![128, 128]));
            tensors.push((at("wk.weight_scale_inv"), DType::F32, vec![1, 1]));
            tensors.push((at("k_norm.weight"), DType::F32, vec![128]));
        }
    }
    let c = inline(plan, Some(Tensors(tensors)), "tp=2");
    assert_snapshot!("fp8_and_derived", plain(&c));
}

#[test]
fn views_are_not_counted() {
    let plan = r#"
        let attn = at("model.layers.0.attn");
        let w = attn.src("kv_b.weight", [64, 32]);
        attn["kv_b.weight"] = w;
        attn["W_UK"] = w.dequantize(bf16).reshape([2, 32, 32]).slice(1, 0..16);
        attn["scaled.weight"] = attn.src("raw.weight", [4], f32).to(bf16);
        for e in 0..4 { attn[`slots.${e}.w`] = attn.src(`slots.${e}.w`, [8]); }
    "#;
    assert_snapshot!("views", plain(&inline(plan, None, "tp=1")));
}

#[test]
fn only_a_terminal_gets_escape_codes() {
    let c = inline(EXPERTS, None, "dp=3,ep=3");
    for (style, codes) in
        [(TableStyle::Plain, false), (TableStyle::Markdown, false), (TableStyle::Styled, true)]
    {
        let table = render_table(&c, None, style, PLAIN_WIDTH);
        assert_eq!(table.contains('\u{1b}'), codes, "{style:?}");
        assert_eq!(table, render_table(&c, None, style, PLAIN_WIDTH), "{style:?}");
    }
}

#[test]
fn control_characters_of_names_are_shown() {
    let plan =
        "let b = at(\"model.layers.0\"); b[\"a\\u001b[31mw\"] = b.src(\"w|*\\n`\", [4]);";
    let c = inline(plan, None, "tp=1");
    for style in [TableStyle::Plain, TableStyle::Markdown] {
        let table = render_table(&c, None, style, PLAIN_WIDTH);
        assert!(!table.contains('\u{1b}') && table.contains("\\u{1b}[31mw"), "{table}");
    }
}
