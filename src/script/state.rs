//! What an evaluation has built so far: sources, nodes, parameters, problems, events.

mod finish;
mod sources;

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

use rhai::Position;
use serde_json::Value;

use crate::diag::{Diagnostic, SourceMap, Span};
use crate::ir::{
    Node, NodeId, Op, Param, Pattern, Place, Plan, Rule, Source, SourceId, Type, first_source,
    infer,
};
use crate::topo::InferMesh;

use super::limits::{Limits, Stop};
use super::values::Tensor;
use super::{Catalog, CatalogEntry, Declared, Request};

pub(super) struct State {
    pub name: String,
    pub files: SourceMap,
    pub model: Option<Rc<Value>>,
    pub mesh: InferMesh,
    pub wants_declared_mesh: bool,
    pub stage: u64,
    /// Set when the script asks which layers or ends its stage holds.
    pub stage_asked: Cell<bool>,
    pub target: BTreeMap<String, String>,
    pub declared: Declared,
    pub limits: Limits,
    /// Set when the script declares what the request lacks; the evaluation then starts anew.
    pub restart: bool,
    pub options: BTreeMap<String, String>,
    pub options_seen: BTreeMap<String, String>,
    /// Functions that the plan and its modules define: name, and how it is written.
    pub functions: Vec<(String, String)>,
    /// Each with the event it belongs to; none for what no single call is to blame for.
    pub problems: Vec<(Diagnostic, Option<u32>)>,
    pub keep: Vec<Rule>,
    pub drop: Vec<Rule>,
    ignore: Option<Rc<Vec<Pattern>>>,
    place: Place,
    sources: Vec<Source>,
    source_ids: HashMap<String, SourceId>,
    nodes: Vec<Node>,
    types: Vec<Type>,
    extents: Vec<Extent>,
    params: Vec<Param>,
    /// Where each target name was written first, values that came to nothing included.
    written: HashMap<String, Span>,
    catalog: HashMap<String, CatalogEntry>,
    has_catalog: bool,
    events: u32,
    pub(super) trap: Option<u32>,
    notes: Vec<Diagnostic>,
}

/// How large an expression is when written out in full: later stages walk it so.
#[derive(Clone, Copy, Debug)]
struct Extent {
    depth: u64,
    operations: u64,
}

/// Operations inside each other, and in all, of one expression. Models need a few dozen, and a
/// few thousand where experts are stacked.
const MAX_EXTENT: Extent = Extent { depth: 256, operations: 1 << 18 };

impl State {
    pub fn new(request: &Request<'_>, files: SourceMap, trap: Option<u32>) -> Self {
        let catalog = request.catalog.map(read_catalog);
        State {
            name: request.name.to_owned(),
            files,
            model: request.model.cloned().map(Rc::new),
            mesh: request.mesh.clone(),
            wants_declared_mesh: request.mesh_open,
            stage: request.at.pp,
            stage_asked: Cell::new(false),
            target: request.target.clone(),
            declared: Declared::default(),
            limits: request.limits.clone(),
            restart: false,
            options: request.options.clone(),
            options_seen: BTreeMap::new(),
            functions: Vec::new(),
            problems: Vec::new(),
            keep: Vec::new(),
            drop: Vec::new(),
            ignore: None,
            place: Place::of(request.mesh, request.at),
            sources: Vec::new(),
            source_ids: HashMap::new(),
            nodes: Vec::new(),
            types: Vec::new(),
            extents: Vec::new(),
            params: Vec::new(),
            written: HashMap::new(),
            has_catalog: catalog.is_some(),
            catalog: catalog.unwrap_or_default(),
            events: 0,
            trap,
            notes: Vec::new(),
        }
    }

    /// The span of a point that rhai reports; without one, the start of the plan.
    pub fn point(&self, source: Option<&str>, at: Position) -> Span {
        let named = source.and_then(|s| self.files.find(s));
        let file =
            named.or_else(|| self.files.find(&self.name)).unwrap_or(crate::diag::FileId(0));
        let line = at.line().unwrap_or(1) as u32;
        self.files.token_at(file, line, at.position().unwrap_or(1) as u32)
    }

    /// Counts one thing the script did. In a replay, the trapped one ends the evaluation.
    pub fn event(&mut self) -> Result<u32, Stop> {
        let this = self.events;
        if self.trap == Some(this) {
            return Err(Stop::Trap);
        }
        if this == self.limits.tensors {
            return Err(Stop::Tensors);
        }
        self.events += 1;
        Ok(this)
    }

    /// Records a problem of the event that is under way.
    pub fn problem(&mut self, event: u32, diagnostic: Diagnostic) {
        self.problems.push((diagnostic, Some(event)));
    }

