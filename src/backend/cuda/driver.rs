//! The driver and its GPUs: found once, each with its primary context kept.
//! Memory, streams, modules and graphs are in files of their own and are named from here.

use std::ffi::{c_char, c_int};
use std::fmt::Arguments;
use std::sync::{Arc, OnceLock};

use cudarc::driver::sys::{self, CUcontext, CUdevice, CUdevice_attribute, CUresult};

use super::Fallible;
use super::errors::{bytes, check};
use super::library::{Candidate, Found, open};
use crate::diag::Diagnostic;

pub use super::graph::Captured;
pub use super::memory::{Imported, Memory, Pinned};
pub use super::module::{Function, Module};
pub use super::stream::{Arg, Event, Stream};

/// The oldest compute capability whose instructions the kernels use.
const OLDEST: (i32, i32) = (8, 0);

/// Every function of the driver that is called. cudarc panics on a missing one, so all are
/// asked for first; a test holds this list against the calls.
const NEEDED: &[&str] = &[
    "cuCtxEnablePeerAccess",
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuDeviceCanAccessPeer",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetUuid_v2",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventQuery",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphGetNodes",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuGraphNodeGetType",
    "cuGraphUpload",
    "cuInit",
    "cuIpcCloseMemHandle",
    "cuIpcGetMemHandle",
    "cuIpcOpenMemHandle_v2",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemHostGetDevicePointer_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuOccupancyMaxActiveBlocksPerMultiprocessor",
    "cuStreamBeginCapture_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamEndCapture",
    "cuStreamQuery",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuStreamWaitValue32_v2",
    "cuStreamWriteValue32_v2",
];

/// Finds the driver and starts it, once a process.
///
/// # Errors
/// E0605 with the loader's or the driver's own reason.
pub fn load() -> Fallible<()> {
    driver().map(|_| ())
}

/// The driver's library, for what cudarc's bindings cannot ask without a panic.
pub(super) fn driver() -> Fallible<&'static Found> {
    static DRIVER: OnceLock<Fallible<Found>> = OnceLock::new();
    DRIVER.get_or_init(start).as_ref().map_err(Clone::clone)
}

fn start() -> Fallible<Found> {
    // The names that cudarc tries, in its order: what it will find is what is found here.
    let names = ["cuda", "nvcuda"].into_iter().flat_map(cudarc::get_lib_name_candidates);
    let names: Vec<Candidate> = names.map(Candidate::Name).collect();
    let found = open(&names).map_err(|reasons| {
        let telling = reasons.into_iter().filter(|reason| {
            reason.starts_with("libcuda.so.1:") || !reason.contains("No such file")
        });
        let none = Diagnostic::error(
            "E0605",
            "the NVIDIA driver's library libcuda.so.1 does not load",
        );
        let said = telling.fold(none, |d, reason| d.note(format!("the loader says: {reason}")));
        said.hint("install the NVIDIA driver, or use --backend cpu, which gives the same bytes")
    })?;
    if let Some(missing) = NEEDED.iter().find(|symbol| !found.has(symbol)) {
        let text = format!("the NVIDIA driver is too old: {} lacks {missing}", found.name);
        return Err(Diagnostic::error("E0605", text).hint("install driver 525 or newer"));
    }
    // SAFETY: the library is there, under the name that cudarc finds it by.
    check(unsafe { sys::cuInit(0) }, None, format_args!("start the NVIDIA driver"))?;
    Ok(found)
}

/// The CUDA version that the driver supports, such as (13, 0).
pub fn version() -> Fallible<(i32, i32)> {
    load()?;
    let mut version: c_int = 0;
    // SAFETY: the driver is loaded and writes one int.
    let result = unsafe { sys::cuDriverGetVersion(&mut version) };
    check(result, None, format_args!("ask the driver for its version"))?;
    Ok((version / 1000, version % 1000 / 10))
}

