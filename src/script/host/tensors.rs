//! Tensors: moves, casts, arithmetic, quantization.

use std::ops::{Range, RangeInclusive};
use std::rc::Rc;

use rhai::{Array, Engine, FnPtr, NativeCallContext};

use crate::dtype::DType;
use crate::ir::Op;

use super::super::values::{AxisValue, DTypeValue, RecipeValue, Tensor};
use super::{Fallible, Shared, kind, push, refuse, shown};

pub(super) fn register(engine: &mut Engine, state: &Shared) {
    moves(engine, state);
    values(engine, state);
}

fn moves(engine: &mut Engine, state: &Shared) {
    let s = Rc::clone(state);
    engine
        .register_fn("cat", move |ctx: NativeCallContext, list: Array| cat(&s, &ctx, list, 0));
    let s = Rc::clone(state);
    engine.register_fn("cat", move |ctx: NativeCallContext, list: Array, dim: i64| {
        cat(&s, &ctx, list, dim)
    });
    let s = Rc::clone(state);
    engine.register_fn("stack", move |ctx: NativeCallContext, list: Array| {
        let parts = tensors(&s, &ctx, list)?;
        push(&s, &ctx, Op::Stack, &parts)
    });
    let s = Rc::clone(state);
    engine.register_fn("stack", move |ctx: NativeCallContext, r: Range<i64>, f: FnPtr| {
        let most = s.borrow().limits.array_items;
        if r.end.saturating_sub(r.start) > most as i64 {
            let why = format!("the plan hit the limit of {most} items in one stack");
            return refuse(&s, &ctx, "E0105", why);
        }
        let parts: Fallible<Vec<Tensor>> =
            r.map(|i| f.call_within_context(&ctx, (i,))).collect();
        push(&s, &ctx, Op::Stack, &parts?)
    });
    let s = Rc::clone(state);
    engine.register_fn(
        "slice",
        move |ctx: NativeCallContext, t: &mut Tensor, dim: i64, r: Range<i64>| {
            slice(&s, &ctx, *t, dim, r.start, r.end)
        },
    );
    let s = Rc::clone(state);
    engine.register_fn(
        "slice",
        move |ctx: NativeCallContext, t: &mut Tensor, dim: i64, r: RangeInclusive<i64>| {
            slice(&s, &ctx, *t, dim, *r.start(), r.end().saturating_add(1))
        },
    );
    let s = Rc::clone(state);
    engine.register_fn("reshape", move |ctx: NativeCallContext, t: &mut Tensor, d: Array| {
        let shape = ints(&s, &ctx, d)?;
        push(&s, &ctx, Op::Reshape { shape }, &[*t])
    });
    let s = Rc::clone(state);
    engine.register_fn("permute", move |ctx: NativeCallContext, t: &mut Tensor, d: Array| {
        let list = ints(&s, &ctx, d)?;
        let dims: Fallible<Vec<usize>> = list.iter().map(|d| dim_arg(&s, &ctx, *d)).collect();
        push(&s, &ctx, Op::Permute { dims: dims? }, &[*t])
    });
    let s = Rc::clone(state);
    engine.register_fn(
        "shard",
        move |ctx: NativeCallContext, t: &mut Tensor, dim: i64, a: AxisValue| {
            let dim = dim_arg(&s, &ctx, dim)?;
            push(&s, &ctx, Op::Shard { dim, axis: a.axis }, &[*t])
        },
    );
    let s = Rc::clone(state);
    engine.register_fn(
        "heads",
        move |ctx: NativeCallContext, t: &mut Tensor, a: AxisValue, n: i64| {
            let heads = size_arg(&s, &ctx, n, "number of heads")?;
            push(&s, &ctx, Op::Heads { axis: a.axis, heads }, &[*t])
        },
    );
    let s = Rc::clone(state);
    engine.register_fn(
        "experts",
        move |ctx: NativeCallContext, t: &mut Tensor, a: AxisValue| {
            push(&s, &ctx, Op::Experts { axis: a.axis }, &[*t])
        },
    );
}

fn cat(s: &Shared, ctx: &NativeCallContext, list: Array, dim: i64) -> Fallible<Tensor> {
    let dim = dim_arg(s, ctx, dim)?;
    let parts = tensors(s, ctx, list)?;
    push(s, ctx, Op::Cat { dim }, &parts)
}

fn slice(
    s: &Shared,
    ctx: &NativeCallContext,
    t: Tensor,
    dim: i64,
    start: i64,
    end: i64,
) -> Fallible<Tensor> {
    let dim = dim_arg(s, ctx, dim)?;
    match (u64::try_from(start), u64::try_from(end)) {
        (Ok(start), Ok(end)) => push(s, ctx, Op::Slice { dim, start, end }, &[t]),
        _ => refuse(s, ctx, "E0203", format!("{start}..{end} has a negative end")),
    }
}

fn tensors(s: &Shared, ctx: &NativeCallContext, list: Array) -> Fallible<Vec<Tensor>> {
    list.into_iter()
        .map(|item| {
            let kind = kind(ctx, &item);
            match item.try_cast::<Tensor>() {
                Some(t) => Ok(t),
                None => refuse(s, ctx, "E0110", format!("a list of tensors holds a {kind}")),
            }
        })
        .collect()
}

fn ints(s: &Shared, ctx: &NativeCallContext, list: Array) -> Fallible<Vec<i64>> {
    list.iter()
        .map(|item| match item.as_int() {
            Ok(n) => Ok(n),
            Err(_) => {
                let why = format!("expected whole numbers, not the {}", shown(ctx, item));
                refuse(s, ctx, "E0110", why)
            }
        })
        .collect()
}

