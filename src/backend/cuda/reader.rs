//! What a rank's expressions read: a trainer rank's shards, or an inference rank's own targets.

use crate::diag::Diagnostic;
use crate::lower::{Part, Program};
use crate::shard::{Expr, Storage, View, Window};

use super::Fallible;
use super::parts::Reader;
use super::place::{Plane, Tensor};

/// The shards of one trainer rank.
pub struct TrainerReader<'a> {
    pub program: &'a Program,
    pub rank: u32,
    /// By source; none where the rank holds nothing.
    pub tensors: &'a [Option<Tensor>],
}

impl Reader for TrainerReader<'_> {
    fn cut(&self, expr: &Expr, window: &Window) -> Fallible<Vec<Window>> {
        let shares = self.program.shares(expr, window).map_err(|apart| {
            let text = format!("operands of element {:?} lie apart", apart.0.lo);
            Diagnostic::error("E0502", text)
        })?;
        let own = shares
            .into_iter()
            .filter(|s| s.holders.as_ref().is_none_or(|h| h.binary_search(&self.rank).is_ok()));
        Ok(own.map(|s| s.window).collect())
    }

    fn view(&self, view: &View, lo: &[u64]) -> Fallible<Plane> {
        let Storage::Source(id) = view.storage else {
            return Err(Diagnostic::error("E0502", "a trainer rank reads a landed parameter"));
        };
        match &self.tensors[id as usize] {
            Some(tensor) => tensor.view(view, lo),
            None => {
                let name = &self.program.sources[id as usize].name;
                let text = format!("trainer {} holds nothing of {name}", self.rank);
                Err(Diagnostic::error("E0502", text))
            }
        }
    }
}

/// Gives the address of a target's storage.
pub type AddressOf<'a> = &'a dyn Fn(u32, Part) -> Fallible<u64>;

/// The targets of one inference rank, which have landed.
pub struct LandedReader<'a> {
    pub program: &'a Program,
    /// Index of the rank in the program.
    pub rank: usize,
    pub address: AddressOf<'a>,
}

impl Reader for LandedReader<'_> {
    fn cut(&self, _: &Expr, window: &Window) -> Fallible<Vec<Window>> {
        Ok(vec![window.clone()])
    }

    fn view(&self, view: &View, lo: &[u64]) -> Fallible<Plane> {
        let (id, part) = match view.storage {
            Storage::Landed(id) => (id, Part::Values),
            Storage::LandedScale(id) => (id, Part::Scales),
            Storage::Source(_) => {
                return Err(Diagnostic::error("E0502", "a derived parameter reads a source"));
            }
        };
        let storages = &self.program.ranks[self.rank].targets[id as usize].storages;
        let storage = storages
            .iter()
            .find(|s| s.part == part)
            .ok_or_else(|| Diagnostic::error("E0502", "a target has no such storage"))?;
        let size = storage.dtype.size();
        let strides = storage.strides.iter().map(|s| (s * size) as i64).collect();
        let address = (self.address)(id, part)?;
        Tensor::whole(address, &storage.shape, strides).view(view, lo)
    }
}
