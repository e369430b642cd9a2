//! Non-finite weights are found whatever the plan does with them, and padding is not one.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use kernelcast::backend::cpu::{FiniteCheck, Options};
use kernelcast::compile::{CompileInputs, ModelInput, compile};
use kernelcast::diag::Diagnostic;
use kernelcast::dtype::DType;
use kernelcast::error::Error;
use kernelcast::memory::{Sources, Targets, update};
use kernelcast::script::{Limits, NoModules};
use kernelcast::topo::{InferMesh, RankId, TrainMesh};

const ONE: u16 = 0x3F80;
const NAN: u16 = 0x7FC0;
const INF: u16 = 0x7F80;
const MINUS_INF: u16 = 0xFF80;

/// Runs a plan that writes `out` from the bf16 source `w`; gives the bytes of `out`.
fn out(expression: &str, shape: &[u64], values: &[u16]) -> Result<Vec<u8>, Error> {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let mut sources = Sources::default();
    sources.add("w", DType::Bf16, shape, &bytes)?;
    let text = format!(
        "let b = at(\"\");\nlet w = b.src(\"w\", {shape:?});\nb[\"out\"] = {expression};"
    );
    let compiled = compile(CompileInputs {
        name: "plan",
        text: &text,
        modules: Rc::new(NoModules),
        model: Some(ModelInput {
            config: serde_json::json!({}),
            catalog: Some(sources.catalog()),
        }),
        open_model: &|_| Err(Diagnostic::error("E0417", "no input").into()),
        mesh: Some(InferMesh::single()),
        train: TrainMesh::single(),
        placements: None,
        options: BTreeMap::new(),
        target: BTreeMap::new(),
        experts: BTreeMap::new(),
        limits: Limits::default(),
    });
    let compiled = compiled.map_err(|e| e.error.diagnostics).unwrap();
    let storage = &compiled.program.ranks[0].targets[0].storages[0];
    let mut held = vec![0; storage.bytes() as usize];
    let mut targets = Targets::default();
    targets.bind(RankId(0), "out", &mut held);
    let options = Options {
        finite: FiniteCheck::During,
        timeout: Duration::from_secs(10),
        progress: &|_| {},
    };
    update(&compiled, std::slice::from_ref(&sources), &mut targets, 1 << 20, &options)?;
    Ok(held)
}

fn refused(expression: &str, shape: &[u64], values: &[u16], message: &str) {
    let e = out(expression, shape, values).map(|bytes| bytes.len()).unwrap_err();
    let found = &e.diagnostics[0];
    assert_eq!((found.code, found.message.as_str()), ("E0602", message), "{expression}");
}

#[test]
fn padding_with_infinity_is_the_plans_own_and_hides_nothing() {
    let pad = "w.pad_to(0, 8, -1.0 / 0.0)";
    let bytes = out(pad, &[6], &[ONE; 6]).unwrap();
    let words: Vec<u16> =
        bytes.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b)).collect();
    assert_eq!(words, [ONE, ONE, ONE, ONE, ONE, ONE, MINUS_INF, MINUS_INF]);
    // The same padding beside a weight that is not a number.
    let poisoned = [ONE, ONE, NAN, ONE, ONE, ONE];
    refused(pad, &[6], &poisoned, "w has 1 non-finite value: NaN at [2]");
    let widened = format!("{pad}.to(f32)");
    out(&widened, &[6], &[ONE; 6]).unwrap();
    refused(&widened, &[6], &poisoned, "w has 1 non-finite value: NaN at [2]");
}

#[test]
fn codes_and_scales_alone_do_not_hide_infinity() {
    let mut values = vec![ONE; 256 * 128];
    values[130 * 128 + 5] = INF;
    for recipe in ["vllm", "deepgemm", "prime_rl", "ue8m0"] {
        for half in ["codes()", "scales()", "dequantize(bf16)", "dequantize(f32).codes()"] {
            let half = half.replace("dequantize(f32)", "dequantize(f32).quantize(fp8::ue8m0)");
            let expression = format!("w.quantize(fp8::{recipe}).{half}");
            refused(
                &expression,
                &[256, 128],
                &values,
                "w has 1 non-finite value: +Inf at [130, 5]",
            );
        }
    }
}
