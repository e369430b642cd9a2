//! Translates rhai's own errors into diagnostics that a stranger can act on.

use rhai::{Dynamic, EvalAltResult, ParseError};

use crate::diag::{Diagnostic, Span};

use super::host::Raised;
use super::state::{State, Trapped};

/// What a plan can call, for "did you mean" and for the arguments that were expected.
const SIGNATURES: &[(&str, &str)] = &[
    ("at", "at(path)"),
    ("block", "recipe.block(128 | 64 | 32)"),
    ("cat", "cat([tensor, ..]) or cat([tensor, ..], dim)"),
    ("copy", "block.copy(name, shape) or block.copy(name, shape, dtype)"),
    ("dequantize", "tensor.dequantize(dtype)"),
    ("drop", "drop(pattern) or drop(pattern, optional)"),
    ("experts", "tensor.experts(axis)"),
    ("get", "model.get(key, default)"),
    ("heads", "tensor.heads(axis, heads)"),
    ("ignored", "block.ignored() or block.ignored(name)"),
    ("infer", "infer(#{ tp: 8, .. })"),
    ("input", "input(path)"),
    ("keep", "keep(pattern) or keep(pattern, optional)"),
    ("named", "fp8::named(recipe_name)"),
    ("option", "option(name, default) or option(name, default, [choice, ..])"),
    ("output", "output(path)"),
    ("pad_to", "tensor.pad_to(dim, multiple) or tensor.pad_to(dim, multiple, value)"),
    ("path", "block.path()"),
    ("permute", "tensor.permute([dim, ..])"),
    ("quantize", "tensor.quantize(recipe)"),
    ("refine", "tensor.refine(recipe) or tensor.refine(block)"),
    ("require", "require(condition, message)"),
    ("reshape", "tensor.reshape([size, ..])"),
    ("scale_suffix", "recipe.scale_suffix(\"_scale_inv\" | \"_scale\")"),
    ("scales", "recipe.scales(f32 | e8m0)"),
    ("shard", "tensor.shard(dim, axis)"),
    ("slice", "tensor.slice(dim, start..end)"),
    ("src", "block.src(name, shape) or block.src(name, shape, dtype)"),
    ("stack", "stack(start..end, |i| tensor) or stack([tensor, ..])"),
    ("stage", "stage(layer)"),
    ("to", "tensor.to(dtype)"),
];

/// The nearest of some names, if one is near.
pub(crate) fn nearest<'a>(
    name: &str,
    names: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    let scored =
        names.into_iter().map(|n| (strsim::normalized_damerau_levenshtein(name, n), n));
    let best = scored.max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(a.1)))?;
    (best.0 >= 0.6).then_some(best.1)
}

/// A script that does not parse. The caller adds the place.
pub(super) fn parse_error(e: &ParseError) -> Diagnostic {
    match e.err_type() {
        rhai::ParseErrorType::Reserved(word) if word == "eval" => {
            Diagnostic::error("E0112", "`eval` is not part of the plan language")
        }
        rhai::ParseErrorType::ForbiddenVariable(name) => {
            Diagnostic::error("E0107", format!("`{name}` is a reserved name"))
                .hint("give the variable another name")
        }
        rhai::ParseErrorType::AssignmentToInvalidLHS(_) => Diagnostic::error(
            "E0101",
            "the plan does not parse: this cannot be written to",
        )
        .hint(
            "put the block into a variable first: let b = x.at(\"..\"); b[\"name\"] = tensor",
        ),
        kind => Diagnostic::error("E0101", format!("the plan does not parse: {kind}")),
    }
}

/// A failed evaluation as one diagnostic; none where the replay's trap ended it and there is no
/// call around it. The calls that led there become labels, innermost first.
pub(super) fn translate(state: &State, error: EvalAltResult) -> Option<Diagnostic> {
    let mut calls: Vec<(String, Span)> = Vec::new();
    let (mut error, mut source) = (error, None::<String>);
    let mut stack = Vec::new();
    loop {
        match error {
            EvalAltResult::ErrorInFunctionCall(name, from, inner, at) => {
                stack.push((name, source.clone(), at));
                source = (!from.is_empty()).then_some(from).or(source);
                error = *inner;
            }
            EvalAltResult::ErrorInModule(name, inner, at) => {
                stack.push((format!("import {name}"), source.clone(), at));
                error = *inner;
            }
            other => {
                error = other;
                break;
            }
        }
    }
    // The caller of the outermost function is the plan itself; each next one is called from
    // the file of the function around it.
    for (name, from, at) in stack.into_iter().rev() {
        let shown = if name.contains('$') { "a closure".to_owned() } else { name };
        calls.push((shown, state.point(from.as_deref(), at)));
    }
    let at = state.point(source.as_deref(), error.position());
    let mut d = innermost(state, error, at);
    for (name, span) in calls {
        if d.code == TRAP {
            d = d.also(span, name);
        } else {
            d = d.also(span, format!("in call to {name}"));
        }
    }
    Some(d)
}

/// Stands for the replay's trap; never shown.
const TRAP: &str = "E0101";

