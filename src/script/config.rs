//! The model's config.json as a plan sees it: read-only, and a missing key is an error at that key.

use std::cell::RefCell;
use std::rc::Rc;

use rhai::{Array, Dynamic, Engine, EvalAltResult, FuncRegistration, NativeCallContext};
use serde_json::Value;

use crate::diag::Diagnostic;

use super::host::{raise, span_of};
use super::state::State;
use super::values::{Config, Facts};

type Shared = Rc<RefCell<State>>;
type Fallible<T> = Result<T, Box<EvalAltResult>>;

pub(super) fn register(engine: &mut Engine, state: &Shared) {
    engine.register_type_with_name::<Config>("model config");
    let s = Rc::clone(state);
    FuncRegistration::new_index_getter().with_purity(true).register_into_engine(
        engine,
        move |ctx: NativeCallContext, c: &mut Config, key: &str| {
            config_get(&s, &ctx, c, key, None)
        },
    );
    let s = Rc::clone(state);
    FuncRegistration::new("get").with_purity(true).register_into_engine(
        engine,
        move |ctx: NativeCallContext, c: &mut Config, key: &str, default: Dynamic| {
            config_get(&s, &ctx, c, key, Some(default))
        },
    );
    engine.register_type_with_name::<Facts>("target");
    let s = Rc::clone(state);
    FuncRegistration::new_index_getter().with_purity(true).register_into_engine(
        engine,
        move |ctx: NativeCallContext, _: &mut Facts, key: &str| fact(&s, &ctx, key),
    );
}

fn config_get(
    state: &Shared,
    ctx: &NativeCallContext,
    config: &Config,
    key: &str,
    default: Option<Dynamic>,
) -> Fallible<Dynamic> {
    let model = state.borrow().model.clone();
    let Some(model) = model else {
        let d =
            Diagnostic::error("E0417", "the plan reads the model's config, but there is none")
                .hint("give --model DIR, or call input(path) at the plan's top");
        return raise(d.at(span_of(&state.borrow(), ctx)), ctx);
    };
    let object = config.path.iter().try_fold(&*model, |v, k| v.get(k));
    match object.and_then(|o| o.get(key)) {
        Some(value) if !value.is_null() => {
            let mut path = config.path.clone();
            path.push(key.to_owned());
            to_dynamic(value, &path).or_else(|why| {
                let at = span_of(&state.borrow(), ctx);
                raise(Diagnostic::error("E0110", why).at(at), ctx)
            })
        }
        found => {
            if let Some(default) = default {
                return Ok(default);
            }
            let mut path = config.path.clone();
            path.push(key.to_owned());
            let what = if found.is_some() { "is null" } else { "is not there" };
            let known = object.and_then(Value::as_object);
            let keys = known.map(|o| o.keys().map(String::as_str).collect::<Vec<_>>());
            let mut d = Diagnostic::error(
                "E0104",
                format!("`{}` {what} in the model's config.json", path.join(".")),
            )
            .at(span_of(&state.borrow(), ctx))
            .note("the plan asks for it here without a default");
            let near = super::errors::nearest(key, keys.unwrap_or_default());
            d.hint = Some(match near.filter(|_| found.is_none()) {
                None if found.is_some() => {
                    format!("say what null means: model.get(\"{key}\", ..)")
                }
                Some(near) => format!("did the plan mean `{near}`?"),
                None => format!(
                    "is this the right model for the plan? Else give a default: \
                                 model.get(\"{key}\", ..)"
                ),
            });
            raise(d, ctx)
        }
    }
}

fn to_dynamic(value: &Value, path: &[String]) -> Result<Dynamic, String> {
    Ok(match value {
        Value::Null => Dynamic::UNIT,
        Value::Bool(b) => Dynamic::from_bool(*b),
        Value::String(s) => s.clone().into(),
        Value::Number(n) => match (n.as_i64(), n.as_f64()) {
            (Some(i), _) => Dynamic::from_int(i),
            (None, Some(f)) if !n.is_u64() => Dynamic::from_float(f),
            _ => return Err(format!("`{}` = {n} does not fit 63 bits", path.join("."))),
        },
        Value::Array(items) => {
            let items: Result<Array, String> =
                items.iter().map(|v| to_dynamic_item(v, path)).collect();
            Dynamic::from_array(items?)
        }
        Value::Object(_) => Dynamic::from(Config { path: path.to_vec() }),
    })
}

/// Objects inside lists become maps: a path cannot lead to them.
fn to_dynamic_item(value: &Value, path: &[String]) -> Result<Dynamic, String> {
    match value {
        Value::Object(o) => {
            let mut map = rhai::Map::new();
            for (k, v) in o {
                map.insert(k.as_str().into(), to_dynamic_item(v, path)?);
            }
            Ok(Dynamic::from_map(map))
        }
        other => to_dynamic(other, path),
    }
}

/// The facts that `--target` can set, with their defaults.
pub const FACTS: [&str; 5] =
    ["sm", "vllm", "moe_backend", "linear_backend", "sequence_parallel_moe"];

fn fact(state: &Shared, ctx: &NativeCallContext, key: &str) -> Fallible<Dynamic> {
    let s = state.borrow();
    let given = s.target.get(key).map(String::as_str);
    let at = span_of(&s, ctx);
    let value: Result<Dynamic, String> = match key {
        "sm" => given.unwrap_or("90").parse::<i64>().map(Dynamic::from_int).map_err(|_| {
            format!("target sm={} is not a number such as 90", given.unwrap_or_default())
        }),
        "vllm" => Ok(given.unwrap_or("0.33").to_owned().into()),
        "moe_backend" | "linear_backend" => Ok(given.unwrap_or("triton").to_lowercase().into()),
        "sequence_parallel_moe" => match given {
            None => Ok(s.mesh.sequence_parallel_moe().into()),
            Some("true" | "1") => Ok(true.into()),
            Some("false" | "0") => Ok(false.into()),
            Some(other) => {
                Err(format!("target sequence_parallel_moe={other} is neither true nor false"))
            }
        },
        // Follows from the axes alone, so `--target` cannot say otherwise.
        "eplb" => Ok(s.mesh.eplb.into()),
        _ => {
            Err(format!("the target has no fact `{key}`; facts are {}, eplb", FACTS.join(", ")))
        }
    };
    drop(s);
    value.or_else(|why| raise(Diagnostic::error("E0110", why).at(at), ctx))
}
