//! Registers the plan language's words; each is a line or two that calls the state.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::{Range, RangeInclusive};
use std::rc::Rc;

use rhai::{
    Array, Dynamic, Engine, EvalAltResult, FnPtr, FuncRegistration, ImmutableString, Map,
    Module, NativeCallContext,
};

use crate::diag::{Diagnostic, Span};
use crate::dtype::DType;
use crate::fp8::{Recipe, RecipeKind, ScaleFormat};
use crate::ir::{Dims, Op, Pattern, Rule, ScaleName};
use crate::topo::{Axis, InferMesh};

use super::limits::Stop;
use super::state::State;
use super::values::{AxisValue, Block, Config, DTypeValue, Facts, RecipeValue, Tensor};

pub(super) type Shared = Rc<RefCell<State>>;
pub(super) type Fallible<T> = Result<T, Box<EvalAltResult>>;

/// A diagnostic on its way through rhai's own errors.
#[derive(Clone, Debug)]
pub(super) struct Raised(pub Diagnostic);

impl Raised {
    pub fn value(d: Diagnostic) -> Dynamic {
        Dynamic::from(Raised(d))
    }
}

/// Names that the host answers; a script may not define them.
pub(super) const RESERVED: [&str; 21] = [
    "at",
    "tp",
    "dp",
    "ep",
    "etp",
    "pp",
    "model",
    "target",
    "none",
    "optional",
    "first_stage",
    "last_stage",
    "f32",
    "bf16",
    "f16",
    "e4m3",
    "e8m0",
    "i32",
    "u8",
    "fp8",
    "stage",
];

pub(super) fn span_of(state: &State, ctx: &NativeCallContext) -> Span {
    state.point(ctx.call_source(), ctx.call_position())
}

/// Ends the script with a diagnostic.
pub(super) fn raise<T>(d: Diagnostic, ctx: &NativeCallContext) -> Fallible<T> {
    Err(Box::new(EvalAltResult::ErrorRuntime(Raised::value(d), ctx.call_position())))
}

/// Ends the script with a diagnostic at the call.
fn refuse<T>(
    s: &Shared,
    ctx: &NativeCallContext,
    code: &'static str,
    message: impl Into<String>,
) -> Fallible<T> {
    let at = span_of(&s.borrow(), ctx);
    raise(Diagnostic::error(code, message).at(at), ctx)
}

/// Ends the script for a reason of ours: as an error that collects the calls around it.
fn trapped<T>(result: Result<T, Stop>, ctx: &NativeCallContext) -> Fallible<T> {
    result.map_err(|stop| {
        Box::new(EvalAltResult::ErrorRuntime(Dynamic::from(stop), ctx.call_position()))
    })
}

/// Adds a node at the call.
fn push(s: &Shared, ctx: &NativeCallContext, op: Op, inputs: &[Tensor]) -> Fallible<Tensor> {
    let mut state = s.borrow_mut();
    let at = span_of(&state, ctx);
    trapped(state.push(op, inputs, at), ctx)
}

pub(super) fn register(engine: &mut Engine, state: &Shared) {
    engine.register_type_with_name::<Block>("block");
    engine.register_type_with_name::<Tensor>("tensor");
    engine.register_type_with_name::<AxisValue>("axis");
    engine.register_type_with_name::<RecipeValue>("recipe");
    engine.register_type_with_name::<DTypeValue>("dtype");
    engine.register_type_with_name::<Raised>("error");
    names(engine, state);
    blocks(engine, state);
    moves(engine, state);
    values(engine, state);
    recipes(engine, state);
    rules(engine, state);
    declarations(engine, state);
    super::config::register(engine, state);
    super::at_statement::register(engine);
    engine.on_print(|text| tracing::info!(target: "plan", "{text}"));
    engine.on_debug(|text, _, _| tracing::debug!(target: "plan", "{text}"));
}

/// Reserved names, visible everywhere; defining one is refused.
fn names(engine: &mut Engine, state: &Shared) {
    let s = Rc::clone(state);
    #[expect(
        deprecated,
        reason = "marked volatile by rhai; nothing else reaches into closures"
    )]
    engine.on_var(move |name, _, _| Ok(reserved(&s.borrow(), name)));
    #[expect(deprecated, reason = "marked volatile by rhai; the only hook for definitions")]
    engine.on_def_var(|_, info, _| Ok(!RESERVED.contains(&info.name())));
    FuncRegistration::new_getter("size")
        .with_purity(true)
        .register_into_engine(engine, |a: &mut AxisValue| a.size as i64);
}

