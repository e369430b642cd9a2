//! Compares what a rank's file holds with the oracle: the first difference, with its coordinates.
//! Knows nothing of manifests or the command line; the caller loads the parts.

mod output;

use std::collections::BTreeMap;

use crate::backend::reference::Oracle;
use crate::diag::{Diagnostic, Span};
use crate::dtype::DType;
use crate::error::Result;
use crate::ir::{Dims, Type, show_shape};
use crate::lower::Part;

pub use output::{VerifyReport, verify_output};

/// A tensor that a rank's file says it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileTensor {
    pub name: String,
    pub dtype: DType,
    pub shape: Dims,
}

/// How a stored tensor differs from what the plan says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Difference {
    /// The plan defines it, the file does not hold it.
    Missing,
    /// The file holds it, the plan does not define it.
    Unexpected,
    /// Another type or shape.
    Form { expected: String, found: String },
    /// Another number of bytes than its own type and shape need.
    Length { expected: u64, found: u64 },
    /// Other elements.
    Elements {
        /// Coordinates of the first that differs.
        index: Dims,
        /// Its bits and value.
        expected: String,
        found: String,
        /// How many of `elements` differ.
        differing: u64,
        elements: u64,
    },
}

/// One tensor of one rank that is not what the plan says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    pub rank: u64,
    /// Name of the tensor in the file.
    pub name: String,
    pub part: Part,
    /// Where the plan defines it.
    pub span: Option<Span>,
    pub difference: Difference,
}

impl Mismatch {
    /// The mismatch as a message.
    pub fn diagnostic(&self) -> Diagnostic {
        let (name, rank) = (&self.name, self.rank);
        let text = match &self.difference {
            Difference::Missing => format!("{name} is missing on rank {rank}"),
            Difference::Unexpected => {
                format!("rank {rank} holds {name}, which the plan does not define")
            }
            Difference::Form { expected, found } => {
                format!("{name} of rank {rank} is {found}, the plan makes {expected}")
            }
            Difference::Length { expected, found } => {
                format!("{name} of rank {rank} has {found} bytes of {expected}")
            }
            Difference::Elements { index, expected, found, differing, elements } => format!(
                "{name} of rank {rank} differs in {differing} of {elements} elements, first at \
                 {}: {found} instead of {expected}",
                show_shape(index)
            ),
        };
        Diagnostic::error("E0606", text).maybe_at(self.span).about(name)
    }
}

/// Recomputes every stored parameter of one rank and compares it with `read(name)`. Derived
/// parameters and aliases are not stored, so `tensors` must not list them.
///
/// # Errors
/// Where a source or the file cannot be read; a difference is no error.
pub fn verify_rank(
    oracle: &Oracle<'_>,
    rank: u64,
    tensors: &[FileTensor],
    read: &dyn Fn(&str) -> Result<Vec<u8>>,
) -> Result<Vec<Mismatch>> {
    let mut left: BTreeMap<&str, &FileTensor> =
        tensors.iter().map(|t| (t.name.as_str(), t)).collect();
    let mut out = Vec::new();
    for param in oracle.plan().params.iter().filter(|p| !p.derived) {
        let wanted = wanted(&param.name, oracle.type_of(param.node));
        let found: Vec<Option<&FileTensor>> =
            wanted.iter().map(|(_, t)| left.remove(t.name.as_str())).collect();
        let mismatch = |part: Part, name: &str, difference| Mismatch {
            rank,
            name: name.to_owned(),
            part,
            span: Some(param.span),
            difference,
        };
        // Evaluated only if a tensor of the right form is there to be compared.
        let mut stored = None;
        for ((part, wanted), found) in wanted.iter().zip(found) {
            let Some(found) = found else {
                out.push(mismatch(*part, &wanted.name, Difference::Missing));
                continue;
            };
            if (found.dtype, &found.shape) != (wanted.dtype, &wanted.shape) {
                let show = |t: &FileTensor| format!("{} {}", t.dtype, show_shape(&t.shape));
                let form = Difference::Form { expected: show(wanted), found: show(found) };
                out.push(mismatch(*part, &wanted.name, form));
                continue;
            }
            let bytes = read(&wanted.name)?;
            let stored = match &mut stored {
                Some(stored) => stored,
                none => none.insert(oracle.param(param)?),
            };
            let expected = match part {
                Part::Values => stored.values.as_slice(),
                Part::Scales => stored.scales.as_deref().unwrap_or_default(),
            };
            if let Some(difference) = compare(wanted, expected, &bytes) {
                out.push(mismatch(*part, &wanted.name, difference));
            }
        }
    }
    let unexpected = left.into_values().map(|t| Mismatch {
        rank,
        name: t.name.clone(),
        part: Part::Values,
        span: None,
        difference: Difference::Unexpected,
    });
    out.extend(unexpected);
    Ok(out)
}

