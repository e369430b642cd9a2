//! Every word that the plan language adds to plain Rhai, as the host registers them.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use rhai::Engine;

use crate::diag::SourceMap;
use crate::topo::{Coords, InferMesh};

use super::state::State;
use super::{Limits, NoModules, Request, host};

/// The functions, methods, operators and reserved names of the language, in order.
///
/// A method that reads a property is `get$NAME`, an index `index$get$` or `index$set$`, as Rhai
/// names them; a recipe is `fp8::NAME`.
pub fn words() -> BTreeSet<String> {
    let (mesh, none) = (InferMesh::single(), BTreeMap::new());
    let request = Request {
        name: "",
        text: "",
        modules: Rc::new(NoModules),
        model: None,
        mesh: &mesh,
        mesh_open: false,
        at: Coords { replica: 0, tp: 0, dp: 0, ep: 0, etp: 0, pp: 0 },
        options: &none,
        target: &none,
        catalog: None,
        limits: Limits::default(),
    };
    let state = Rc::new(RefCell::new(State::new(&request, SourceMap::default(), None)));
    let mut engine = Engine::new_raw();
    host::register(&mut engine, &state);
    let functions =
        engine.collect_fn_metadata(None, |f| Some(f.metadata.name.to_string()), false);
    let recipes = host::RECIPES.iter().map(|name| format!("fp8::{name}"));
    let names = host::RESERVED.iter().map(|name| (*name).to_owned());
    functions.into_iter().chain(recipes).chain(names).collect()
}
