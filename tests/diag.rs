//! What the engine's reports look like, and the table of codes behind `engine explain`.

use insta::assert_snapshot;
use kernelcast::diag::{
    Diagnostic, FileId, Format, Severity, SourceMap, Span, codes, group, render, summary,
};

const PLAN: &str = "\
let H = model.hidden_size;
let I = model.intermediate_size;
for i in 0..model.num_hidden_layers {
    let mlp = at(`model.layers.${i}.mlp`);
    mlp[\"gate_proj.weight\"] = mlp
        .src(\"gate_proj.weight\", [I, H])
        // the checkpoint is FP8 already
        .quantize(fp8::vllm)
        .shard(0, tp);
}
";

const LIB: &str = "\
/// SwiGLU. Each half is cut first.
fn swiglu(mlp, I, quant) {
    let gate = mlp.src(\"gate_proj.weight\", [I, H]);
    gate.quantize(quant)
}
";

/// A plan and a module of it.
fn sources() -> (SourceMap, FileId, FileId) {
    let mut sources = SourceMap::default();
    let plan = sources.add("plans/x.rhai", PLAN);
    let lib = sources.add("plans/lib/mlp.rhai", LIB);
    (sources, plan, lib)
}

fn text(diagnostics: &[Diagnostic], sources: &SourceMap) -> String {
    render(diagnostics, sources, Format::Text { color: false })
}

/// A cut through a block, as layer `i` of a loop reports it.
fn cut(sources: &SourceMap, plan: FileId, i: usize) -> Diagnostic {
    Diagnostic::error("E0304", "a cut at 1368 rows crosses a 128-row quantization block")
        .at(sources.token_at(plan, 9, 10))
        .label("tp = 8 cuts 10944 rows into 1368")
        .note("1368 is 10 blocks and 88 rows")
        .hint("write .shard before .quantize to quantize each rank's own rows")
        .about(format!("model.layers.{i}.mlp.gate_proj.weight"))
}

#[test]
fn caret_label_notes_hint() {
    let (sources, plan, _) = sources();
    let one = cut(&sources, plan, 0).also(sources.token_at(plan, 8, 10), "quantized here");
    assert_snapshot!(text(&[one], &sources), @r"
    error[E0304]: a cut at 1368 rows crosses a 128-row quantization block
     --> plans/x.rhai:9:10
      |
    8 |         .quantize(fp8::vllm)
      |          -------- quantized here
    9 |         .shard(0, tp);
      |          ^^^^^ tp = 8 cuts 10944 rows into 1368
      |
      = for model.layers.0.mlp.gate_proj.weight
      = note: 1368 is 10 blocks and 88 rows
      = hint: write .shard before .quantize to quantize each rank's own rows
    ");
}

#[test]
fn repeats_are_one_report() {
    let (sources, plan, _) = sources();
    let mut all: Vec<_> = (0..46).map(|i| cut(&sources, plan, i)).collect();
    // The same of layer 3, from another rank: not one more subject.
    all.push(cut(&sources, plan, 3));
    assert_eq!(group(&all).len(), 1);
    assert_eq!(group(&all)[0].count, 46);
    assert_snapshot!(text(&all, &sources), @r"
    error[E0304]: a cut at 1368 rows crosses a 128-row quantization block
     --> plans/x.rhai:9:10
      |
    9 |         .shard(0, tp);
      |          ^^^^^ tp = 8 cuts 10944 rows into 1368
      |
      = for model.layers.0.mlp.gate_proj.weight and 45 more
      = note: 1368 is 10 blocks and 88 rows
      = hint: write .shard before .quantize to quantize each rank's own rows
    ");
}

#[test]
fn other_code_span_or_severity_is_another_report() {
    let (sources, plan, _) = sources();
    let a = cut(&sources, plan, 0);
    let other_span = cut(&sources, plan, 1).at(sources.token_at(plan, 8, 10));
    let other_code = Diagnostic { code: "E0301", ..cut(&sources, plan, 2) };
    let warning = Diagnostic { severity: Severity::Warning, ..cut(&sources, plan, 3) };
    let all = [a.clone(), other_span, other_code, warning, a];
    let counts: Vec<_> = group(&all).iter().map(|g| (g.first.code, g.count)).collect();
    assert_eq!(counts, [("E0304", 1), ("E0304", 1), ("E0301", 1), ("E0304", 1)]);
}

#[test]
fn without_a_span() {
    let (sources, ..) = sources();
    let missing = |name: &str| {
        Diagnostic::error("E0413", "the index names a file that is missing")
            .note("index: model.safetensors.index.json")
            .hint("copy the missing file, or remove it from the index")
            .about(name)
    };
    let all = [
        missing("model-00002-of-00004.safetensors"),
        missing("model-00003-of-00004.safetensors"),
        Diagnostic::warning("E0422", "ignore-list entry `lm_haed` matches nothing"),
        Diagnostic::warning("E0422", "ignore-list entry `gate` matches nothing"),
        Diagnostic::info("E0421", "2 files are not in the index and were not read"),
    ];
    assert_snapshot!(text(&all, &sources), @r"
    error[E0413]: the index names a file that is missing
     |
     = for model-00002-of-00004.safetensors and 1 more
     = note: index: model.safetensors.index.json
     = hint: copy the missing file, or remove it from the index

    warning[E0422]: ignore-list entry `lm_haed` matches nothing

    warning[E0422]: ignore-list entry `gate` matches nothing

    note[E0421]: 2 files are not in the index and were not read
    ");
}

#[test]
fn repeats_without_a_subject() {
    let (sources, plan, _) = sources();
    let at = sources.token_at(plan, 4, 15);
    let all = [1, 20, 3, 20]
        .map(|i| Diagnostic::error("E0104", format!("the config has no key `a{i}`")).at(at));
    assert_snapshot!(text(&all, &sources), @r"
    error[E0104]: the config has no key `a1`
     --> plans/x.rhai:4:15
      |
    4 |     let mlp = at(`model.layers.${i}.mlp`);
      |               ^^
      |
      = and 2 more like this
    ");
    // Messages that differ in more than numbers are told one by one.
    let other = Diagnostic::error("E0104", "the config has no key `b1`").at(at);
    assert_eq!(group(&[all.as_slice(), &[other]].concat()).len(), 2);
}

#[test]
fn labels_in_several_files() {
    let (sources, plan, lib) = sources();
    let one = Diagnostic::error("E0207", "already quantized with 128 x 128 blocks")
        .at(sources.token_at(plan, 8, 10))
        .label("asks for 64 x 64")
        .also(sources.token_at(lib, 4, 10), "quantized here")
        .also(sources.token_at(lib, 3, 20), "this source")
        .also(sources.token_at(plan, 1, 5), "H is 6144");
    assert_snapshot!(text(std::slice::from_ref(&one), &sources), @r#"
    error[E0207]: already quantized with 128 x 128 blocks
     --> plans/x.rhai:8:10
      |
    1 | let H = model.hidden_size;
      |     - H is 6144
    ...
    8 |         .quantize(fp8::vllm)
      |          ^^^^^^^^ asks for 64 x 64
      |
     ::: plans/lib/mlp.rhai:3:20
      |
    3 |     let gate = mlp.src("gate_proj.weight", [I, H]);
      |                    --- this source
    4 |     gate.quantize(quant)
      |          -------- quantized here
    "#);

    let no_span = Diagnostic { span: None, ..one };
    assert_snapshot!(text(&[no_span], &sources), @r#"
    error[E0207]: already quantized with 128 x 128 blocks
     --> plans/lib/mlp.rhai:3:20
      |
    3 |     let gate = mlp.src("gate_proj.weight", [I, H]);
      |                    --- this source
    4 |     gate.quantize(quant)
      |          -------- quantized here
      |
     ::: plans/x.rhai:1:5
      |
    1 | let H = model.hidden_size;
      |     - H is 6144
      |
      = note: asks for 64 x 64
    "#);
}

#[test]
fn json_lines() {
    let (sources, plan, _) = sources();
    let all = [
        cut(&sources, plan, 0).also(sources.token_at(plan, 8, 10), "quantized here"),
        cut(&sources, plan, 1),
        Diagnostic::warning("E0422", "ignore-list entry \"gate\"\nmatches nothing"),
    ];
    let json = render(&all, &sources, Format::Json);
    assert_snapshot!(json, @r#"
    {"code":"E0304","severity":"error","message":"a cut at 1368 rows crosses a 128-row quantization block","file":"plans/x.rhai","line":9,"column":10,"label":"tp = 8 cuts 10944 rows into 1368","notes":["quantized here: plans/x.rhai:8:10","1368 is 10 blocks and 88 rows"],"hint":"write .shard before .quantize to quantize each rank's own rows","subject":"model.layers.0.mlp.gate_proj.weight","count":2}
    {"code":"E0422","severity":"warning","message":"ignore-list entry \"gate\"\nmatches nothing","file":null,"line":null,"column":null,"label":null,"notes":[],"hint":null,"subject":null,"count":1}
    "#);
    for line in json.lines() {
        let value: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(value.as_object().unwrap().len(), 11);
    }
}

#[test]
fn color_only_adds_styles() {
    let (sources, plan, _) = sources();
    let all = [cut(&sources, plan, 0)];
    let colored = render(&all, &sources, Format::Text { color: true });
    assert!(colored.contains('\u{1b}'));
    let mut plain = String::new();
    let mut rest = colored.as_str();
    while let Some((before, after)) = rest.split_once('\u{1b}') {
        plain.push_str(before);
        rest = after.split_once('m').map_or("", |(_, rest)| rest);
    }
    plain.push_str(rest);
    assert_eq!(plain, text(&all, &sources));
}

#[test]
fn tabs_and_wide_text() {
    let mut sources = SourceMap::default();
    let file =
        sources.add("p.rhai", "let é = \"重みは猫\"; x.shard(0, tp)\r\n\t\ty.shard(1, tp)\r\n");
    let all = [
        Diagnostic::error("E0301", "5 rows over 2 ranks").at(sources.token_at(file, 1, 19)),
        Diagnostic::error("E0301", "7 rows over 2 ranks").at(sources.token_at(file, 2, 5)),
    ];
    assert_eq!(sources.line(file, 1), Some("let é = \"重みは猫\"; x.shard(0, tp)"));
    assert_snapshot!(text(&all, &sources), @r#"
    error[E0301]: 5 rows over 2 ranks
     --> p.rhai:1:19
      |
    1 | let é = "重みは猫"; x.shard(0, tp)
      |                       ^^^^^

    error[E0301]: 7 rows over 2 ranks
     --> p.rhai:2:5
      |
    2 |         y.shard(1, tp)
      |           ^^^^^
    "#);
}

#[test]
fn hostile_spans() {
    let mut sources = SourceMap::default();
    let file = sources.add("p.rhai", "ab\n\n€\n");
    let at = |file, line, column, len| Span { file: FileId(file), line, column, len };
    let spans = [
        at(0, 0, 0, 0),               // rhai's "no position"
        at(0, 1, 0, 1),               // rhai's beginning of a line
        at(0, 1, 3, 1),               // just after the last character
        at(0, 1, 1, u32::MAX),        // longer than its line
        at(0, 1, u32::MAX, u32::MAX), // beyond its line
        at(0, 2, 1, 5),               // an empty line
        at(0, 3, 1, 0),               // no length
        at(0, 4, 1, 1),               // end of file
        at(0, u32::MAX, 1, 1),        // beyond the file
        at(u32::MAX, 1, 1, 1),        // no such file
    ];
    let all = spans.map(|span| Diagnostic::error("E0101", "m").at(span).label("l"));
    assert_snapshot!(text(&all, &sources), @r"
    error[E0101]: m
     |
     = note: at p.rhai:0:0, which is not in the file: l

    error[E0101]: m
     --> p.rhai:1:1
      |
    1 | ab
      | ^ l

    error[E0101]: m
     --> p.rhai:1:3
      |
    1 | ab
      |   ^ l

    error[E0101]: m
     --> p.rhai:1:1
      |
    1 | ab
      | ^^ l

    error[E0101]: m
     |
     = note: at p.rhai:1:4294967295, which is not in the file: l

    error[E0101]: m
     --> p.rhai:2:1
      |
    2 |
      | ^ l

    error[E0101]: m
     --> p.rhai:3:1
      |
    3 | €
      | ^ l

    error[E0101]: m
     --> p.rhai:4:1
      |
    4 |
      | ^ l

    error[E0101]: m
     |
     = note: at p.rhai:4294967295:1, which is not in the file: l

    error[E0101]: m
     |
     = note: at <unknown file>:1:1, which is not in the file: l
    ");

    // Every pair of places in one report, and control characters in every text.
    for span in spans {
        for other in spans {
            let one = Diagnostic::error("E0101", "a\n\u{1b}[31mb\tc")
                .at(span)
                .label("a\n\u{1b}b\tc")
                .also(other, "a\n\u{1b}b\tc")
                .also(at(0, 2, 1, 1), "")
                .note("a\n\u{1b}b\tc")
                .hint("a\n\u{1b}b\tc")
                .about("\u{1b}");
            assert!(!text(std::slice::from_ref(&one), &sources).contains('\u{1b}'));
            assert_eq!(render(&[one], &sources, Format::Json).lines().count(), 1);
        }
    }
    assert_eq!(sources.token_at(FileId(9), 0, 0).len, 1);
    assert_eq!(sources.text(FileId(9)), "");
    assert_eq!(sources.line(file, 5), None);
}

#[test]
fn summaries() {
    let (sources, plan, _) = sources();
    let warning = Diagnostic::warning("E0422", "w");
    let plan_errors = [
        cut(&sources, plan, 0),
        cut(&sources, plan, 1),
        Diagnostic::error("E0301", "a"),
        Diagnostic::error("E0301", "b"),
    ];
    let and = |more: Diagnostic| [plan_errors.as_slice(), &[more]].concat();
    assert_eq!(summary(&[]), "");
    assert_eq!(summary(&[Diagnostic::info("E0421", "n")]), "");
    assert_eq!(summary(std::slice::from_ref(&warning)), "warning: 1 warning");
    assert_eq!(summary(&plan_errors), "error: 3 problems in the plan, nothing was written");
    assert_eq!(
        summary(&and(warning)),
        "error: 3 problems in the plan, nothing was written (1 warning)"
    );
    assert_eq!(
        summary(&and(Diagnostic::error("E0401", "m"))),
        "error: 4 problems in the plan or its inputs, nothing was written"
    );
    assert_eq!(summary(&[Diagnostic::error("E0604", "m")]), "error: 1 problem");
}

#[test]
fn nothing_renders_to_nothing() {
    assert_eq!(text(&[], &SourceMap::default()), "");
    assert_eq!(render(&[], &SourceMap::default(), Format::Json), "");
}

#[test]
fn many_diagnostics() {
    let (sources, plan, _) = sources();
    let mut all: Vec<_> = (0..50_000).map(|i| cut(&sources, plan, i)).collect();
    for i in 0..50_000 {
        all.push(Diagnostic::error("E0401", format!("tensor {i} was not found")));
    }
    let groups = group(&all);
    assert_eq!(groups.len(), 50_001);
    assert_eq!(groups[0].count, 50_000);
    assert_eq!(render(&all, &sources, Format::Json).lines().count(), 50_001);
    assert!(
        text(&all, &sources).contains("model.layers.0.mlp.gate_proj.weight and 49999 more")
    );
}

#[test]
fn table_of_codes() {
    assert_eq!(codes::CODES.len(), 66);
    assert!(codes::CODES.is_sorted_by(|a, b| a.code < b.code), "sorted and unique");
    for code in codes::CODES {
        let codes::Code { code, title, text } = *code;
        assert!(code.len() == 5 && code.starts_with("E0"), "{code}");
        assert!(code[1..].bytes().all(|b| b.is_ascii_digit()), "{code}");
        assert!(!title.is_empty() && title.len() <= 72 && !title.ends_with('.'), "{code}");
        assert_eq!(title.trim(), title, "{code}");
        assert_eq!(text.trim(), text, "{code}");
        assert!(text.len() > 80 && text.lines().count() <= 14, "{code}");
        for line in text.lines() {
            assert!(line.chars().count() <= 88 && line.trim_end() == line, "{code}: {line}");
        }
        assert_eq!(codes::find(&code.to_lowercase()).map(|c| c.code), Some(code));
    }
    assert!(codes::find("E9999").is_none());
    assert!(codes::find("").is_none());
}
