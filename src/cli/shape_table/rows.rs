//! From the targets of a class of equal ranks to sections of rows: layers and numbers folded.

use std::collections::HashMap;

use crate::compile::Compiled;
use crate::dtype::DType;
use crate::ir::{Dims, Plan};
use crate::lower::{Part, RankProgram, Target, TargetKind, Unit};
use crate::shard::{Piece, Storage, row_major};

use super::names::{Layer, Names, Numbers, split_layer, template};

/// Everything that rows must share to be one row.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Facts {
    /// Name as seen from the layer, numbers taken out.
    name: String,
    pub kind: Kind,
    pub full: Option<Dims>,
    pub shape: Dims,
    pub dtype: DType,
    /// In elements; only where the target is not contiguous.
    pub strides: Option<Dims>,
    pub scale: Option<Scale>,
    pub origin: Origin,
}

/// [`TargetKind`] as a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Parameter,
    Derived,
    Alias,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Scale {
    pub dtype: DType,
    pub shape: Dims,
    pub block: u64,
}

/// What happens to the sources' elements on their way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Origin {
    /// Element type of the first source.
    pub from: Option<DType>,
    pub recipe: Option<&'static str>,
    /// True if the source has the target's own name.
    pub same_name: bool,
}

/// One parameter of each layer of a section, or several that differ in a number.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub facts: Facts,
    numbers: Vec<Numbers>,
    /// What it is made from: trainer tensors, or the parameters that it is derived from.
    pub sources: Names,
    /// Parameters that the row stands for, in one layer.
    pub count: u64,
    /// Bytes that an update writes, in one layer.
    pub bytes: u64,
}

impl Row {
    pub fn name(&self) -> String {
        let mut numbers = self.numbers.iter();
        let segments = self.facts.name.split('.').map(|s| match s {
            super::names::NUMBER => numbers.next().map_or_else(String::new, Numbers::show),
            word => word.to_owned(),
        });
        segments.collect::<Vec<_>>().join(".")
    }

    fn alike(&self, other: &Row) -> bool {
        self.facts == other.facts
            && self.numbers == other.numbers
            && self.sources.alike(&other.sources)
    }
}

/// Rows under one header: equal layers, or the parameters outside of layers.
#[derive(Clone, Debug)]
pub(super) struct Section {
    /// `model.layers.`; empty outside of layers.
    pub prefix: String,
    pub layers: Vec<u64>,
    pub rows: Vec<Row>,
}

impl Section {
    /// How many layers each row stands for.
    pub fn times(&self) -> u64 {
        self.layers.len().max(1) as u64
    }

    pub fn bytes(&self) -> u64 {
        self.rows.iter().fold(0, |all, r| all.saturating_add(r.bytes))
    }

    /// Parameters that an update writes, in all layers.
    pub fn written(&self) -> u64 {
        let rows = self.rows.iter().filter(|r| r.facts.kind == Kind::Parameter);
        rows.map(|r| r.count).sum::<u64>() * self.times()
    }
}

/// Splits ranks into classes that hold the same names, shapes and types, in order.
pub(super) fn classes(ranks: &[RankProgram]) -> Vec<Vec<&RankProgram>> {
    let mut out: Vec<Vec<&RankProgram>> = Vec::new();
    for rank in ranks {
        match out.iter_mut().find(|class| equal(class[0], rank)) {
            Some(class) => class.push(rank),
            None => out.push(vec![rank]),
        }
    }
    out
}

fn equal(a: &RankProgram, b: &RankProgram) -> bool {
    a.coords.pp == b.coords.pp
        && a.targets.len() == b.targets.len()
        && a.targets.iter().zip(&b.targets).all(|(a, b)| {
            a.name == b.name
                && a.kind == b.kind
                && a.storages == b.storages
                && a.full_shape == b.full_shape
                && a.recipe == b.recipe
        })
}

/// The sections of a class: parameters outside of layers first, then layers as they appear.
pub(super) fn sections(compiled: &Compiled, class: &[&RankProgram]) -> Vec<Section> {
    let [first, others @ ..] = class else { return Vec::new() };
    let plan = &compiled.stages[first.coords.pp as usize];
    let mut whole = Section { prefix: String::new(), layers: Vec::new(), rows: Vec::new() };
    let mut layers: Vec<Section> = Vec::new();
    let mut places: HashMap<(&str, u64), usize> = HashMap::new();
    for (index, target) in first.targets.iter().enumerate() {
        let units = &compiled.program.units;
        let Some((prefix, number, rest)) = split_layer(&target.name) else {
            let outside = Layer { prefix: "", number: None };
            let others = others.iter().map(|r| &*r.targets[index]);
            whole.rows.extend(row(plan, units, &target.name, target, others, outside));
            continue;
        };
        let others = others.iter().map(|r| &*r.targets[index]);
        let layer = Layer { prefix, number: Some(number) };
        let row = row(plan, units, rest, target, others, layer);
        let at = *places.entry((prefix, number)).or_insert_with(|| {
            layers.push(Section {
                prefix: prefix.to_owned(),
                layers: vec![number],
                rows: Vec::new(),
            });
            layers.len() - 1
        });
        layers[at].rows.extend(row);
    }
    let mut out: Vec<Section> = Vec::new();
    if !whole.rows.is_empty() {
        fold_rows(&mut whole.rows);
        out.push(whole);
    }
    for mut layer in layers {
        fold_rows(&mut layer.rows);
        match out.iter_mut().find(|s| equal_layers(s, &layer)) {
            Some(section) => {
                section.layers.extend(&layer.layers);
                for (ours, theirs) in section.rows.iter_mut().zip(&layer.rows) {
                    ours.sources.union(&theirs.sources);
                }
            }
            None => out.push(layer),
        }
    }
    out.iter_mut().for_each(|s| s.layers.sort_unstable());
    out
}