fn reserved(state: &State, name: &str) -> Option<Dynamic> {
    if let Some(axis) = Axis::ALL.into_iter().find(|a| a.name() == name) {
        return Some(Dynamic::from(AxisValue { axis, size: state.mesh.size(axis) }));
    }
    if let Some(dtype) = DType::from_short_name(name) {
        return Some(Dynamic::from(DTypeValue(dtype)));
    }
    Some(match name {
        "at" => Dynamic::from(super::at_statement::Root),
        "model" => Dynamic::from(Config { path: Vec::new() }),
        "target" => Dynamic::from(Facts),
        "none" => Dynamic::from(RecipeValue::None),
        "optional" => true.into(),
        "first_stage" => (state.stage == 0).into(),
        "last_stage" => (state.stage + 1 == state.mesh.pp).into(),
        _ => return None,
    })
}

fn blocks(engine: &mut Engine, state: &Shared) {
    engine.register_fn("at", |path: &str| Block { path: path.to_owned() });
    engine.register_fn("at", |b: &mut Block, path: &str| Block { path: b.join(path) });
    engine.register_fn("path", |b: &mut Block| -> ImmutableString { b.path.as_str().into() });

    let s = Rc::clone(state);
    engine.register_fn(
        "src",
        move |ctx: NativeCallContext, b: &mut Block, n: &str, d: Array| {
            source(&s, &ctx, b.join(n), &d, DType::Bf16)
        },
    );
    let s = Rc::clone(state);
    engine.register_fn(
        "src",
        move |ctx: NativeCallContext, b: &mut Block, n: &str, d: Array, t: DTypeValue| {
            source(&s, &ctx, b.join(n), &d, t.0)
        },
    );
    let s = Rc::clone(state);
    engine.register_fn(
        "copy",
        move |ctx: NativeCallContext, b: &mut Block, n: &str, d: Array| {
            copy(&s, &ctx, b.join(n), &d, DType::Bf16)
        },
    );
    let s = Rc::clone(state);
    engine.register_fn(
        "copy",
        move |ctx: NativeCallContext, b: &mut Block, n: &str, d: Array, t: DTypeValue| {
            copy(&s, &ctx, b.join(n), &d, t.0)
        },
    );
    let s = Rc::clone(state);
    // Pure, so that a block held by a constant can be written to.
    FuncRegistration::new_index_setter().with_purity(true).register_into_engine(
        engine,
        move |ctx: NativeCallContext, b: &mut Block, name: &str, t: Tensor| {
            assign(&s, &ctx, b.join(name), t)
        },
    );
}

fn source(
    s: &Shared,
    ctx: &NativeCallContext,
    name: String,
    shape: &Array,
    dtype: DType,
) -> Fallible<Tensor> {
    let shape = dims(s, ctx, shape)?;
    let mut state = s.borrow_mut();
    let at = span_of(&state, ctx);
    trapped(state.source(name, shape, dtype, at), ctx)
}

fn copy(
    s: &Shared,
    ctx: &NativeCallContext,
    name: String,
    shape: &Array,
    dtype: DType,
) -> Fallible<()> {
    let t = source(s, ctx, name.clone(), shape, dtype)?;
    assign(s, ctx, name, t)
}

fn assign(s: &Shared, ctx: &NativeCallContext, name: String, t: Tensor) -> Fallible<()> {
    let fine = !name.is_empty() && name.split('.').all(|part| !part.is_empty());
    if !fine {
        return refuse(s, ctx, "E0110", format!("`{name}` is not a parameter's name"));
    }
    let mut state = s.borrow_mut();
    let at = span_of(&state, ctx);
    trapped(state.assign(name, t, at), ctx)
}

