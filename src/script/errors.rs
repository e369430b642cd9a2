//! Translates rhai's own errors into diagnostics that a stranger can act on.

use std::any::type_name;

use rhai::{Dynamic, EvalAltResult, LexError, ParseError};

use crate::diag::{Diagnostic, Span};

use super::at_statement::Root;
use super::definitions::RESERVED_WORD;
use super::host::Raised;
use super::limits::{MAP_ITEMS, MODULES, Stop, VARIABLES};
use super::state::State;
use super::values::{AxisValue, Block, Config, DTypeValue, Facts, RecipeValue, Tensor};

/// What a plan can call, for "did you mean" and for the arguments that were expected.
const SIGNATURES: &[(&str, &str)] = &[
    ("at", "at(path)"),
    ("block", "recipe.block(128 | 64 | 32)"),
    ("cat", "cat([tensor, ..]) or cat([tensor, ..], dim)"),
    ("codes", "tensor.codes()"),
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
    ("refine", "tensor.refine(block) or tensor.refine(recipe)"),
    ("require", "require(condition, message)"),
    ("reshape", "tensor.reshape([size, ..])"),
    ("scale_suffix", "recipe.scale_suffix(\"_scale_inv\" | \"_scale\")"),
    ("scales", "tensor.scales() or recipe.scales(f32 | e8m0)"),
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
        rhai::ParseErrorType::BadInput(LexError::ImproperSymbol(word, why)) => {
            match (word.as_str(), why.as_str()) {
                (name, RESERVED_WORD) => reserved(name),
                ("eval" | "curry", _) => Diagnostic::error(
                    "E0112",
                    format!("`{word}` is not part of the plan language"),
                )
                .hint("a plan is what its files say; use functions and closures"),
                _ => unparsed(&plain(why)),
            }
        }
        rhai::ParseErrorType::ForbiddenVariable(name) => reserved(name),
        rhai::ParseErrorType::AssignmentToInvalidLHS(_) => Diagnostic::error(
            "E0101",
            "the plan does not parse: this cannot be written to",
        )
        .hint(
            "put the block into a variable first: let b = x.at(\"..\"); b[\"name\"] = tensor",
        ),
        kind => unparsed(&plain(&kind.to_string())),
    }
}

fn unparsed(why: &str) -> Diagnostic {
    Diagnostic::error("E0101", format!("the plan does not parse: {why}"))
}

/// Line and column of the last bracket that is open where a text ends; none if the parser
/// stopped before the end.
pub(super) fn never_closed(text: &str, stopped: rhai::Position) -> Option<(u16, u16)> {
    let rest = text.lines().skip(stopped.line()?.saturating_sub(1));
    let column = stopped.position().unwrap_or(0);
    let rest: String = rest.collect::<Vec<_>>().join("\n").chars().skip(column).collect();
    if !rest.trim().is_empty() {
        return None;
    }
    let (mut open, mut line, mut column) = (Vec::new(), 1, 0);
    let (mut quote, mut last) = (None, '\n');
    let mut comment = false;
    for c in text.chars() {
        (line, column) = if c == '\n' { (line + 1, 0) } else { (line, column + 1) };
        let escaped = last == '\\';
        comment = (comment || quote.is_none() && last == '/' && c == '/') && c != '\n';
        match (quote, c) {
            _ if comment => {}
            (Some(q), c) if c == q && !escaped => quote = None,
            (Some(_), _) => {}
            (None, '"' | '`') => quote = Some(c),
            (None, '(' | '[' | '{') => open.push((line, column)),
            (None, ')' | ']' | '}') => {
                open.pop();
            }
            _ => {}
        }
        // An escaped backslash escapes nothing.
        last = if escaped { ' ' } else { c };
    }
    open.pop().filter(|_| quote.is_none())
}

/// How an evaluation ended before its end.
pub(super) struct Failure {
    /// None where a trap or a new start ended it.
    pub diagnostic: Option<Diagnostic>,
    /// The calls that led there, innermost first.
    pub calls: Vec<(String, Span)>,
}