fn equal_layers(a: &Section, b: &Section) -> bool {
    a.prefix == b.prefix
        && a.rows.len() == b.rows.len()
        && a.rows.iter().zip(&b.rows).all(|(a, b)| a.alike(b))
}

/// The row of a target of one layer; `others` are the same target on the class's other ranks.
fn row<'a>(
    plan: &'a Plan,
    units: &[Unit],
    name: &str,
    target: &'a Target,
    others: impl Iterator<Item = &'a Target>,
    layer: Layer<'_>,
) -> Option<Row> {
    let values = target.storages.iter().find(|s| s.part == Part::Values)?;
    let scales = target.storages.iter().find(|s| s.part == Part::Scales);
    let unit = target.places.first().and_then(|p| units.get(p.unit as usize));
    let block = unit.and_then(|u| u.quant).map_or(0, |q| q.block);
    let (text, numbers) = template(name);
    let kind = match target.kind {
        TargetKind::Parameter => Kind::Parameter,
        TargetKind::Derived => Kind::Derived,
        TargetKind::Alias => Kind::Alias,
    };
    let sources = match kind {
        Kind::Parameter => {
            let mut names = Names::of(target.sources.iter().map(String::as_str), layer);
            for other in others.filter(|o| o.sources != target.sources) {
                names.union(&Names::of(other.sources.iter().map(String::as_str), layer));
            }
            names
        }
        Kind::Derived | Kind::Alias => Names::of(landed(plan, &target.derived), layer),
    };
    let bytes = match kind {
        Kind::Parameter => {
            target.storages.iter().fold(0u64, |all, s| all.saturating_add(s.bytes()))
        }
        Kind::Derived | Kind::Alias => 0,
    };
    let facts = Facts {
        name: text,
        kind,
        full: target.full_shape.clone(),
        shape: values.shape.clone(),
        dtype: values.dtype,
        strides: (values.strides != row_major(&values.shape)).then(|| values.strides.clone()),
        scale: scales.map(|s| Scale { dtype: s.dtype, shape: s.shape.clone(), block }),
        origin: Origin {
            from: first_dtype(target, units),
            recipe: target.recipe,
            same_name: matches!(&target.sources[..], [one] if *one == target.name),
        },
    };
    let numbers = numbers.into_iter().map(Numbers::one).collect();
    Some(Row { facts, numbers, sources, count: 1, bytes })
}

/// Names of the parameters that a derived one is computed from, in order of first use.
fn landed<'a>(plan: &'a Plan, pieces: &[Piece]) -> Vec<&'a str> {
    let mut order = Vec::new();
    for piece in pieces {
        piece.expr.views(&mut |view| {
            if let Storage::Landed(id) = view.storage
                && !order.contains(&id)
            {
                order.push(id);
            }
        });
    }
    order
        .into_iter()
        .filter_map(|id| Some(plan.params.get(id as usize)?.name.as_str()))
        .collect()
}

/// Type of the first source that a target's units read.
fn first_dtype(target: &Target, units: &[Unit]) -> Option<DType> {
    let exprs = target.places.iter().filter_map(|p| Some(&units.get(p.unit as usize)?.expr));
    exprs.into_iter().find_map(|expr| {
        let mut found = None;
        expr.views(&mut |view| found = found.or(Some(view.dtype)));
        found
    })
}

/// Folds rows of a layer that differ only in numbers of their names.
fn fold_rows(rows: &mut Vec<Row>) {
    let mut places: HashMap<Facts, usize> = HashMap::new();
    let mut out: Vec<Row> = Vec::with_capacity(rows.len());
    for row in rows.drain(..) {
        // With two numbers, not every combination need occur.
        if row.numbers.len() != 1 {
            out.push(row);
            continue;
        }
        match places.get(&row.facts) {
            Some(&at) if out[at].sources.alike(&row.sources) => {
                let ours = &mut out[at];
                ours.numbers.iter_mut().zip(&row.numbers).for_each(|(a, b)| a.add(b));
                ours.sources.union(&row.sources);
                ours.count += row.count;
                ours.bytes = ours.bytes.saturating_add(row.bytes);
            }
            _ => {
                places.insert(row.facts.clone(), out.len());
                out.push(row);
            }
        }
    }
    *rows = out;
}
