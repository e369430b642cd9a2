//! Codes and scales as tensors of their own: one grid a part, where the parts do not end on it.
//! Field case "A shard narrower than one FP8 block": both grids must be expressible.

use std::path::Path;
use std::process::Command;

use half::bf16;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

/// Name, shape, and the value of the element at a flat index.
type Source = (&'static str, Vec<usize>, fn(usize) -> f32);

/// Saves bf16 tensors whose elements follow their index.
fn save(folder: &Path, tensors: &[Source]) {
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, shape, value)| {
            let elements = 0..shape.iter().product::<usize>();
            elements.flat_map(|i| bf16::from_f32(value(i)).to_le_bytes()).collect()
        })
        .collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
        (*name, TensorView::new(Dtype::BF16, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    std::fs::write(folder.join("config.json"), "{}").unwrap();
}

/// Runs a plan, has the oracle verify it, and gives the bytes of rank 0's file.
fn rank_file(plan: &str, infer: &str, tensors: &[Source]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), tensors);
    let (path, out) = (dir.path().join("plan.rhai"), dir.path().join("out"));
    std::fs::write(&path, plan).unwrap();
    let done = Command::new(env!("CARGO_BIN_EXE_engine"))
        .args([
            Path::new("run"),
            &path,
            Path::new("--verify"),
            Path::new("--model"),
            dir.path(),
        ])
        .args([Path::new("--infer"), Path::new(infer), Path::new("--out"), &out])
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    std::fs::read(out.join("rank-0/model-rank-0-part-0.safetensors")).unwrap()
}

fn scales(file: &SafeTensors<'_>, name: &str) -> (Vec<usize>, Vec<u32>) {
    let t = file.tensor(name).unwrap();
    let bits = t.data().as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
    (t.shape().to_vec(), bits)
}

const HALVES: &str = r#"
let a = at("shared");
let gate = a.src("gate", [512, 2048]).shard(0, tp).quantize(fp8::vllm);
let up = a.src("up", [512, 2048]).shard(0, tp).quantize(fp8::vllm);
a["gate_up"] = cat([gate.codes(), up.codes()]);
a["gate_up_scale_inv"] = cat([gate.scales(), up.scales()]);
"#;

/// f32(1 / 448) and f32(4 / 448), as the case gives them.
const C: u32 = 0x3B12_4925;
const FOUR_C: u32 = 0x3C12_4925;

#[test]
fn halves_below_a_block_have_a_grid_each() {
    let tensors: [Source; 2] =
        [("shared.gate", vec![512, 2048], |_| 1.0), ("shared.up", vec![512, 2048], |_| 4.0)];
    let bytes = rank_file(HALVES, "tp=8", &tensors);
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let codes = file.tensor("shared.gate_up").unwrap();
    assert_eq!((codes.dtype(), codes.shape()), (Dtype::F8_E4M3, &[128, 2048][..]));
    assert!(codes.data().iter().all(|c| *c == 0x7E));
    let (shape, bits) = scales(&file, "shared.gate_up_scale_inv");
    assert_eq!(shape, [2, 16]);
    assert_eq!(bits, [[C; 16], [FOUR_C; 16]].concat());
}

#[test]
fn experts_of_320_rows_a_half_have_six_rows_of_scales() {
    let plan = r#"
let a = at("a");
let gate = a.src("gate", [8, 320, 384]).experts(ep).quantize(fp8::vllm);
let up = a.src("up", [8, 320, 384]).experts(ep).quantize(fp8::vllm);
a["w13"] = cat([gate.codes(), up.codes()], 1);
a["w13_scale_inv"] = cat([gate.scales(), up.scales()], 1);
a["turned"] = gate.permute([0, 2, 1]).scales();
a["inner"] = up.scales().slice(1, 1..3).slice(2, 1..2);
a["powers"] = up.dequantize(f32).quantize(fp8::ue8m0.scales(e8m0)).scales();
"#;
    let tensors: [Source; 2] = [
        ("a.gate", vec![8, 320, 384], |_| 1.0),
        ("a.up", vec![8, 320, 384], |i| (i % 911) as f32 / 64.0 - 3.0),
    ];
    let bytes = rank_file(plan, "tp=2,dp=2,ep=4", &tensors);
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (shape, bits) = scales(&file, "a.w13_scale_inv");
    assert_eq!(shape, [2, 6, 3]);
    // The first three rows of each expert are gate's.
    assert!(bits.chunks(18).all(|expert| expert[..9] == [C; 9]));
    assert_eq!(file.tensor("a.turned").unwrap().shape(), [2, 3, 3]);
    let (shape, inner) = scales(&file, "a.inner");
    assert_eq!(shape, [2, 2, 1]);
    assert_eq!(inner, [bits[13], bits[16], bits[18 + 13], bits[18 + 16]]);
    assert_eq!(file.tensor("a.powers").unwrap().dtype(), Dtype::F8_E8M0);
}
