//! The oracle: what a plan's parameter holds on one rank, found element by element.
//! Knows nothing of boxes, pieces, units or schedules, whose results it judges.
//!
//! Each operation says where an element comes from. Only runs along the last dimension are
//! walked at once, which is as fast as it needs to be.

mod number;
mod tile;
mod walk;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rayon::prelude::*;

use crate::diag::Diagnostic;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ir::{NodeId, Param, Place, Plan, SourceId, Type, infer_all};
use crate::lower::Part;

use number::widen;
use walk::Walk;

/// Gives the oracle the bytes of source tensors.
pub trait SourceBytes: Sync {
    /// All bytes of one tensor, row-major and little-endian.
    ///
    /// # Errors
    /// Where there is no such tensor, or it cannot be read.
    fn read(&self, name: &str) -> Result<Arc<Vec<u8>>>;
}

/// What one rank holds of one parameter, as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// The elements, or the codes of a quantized value.
    pub values: Vec<u8>,
    /// The scales of a quantized value, f32 or e8m0 as its type says.
    pub scales: Option<Vec<u8>>,
}

/// Evaluates the expressions of one plan at one place.
pub struct Oracle<'a> {
    plan: &'a Plan,
    types: Vec<Type>,
    place: Place,
    /// Physical to logical experts by layer; the initial map for layers that are not named.
    experts: &'a BTreeMap<String, Vec<u64>>,
    sources: &'a dyn SourceBytes,
}

/// An element's value for messages.
pub(crate) fn show_value(dtype: DType, bits: u32) -> String {
    match dtype {
        DType::I32 => (bits as i32).to_string(),
        _ => widen(dtype, bits).to_string(),
    }
}

/// Rows that are evaluated together where no tile says how many.
const BAND: u64 = 128;

impl<'a> Oracle<'a> {
    /// # Errors
    /// Every node whose type the place does not allow.
    pub fn new(
        plan: &'a Plan,
        place: Place,
        experts: &'a BTreeMap<String, Vec<u64>>,
        sources: &'a dyn SourceBytes,
    ) -> Result<Self> {
        let (types, errors) = infer_all(plan, &place);
        let refused = |(node, e): (usize, crate::ir::TypeError)| {
            Diagnostic::error(e.code, e.message).at(plan.nodes[node].span)
        };
        let types: Option<Vec<Type>> = types.into_iter().collect();
        match types {
            Some(types) => Ok(Oracle { plan, types, place, experts, sources }),
            None => Err(Error::refused(errors.into_iter().map(refused).collect())),
        }
    }

    /// The plan whose expressions are evaluated.
    pub fn plan(&self) -> &'a Plan {
        self.plan
    }

    /// What a node evaluates to here.
    pub fn type_of(&self, node: NodeId) -> &Type {
        &self.types[node.0 as usize]
    }

    /// The bytes of a parameter, derived ones included.
    ///
    /// # Errors
    /// Sources that cannot be read, an expert map that does not fit, and E0606 where one tile
    /// of the result would need two scales.
    pub fn param(&self, param: &Param) -> Result<Stored> {
        self.node(&param.name, param.node)
    }

    /// The bytes of any node, as if it were the parameter `name` (which picks the expert map).
    ///
    /// # Errors
    /// As [`Oracle::param`].
    pub fn node(&self, name: &str, node: NodeId) -> Result<Stored> {
        let t = self.type_of(node);
        let scales = t.scale_shape().zip(t.scale_dtype());
        let scale_bytes = scales
            .as_ref()
            .map_or(0, |(shape, dtype)| shape.iter().product::<u64>() * dtype.size());
        let mut values = vec![0; t.bytes() as usize];
        let mut scale_buffer = vec![0; scale_bytes as usize];
        let loaded = Loaded { sources: self.sources, cells: Mutex::default() };
        let experts = self.experts_of(name);
        bands(t, &mut values, &mut scale_buffer).into_par_iter().try_for_each(|band| {
            let mut walk = Walk {
                oracle: self,
                loaded: &loaded,
                experts,
                held: HashMap::new(),
                tiles: HashMap::new(),
            };
            walk.band(name, node, t, band)
        })?;
        Ok(Stored { values, scales: scales.map(|_| scale_buffer) })
    }

    /// The map of the innermost layer that a parameter lies in.
    fn experts_of(&self, name: &str) -> Option<&[u64]> {
        let inside =
            |layer: &str| name.strip_prefix(layer).is_some_and(|rest| rest.starts_with('.'));
        let layers = self.experts.iter().filter(|(layer, _)| inside(layer));
        layers.max_by_key(|(layer, _)| layer.len()).map(|(_, map)| map.as_slice())
    }
}

/// Consecutive rows of a result that lie in one row of tiles, and where their bytes go.
struct Band<'b> {
    /// Counted over all dimensions but the last.
    first_row: u64,
    values: &'b mut [u8],
    scales: &'b mut [u8],
}

fn bands<'b>(t: &Type, values: &'b mut [u8], scales: &'b mut [u8]) -> Vec<Band<'b>> {
    if values.is_empty() {
        return Vec::new();
    }
    let (rows, cols) = matrix(&t.shape);
    let height = t.quant.map_or(BAND, |q| q.block).min(rows);
    let row_bytes = (cols * t.dtype.size()) as usize;
    let scale_row = match (t.quant, t.scale_dtype()) {
        (Some(q), Some(dtype)) => (cols.div_ceil(q.block) * dtype.size()) as usize,
        _ => 1,
    };
    let mut scale_rows = scales.chunks_mut(scale_row);
    let mut out = Vec::new();
    let mut first_row = 0;
    for matrix in values.chunks_mut(rows as usize * row_bytes) {
        for values in matrix.chunks_mut(height as usize * row_bytes) {
            let count = (values.len() / row_bytes) as u64;
            out.push(Band { first_row, values, scales: scale_rows.next().unwrap_or_default() });
            first_row += count;
        }
    }
    out
}

/// Rows and columns: the last two sizes, 1 where there are fewer.
fn matrix(shape: &[u64]) -> (u64, u64) {
    match shape {
        [.., rows, cols] => (*rows, *cols),
        [cols] => (1, *cols),
        [] => (1, 1),
    }
}

/// Source tensors read so far, shared by the bands of one parameter.
struct Loaded<'o> {
    sources: &'o dyn SourceBytes,
    cells: Mutex<HashMap<(SourceId, Part), Cell>>,
}

type Cell = Arc<OnceLock<Result<Arc<Vec<u8>>>>>;

impl Loaded<'_> {
    fn get(&self, key: (SourceId, Part), name: &str, bytes: u64) -> Result<Arc<Vec<u8>>> {
        let cell = {
            let mut cells = self.cells.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(cells.entry(key).or_default())
        };
        let read = || {
            let data = self.sources.read(name)?;
            if data.len() as u64 == bytes {
                return Ok(data);
            }
            let text = format!("{name} has {} bytes, the plan needs {bytes}", data.len());
            Err(Diagnostic::error("E0601", text).about(name).into())
        };
        cell.get_or_init(read).clone()
    }
}
