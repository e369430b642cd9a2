//! Declarations: input, topology, output, options, pipeline stages.

use std::collections::BTreeMap;
use std::rc::Rc;

use rhai::{Array, Dynamic, Engine, Map, NativeCallContext};

use crate::topo::{InferMesh, stage_layers};

use super::super::limits::{RULES, Stop};
use super::super::state::State;
use super::{Fallible, Shared, raise, refuse, short, span_of, trapped};

pub(super) fn register(engine: &mut Engine, state: &Shared) {
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

fn stage(s: &Shared, ctx: &NativeCallContext, layer: i64) -> Fallible<bool> {
    let (pp, this, model) = {
        let state = s.borrow();
        state.stage_asked.set(true);
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
    Ok(stage_layers(layers, pp, this).contains(&layer))
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
    short(s, ctx, name)?;
    if s.borrow().options_seen.len() >= RULES {
        return refuse(s, ctx, "E0105", format!("the plan hit the limit of {RULES} options"));
    }
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