/// Adds the calls that led to a diagnostic; a recursion's repeats become one.
pub(super) fn called(mut d: Diagnostic, calls: Vec<(String, Span)>) -> Diagnostic {
    let mut repeats: Vec<(String, Span, usize)> = Vec::new();
    for (name, at) in calls {
        match repeats.iter_mut().find(|r| r.0 == name && r.1 == at) {
            Some(known) => known.2 += 1,
            None => repeats.push((name, at, 1)),
        }
    }
    for (name, at, times) in repeats {
        let times = if times > 1 { format!(", {times} times") } else { String::new() };
        d = d.also(at, format!("in {name}{times}"));
    }
    d
}

/// A failed evaluation in words that a stranger can act on.
pub(super) fn translate(state: &State, error: EvalAltResult) -> Failure {
    let (mut error, mut source) = (error, None::<String>);
    let mut calls = Vec::new();
    loop {
        match error {
            EvalAltResult::ErrorInFunctionCall(name, from, inner, at) => {
                let anonymous = name.starts_with("anon$");
                let shown = if anonymous { "a closure".to_owned() } else { name };
                calls.push((format!("call to {shown}"), state.point(source.as_deref(), at)));
                source = (!from.is_empty()).then_some(from).or(source);
                error = *inner;
            }
            EvalAltResult::ErrorInModule(name, inner, at) => {
                calls.push((format!("import of {name}"), state.point(source.as_deref(), at)));
                source = Some(name);
                error = *inner;
            }
            other => {
                error = other;
                break;
            }
        }
    }
    calls.reverse();
    // Rhai gives these up at the outermost call.
    let within = matches!(
        error,
        EvalAltResult::ErrorTerminated(..) | EvalAltResult::ErrorStackOverflow(..)
    );
    let placeless = error.position().is_none();
    let at = match calls.first().filter(|_| placeless) {
        Some(call) => call.1,
        None => state.point(source.as_deref(), error.position()),
    };
    let mut diagnostic = innermost(state, error, at);
    if let Some(d) = &mut diagnostic {
        if placeless && calls.is_empty() {
            d.span = d.span.filter(|span| *span != at);
        }
        let called = calls.first().is_some_and(|c| c.0.starts_with("call"));
        match d.code {
            "E0105" if within && state.files.opens_call(at) => {
                d.label = Some("within this call".to_owned());
            }
            "E0103" if called && d.hint.is_none() => {
                d.hint = Some(
                    "functions do not see the script's variables: pass them as arguments"
                        .to_owned(),
                );
            }
            _ => {}
        }
    }
    Failure { diagnostic, calls }
}

