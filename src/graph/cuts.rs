//! How a unit is cut: slices, the parts of each by owner, the tiles that owners share. Units that
//! differ only in which tensors they read, placed alike, are cut once.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::hash::{Hash, Hasher};
use std::rc::Rc;
use std::sync::Arc;

use xxhash_rust::xxh3::Xxh3;

use crate::diag::Diagnostic;
use crate::lower::{Program, Unit};
use crate::shard::{Apart, Leaf, Share, Storage, Window};
use crate::topo::Layout;

use super::owners::{operands_apart, owned, tiles_are_whole};
use super::shared::{Made, shared_tiles};
use super::slabs;

/// A range of a unit that goes into one bucket.
pub(super) struct Slice {
    pub bytes: u64,
    shares: Vec<Share>,
    /// Shares of what is quantized, in its own coordinates.
    inputs: Vec<Share>,
    window: Window,
    /// One for each replica of the holders.
    choices: Vec<Option<Rc<Owned>>>,
}

/// A slice with an owner for each part.
#[derive(Default)]
pub(super) struct Owned {
    pub parts: Vec<OwnedPart>,
    /// Boxes of tiles with their holders.
    pub shared: Vec<(Window, Vec<u32>)>,
    /// Bytes of each owner.
    pub loads: Vec<(u32, u64)>,
}

pub(super) struct OwnedPart {
    pub owner: u32,
    pub window: Window,
    pub value_bytes: u64,
    pub scale_bytes: u64,
}

/// All cuts that were made so far.
pub(super) struct Cuts<'a> {
    program: &'a Program,
    layouts: HashMap<*const Layout, u64>,
    known: HashMap<u128, Slices>,
}

/// The slices of all units that are cut alike.
pub(super) type Slices = Rc<Vec<RefCell<Slice>>>;

impl<'a> Cuts<'a> {
    pub(super) fn new(program: &'a Program) -> Self {
        Cuts { program, layouts: HashMap::new(), known: HashMap::new() }
    }

    /// The slices of a unit, and a digest of all that they depend on.
    ///
    /// # Errors
    /// E0308 for what no rank can make.
    pub(super) fn of(&mut self, unit: &Unit, limit: u64) -> Result<(u128, Slices), Diagnostic> {
        let key = self.key(unit, limit);
        if let Some(slices) = self.known.get(&key) {
            return Ok((key, Rc::clone(slices)));
        }
        let leaf = unit.expr.leaf();
        if leaf.is_some_and(|l| !l.sole) {
            tiles_are_whole(self.program, unit)?;
        }
        let (block, phase) = unit.grid();
        let mut slices = Vec::new();
        let mut problem = None;
        let whole = Window::whole(&unit.shape);
        slabs(&whole, unit.dtype.size(), block, phase, limit, &mut |window| match slice(
            self.program,
            unit,
            leaf.as_ref(),
            window,
        ) {
            Ok(slice) => slices.push(slice.into()),
            Err(d) => problem = Some(d),
        });
        if let Some(d) = problem {
            return Err(d);
        }
        let slices = Rc::new(slices);
        self.known.insert(key, Rc::clone(&slices));
        Ok((key, slices))
    }

    /// Hash of a unit's expression with each source replaced by where it is placed.
    fn key(&mut self, unit: &Unit, limit: u64) -> u128 {
        let mut hash = Digest::default();
        let mut expr = unit.expr.clone();
        expr.views_mut(&mut |view| {
            let Storage::Source(id) = view.storage else { return };
            let layout = &self.program.sources[id as usize].layout;
            let number = self.layouts.entry(Arc::as_ptr(layout)).or_insert_with(|| {
                let mut own = Digest::default();
                layout.hash(&mut own);
                own.finish()
            });
            number.hash(&mut hash);
            view.storage = Storage::Source(0);
        });
        expr.hash(&mut hash);
        unit.shape.hash(&mut hash);
        (unit.quant.map(|q| (q.block, q.scales)), unit.dtype, limit).hash(&mut hash);
        hash.0.digest128()
    }
}

/// The project's hash as a [`Hasher`].
#[derive(Default)]
pub(super) struct Digest(pub Xxh3);

impl Hasher for Digest {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(&self) -> u64 {
        self.0.digest()
    }
}

fn slice(
    program: &Program,
    unit: &Unit,
    leaf: Option<&Leaf<'_>>,
    window: Window,
) -> Result<Slice, Diagnostic> {
    let apart = |a: Apart| operands_apart(unit, &a.0);
    let shares = program.shares(&unit.expr, &window).map_err(apart)?;
    let inputs = match leaf {
        Some(leaf) => program.input_shares(leaf.made, &leaf.region(&window)).map_err(apart)?,
        None => Vec::new(),
    };
    let replicas = shares.iter().filter_map(|s| Some(s.holders.as_deref()?.len())).max();
    let (values, scales) = unit.bytes_of(&window);
    let choices = vec![None; replicas.unwrap_or(1)];
    Ok(Slice { bytes: values + scales, shares, inputs, window, choices })
}

impl Slice {
    /// The replica of the holders whose ranks have the least to send.
    pub(super) fn choose(&self, sent: &[u64]) -> usize {
        let load = |choice: &usize| {
            let holders = self.shares.iter().filter_map(|s| s.holders.as_deref());
            holders.map(|h| sent[h[choice % h.len()] as usize]).max()
        };
        match self.choices.len() {
            1 => 0,
            n => (0..n).min_by_key(load).unwrap_or(0),
        }
    }

    /// The parts of a choice. `unit` is any unit that is cut so.
    pub(super) fn owned(&mut self, choice: usize, unit: &Unit) -> Rc<Owned> {
        if let Some(known) = &self.choices[choice] {
            return Rc::clone(known);
        }
        let mut parts = owned(&self.shares, choice);
        // What one rank makes is one part, however many sources it comes from.
        if parts.iter().all(|p| p.0 == parts[0].0) {
            parts = vec![(parts[0].0, self.window.clone())];
        }
        let mut new = Owned::default();
        if let Some(leaf) = unit.expr.leaf() {
            let inputs = owned(&self.inputs, choice);
            new.shared = shared(&leaf, &parts, inputs);
        }
        let mut loads: BTreeMap<u32, u64> = BTreeMap::new();
        for (owner, window) in parts {
            let (value_bytes, scale_bytes) = unit.bytes_of(&window);
            *loads.entry(owner).or_default() += value_bytes + scale_bytes;
            new.parts.push(OwnedPart { owner, window, value_bytes, scale_bytes });
        }
        new.loads = loads.into_iter().collect();
        let new = Rc::new(new);
        self.choices[choice] = Some(Rc::clone(&new));
        new
    }
}

fn shared(
    leaf: &Leaf<'_>,
    parts: &[(u32, Window)],
    inputs: Vec<(u32, Window)>,
) -> Vec<(Window, Vec<u32>)> {
    let mut made: Vec<Made> =
        inputs.into_iter().map(|(owner, window)| Made { window, owner }).collect();
    // Who makes a part needs its tiles' maxima, whether or not it holds all of their rows.
    for (owner, window) in parts {
        let window = leaf.elements(window);
        let known = |m: &Made| m.owner == *owner && m.window.contains(&window);
        if !made.iter().any(known) {
            made.push(Made { window, owner: *owner });
        }
    }
    let mut found = Vec::new();
    let block = u64::from(leaf.made.recipe.block);
    shared_tiles(&made, &leaf.made.extent, block, &mut |tiles, owners| {
        found.push((tiles, owners));
    });
    found
}