/// The storages of a parameter, as a file names them.
fn wanted(name: &str, t: &Type) -> Vec<(Part, FileTensor)> {
    let values = FileTensor { name: name.to_owned(), dtype: t.dtype, shape: t.shape.clone() };
    let mut out = vec![(Part::Values, values)];
    if let (Some(q), Some(shape), Some(dtype)) = (t.quant, t.scale_shape(), t.scale_dtype()) {
        let name = format!("{name}{}", q.scale_name.suffix());
        out.push((Part::Scales, FileTensor { name, dtype, shape }));
    }
    out
}

/// The difference between two contents of a tensor, if there is one.
fn compare(tensor: &FileTensor, expected: &[u8], found: &[u8]) -> Option<Difference> {
    if expected == found {
        return None;
    }
    if expected.len() != found.len() {
        let (expected, found) = (expected.len() as u64, found.len() as u64);
        return Some(Difference::Length { expected, found });
    }
    let size = tensor.dtype.size() as usize;
    let pairs = expected.chunks_exact(size).zip(found.chunks_exact(size));
    let mut differing = pairs.enumerate().filter(|(_, (a, b))| a != b);
    let (first, (a, b)) = differing.next()?;
    Some(Difference::Elements {
        index: coordinates(&tensor.shape, first as u64),
        expected: show(tensor.dtype, a),
        found: show(tensor.dtype, b),
        differing: 1 + differing.count() as u64,
        elements: (expected.len() / size) as u64,
    })
}

fn coordinates(shape: &[u64], mut element: u64) -> Dims {
    let mut at: Dims = shape.into();
    for (i, size) in at.iter_mut().zip(shape).rev() {
        *i = element % size;
        element /= size;
    }
    at
}

/// `0x3f80 (1)`.
fn show(dtype: DType, bytes: &[u8]) -> String {
    let bits = bytes.iter().rev().fold(0u32, |n, b| n << 8 | u32::from(*b));
    let digits = 2 * bytes.len();
    format!("0x{bits:0digits$x} ({})", crate::backend::reference::show_value(dtype, bits))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(dtype: DType, shape: &[u64]) -> FileTensor {
        FileTensor { name: "w".to_owned(), dtype, shape: shape.into() }
    }

    #[test]
    fn the_first_difference_has_its_coordinates() {
        let t = tensor(DType::Bf16, &[2, 3]);
        let a: Vec<u8> = [0x80, 0x3f].repeat(6);
        let mut b = a.clone();
        assert_eq!(compare(&t, &a, &b), None);
        (b[9], b[10]) = (0xbf, 0x81);
        let found = compare(&t, &a, &b);
        let Some(Difference::Elements { index, expected, found, differing, elements }) = found
        else {
            panic!("{found:?}")
        };
        assert_eq!((index[..].to_vec(), differing, elements), (vec![1, 1], 2, 6));
        assert_eq!((expected.as_str(), found.as_str()), ("0x3f80 (1)", "0xbf80 (-1)"));
    }

    #[test]
    fn lengths_and_integers_are_told() {
        let t = tensor(DType::I32, &[1]);
        assert_eq!(
            compare(&t, &[0; 4], &[0; 3]),
            Some(Difference::Length { expected: 4, found: 3 })
        );
        assert_eq!(show(DType::I32, &[0xff; 4]), "0xffffffff (-1)");
        assert_eq!(show(DType::E4m3, &[0x7e]), "0x7e (448)");
    }
}
