//! Runs a plan script and gives a `Plan`. The only folder that imports rhai.

mod at_statement;
mod config;
mod definitions;
mod errors;
mod host;
mod limits;
mod modules;
mod replay;
mod state;
mod values;
mod words;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use rhai::Engine;

use crate::diag::{Diagnostic, SourceMap};
use crate::dtype::DType;
use crate::ir::{Dims, Plan};
use crate::topo::{Coords, InferMesh};

pub use config::FACTS;
use errors::Failure;
pub(crate) use errors::nearest as nearest_name;
pub use limits::Limits;
pub use modules::{BuiltinModules, ModuleFiles, NoModules};
use state::State;
pub use words::words;

/// What the trainer side really holds, by name; absent in a dry run from a bare config.
pub trait Catalog {
    /// Format and shape of one tensor.
    fn find(&self, name: &str) -> Option<CatalogEntry>;
    /// Every name, in order.
    fn names(&self) -> Vec<String>;
}

/// One tensor of a [`Catalog`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CatalogEntry {
    /// None for an element type that the engine does not know.
    pub dtype: Option<DType>,
    /// The type's name as the file spells it.
    pub dtype_name: String,
    pub shape: Dims,
}

/// Everything an evaluation depends on. The same request gives the same plan.
pub struct Request<'a> {
    /// Name of the plan file as shown to a person.
    pub name: &'a str,
    pub text: &'a str,
    pub modules: Rc<dyn ModuleFiles>,
    /// The model's config.json, where it is known already.
    pub model: Option<&'a serde_json::Value>,
    pub mesh: &'a InferMesh,
    /// True if `mesh` is only a stand-in: a topology that the plan declares then restarts it.
    pub mesh_open: bool,
    /// The rank whose local shapes are checked while the script runs, and whose stage it is for.
    pub at: Coords,
    pub options: &'a BTreeMap<String, String>,
    pub target: &'a BTreeMap<String, String>,
    pub catalog: Option<&'a dyn Catalog>,
    pub limits: Limits,
}

/// Defaults that a plan declares for itself; flags override them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Declared {
    pub input: Option<String>,
    pub infer: Option<InferMesh>,
    pub output: Option<String>,
}

/// How an evaluation ended.
pub enum Outcome {
    /// The plan. `problems` holds errors that were found on the way; `complete` says that the
    /// script ran to its end.
    Done { plan: Box<Plan>, declared: Declared, problems: Vec<Diagnostic>, complete: bool },
    /// The script declares an input or a topology that the request did not have: supply it and
    /// evaluate again.
    Restart(Declared),
}

/// Evaluates a plan script.
///
/// Problems do not end the evaluation where it can go on; a script error does, and is then the
/// last of `problems`.
pub fn evaluate(request: &Request<'_>) -> Outcome {
    let (state, failure) = run(request, None);
    let mut state = take(state);
    if state.restart {
        return Outcome::Restart(state.declared);
    }
    let complete = failure.is_none();
    state.finish(complete);
    let mut problems = replay::with_call_chains(request, &mut state);
    if let Some(Failure { diagnostic: Some(d), calls }) = failure {
        problems.push(errors::called(d, calls));
    }
    Outcome::Done {
        declared: state.declared.clone(),
        plan: Box::new(state.into_plan()),
        problems,
        complete,
    }
}

/// Adds the call chain to late diagnostics: each is paired with the event it belongs to.
pub fn explain_late(
    request: &Request<'_>,
    late: Vec<(Diagnostic, Option<u32>)>,
) -> Vec<Diagnostic> {
    replay::chains(request, late)
}

/// One run, up to the trapped event if there is one.
fn run(request: &Request<'_>, trap: Option<u32>) -> (Rc<RefCell<State>>, Option<Failure>) {
    let mut files = SourceMap::default();
    files.add(request.name, request.text);
    let state = Rc::new(RefCell::new(State::new(request, files, trap)));
    let mut engine = Engine::new_raw();
    limits::apply(&mut engine, &request.limits);
    host::register(&mut engine, &state);
    let failure =
        modules::run(&mut engine, &state, &request.modules, request.name, request.text);
    let failure = failure.err().and_then(|e| {
        let state = &mut *state.borrow_mut();
        if state.restart {
            return None;
        }
        Some(errors::translate(state, *e))
    });
    drop(engine);
    (state, failure)
}

fn take(state: Rc<RefCell<State>>) -> State {
    match Rc::try_unwrap(state) {
        Ok(cell) => cell.into_inner(),
        Err(_) => unreachable!("the engine that shared the state is gone"),
    }
}
