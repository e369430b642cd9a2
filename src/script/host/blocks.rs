//! Blocks: `at`, `.src`, `.copy`, and the assignment of a parameter.

use std::rc::Rc;

use rhai::{Array, Engine, FuncRegistration, ImmutableString, NativeCallContext};

use crate::dtype::DType;
use crate::ir::Dims;

use super::super::values::{Block, DTypeValue, Tensor};
use crate::diag::Diagnostic;

use super::{Fallible, Shared, raise, refuse, short, shown, span_of, trapped};

pub(super) fn register(engine: &mut Engine, state: &Shared) {
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
    short(s, ctx, &name)?;
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
    short(s, ctx, &name)?;
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
