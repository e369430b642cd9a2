//! Strided rows out of a file: one read for a dense band, one a row for a sparse one.
//! Knows nothing of tensors.

use std::io;

/// Largest band read in one go, in bytes; it stays in a core's cache while rows are picked.
const SCRATCH: u64 = 256 << 10;
/// A gap up to this many bytes costs less to read over than another system call (measured
/// on files in the page cache).
const GAP: u64 = 8 << 10;
/// A row longer than this, in bytes, pays for its own system call.
const LONG: u64 = 32 << 10;

/// Rows of equal length at equal distances.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    /// Byte of the first row.
    pub offset: u64,
    /// Bytes of a row, at least 1.
    pub row_bytes: usize,
    /// Bytes from the start of a row to that of the next.
    pub stride: u64,
    /// How many, at least 1.
    pub rows: u64,
}

/// Fills `buf` (exactly all rows) through `read_at(buf, offset)`. The caller has checked that
/// the last row's end fits 64 bits.
pub(super) fn read(
    at: Rows,
    buf: &mut [u8],
    read_at: impl Fn(&mut [u8], u64) -> io::Result<()>,
) -> io::Result<()> {
    let row = at.row_bytes as u64;
    if at.rows == 1 || at.stride == row {
        return read_at(buf, at.offset);
    }
    let dense = at.stride > row && at.stride - row <= GAP && row <= LONG;
    if !dense {
        for (i, out) in (0u64..).zip(buf.chunks_exact_mut(at.row_bytes)) {
            read_at(out, at.offset + i * at.stride)?;
        }
        return Ok(());
    }
    let group = (SCRATCH - row) / at.stride + 1;
    let mut scratch =
        vec![0; (at.rows.min(group) - 1) as usize * at.stride as usize + at.row_bytes];
    let mut offset = at.offset;
    for out in buf.chunks_mut(group as usize * at.row_bytes) {
        let rows = out.len() / at.row_bytes;
        let band = &mut scratch[..(rows - 1) * at.stride as usize + at.row_bytes];
        read_at(band, offset)?;
        let picked = band.chunks(at.stride as usize);
        for (from, to) in picked.zip(out.chunks_exact_mut(at.row_bytes)) {
            to.copy_from_slice(&from[..at.row_bytes]);
        }
        // The step after the last band is not used, so it may pass the end.
        offset = offset.saturating_add(group * at.stride);
    }
    Ok(())
}