fn innermost(state: &State, error: EvalAltResult, at: Span) -> Diagnostic {
    match error {
        EvalAltResult::ErrorRuntime(value, _) if value.is::<Trapped>() => {
            Diagnostic::error(TRAP, "trap")
        }
        EvalAltResult::ErrorRuntime(value, _) => raised(value, at),
        EvalAltResult::ErrorTerminated(..) => {
            limit("time", at).hint("a plan takes milliseconds: look for a loop that never ends")
        }
        EvalAltResult::ErrorTooManyOperations(_) => {
            limit("the number of operations", at).hint("look for a loop that never ends")
        }
        EvalAltResult::ErrorStackOverflow(_) => {
            limit("the depth of calls", at).hint("look for a function that calls itself")
        }
        EvalAltResult::ErrorDataTooLarge(what, _) => limit(&what.to_lowercase(), at),
        EvalAltResult::ErrorTooManyVariables(_) => limit("the number of variables", at),
        EvalAltResult::ErrorTooManyModules(_) => limit("the number of modules", at),
        EvalAltResult::ErrorFunctionNotFound(call, _) => unknown_function(&call, at),
        EvalAltResult::ErrorVariableNotFound(name, _) => unknown_variable(state, &name, at),
        EvalAltResult::ErrorForbiddenVariable(name, _) => {
            Diagnostic::error("E0107", format!("`{name}` is a reserved name")).at(at)
        }
        EvalAltResult::ErrorPropertyNotFound(name, _)
        | EvalAltResult::ErrorDotExpr(name, _) => {
            Diagnostic::error("E0102", format!("there is no property here: {name}")).at(at)
        }
        EvalAltResult::ErrorIndexingType(what, _) => {
            Diagnostic::error("E0110", format!("this cannot be indexed so: {what}"))
                .at(at)
                .hint("a parameter is written block[\"name\"] = tensor")
        }
        EvalAltResult::ErrorMismatchDataType(want, got, _) => {
            Diagnostic::error("E0110", format!("expected {want}, found {got}")).at(at)
        }
        EvalAltResult::ErrorMismatchOutputType(want, got, _) => {
            Diagnostic::error("E0110", format!("the closure gave {got}, not {want}")).at(at)
        }
        EvalAltResult::ErrorArithmetic(what, _) => Diagnostic::error("E0209", what).at(at),
        EvalAltResult::ErrorParsing(kind, _) => match kind {
            rhai::ParseErrorType::Reserved(_) | rhai::ParseErrorType::ForbiddenVariable(_) => {
                Diagnostic::error("E0107", kind.to_string()).at(at)
            }
            _ => Diagnostic::error("E0101", kind.to_string()).at(at),
        },
        other => Diagnostic::error("E0111", strip_position(&other.to_string())).at(at),
    }
}

fn raised(value: Dynamic, at: Span) -> Diagnostic {
    match value.clone().try_cast::<Raised>() {
        Some(Raised(d)) => {
            let span = d.span.unwrap_or(at);
            d.at(span)
        }
        None => Diagnostic::error("E0111", format!("the plan says: {value}")).at(at),
    }
}

fn limit(what: &str, at: Span) -> Diagnostic {
    Diagnostic::error("E0105", format!("the plan hit the limit on {what}")).at(at)
}

fn strip_position(text: &str) -> String {
    text.rsplit_once(" (line ").map_or(text, |(head, _)| head).to_owned()
}

/// `shard (block, int, axis)`: the name is not known, or the arguments do not fit.
fn unknown_function(call: &str, at: Span) -> Diagnostic {
    let name = call.split([' ', '(']).next().unwrap_or(call);
    let name = name.rsplit("::").next().unwrap_or(name);
    let shown = call.replace("rhai::", "").replace("&str | ImmutableString | ", "");
    if let Some((_, signature)) = SIGNATURES.iter().find(|(n, _)| *n == name) {
        return Diagnostic::error("E0102", format!("`{name}` does not take these: {shown}"))
            .at(at)
            .label("wrong arguments")
            .hint(format!("it is written {signature}"));
    }
    let d = Diagnostic::error("E0102", format!("there is no function or method `{name}`"))
        .at(at)
        .note(format!("called as {shown}"));
    match nearest(name, SIGNATURES.iter().map(|s| s.0)) {
        Some(near) => {
            let signature = SIGNATURES.iter().find(|s| s.0 == near).map_or("", |s| s.1);
            d.hint(format!("did you mean {signature}?"))
        }
        None => d.hint("docs and README list every word of the plan language"),
    }
}

fn unknown_variable(state: &State, name: &str, at: Span) -> Diagnostic {
    let d = Diagnostic::error("E0103", format!("there is no variable `{name}`")).at(at);
    let words = state.files.text(at.file).split(|c: char| !c.is_alphanumeric() && c != '_');
    let words = words.filter(|w| w.len() > 1 && *w != name);
    let known = super::host::RESERVED.into_iter().chain(words);
    match nearest(name, known) {
        Some(near) => d.hint(format!("did you mean `{near}`?")),
        None => d.hint("functions do not see the script's variables: pass them as arguments"),
    }
}