fn dim_arg(s: &Shared, ctx: &NativeCallContext, dim: i64) -> Fallible<usize> {
    match usize::try_from(dim) {
        Ok(d) if d < 16 => Ok(d),
        _ => refuse(s, ctx, "E0202", format!("there is no dimension {dim}")),
    }
}

fn size_arg(s: &Shared, ctx: &NativeCallContext, n: i64, what: &str) -> Fallible<u64> {
    match u64::try_from(n) {
        Ok(n) if n > 0 => Ok(n),
        _ => refuse(s, ctx, "E0209", format!("a {what} of {n}")),
    }
}

fn values(engine: &mut Engine, state: &Shared) {
    let s = Rc::clone(state);
    engine.register_fn(
        "pad_to",
        move |ctx: NativeCallContext, t: &mut Tensor, d: i64, m: i64| {
            pad(&s, &ctx, *t, d, m, 0.0)
        },
    );
    let s = Rc::clone(state);
    engine.register_fn(
        "pad_to",
        move |ctx: NativeCallContext, t: &mut Tensor, d: i64, m: i64, value: f64| {
            pad(&s, &ctx, *t, d, m, value)
        },
    );
    let s = Rc::clone(state);
    engine.register_fn("to", move |ctx: NativeCallContext, t: &mut Tensor, d: DTypeValue| {
        push(&s, &ctx, Op::Cast { dtype: d.0 }, &[*t])
    });
    let s = Rc::clone(state);
    engine.register_fn(
        "dequantize",
        move |ctx: NativeCallContext, t: &mut Tensor, d: DTypeValue| {
            push(&s, &ctx, Op::Dequantize { dtype: d.0 }, &[*t])
        },
    );
    let s = Rc::clone(state);
    engine.register_fn("refine", move |ctx: NativeCallContext, t: &mut Tensor, b: i64| {
        let block = size_arg(&s, &ctx, b, "block")?;
        push(&s, &ctx, Op::Refine { block }, &[*t])
    });
    let s = Rc::clone(state);
    engine.register_fn(
        "refine",
        move |ctx: NativeCallContext, t: &mut Tensor, r: RecipeValue| refine(&s, &ctx, *t, r),
    );
    for (word, op) in [("codes", Op::Codes), ("scales", Op::Scales)] {
        let s = Rc::clone(state);
        engine.register_fn(word, move |ctx: NativeCallContext, t: &mut Tensor| {
            push(&s, &ctx, op.clone(), &[*t])
        });
    }
    let s = Rc::clone(state);
    engine.register_fn("+", move |ctx: NativeCallContext, a: Tensor, b: Tensor| {
        push(&s, &ctx, Op::Add, &[a, b])
    });
    let s = Rc::clone(state);
    engine.register_fn("*", move |ctx: NativeCallContext, a: Tensor, k: f64| {
        push(&s, &ctx, Op::Scale { factor: k }, &[a])
    });
    let s = Rc::clone(state);
    engine.register_fn("*", move |ctx: NativeCallContext, a: Tensor, k: i64| {
        push(&s, &ctx, Op::Scale { factor: k as f64 }, &[a])
    });
    let s = Rc::clone(state);
    engine.register_fn(
        "quantize",
        move |ctx: NativeCallContext, t: &mut Tensor, r: RecipeValue| quantize(&s, &ctx, *t, r),
    );
}

fn pad(
    s: &Shared,
    ctx: &NativeCallContext,
    t: Tensor,
    dim: i64,
    multiple: i64,
    value: f64,
) -> Fallible<Tensor> {
    let dim = dim_arg(s, ctx, dim)?;
    let multiple = size_arg(s, ctx, multiple, "multiple")?;
    push(s, ctx, Op::Pad { dim, multiple, value }, &[t])
}

/// Brings an FP8 source to the form in which a recipe's target is cut: its tiles, or values for
/// none. What is not quantized has no grid yet.
fn refine(
    s: &Shared,
    ctx: &NativeCallContext,
    t: Tensor,
    recipe: RecipeValue,
) -> Fallible<Tensor> {
    let Some(block) = s.borrow().block_of(t) else { return Ok(t) };
    let wanted = match recipe {
        RecipeValue::None => return quantize(s, ctx, t, recipe),
        RecipeValue::One { recipe, .. } | RecipeValue::TwoStep { first: recipe, .. } => {
            u64::from(recipe.block)
        }
    };
    if block == wanted {
        return Ok(t);
    }
    push(s, ctx, Op::Refine { block: wanted }, &[t])
}

fn quantize(
    s: &Shared,
    ctx: &NativeCallContext,
    t: Tensor,
    recipe: RecipeValue,
) -> Fallible<Tensor> {
    match recipe {
        // A target that is not quantized holds an FP8 source's values.
        RecipeValue::None if s.borrow().block_of(t).is_some() => {
            push(s, ctx, Op::Dequantize { dtype: DType::Bf16 }, &[t])
        }
        RecipeValue::None => Ok(t),
        RecipeValue::One { recipe, scale_name } => {
            push(s, ctx, Op::Quantize { recipe, scale_name }, &[t])
        }
        RecipeValue::TwoStep { first, second, scale_name } => {
            let codes = push(s, ctx, Op::Quantize { recipe: first, scale_name }, &[t])?;
            let values = push(s, ctx, Op::Dequantize { dtype: DType::F32 }, &[codes])?;
            push(s, ctx, Op::Quantize { recipe: second, scale_name }, &[values])
        }
    }
}