fn innermost(state: &State, error: EvalAltResult, at: Span) -> Option<Diagnostic> {
    let limits = &state.limits;
    let endless = "look for a loop that never ends";
    Some(match error {
        EvalAltResult::ErrorRuntime(value, _) | EvalAltResult::ErrorTerminated(value, _) => {
            match value.clone().try_cast::<Stop>() {
                None => raised(value, at),
                Some(Stop::Trap) => return None,
                Some(Stop::Operations) => {
                    limit(format!("{} operations", limits.operations), at).hint(endless)
                }
                Some(Stop::Tensors) => {
                    limit(format!("{} tensor expressions", limits.tensors), at)
                        .hint("look for a loop that makes more than a model has")
                }
                Some(Stop::Time) => limit(format!("{} s of time", limits.time.as_secs()), at)
                    .hint(format!("a plan takes milliseconds: {endless}")),
            }
        }
        EvalAltResult::ErrorStackOverflow(_) => {
            limit(format!("{} calls within each other", limits.call_depth), at)
                .hint("look for a function that calls itself")
        }
        EvalAltResult::ErrorDataTooLarge(what, _) => {
            let most = match what.as_str() {
                "Length of string" => format!("{} bytes in one string", limits.string_bytes),
                "Size of object map" => format!("{MAP_ITEMS} keys in one map"),
                _ => format!("{} items in one list", limits.array_items),
            };
            limit(most, at).hint("look for a loop that makes it grow")
        }
        EvalAltResult::ErrorTooManyVariables(_) => limit(format!("{VARIABLES} variables"), at),
        EvalAltResult::ErrorTooManyModules(_) => limit(format!("{MODULES} imports"), at),
        EvalAltResult::ErrorFunctionNotFound(call, _) => unknown_function(state, &call, at),
        EvalAltResult::ErrorModuleNotFound(name, _) => unknown_module(state, &name, at),
        EvalAltResult::ErrorVariableNotFound(name, _) => unknown_variable(state, &name, at),
        EvalAltResult::ErrorForbiddenVariable(name, _) => reserved(&name).at(at),
        EvalAltResult::ErrorPropertyNotFound(what, _)
        | EvalAltResult::ErrorDotExpr(what, _) => unknown_property(&what, at),
        EvalAltResult::ErrorIndexingType(what, _) if what.starts_with("block [") => {
            let kind = what.rsplit_once("= ").map_or("a value", |(_, kind)| kind);
            let message = format!("a block's parameter is a tensor, this is {}", types(kind));
            Diagnostic::error("E0110", message).at(at).hint("block[\"name\"] = tensor")
        }
        EvalAltResult::ErrorIndexingType(what, _) => {
            Diagnostic::error("E0110", format!("there is no indexing like {}", types(&what)))
                .at(at)
        }
        EvalAltResult::ErrorMismatchDataType(want, got, _)
        | EvalAltResult::ErrorMismatchOutputType(want, got, _) => {
            let (want, got) = (types(&want), types(&got));
            Diagnostic::error("E0110", format!("expected {want}, found {got}")).at(at)
        }
        EvalAltResult::ErrorDataRace(..) => Diagnostic::error(
            "E0111",
            "a variable that a closure has captured is in use by the call around it",
        )
        .at(at)
        .hint("hand it to a function as an argument instead"),
        EvalAltResult::ErrorArithmetic(what, _) => {
            Diagnostic::error("E0111", plain(&what)).at(at)
        }
        EvalAltResult::ErrorParsing(kind, _) => match kind {
            rhai::ParseErrorType::Reserved(name)
            | rhai::ParseErrorType::ForbiddenVariable(name) => reserved(&name).at(at),
            _ => Diagnostic::error("E0101", plain(&kind.to_string())).at(at),
        },
        other => Diagnostic::error("E0111", plain(&other.to_string())).at(at),
    })
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

fn limit(most: String, at: Span) -> Diagnostic {
    Diagnostic::error("E0105", format!("the plan hit the limit of {most}")).at(at)
}

fn reserved(name: &str) -> Diagnostic {
    Diagnostic::error("E0107", format!("`{name}` is a reserved name"))
        .hint("it means the same in every plan: choose another name")
}

/// Rhai's own words in the style of ours: no capital, no position.
fn plain(text: &str) -> String {
    let text = text.rsplit_once(" (line ").map_or(text, |(head, _)| head);
    let text = types(text);
    let mut letters = text.chars();
    match letters.next() {
        // `LeftBrace` would be a word of its own; a capital before a small letter is not.
        Some(first) if letters.clone().next().is_some_and(char::is_lowercase) => {
            first.to_lowercase().chain(letters).collect()
        }
        _ => text,
    }
}

/// Names of types as a plan's author knows them.
pub(super) fn types(text: &str) -> String {
    let names = [
        ("&str | ImmutableString | String", "string"),
        ("ImmutableString", "string"),
        ("core::ops::range::RangeInclusive<i64>", "range"),
        ("core::ops::range::Range<i64>", "range"),
        ("range<i64>", "range"),
        ("range=<i64>", "range"),
        ("i64", "int"),
        ("f64", "float"),
        ("&str", "string"),
        ("()", "nothing"),
    ];
    let own = [
        (type_name::<Block>(), "block"),
        (type_name::<Tensor>(), "tensor"),
        (type_name::<AxisValue>(), "axis"),
        (type_name::<RecipeValue>(), "recipe"),
        (type_name::<DTypeValue>(), "dtype"),
        (type_name::<Facts>(), "target"),
        (type_name::<Config>(), "model config"),
        (type_name::<Root>(), "at"),
        (type_name::<Raised>(), "error"),
    ];
    own.iter().chain(&names).fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// `shard (tensor, axis, i64)`: the name is not known, or the arguments do not fit.
fn unknown_function(state: &State, call: &str, at: Span) -> Diagnostic {
    let (path, arguments) = call.split_once(" (").unwrap_or((call, ")"));
    let shown = format!("({})", types(arguments.strip_suffix(')').unwrap_or(arguments)));
    let (space, name) = path.rsplit_once("::").map_or(("", path), |(s, n)| (s, n));
    if !name.starts_with(|c: char| c.is_alphabetic() || c == '_') {
        return Diagnostic::error("E0102", format!("`{name}` is not defined for {shown}"))
            .at(at);
    }
    let own = state.functions.iter().map(|(n, s)| (n.as_str(), s.as_str()));
    let known: Vec<(&str, &str)> = match space {
        "" => SIGNATURES.iter().copied().chain(own).collect(),
        "fp8" => SIGNATURES.iter().copied().filter(|s| s.0 == "named").collect(),
        _ => own.collect(),
    };
    let space = if space.is_empty() || space == "fp8" { "" } else { &path[..space.len() + 2] };
    let written = |name: &str| {
        let mut forms: Vec<String> =
            known.iter().filter(|s| s.0 == name).map(|s| format!("{space}{}", s.1)).collect();
        forms.dedup();
        forms.join(" or ")
    };
    let forms = written(name);
    if !forms.is_empty() {
        return Diagnostic::error("E0102", format!("`{name}` does not take {shown}"))
            .at(at)
            .hint(format!("it is written {forms}"));
    }
    let d = Diagnostic::error("E0102", format!("there is no function or method `{name}`"))
        .at(at)
        .note(format!("called as {path}{shown}"));
    match nearest(name, known.iter().map(|s| s.0)) {
        Some(near) => d.hint(format!("did you mean {}?", written(near))),
        None => d.hint("the README lists every word of the plan language"),
    }
}

fn unknown_module(state: &State, name: &str, at: Span) -> Diagnostic {
    let imported = state.files.text(at.file).lines();
    let imported = imported.filter(|l| l.trim_start().starts_with("import "));
    let aliases: Vec<&str> =
        imported.filter_map(|l| l.rsplit_once(" as ")?.1.trim().strip_suffix(';')).collect();
    let d = Diagnostic::error("E0103", format!("nothing is imported as `{name}`")).at(at);
    match nearest(name, aliases) {
        Some(near) => d.hint(format!("did you mean `{near}`?")),
        None => d.hint(format!("import it at the top: import \"lib/{name}\" as {name};")),
    }
}

/// Rhai says `Unknown property 'shape' - a getter is not registered for type 'tensor'`.
fn unknown_property(what: &str, at: Span) -> Diagnostic {
    let mut quoted = what.split('\'').skip(1).step_by(2);
    let message = match (quoted.next(), quoted.next()) {
        (Some(name), Some(kind)) => format!("{} has no property `{name}`", types(kind)),
        (Some(name), None) => format!("there is no property `{name}` here"),
        _ => format!("there is no such property here: {}", plain(what)),
    };
    Diagnostic::error("E0102", message).at(at)
}

fn unknown_variable(state: &State, name: &str, at: Span) -> Diagnostic {
    if let Some((space, wanted)) = name.rsplit_once("::") {
        return unknown_constant(name, space, wanted).at(at);
    }
    let d = Diagnostic::error("E0103", format!("there is no variable `{name}`")).at(at);
    if name == "fp8" {
        return d.hint("recipes are written with two colons, such as fp8::vllm");
    }
    if let Some(dtype) = crate::dtype::DType::from_torch_name(name) {
        return d.hint(format!("torch's {name} is written `{dtype}`"));
    }
    let words = state.files.text(at.file).split(|c: char| !c.is_alphanumeric() && c != '_');
    let words = words.filter(|w| w.len() > 1 && *w != name);
    let known = super::host::RESERVED.into_iter().chain(words);
    match nearest(name, known) {
        Some(near) => d.hint(format!("did you mean `{near}`?")),
        None => d,
    }
}

/// `fp8::deep_gemm`, or a constant that a module does not have.
fn unknown_constant(name: &str, space: &str, wanted: &str) -> Diagnostic {
    if space != "fp8" {
        return Diagnostic::error("E0103", format!("there is no constant `{name}`"))
            .hint("a module's `const` is visible to others only where it is exported");
    }
    let d = Diagnostic::error("E0103", format!("there is no recipe `{name}`"));
    let known = super::host::RECIPES;
    match nearest(wanted, known) {
        Some(near) => d.hint(format!("did you mean `fp8::{near}`?")),
        None => d.hint(format!("recipes are {}", known.join(", "))),
    }
}
