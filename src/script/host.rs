//! Registers the plan language's words; each is a line or two that calls the state.

mod blocks;
mod declarations;
mod recipes;
mod rules;
mod tensors;

use std::cell::RefCell;
use std::rc::Rc;

use rhai::{Dynamic, Engine, EvalAltResult, FuncRegistration, NativeCallContext};

use crate::diag::{Diagnostic, Span};
use crate::dtype::DType;
use crate::ir::Op;
use crate::topo::Axis;

pub(super) use recipes::RECIPES;

use super::limits::{NAME_BYTES, Stop};
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

/// Refuses a name or pattern that is too long to be one.
fn short(s: &Shared, ctx: &NativeCallContext, name: &str) -> Fallible<()> {
    if name.len() <= NAME_BYTES {
        return Ok(());
    }
    let start: String = name.chars().take(40).collect();
    let why = format!("`{start}..` has {} bytes, a name has at most {NAME_BYTES}", name.len());
    refuse(s, ctx, "E0110", why)
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
    blocks::register(engine, state);
    tensors::register(engine, state);
    recipes::register(engine, state);
    rules::register(engine, state);
    declarations::register(engine, state);
    super::config::register(engine, state);
    super::at_statement::register(engine);
    // A run up to a trap only repeats what was printed before.
    let (first, again) = (Rc::clone(state), Rc::clone(state));
    engine.on_print(move |text| {
        if first.borrow().trap.is_none() {
            tracing::info!(target: "plan", "{text}");
        }
    });
    engine.on_debug(move |text, _, _| {
        if again.borrow().trap.is_none() {
            tracing::info!(target: "plan", "{text}");
        }
    });
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
    if name == "first_stage" || name == "last_stage" {
        state.stage_asked.set(true);
    }
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