/// How many GPUs this process sees.
pub fn device_count() -> Fallible<usize> {
    load()?;
    let mut count: c_int = 0;
    // SAFETY: the driver is loaded and writes one int.
    let result = unsafe { sys::cuDeviceGetCount(&mut count) };
    check(result, None, format_args!("count the GPUs"))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// A GPU with its primary context, which lives as long as anything made from it.
pub struct Gpu {
    ordinal: usize,
    device: CUdevice,
    context: CUcontext,
    name: String,
    uuid: String,
    capability: (i32, i32),
    multiprocessors: u32,
    flushes_remote_writes: bool,
}

// SAFETY: a context may be current on several threads at once, and the driver's functions lock.
unsafe impl Send for Gpu {}
// SAFETY: as above; nothing in it changes after `open`.
unsafe impl Sync for Gpu {}

/// The GPU's context is current on this thread until this is dropped; then the one that was
/// current before is again, as the process may be another's (PyTorch's).
pub(super) struct Entered {
    before: Option<CUcontext>,
}

impl Gpu {
    /// The GPU of this number among those that the process sees.
    ///
    /// # Errors
    /// E0605 if there is none, or one too old for the kernels.
    pub fn open(ordinal: usize) -> Fallible<Arc<Gpu>> {
        let count = device_count()?;
        if ordinal >= count {
            let text = format!("GPU {ordinal} does not exist: this process sees {count}");
            return Err(Diagnostic::error("E0605", text)
                .hint("GPUs are counted from 0, among those of CUDA_VISIBLE_DEVICES"));
        }
        let mut device: CUdevice = 0;
        // SAFETY: the driver is loaded; the number was checked.
        let result = unsafe { sys::cuDeviceGet(&mut device, ordinal as c_int) };
        check(result, Some(ordinal), format_args!("open it"))?;

        let name = device_name(ordinal, device)?;
        let asked = |attribute| attribute_of(ordinal, device, attribute);
        let capability = (
            asked(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            asked(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability < OLDEST {
            let text = format!(
                "GPU {ordinal} ({name}) is too old: compute capability {}.{}, not {}.{} or newer",
                capability.0, capability.1, OLDEST.0, OLDEST.1
            );
            return Err(Diagnostic::error("E0605", text));
        }
        let multiprocessors =
            asked(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let flushes = asked(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES)?;
        let uuid = device_uuid(ordinal, device)?;

        let mut context: CUcontext = std::ptr::null_mut();
        // SAFETY: the device is valid; what is retained here is released in `drop`.
        let result = unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, device) };
        check(result, Some(ordinal), format_args!("make its context"))?;
        Ok(Arc::new(Gpu {
            ordinal,
            device,
            context,
            name,
            uuid,
            capability,
            multiprocessors: u32::try_from(multiprocessors).unwrap_or(1).max(1),
            flushes_remote_writes: flushes != 0,
        }))
    }

    /// Makes this GPU the current one of the calling thread, as NCCL wants it. The calls of
    /// this layer do so for themselves.
    pub fn bind(&self) -> Fallible<()> {
        // SAFETY: the context is retained.
        let result = unsafe { sys::cuCtxSetCurrent(self.context) };
        self.check(result, format_args!("make it this thread's GPU"))
    }

    /// The number that it was opened by.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// The card's name, such as `NVIDIA H100 80GB HBM3`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Compute capability, major and minor.
    pub fn capability(&self) -> (i32, i32) {
        self.capability
    }

    /// The card's own identity, as `nvidia-smi -L` shows it: the same in every process.
    pub fn uuid(&self) -> String {
        self.uuid.clone()
    }

    /// How many multiprocessors it has.
    pub fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// Whether a wait on a flag may ask that remote writes before it be flushed.
    pub(super) fn flushes_remote_writes(&self) -> bool {
        self.flushes_remote_writes
    }

    /// Bytes of its memory: free, and in all.
    pub fn memory(&self) -> Fallible<(u64, u64)> {
        let _here = self.enter()?;
        let (mut free, mut total) = (0usize, 0usize);
        // SAFETY: a context is current; two numbers are written.
        let result = unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) };
        self.check(result, format_args!("ask for its free memory"))?;
        Ok((free as u64, total as u64))
    }

    /// Whether kernels and copies of this GPU can use memory of the other. A GPU reaches itself.
    pub fn can_reach(&self, other: &Gpu) -> Fallible<bool> {
        if self.device == other.device {
            return Ok(true);
        }
        let mut can: c_int = 0;
        // SAFETY: both devices are valid; one int is written.
        let result = unsafe { sys::cuDeviceCanAccessPeer(&mut can, self.device, other.device) };
        self.check(result, format_args!("ask whether it reaches GPU {}", other.ordinal))?;
        Ok(can != 0)
    }

    /// Lets kernels and copies of this GPU use memory of the other (one direction; it lasts as
    /// long as the contexts). Doing it again is no error.
    pub fn enable_peer(&self, other: &Gpu) -> Fallible<()> {
        if self.device == other.device {
            return Ok(());
        }
        let _here = self.enter()?;
        // SAFETY: both contexts are retained; the flags must be 0.
        let result = unsafe { sys::cuCtxEnablePeerAccess(other.context, 0) };
        if result as u32 == CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED as u32 {
            return Ok(());
        }
        self.check(result, format_args!("reach the memory of GPU {}", other.ordinal))
    }

    /// Memory of its own allocation. No bytes give a null address.
    ///
    /// # Errors
    /// E0605 with the bytes wanted and free.
    pub fn alloc(self: &Arc<Self>, bytes: u64) -> Fallible<Memory> {
        Memory::new(self, bytes)
    }

    /// Memory to be opened by other processes: whole pages of 2 MiB. Smaller allocations share
    /// a page, and a handle gives away all of the page.
    pub fn alloc_shared(self: &Arc<Self>, bytes: u64) -> Fallible<Memory> {
        const PAGE: u64 = 2 << 20;
        Memory::new(self, bytes.max(1).next_multiple_of(PAGE))
    }

    /// A stream that does not wait for the default stream.
    pub fn stream(self: &Arc<Self>) -> Fallible<Stream> {
        Stream::new(self)
    }

    /// An event; only a timed one can measure.
    pub fn event(self: &Arc<Self>, timed: bool) -> Fallible<Event> {
        Event::new(self, timed)
    }

    /// Loads compiled kernels.
    pub fn module(self: &Arc<Self>, cubin: &[u8]) -> Fallible<Module> {
        Module::new(self, cubin)
    }

    /// Makes the context current until the guard is dropped.
    pub(super) fn enter(&self) -> Fallible<Entered> {
        let mut now: CUcontext = std::ptr::null_mut();
        // SAFETY: the driver is loaded and writes one pointer.
        let result = unsafe { sys::cuCtxGetCurrent(&mut now) };
        self.check(result, format_args!("ask which GPU is this thread's"))?;
        if now == self.context {
            return Ok(Entered { before: None });
        }
        self.bind()?;
        Ok(Entered { before: Some(now) })
    }

    /// Passes a success of the driver; anything else names this GPU and what was tried.
    pub(super) fn check(&self, result: CUresult, doing: Arguments<'_>) -> Fallible<()> {
        check(result, Some(self.ordinal), doing)
    }

    /// How the memory stands, for a message; nothing if even that cannot be asked.
    pub(super) fn room(&self) -> String {
        self.memory().map_or(String::new(), |(free, total)| {
            format!("{} of its {} are free", bytes(free), bytes(total))
        })
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // SAFETY: retained once in `open`; all that was made from it holds this and is gone.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            // SAFETY: it was this thread's current context; null leaves the thread without one.
            let _ = unsafe { sys::cuCtxSetCurrent(before) };
        }
    }
}

