//! Failures of the driver as diagnostics: what was tried, on which GPU, in the driver's words.

use std::ffi::{CStr, c_char};
use std::fmt::Arguments;

use cudarc::driver::sys::{self, CUresult};

use super::Fallible;
use crate::diag::Diagnostic;

/// Codes after which the context answers every call with the same error, with what they say.
/// The driver reports them late, on whatever call comes next.
const STICKY: [u32; 13] = [214, 220, 226, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721];

/// Passes a success, and makes a diagnostic of anything else.
pub(super) fn check(
    result: CUresult,
    gpu: Option<usize>,
    doing: Arguments<'_>,
) -> Fallible<()> {
    if result as u32 == 0 {
        return Ok(());
    }
    Err(failed(result, gpu, doing))
}

/// What the driver's `result` says of what was being done.
pub(super) fn failed(result: CUresult, gpu: Option<usize>, doing: Arguments<'_>) -> Diagnostic {
    let number = result as u32;
    let name = words(result, sys::cuGetErrorName);
    let text = words(result, sys::cuGetErrorString);
    let place = gpu.map_or(String::new(), |ordinal| format!("GPU {ordinal}: "));
    let name = name.unwrap_or_else(|| "an unknown error".into());
    let said = Diagnostic::error("E0605", format!("{place}cannot {doing}: {name} ({number})"));
    let said = match text {
        Some(text) => said.note(format!("the driver says: {text}")),
        None => said,
    };
    if STICKY.contains(&number) {
        return said
            .note("the fault may be that of earlier work on this GPU: it is reported late")
            .note("this GPU cannot be used by this process any more, only by a new one");
    }
    match number {
        100 => said.hint("check that this process may see a GPU (CUDA_VISIBLE_DEVICES)"),
        34 => said.hint("a stub of libcuda was found: put the driver's own before it"),
        803 => said.hint("the driver's library and its kernel module differ: restart the host"),
        802 => said.hint("the fabric manager has not started yet: wait for it, or start it"),
        _ => said,
    }
}

/// One of the driver's two descriptions of a result.
fn words(
    result: CUresult,
    of: unsafe fn(CUresult, *mut *const c_char) -> CUresult,
) -> Option<String> {
    let mut text: *const c_char = std::ptr::null();
    // SAFETY: the driver is loaded, for it gave `result`; it stores a pointer to a constant
    // string, or null for a code that it does not know.
    let known = unsafe { of(result, &mut text) } as u32 == 0 && !text.is_null();
    // SAFETY: a non-null pointer from the driver is a string that is never freed.
    known.then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

/// Bytes as a person reads them, for messages on memory.
pub(super) fn bytes(count: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if count < 1024 {
        return format!("{count} bytes");
    }
    let (mut value, mut unit) = (count as f64 / 1024.0, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}