/// Sizes of a declared shape: whole numbers from 1 on.
fn dims(s: &Shared, ctx: &NativeCallContext, shape: &Array) -> Fallible<Dims> {
    let mut out = Dims::new();
    for size in shape {
        match size.as_int() {
            Ok(n) if n > 0 => out.push(n as u64),
            Ok(n) => {
                let at = span_of(&s.borrow(), ctx);
                let message = format!("a source has a size of {n} in {shape:?}");
                let d = Diagnostic::error("E0209", message).at(at);
                return raise(
                    d.hint("does a key of config.json mean something else here?"),
                    ctx,
                );
            }
            Err(_) => {
                let why = format!("a shape is whole numbers, not the {}", shown(ctx, size));
                return refuse(s, ctx, "E0110", why);
            }
        }
    }
    Ok(out)
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

/// What a value is, in a plan's words.
fn kind(ctx: &NativeCallContext, value: &Dynamic) -> String {
    super::errors::types(ctx.engine().map_type_name(value.type_name()))
}

/// A value with its kind: `string "256"`, `float 85.3`, `block`.
fn shown(ctx: &NativeCallContext, value: &Dynamic) -> String {
    let kind = kind(ctx, value);
    match kind.as_str() {
        "string" => format!("string \"{value}\""),
        "float" | "bool" => format!("{kind} {value}"),
        _ => kind,
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

/// Brings a quantized value to a recipe's tiles; what is not quantized has no grid yet.
fn refine(
    s: &Shared,
    ctx: &NativeCallContext,
    t: Tensor,
    recipe: RecipeValue,
) -> Fallible<Tensor> {
    let wanted = match recipe {
        RecipeValue::None => return Ok(t),
        RecipeValue::One { recipe, .. } | RecipeValue::TwoStep { first: recipe, .. } => {
            u64::from(recipe.block)
        }
    };
    match s.borrow().block_of(t) {
        Some(block) if block != wanted => {}
        _ => return Ok(t),
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

/// The recipe of a name, with blocks of 128 and f32 scales.
fn recipe_named(name: &str) -> Option<RecipeValue> {
    let one = |kind| Recipe { kind, block: 128, scales: ScaleFormat::F32 };
    let scale_name = ScaleName::ScaleInv;
    let kind = match name {
        "vllm" => RecipeKind::Vllm,
        "deepgemm" => RecipeKind::Deepgemm,
        "prime_rl" => RecipeKind::PrimeRl,
        "ue8m0" => RecipeKind::Ue8m0,
        "ue8m0_two_step" => {
            let (first, second) = (one(RecipeKind::Vllm), one(RecipeKind::Ue8m0));
            return Some(RecipeValue::TwoStep { first, second, scale_name });
        }
        _ => return None,
    };
    Some(RecipeValue::One { recipe: one(kind), scale_name })
}

pub(super) const RECIPES: [&str; 5] =
    ["vllm", "deepgemm", "prime_rl", "ue8m0", "ue8m0_two_step"];

fn recipes(engine: &mut Engine, state: &Shared) {
    let mut fp8 = Module::new();
    for name in RECIPES {
        if let Some(recipe) = recipe_named(name) {
            fp8.set_var(name, Dynamic::from(recipe));
        }
    }
    let s = Rc::clone(state);
    fp8.set_native_fn("named", move |ctx: NativeCallContext, name: &str| {
        recipe_named(name).map_or_else(
            || {
                let known = RECIPES.join(", ");
                refuse(&s, &ctx, "E0110", format!("there is no recipe `{name}`: {known}"))
            },
            Ok,
        )
    });
    engine.register_static_module("fp8", fp8.into());
    let s = Rc::clone(state);
    engine.register_fn("block", move |ctx: NativeCallContext, r: RecipeValue, b: i64| {
        let block = match b {
            128 | 64 | 32 => b as u32,
            _ => {
                return refuse(&s, &ctx, "E0110", format!("a block is 128, 64 or 32, not {b}"));
            }
        };
        Ok(match r {
            RecipeValue::None => r,
            RecipeValue::One { recipe, scale_name } => {
                RecipeValue::One { recipe: Recipe { block, ..recipe }, scale_name }
            }
            RecipeValue::TwoStep { first, second, scale_name } => RecipeValue::TwoStep {
                first: Recipe { block, ..first },
                second: Recipe { block, ..second },
                scale_name,
            },
        })
    });
    let s = Rc::clone(state);
    engine
        .register_fn("scales", move |ctx: NativeCallContext, r: RecipeValue, d: DTypeValue| {
            scales(&s, &ctx, r, d.0)
        });
    let s = Rc::clone(state);
    engine.register_fn(
        "scale_suffix",
        move |ctx: NativeCallContext, r: RecipeValue, t: &str| {
            let name = match t {
                "_scale_inv" => ScaleName::ScaleInv,
                "_scale" => ScaleName::Scale,
                _ => {
                    let why = format!("a scale's suffix is _scale_inv or _scale, not `{t}`");
                    return refuse(&s, &ctx, "E0110", why);
                }
            };
            Ok(match r {
                RecipeValue::None => r,
                RecipeValue::One { recipe, .. } => {
                    RecipeValue::One { recipe, scale_name: name }
                }
                RecipeValue::TwoStep { first, second, .. } => {
                    RecipeValue::TwoStep { first, second, scale_name: name }
                }
            })
        },
    );
    engine.register_fn("==", |a: RecipeValue, b: RecipeValue| a == b);
    engine.register_fn("!=", |a: RecipeValue, b: RecipeValue| a != b);
}

fn scales(
    s: &Shared,
    ctx: &NativeCallContext,
    r: RecipeValue,
    dtype: DType,
) -> Fallible<RecipeValue> {
    let scales = match dtype {
        DType::F32 => ScaleFormat::F32,
        DType::E8m0 => ScaleFormat::E8m0,
        _ => return refuse(s, ctx, "E0110", format!("scales are f32 or e8m0, not {dtype}")),
    };
    let powers =
        |recipe: Recipe| recipe.kind == RecipeKind::Ue8m0 || scales == ScaleFormat::F32;
    match r {
        RecipeValue::None => Ok(r),
        RecipeValue::One { recipe, scale_name } if powers(recipe) => {
            Ok(RecipeValue::One { recipe: Recipe { scales, ..recipe }, scale_name })
        }
        RecipeValue::TwoStep { first, second, scale_name } => {
            let second = Recipe { scales, ..second };
            Ok(RecipeValue::TwoStep { first, second, scale_name })
        }
        RecipeValue::One { recipe, .. } => refuse(
            s,
            ctx,
            "E0110",
            format!("scales of recipe {} are not powers of two", recipe.kind.name()),
        ),
    }
}

fn rules(engine: &mut Engine, state: &Shared) {
    for word in ["keep", "drop"] {
        let s = Rc::clone(state);
        engine.register_fn(word, move |ctx: NativeCallContext, p: &str| {
            rule(&s, &ctx, word, p, false)
        });
        let s = Rc::clone(state);
        engine.register_fn(word, move |ctx: NativeCallContext, p: &str, optional: bool| {
            rule(&s, &ctx, word, p, optional)
        });
    }
    let s = Rc::clone(state);
    engine.register_fn(
        "require",
        move |ctx: NativeCallContext, ok: bool, message: &str| -> Fallible<()> {
            let mut state = s.borrow_mut();
            let event = trapped(state.event(), &ctx)?;
            if !ok {
                let at = span_of(&state, &ctx);
                state.problem(event, Diagnostic::error("E0108", message).at(at));
            }
            Ok(())
        },
    );
    let s = Rc::clone(state);
    engine.register_fn("ignored", move |ctx: NativeCallContext, b: &mut Block, name: &str| {
        ignored(&s, &ctx, &b.join(name))
    });
    let s = Rc::clone(state);
    engine.register_fn("ignored", move |ctx: NativeCallContext, b: &mut Block| {
        ignored(&s, &ctx, &b.path)
    });
}

fn ignored(s: &Shared, ctx: &NativeCallContext, path: &str) -> Fallible<bool> {
    let found = s.borrow_mut().ignored(path);
    found.or_else(|why| refuse(s, ctx, "E0110", why))
}

fn rule(
    s: &Shared,
    ctx: &NativeCallContext,
    word: &str,
    pattern: &str,
    optional: bool,
) -> Fallible<()> {
    let pattern = match Pattern::new(pattern) {
        Ok(pattern) => pattern,
        Err(why) => return refuse(s, ctx, "E0110", why),
    };
    let mut state = s.borrow_mut();
    trapped(state.event(), ctx)?;
    let span = span_of(&state, ctx);
    let rule = Rule { pattern, optional, span };
    match word {
        "keep" => state.keep.push(rule),
        _ => state.drop.push(rule),
    }
    Ok(())
}

fn declarations(engine: &mut Engine, state: &Shared) {
    let s = Rc::clone(state);
    engine.register_fn("input", move |ctx: NativeCallContext, path: &str| {
        let mut state = s.borrow_mut();
        state.declared.input = Some(path.to_owned());
        restart_if(&mut state, &ctx, |s| s.model.is_none())
    });
    let s = Rc::clone(state);
    engine.register_fn("output", move |path: &str| {
        s.borrow_mut().declared.output = Some(path.to_owned());
    });
    let s = Rc::clone(state);
    engine.register_fn("infer", move |ctx: NativeCallContext, axes: Map| {
        let mut sizes = BTreeMap::new();
        for (name, size) in &axes {
            let Some(size) = size.as_int().ok().and_then(|n| u64::try_from(n).ok()) else {
                return refuse(&s, &ctx, "E0307", format!("the size of axis {name} is {size}"));
            };
            sizes.insert(name.to_string(), size);
        }
        let at = span_of(&s.borrow(), &ctx);
        let mesh = InferMesh::from_axes(sizes).or_else(|d| raise(d.at(at), &ctx))?;
        let mut state = s.borrow_mut();
        let first = state.declared.infer.is_none();
        state.declared.infer = Some(mesh);
        restart_if(&mut state, &ctx, |s| first && s.wants_declared_mesh)
    });
    let s = Rc::clone(state);
    engine
        .register_fn("stage", move |ctx: NativeCallContext, layer: i64| stage(&s, &ctx, layer));
    option(engine, state);
}

fn restart_if(
    state: &mut State,
    ctx: &NativeCallContext,
    needed: impl Fn(&State) -> bool,
) -> Fallible<()> {
    if !needed(state) {
        return Ok(());
    }
    state.restart = true;
    trapped(Err(Stop::Trap), ctx)
}

/// Layers split L / pp each; the remainder goes one each to the stages from the second-last
/// backwards (vLLM's get_pp_indices: 61 over 2 gives 31 and 30).
fn stage(s: &Shared, ctx: &NativeCallContext, layer: i64) -> Fallible<bool> {
    let (pp, this, model) = {
        let state = s.borrow();
        (state.mesh.pp, state.stage, state.model.clone())
    };
    if pp == 1 {
        return Ok(true);
    }
    let layers = model.and_then(|m| m.get("num_hidden_layers")?.as_u64());
    let (Some(layers), Ok(layer)) = (layers, u64::try_from(layer)) else {
        return refuse(
            s,
            ctx,
            "E0104",
            "stages need num_hidden_layers in the model's config.json",
        );
    };
    if layers < pp {
        return refuse(s, ctx, "E0301", format!("{layers} layers over pp = {pp} stages"));
    }
    let (base, rest) = (layers / pp, layers % pp);
    let mut end = 0;
    for stage in 0..pp {
        // The last stage holds norm and head and gets no extra layer; nor does the first before
        // all between have theirs.
        let extra = stage + 1 < pp && stage + 1 + rest >= pp;
        let start = end;
        end += base + u64::from(extra);
        if stage == this {
            return Ok((start..end).contains(&layer));
        }
    }
    Ok(false)
}

fn option(engine: &mut Engine, state: &Shared) {
    let s = Rc::clone(state);
    engine.register_fn(
        "option",
        move |ctx: NativeCallContext, name: &str, default: Dynamic| {
            chosen(&s, &ctx, name, default, None)
        },
    );
    let s = Rc::clone(state);
    engine.register_fn(
        "option",
        move |ctx: NativeCallContext, name: &str, default: Dynamic, choices: Array| {
            chosen(&s, &ctx, name, default, Some(choices))
        },
    );
}

/// The value of a declared option, of the default's type.
fn chosen(
    s: &Shared,
    ctx: &NativeCallContext,
    name: &str,
    default: Dynamic,
    choices: Option<Array>,
) -> Fallible<Dynamic> {
    let given = s.borrow().options.get(name).cloned();
    let text = given.unwrap_or_else(|| default.to_string());
    let bad = |what: String| refuse(s, ctx, "E0109", format!("option {name}={text} {what}"));
    let value: Dynamic = if default.is_bool() {
        match text.as_str() {
            "true" | "1" => true.into(),
            "false" | "0" => false.into(),
            _ => return bad("is neither true nor false".to_owned()),
        }
    } else if default.is_int() {
        match text.parse::<i64>() {
            Ok(n) => n.into(),
            Err(_) => return bad("is not a whole number".to_owned()),
        }
    } else {
        text.clone().into()
    };
    if let Some(choices) = choices {
        let words: Vec<String> = choices.iter().map(Dynamic::to_string).collect();
        if !words.contains(&text) {
            return bad(format!("is not one of {}", words.join(", ")));
        }
    }
    s.borrow_mut().options_seen.insert(name.to_owned(), text);
    Ok(value)
}