/// Whether some GPU is current on the calling thread.
pub(super) fn is_bound() -> Fallible<bool> {
    load()?;
    let mut now: CUcontext = std::ptr::null_mut();
    // SAFETY: the driver is loaded and writes one pointer.
    let result = unsafe { sys::cuCtxGetCurrent(&mut now) };
    check(result, None, format_args!("ask which GPU is this thread's"))?;
    Ok(!now.is_null())
}

fn attribute_of(
    ordinal: usize,
    device: CUdevice,
    attribute: CUdevice_attribute,
) -> Fallible<i32> {
    let mut value: c_int = 0;
    // SAFETY: the device is valid; one int is written.
    let result = unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) };
    check(result, Some(ordinal), format_args!("ask for {attribute:?}"))?;
    Ok(value)
}

fn device_name(ordinal: usize, device: CUdevice) -> Fallible<String> {
    let mut name = [0u8; 256];
    // SAFETY: the driver writes at most 256 bytes with a closing 0.
    let result = unsafe {
        sys::cuDeviceGetName(name.as_mut_ptr().cast::<c_char>(), name.len() as c_int, device)
    };
    check(result, Some(ordinal), format_args!("ask for its name"))?;
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    Ok(String::from_utf8_lossy(&name[..end]).into_owned())
}

fn device_uuid(ordinal: usize, device: CUdevice) -> Fallible<String> {
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: the device is valid; 16 bytes are written.
    let result = unsafe { sys::cuDeviceGetUuid_v2(&mut uuid, device) };
    check(result, Some(ordinal), format_args!("ask for its identity"))?;
    let mut text = String::from("GPU");
    for (i, byte) in uuid.bytes.iter().enumerate() {
        let dash = if matches!(i, 0 | 4 | 6 | 8 | 10) { "-" } else { "" };
        text += &format!("{dash}{:02x}", *byte as u8);
    }
    Ok(text)
}
