//! Finds NaN and infinity: cheaply in what a pass has made, exactly in a source tensor.

use rayon::prelude::*;

use crate::diag::Diagnostic;
use crate::dtype::DType;
use crate::lower::ProgramSource;
use crate::shard::Storage;

use super::{Rows, Strided};

/// The non-finite values of one source tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NonFinite {
    pub tensor: String,
    pub count: u64,
    /// Index of the first one.
    pub first: Vec<u64>,
    /// `NaN`, `+Inf` or `-Inf`: the first one's kind.
    pub kind: &'static str,
}

impl NonFinite {
    /// `w has 1 non-finite value: NaN at [130, 5]`.
    pub fn message(&self) -> String {
        let plural = if self.count == 1 { "value: " } else { "values, the first " };
        format!(
            "{} has {} non-finite {plural}{} at {:?}",
            self.tensor, self.count, self.kind, self.first
        )
    }
}

/// True if every element is finite; types without NaN always are.
pub(super) fn all_finite(dtype: DType, bytes: &[u8]) -> bool {
    // A maximum over the absolute bits vectorizes, where an early exit would not.
    match dtype {
        DType::Bf16 => max16(bytes) < 0x7F80,
        DType::F16 => max16(bytes) < 0x7C00,
        DType::F32 => {
            let max = bytes.chunks_exact(4).fold(0u32, |m, b| m.max(word(b) & 0x7FFF_FFFF));
            max < 0x7F80_0000
        }
        DType::E4m3 => bytes.iter().fold(0u8, |m, b| m.max(b & 0x7F)) < 0x7F,
        DType::E8m0 => bytes.iter().fold(0u8, |m, b| m.max(*b)) < 0xFF,
        DType::I32 | DType::U8 => true,
    }
}

fn max16(bytes: &[u8]) -> u16 {
    bytes.chunks_exact(2).fold(0u16, |m, b| m.max(u16::from_le_bytes([b[0], b[1]]) & 0x7FFF))
}

fn word(b: &[u8]) -> u32 {
    u32::from_le_bytes([b[0], b[1], b[2], b[3]])
}

/// The kind of one element, if it is not finite.
fn kind_of(dtype: DType, b: &[u8]) -> Option<&'static str> {
    let sign = |negative: bool| if negative { "-Inf" } else { "+Inf" };
    let of = |bits: u32, negative: bool, inf: u32| match bits {
        b if b == inf => Some(sign(negative)),
        b if b > inf => Some("NaN"),
        _ => None,
    };
    match dtype {
        DType::Bf16 | DType::F16 => {
            let bits = u16::from_le_bytes([b[0], b[1]]);
            let inf = if dtype == DType::Bf16 { 0x7F80 } else { 0x7C00 };
            of(u32::from(bits & 0x7FFF), bits >> 15 == 1, inf)
        }
        DType::F32 => of(word(b) & 0x7FFF_FFFF, word(b) >> 31 == 1, 0x7F80_0000),
        DType::E4m3 => (b[0] & 0x7F == 0x7F).then_some("NaN"),
        DType::E8m0 => (b[0] == 0xFF).then_some("NaN"),
        DType::I32 | DType::U8 => None,
    }
}

const PART: u64 = 4 << 20;

/// Reads whole source tensors and reports every one that holds NaN or infinity, in order.
///
/// # Errors
/// The first read that fails.
pub fn scan(
    rows: &dyn Rows,
    sources: &[(u32, &ProgramSource)],
) -> Result<Vec<NonFinite>, Diagnostic> {
    let found: Result<Vec<Option<NonFinite>>, Diagnostic> =
        sources.par_iter().map(|(id, source)| scan_one(rows, *id, source)).collect();
    Ok(found?.into_iter().flatten().collect())
}

fn scan_one(
    rows: &dyn Rows,
    id: u32,
    source: &ProgramSource,
) -> Result<Option<NonFinite>, Diagnostic> {
    let (bytes, size) = (source.bytes(), source.dtype.size());
    let mut buffer = vec![0u8; bytes.min(PART) as usize];
    let mut found: Option<NonFinite> = None;
    let mut offset = 0;
    while offset < bytes {
        let part = &mut buffer[..(bytes - offset).min(PART) as usize];
        let strided = Strided { offset, row_bytes: part.len() as u64, stride: 0, rows: 1 };
        rows.read(Storage::Source(id), strided, part)?;
        if !all_finite(source.dtype, part) {
            for (i, element) in part.chunks_exact(size as usize).enumerate() {
                let Some(kind) = kind_of(source.dtype, element) else { continue };
                let first = || NonFinite {
                    tensor: source.name.clone(),
                    count: 0,
                    first: index_of(offset / size + i as u64, &source.shape),
                    kind,
                };
                found.get_or_insert_with(first).count += 1;
            }
        }
        offset += part.len() as u64;
    }
    Ok(found)
}

fn index_of(flat: u64, shape: &[u64]) -> Vec<u64> {
    crate::shard::row_major(shape).iter().zip(shape).map(|(s, n)| flat / s % n).collect()
}
