//! Imports: only from the plan's folder and the built-in library, through a trait that reads.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use rhai::{AST, Engine, EvalAltResult, Module, ModuleResolver, Position, Scope, Shared};

use crate::diag::Diagnostic;

use super::host::Raised;
use super::state::State;

/// Reads a module by its path under the plan's folder (`lib/attention.rhai`).
pub trait ModuleFiles {
    /// The name to show and the text; none if there is no such file, an error with a reason if
    /// it cannot be read.
    fn read(&self, path: &str) -> Result<Option<(String, String)>, String>;
}

/// The library that is part of the engine: the files of plans/lib.
pub struct BuiltinModules;

const BUILTIN: &[(&str, &str)] = &[
    ("lib/attention.rhai", include_str!("../../plans/lib/attention.rhai")),
    ("lib/common.rhai", include_str!("../../plans/lib/common.rhai")),
    ("lib/deepseek.rhai", include_str!("../../plans/lib/deepseek.rhai")),
    ("lib/deepseek_v4.rhai", include_str!("../../plans/lib/deepseek_v4.rhai")),
    ("lib/megatron.rhai", include_str!("../../plans/lib/megatron.rhai")),
    ("lib/mla.rhai", include_str!("../../plans/lib/mla.rhai")),
    ("lib/mlp.rhai", include_str!("../../plans/lib/mlp.rhai")),
    ("lib/moe.rhai", include_str!("../../plans/lib/moe.rhai")),
    ("lib/mxfp4.rhai", include_str!("../../plans/lib/mxfp4.rhai")),
    ("lib/prime_rl.rhai", include_str!("../../plans/lib/prime_rl.rhai")),
    ("lib/quant.rhai", include_str!("../../plans/lib/quant.rhai")),
    ("lib/qwen_hybrid.rhai", include_str!("../../plans/lib/qwen_hybrid.rhai")),
    ("lib/trainer.rhai", include_str!("../../plans/lib/trainer.rhai")),
];

impl ModuleFiles for BuiltinModules {
    fn read(&self, path: &str) -> Result<Option<(String, String)>, String> {
        let found = BUILTIN.iter().find(|(name, _)| *name == path);
        Ok(found.map(|(name, text)| (format!("plans/{name}"), (*text).to_owned())))
    }
}

/// No modules at all beside the built-in library; for plans given as a string.
pub struct NoModules;

impl ModuleFiles for NoModules {
    fn read(&self, _: &str) -> Result<Option<(String, String)>, String> {
        Ok(None)
    }
}

/// The resolver that serves a script's imports.
pub(super) struct Jail {
    pub state: Rc<RefCell<State>>,
    pub files: Rc<dyn ModuleFiles>,
    cache: RefCell<BTreeMap<String, Shared<Module>>>,
    open: RefCell<Vec<String>>,
}

/// Compiles and runs the main script.
pub(super) fn run(
    engine: &mut Engine,
    state: &Rc<RefCell<State>>,
    files: &Rc<dyn ModuleFiles>,
    name: &str,
    text: &str,
) -> Result<(), Box<EvalAltResult>> {
    engine.set_module_resolver(Jail {
        state: Rc::clone(state),
        files: Rc::clone(files),
        cache: RefCell::default(),
        open: RefCell::default(),
    });
    let ast = compile(engine, state, name, text)?;
    engine.run_ast(&ast)
}

/// The file of an import path, or why the path is not allowed.
fn file_of(path: &str) -> Result<String, String> {
    let path = path.strip_suffix(".rhai").unwrap_or(path);
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    let fine = !path.is_empty()
        && path.len() <= 200
        && path.split('/').all(|part| !part.is_empty() && part.chars().all(plain));
    if fine {
        return Ok(format!("{path}.rhai"));
    }
    Err("a path is words of letters, digits, _ and - with / between, below the plan's folder"
        .to_owned())
}

fn compile(
    engine: &Engine,
    state: &Rc<RefCell<State>>,
    name: &str,
    text: &str,
) -> Result<AST, Box<EvalAltResult>> {
    let mut ast = engine.compile(text).map_err(|e| {
        let at = state.borrow().point(Some(name), e.position());
        let d = super::errors::parse_error(&e).at(at);
        let d = match super::errors::never_closed(text, e.position()) {
            Some((line, column)) => {
                let opened = state.borrow().point(Some(name), Position::new(line, column));
                d.also(opened, "never closed")
            }
            None => d,
        };
        Box::new(EvalAltResult::ErrorRuntime(Raised::value(d), e.position()))
    })?;
    ast.set_source(name);
    // Rhai lists functions in the order of its hashes; hints name the shorter form first.
    let mut functions: Vec<_> = ast.iter_functions().collect();
    functions.sort_by_key(|f| (f.name, f.params.len()));
    for function in functions {
        if !function.name.starts_with("anon$") {
            let signature = format!("{}({})", function.name, function.params.join(", "));
            state.borrow_mut().functions.push((function.name.to_owned(), signature));
        }
    }
    Ok(ast)
}

impl ModuleResolver for Jail {
    fn resolve(
        &self,
        engine: &Engine,
        source: Option<&str>,
        path: &str,
        pos: Position,
    ) -> Result<Shared<Module>, Box<EvalAltResult>> {
        let refuse = |why: String| {
            let at = self.state.borrow().point(source, pos);
            let d = Diagnostic::error("E0106", format!("import \"{path}\": {why}")).at(at);
            Box::new(EvalAltResult::ErrorRuntime(Raised::value(d), pos))
        };
        let file = file_of(path).map_err(refuse)?;
        if let Some(module) = self.cache.borrow().get(&file) {
            return Ok(Shared::clone(module));
        }
        if self.open.borrow().contains(&file) {
            return Err(refuse("the modules import each other in a circle".to_owned()));
        }
        let found = match self.files.read(&file).map_err(refuse)? {
            Some(found) => Some(found),
            None => BuiltinModules.read(&file).map_err(refuse)?,
        };
        let Some((name, text)) = found else {
            let why = "neither in the plan's folder nor in the built-in library";
            let built_in = BUILTIN.iter().filter_map(|(name, _)| name.strip_suffix(".rhai"));
            return Err(refuse(match super::errors::nearest(path, built_in) {
                Some(near) => format!("{why}, which has \"{near}\""),
                None => why.to_owned(),
            }));
        };
        self.state.borrow_mut().files.add(&name, &text);
        self.open.borrow_mut().push(file.clone());
        let module = compile(engine, &self.state, &name, &text)
            .and_then(|ast| Module::eval_ast_as_new(Scope::new(), &ast, engine));
        self.open.borrow_mut().pop();
        let module = module.map_err(|e| EvalAltResult::ErrorInModule(name, e, pos))?;
        let module = Shared::new(module);
        self.cache.borrow_mut().insert(file, Shared::clone(&module));
        Ok(module)
    }
}
