//! Rules: keep, drop, require, and the model's own list of modules to leave alone.

use std::rc::Rc;

use rhai::{Engine, NativeCallContext};

use crate::diag::Diagnostic;
use crate::ir::{Pattern, Rule};

use super::super::limits::{NAME_BYTES, RULES};
use super::super::values::Block;
use super::{Fallible, Shared, refuse, short, span_of, trapped};

pub(super) fn register(engine: &mut Engine, state: &Shared) {
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
                let message: String = message.chars().take(NAME_BYTES).collect();
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
    short(s, ctx, pattern)?;
    let rules = s.borrow().keep.len() + s.borrow().drop.len();
    if rules >= RULES {
        let why = format!("the plan hit the limit of {RULES} keep and drop rules");
        return refuse(s, ctx, "E0105", why);
    }
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