    pub fn type_of(&self, id: NodeId) -> &Type {
        &self.types[id.0 as usize]
    }

    /// The block size of a quantized value.
    pub fn block_of(&self, t: Tensor) -> Option<u64> {
        Some(self.type_of(t.0?).quant?.block)
    }

    /// Adds a node, or reports why it cannot be and gives the empty tensor.
    pub fn push(&mut self, op: Op, inputs: &[Tensor], span: Span) -> Result<Tensor, Stop> {
        let event = self.event()?;
        let ids: Option<Vec<NodeId>> = inputs.iter().map(|t| t.0).collect();
        let Some(ids) = ids else { return Ok(Tensor(None)) };
        let types: Vec<&Type> = ids.iter().map(|i| self.type_of(*i)).collect();
        match infer(&op, &types, &self.place, &self.sources) {
            Ok(found) => {
                let extent = self.extent_of(&ids);
                let Extent { depth, operations } = MAX_EXTENT;
                if extent.depth > depth || extent.operations > operations {
                    let why = format!(
                        "an expression of {} operations, {} of them inside each other; the \
                         limits are {operations} and {depth}",
                        extent.operations, extent.depth
                    );
                    self.problem(event, Diagnostic::error("E0105", why).at(span));
                    return Ok(Tensor(None));
                }
                let id = NodeId(self.nodes.len() as u32);
                self.extents.push(extent);
                self.types.push(found);
                self.nodes.push(Node { op, inputs: ids, span, event });
                Ok(Tensor(Some(id)))
            }
            Err(e) => {
                let mut d = e.at(span);
                d.subject =
                    ids.first().and_then(|id| first_source(&self.nodes, &self.sources, *id));
                self.problem(event, d);
                Ok(Tensor(None))
            }
        }
    }

    fn extent_of(&self, inputs: &[NodeId]) -> Extent {
        let mut out = Extent { depth: 1, operations: 1 };
        for extent in inputs.iter().map(|i| self.extents[i.0 as usize]) {
            out.depth = out.depth.max(extent.depth + 1);
            out.operations = out.operations.saturating_add(extent.operations);
        }
        out
    }

    /// Defines a target parameter.
    pub fn assign(&mut self, name: String, value: Tensor, span: Span) -> Result<(), Stop> {
        let event = self.event()?;
        let mut names = vec![name.clone()];
        names.extend(value.0.and_then(|node| self.scale_of(&name, node)));
        for written in names {
            if let Some(first) = self.written.get(&written).copied() {
                let d =
                    Diagnostic::error("E0406", format!("{written} is written twice")).at(span);
                let d = match first == span {
                    true => d.hint("is the number of the layer or expert missing in the name?"),
                    false => d.also(first, "written here first"),
                }
                .about(written);
                self.problem(event, d);
                return Ok(());
            }
            self.written.insert(written, span);
        }
        if let Some(node) = value.0 {
            self.params.push(Param { name, node, span, derived: false, event });
        }
        Ok(())
    }

    /// True if the module path is on the model's own list of modules to leave unquantized.
    pub fn ignored(&mut self, path: &str) -> Result<bool, String> {
        let list = match &self.ignore {
            Some(list) => Rc::clone(list),
            None => {
                let list = Rc::new(ignore_list(self.model.as_deref())?);
                self.ignore = Some(Rc::clone(&list));
                list
            }
        };
        Ok(list.iter().any(|p| p.matches(path)))
    }

    pub fn into_plan(self) -> Plan {
        Plan {
            name: self.name,
            sources: self.sources,
            nodes: self.nodes,
            params: self.params,
            keep: self.keep,
            drop: self.drop,
            files: self.files,
            options: self.options_seen,
            notes: self.notes,
        }
    }
}

fn read_catalog(catalog: &dyn Catalog) -> HashMap<String, CatalogEntry> {
    let names = catalog.names().into_iter();
    names.filter_map(|n| catalog.find(&n).map(|e| (n, e))).collect()
}

/// `modules_to_not_convert`, `ignored_layers` or `ignore` of the config's quantization_config.
fn ignore_list(model: Option<&Value>) -> Result<Vec<Pattern>, String> {
    let Some(config) = model.and_then(|m| m.get("quantization_config")) else {
        return Ok(Vec::new());
    };
    let keys = ["modules_to_not_convert", "ignored_layers", "ignore"];
    let lists = keys.iter().filter_map(|k| config.get(k)).filter_map(Value::as_array);
    lists
        .flatten()
        .map(|entry| match entry.as_str() {
            Some(text) => Pattern::new(text),
            None => Err(format!("{entry} in the ignore list is not a name")),
        })
        .collect()
}
