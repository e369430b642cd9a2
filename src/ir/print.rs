//! The text form of a plan: sources, then each parameter's expression.

use std::fmt::Write;

use super::{NodeId, Op, Plan, SourceFormat};

/// `[2048, 256]`.
pub fn show_shape(shape: &[u64]) -> String {
    let sizes: Vec<String> = shape.iter().map(u64::to_string).collect();
    format!("[{}]", sizes.join(", "))
}

/// One line a source and a parameter, in the plan's order; the same on every machine.
pub fn print_plan(plan: &Plan) -> String {
    let mut out = String::new();
    for s in &plan.sources {
        let format = match &s.format {
            SourceFormat::Plain(dtype) => dtype.to_string(),
            SourceFormat::Quantized { block, scale } => {
                format!("e4m3/{block} scale {} {}", scale.name, scale.dtype)
            }
        };
        let _ = writeln!(out, "source {} {format} {}", s.name, show_shape(&s.shape));
    }
    for p in &plan.params {
        let kind = if p.derived { "derive" } else { "param" };
        let at = plan.files.show(p.span);
        let _ = writeln!(out, "{kind} {} = {}  # {at}", p.name, show(plan, p.node));
    }
    for (word, rules) in [("keep", &plan.keep), ("drop", &plan.drop)] {
        for rule in rules {
            let _ = writeln!(out, "{word} {}", rule.pattern.text());
        }
    }
    out
}

fn show(plan: &Plan, id: NodeId) -> String {
    let node = plan.node(id);
    let input = |i: usize| show(plan, node.inputs[i]);
    let list = || {
        let parts: Vec<String> = node.inputs.iter().map(|i| show(plan, *i)).collect();
        parts.join(", ")
    };
    match &node.op {
        Op::Source(s) => plan.source(*s).name.clone(),
        Op::Cat { dim } => format!("cat([{}], {dim})", list()),
        Op::Stack => format!("stack([{}])", list()),
        Op::Slice { dim, start, end } => format!("{}.slice({dim}, {start}..{end})", input(0)),
        Op::Reshape { shape } => format!("{}.reshape({shape:?})", input(0)),
        Op::Permute { dims } => format!("{}.permute({dims:?})", input(0)),
        Op::Pad { dim, multiple, value } => {
            format!("{}.pad_to({dim}, {multiple}, {value})", input(0))
        }
        Op::Cast { dtype } => format!("{}.to({dtype})", input(0)),
        Op::Shard { dim, axis } => format!("{}.shard({dim}, {axis})", input(0)),
        Op::Heads { axis, heads } => format!("{}.heads({axis}, {heads})", input(0)),
        Op::Experts { axis } => format!("{}.experts({axis})", input(0)),
        Op::Quantize { recipe, .. } => {
            format!("{}.quantize({}/{})", input(0), recipe.kind.name(), recipe.block)
        }
        Op::Refine { block } => format!("{}.refine({block})", input(0)),
        Op::Dequantize { dtype } => format!("{}.dequantize({dtype})", input(0)),
        Op::Codes => format!("{}.codes()", input(0)),
        Op::Scales => format!("{}.scales()", input(0)),
        Op::Add => format!("({} + {})", input(0), input(1)),
        Op::Scale { factor } => format!("({} * {factor})", input(0)),
    }
}
