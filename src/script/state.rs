//! What an evaluation has built so far: sources, nodes, parameters, problems, events.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::rc::Rc;

use rhai::Position;
use serde_json::Value;

use crate::diag::{Diagnostic, SourceMap, Span};
use crate::dtype::DType;
use crate::fp8::ScaleFormat;
use crate::ir::{
    Dims, Node, NodeId, Op, Param, Pattern, Place, Plan, Rule, Source, SourceFormat, SourceId,
    SourceScale, Type, first_source, infer, show_shape,
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
    pub target: BTreeMap<String, String>,
    pub declared: Declared,
    pub limits: Limits,
    /// Set when the script declares what the request lacks; the evaluation then starts anew.
    pub restart: bool,
    pub options: BTreeMap<String, String>,
    pub options_seen: BTreeMap<String, String>,
    /// Each with the event it belongs to; none for what no single call is to blame for.
    /// Functions that the plan and its modules define: name, and how it is written.
    pub functions: Vec<(String, String)>,
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
    trap: Option<u32>,
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
                let mut d = type_diagnostic(e, span);
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

    /// Declares and reads a source tensor.
    pub fn source(
        &mut self,
        name: String,
        shape: Dims,
        dtype: DType,
        span: Span,
    ) -> Result<Tensor, Stop> {
        if let Some(id) = self.source_ids.get(&name).copied() {
            let known = &self.sources[id.0 as usize];
            if known.shape != shape {
                let d = Diagnostic::error(
                    "E0402",
                    format!(
                        "{name} is named twice with shapes {} and {}",
                        show_shape(&known.shape),
                        show_shape(&shape)
                    ),
                )
                .at(span)
                .also(known.span, "first named here")
                .about(name);
                let event = self.event()?;
                self.problem(event, d);
                return Ok(Tensor(None));
            }
            return self.read(id, dtype, span);
        }
        match self.source_format(&name, &shape, dtype) {
            Ok(format) => {
                let id = SourceId(self.sources.len() as u32);
                self.source_ids.insert(name.clone(), id);
                self.sources.push(Source { name, shape, format, span });
                self.read(id, dtype, span)
            }
            Err(d) => {
                let event = self.event()?;
                self.problem(event, d.at(span).about(name));
                Ok(Tensor(None))
            }
        }
    }

    /// Reads a source in the type that the plan declares, which its own may widen to.
    fn read(&mut self, id: SourceId, declared: DType, span: Span) -> Result<Tensor, Stop> {
        let value = self.push(Op::Source(id), &[], span)?;
        let source = &self.sources[id.0 as usize];
        match source.format {
            SourceFormat::Plain(dtype) if dtype == declared => Ok(value),
            SourceFormat::Plain(dtype) if dtype.widens_to(declared) => {
                self.push(Op::Cast { dtype: declared }, &[value], span)
            }
            SourceFormat::Quantized { .. } if declared.is_float() => Ok(value),
            _ => {
                let d = Diagnostic::error(
                    "E0403",
                    format!("{} is named twice, now as {declared}", source.name),
                )
                .at(span)
                .also(source.span, "first named here")
                .about(source.name.clone());
                let event = self.event()?;
                self.problem(event, d);
                Ok(Tensor(None))
            }
        }
    }

    /// How a source is really stored; what the plan declares where no files are known.
    fn source_format(
        &self,
        name: &str,
        shape: &Dims,
        declared: DType,
    ) -> Result<SourceFormat, Diagnostic> {
        if !self.has_catalog {
            return Ok(SourceFormat::Plain(declared));
        }
        let Some(found) = self.catalog.get(name) else {
            return Err(Diagnostic::error(
                "E0401",
                format!("there is no source tensor {name}"),
            ));
        };
        if found.shape != *shape {
            return Err(Diagnostic::error(
                "E0402",
                format!(
                    "{name} is {} in the source, the plan says {}",
                    show_shape(&found.shape),
                    show_shape(shape)
                ),
            )
            .hint("is the plan's formula right for this model's config.json?"));
        }
        let Some(dtype) = found.dtype else {
            return Err(Diagnostic::error(
                "E0418",
                format!(
                    "{name} is stored as {}, which the engine does not read",
                    found.dtype_name
                ),
            ));
        };
        if dtype == DType::E4m3 && declared.is_float() {
            return self.quantized_format(name, shape);
        }
        if dtype.widens_to(declared) {
            return Ok(SourceFormat::Plain(dtype));
        }
        Err(Diagnostic::error(
            "E0403",
            format!("{name} is {dtype} in the source, the plan says {declared}"),
        )
        .hint(format!(
            "name the stored type and write the cast: src(.., .., {dtype}).to({declared})"
        )))
    }

    fn quantized_format(&self, name: &str, shape: &Dims) -> Result<SourceFormat, Diagnostic> {
        let block = self.source_block()?;
        let found = ["_scale_inv", "_scale"].iter().find_map(|suffix| {
            let scale = format!("{name}{suffix}");
            self.catalog.get(&scale).map(|entry| (scale, entry))
        });
        let Some((scale, entry)) = found else {
            return Err(Diagnostic::error(
                "E0412",
                format!("{name} is e4m3 and has no scale: {name}_scale_inv is missing"),
            )
            .hint("FP8 codes mean nothing without their block scales"));
        };
        let quantized = Type {
            shape: shape.clone(),
            dtype: DType::E4m3,
            quant: Some(crate::ir::Quant {
                block,
                scales: ScaleFormat::F32,
                scale_name: crate::ir::ScaleName::ScaleInv,
            }),
        };
        let wanted = quantized.scale_shape().unwrap_or_default();
        if entry.shape != wanted {
            return Err(Diagnostic::error(
                "E0412",
                format!(
                    "{scale} is {}, blocks of {block} over {} need {}",
                    show_shape(&entry.shape),
                    show_shape(shape),
                    show_shape(&wanted)
                ),
            ));
        }
        match entry.dtype {
            Some(dtype @ (DType::F32 | DType::Bf16 | DType::E8m0)) => {
                Ok(SourceFormat::Quantized {
                    block,
                    scale: SourceScale {
                        name: scale,
                        dtype,
                        shape: wanted,
                        target: match dtype {
                            DType::E8m0 => ScaleFormat::E8m0,
                            _ => ScaleFormat::F32,
                        },
                    },
                })
            }
            _ => Err(Diagnostic::error(
                "E0412",
                format!("{scale} is {}; block scales are f32, bf16 or e8m0", entry.dtype_name),
            )),
        }
    }

    /// The tile size of the model's own FP8 weights; 128 where the config says nothing.
    fn source_block(&self) -> Result<u64, Diagnostic> {
        let sizes = self
            .model
            .as_ref()
            .and_then(|m| m.get("quantization_config")?.get("weight_block_size").cloned());
        let Some(sizes) = sizes.filter(|s| !s.is_null()) else { return Ok(128) };
        let list: Option<Vec<u64>> =
            sizes.as_array().and_then(|l| l.iter().map(Value::as_u64).collect());
        match list.as_deref() {
            Some([a, b]) if a == b && *a > 0 => Ok(*a),
            _ => Err(Diagnostic::error(
                "E0412",
                format!("weight_block_size {sizes} of the config is not a square block"),
            )),
        }
    }

    /// Defines a target parameter.
    pub fn assign(&mut self, name: String, value: Tensor, span: Span) -> Result<(), Stop> {
        let event = self.event()?;
        let mut names = vec![name.clone()];
        names.extend(value.0.and_then(|node| self.scale_of(&name, node)));
        for written in names {
            if let Some(first) = self.written.get(&written).copied() {
                let d = Diagnostic::error("E0406", format!("{written} is written twice"))
                    .at(span)
                    .also(first, "written here first")
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

    /// The name under which a quantized value's scales are written.
    fn scale_of(&self, name: &str, node: NodeId) -> Option<String> {
        let quant = self.type_of(node).quant?;
        Some(format!("{name}{}", quant.scale_name.suffix()))
    }

    /// A name that is kept is not written.
    fn check_kept(&mut self) {
        let mut clashes = Vec::new();
        for param in &self.params {
            let scale = self.scale_of(&param.name, param.node);
            for name in [Some(&param.name), scale.as_ref()].into_iter().flatten() {
                if let Some(rule) = self.keep.iter().find(|r| r.pattern.matches(name)) {
                    let d = Diagnostic::error(
                        "E0420",
                        format!("keep(\"{}\") names what the plan writes", rule.pattern.text()),
                    )
                    .at(rule.span)
                    .also(param.span, format!("{name} is written here"))
                    .hint("make the pattern narrower, or write nothing under this name")
                    .about(name);
                    clashes.push((d, Some(param.event)));
                }
            }
        }
        self.problems.extend(clashes);
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

    /// What can only be said at the end: derived parameters, unknown options, empty entries.
    /// The last two only of a script that ran to its end.
    pub fn finish(&mut self, complete: bool) {
        self.mark_derived();
        self.check_kept();
        self.suggest_names();
        if complete {
            self.check_options();
            self.check_ignore_list();
        }
    }

    /// A parameter is derived if every path to its sources passes `.dequantize` of a node that
    /// is itself a parameter, and it is not quantized itself.
    fn mark_derived(&mut self) {
        let targets: BTreeSet<NodeId> = self.params.iter().map(|p| p.node).collect();
        let mut some = vec![false; self.nodes.len()];
        let mut all = vec![false; self.nodes.len()];
        for (i, node) in self.nodes.iter().enumerate() {
            let landed = matches!(node.op, Op::Dequantize { .. })
                && node.inputs.iter().all(|n| targets.contains(n));
            let mut inputs = node.inputs.iter().map(|n| n.0 as usize).peekable();
            all[i] = landed || (inputs.peek().is_some() && inputs.clone().all(|n| all[n]));
            some[i] = landed || inputs.any(|n| some[n]);
        }
        let mut mixed = Vec::new();
        for param in &mut self.params {
            let i = param.node.0 as usize;
            // Receivers only dequantize: a value that is quantized again comes from the sources.
            param.derived = all[i] && self.types[i].quant.is_none();
            if some[i] && !all[i] {
                let d = Diagnostic::error(
                    "E0501",
                    format!(
                        "{} mixes a value that the receiver derives from another parameter \
                         with sources",
                        param.name
                    ),
                )
                .at(param.span)
                .hint("a derived parameter is made of parameters that have landed, and nothing else")
                .about(&param.name);
                mixed.push((d, Some(param.event)));
            }
        }
        self.problems.extend(mixed);
    }

    /// Names near a misspelt source; only for the first few, since each is a walk over all names.
    fn suggest_names(&mut self) {
        let missing =
            self.problems.iter_mut().filter(|(d, _)| d.code == "E0401" && d.hint.is_none());
        let mut names: Vec<&str> = self.catalog.keys().map(String::as_str).collect();
        names.sort_unstable();
        for (d, _) in missing.take(8) {
            let wanted = d.subject.clone().unwrap_or_default();
            d.hint = super::errors::nearest(&wanted, names.iter().copied())
                .map(|near| format!("the nearest name is {near}"));
        }
    }

    fn check_options(&mut self) {
        for name in self.options.keys() {
            if self.options_seen.contains_key(name) {
                continue;
            }
            let known: Vec<&str> = self.options_seen.keys().map(String::as_str).collect();
            let mut d = Diagnostic::error("E0109", format!("the plan has no option `{name}`"));
            d.hint = Some(match known.is_empty() {
                true => "the plan declares no options".to_owned(),
                false => format!("its options are {}", known.join(", ")),
            });
            self.problems.push((d, None));
        }
    }

    /// Entries of the model's ignore list that no source lies under.
    fn check_ignore_list(&mut self) {
        let Some(list) = self.ignore.clone() else { return };
        let names = self.sources.iter().map(|s| s.name.as_str());
        let names: Vec<&str> = names.chain(self.catalog.keys().map(String::as_str)).collect();
        let runs = SegmentRuns::of(&names, list.iter().map(Pattern::text));
        let lost: Vec<&str> = list
            .iter()
            .filter(|p| match runs.plain(p.text()) {
                true => !runs.found.contains(p.text()),
                false => !names.iter().any(|n| p.matches(n)),
            })
            .map(Pattern::text)
            .collect();
        if let Some(first) = lost.first() {
            let more = match lost.len() {
                1 => String::new(),
                n => format!(" and {} more", n - 1),
            };
            self.notes.push(Diagnostic::warning(
                "E0422",
                format!(
                    "{first}{more} of the model's list of modules to leave unquantized \
                     matches no source of this plan"
                ),
            ));
        }
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

/// Which of the wanted runs of whole segments occur in a list of names.
struct SegmentRuns<'a> {
    found: BTreeSet<&'a str>,
}

impl<'a> SegmentRuns<'a> {
    fn of(names: &[&'a str], wanted: impl Iterator<Item = &'a str>) -> Self {
        let wanted: HashSet<&str> = wanted.collect();
        let heads: HashSet<&str> =
            wanted.iter().map(|w| w.split('.').next().unwrap_or_default()).collect();
        let mut found = BTreeSet::new();
        for name in names {
            let ends: Vec<usize> =
                name.match_indices('.').map(|(i, _)| i).chain([name.len()]).collect();
            let starts = [0].into_iter().chain(ends.iter().map(|e| e + 1));
            for (k, start) in starts.take(ends.len()).enumerate() {
                // Most segments begin no wanted run.
                if heads.contains(&name[start..ends[k]]) {
                    found.extend(ends[k..].iter().filter_map(|e| wanted.get(&name[start..*e])));
                }
            }
        }
        SegmentRuns { found }
    }

    fn plain(&self, pattern: &str) -> bool {
        !pattern.contains('*') && !pattern.starts_with("re:")
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

/// A type error at its place in the plan.
pub(super) fn type_diagnostic(e: crate::ir::TypeError, span: Span) -> Diagnostic {
    let mut d = Diagnostic::error(e.code, e.message).at(span);
    d.label = e.label;
    d.hint = e.hint;
    d
}
