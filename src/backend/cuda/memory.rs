//! Memory of a GPU, memory that another process gave, and pinned memory of the host.

use std::ffi::{c_char, c_void};
use std::sync::Arc;

use cudarc::driver::sys::{self, CUdeviceptr, CUipcMem_flags_enum, CUipcMemHandle, CUresult};

use super::Fallible;
use super::driver::Gpu;
use super::errors::{bytes as readable, failed};
use crate::diag::Diagnostic;

/// An allocation on a GPU (never of a pool: those have no handle and no peer access).
pub struct Memory {
    gpu: Arc<Gpu>,
    address: CUdeviceptr,
    bytes: u64,
}

impl Memory {
    pub(super) fn new(gpu: &Arc<Gpu>, bytes: u64) -> Fallible<Memory> {
        let mut address: CUdeviceptr = 0;
        if bytes > 0 {
            let _here = gpu.enter()?;
            // SAFETY: a context is current; one address is written.
            let result = unsafe { sys::cuMemAlloc_v2(&mut address, size(bytes)?) };
            if result as u32 == CUresult::CUDA_ERROR_OUT_OF_MEMORY as u32 {
                let text = format!("GPU {} has no room for {}", gpu.ordinal(), readable(bytes));
                return Err(Diagnostic::error("E0605", text)
                    .note(gpu.room())
                    .hint("lower --staging, or free memory on the GPU"));
            }
            gpu.check(result, format_args!("reserve {}", readable(bytes)))?;
        }
        Ok(Memory { gpu: gpu.clone(), address, bytes })
    }

    /// Where it begins; 0 if it has no bytes.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// How many bytes were asked for (whole pages from `alloc_shared`).
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The GPU that it is on.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// A handle that another process of this host opens with [`Imported::open`].
    pub fn ipc_handle(&self) -> Fallible<[u8; 64]> {
        let _here = self.gpu.enter()?;
        let mut handle = CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: the address is that of a live allocation; 64 bytes are written.
        let result = unsafe { sys::cuIpcGetMemHandle(&mut handle, self.address) };
        self.gpu.check(result, format_args!("make a handle of its memory"))?;
        Ok(handle.reserved.map(|byte| byte as u8))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.address == 0 {
            return;
        }
        if let Ok(_here) = self.gpu.enter() {
            // SAFETY: allocated in `new` and freed once.
            let _ = unsafe { sys::cuMemFree_v2(self.address) };
        }
    }
}

/// Another process's memory, mapped into this one.
pub struct Imported {
    gpu: Arc<Gpu>,
    address: CUdeviceptr,
}

impl Imported {
    /// Opens a handle of another process for use by `gpu`, wherever the memory is. A process
    /// cannot open its own handles.
    pub fn open(gpu: &Arc<Gpu>, handle: [u8; 64]) -> Fallible<Imported> {
        let _here = gpu.enter()?;
        let mut address: CUdeviceptr = 0;
        let handle = CUipcMemHandle { reserved: handle.map(|byte| byte as c_char) };
        let lazily = CUipcMem_flags_enum::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        // SAFETY: a context is current; the driver checks the handle and writes one address.
        let result = unsafe { sys::cuIpcOpenMemHandle_v2(&mut address, handle, lazily) };
        if result as u32 != 0 {
            let doing = format_args!("open the memory of another process");
            return Err(failed(result, Some(gpu.ordinal()), doing).hint(
                "containers need a shared IPC namespace; --path nccl needs none of this",
            ));
        }
        Ok(Imported { gpu: gpu.clone(), address })
    }

    /// Where the other process's allocation begins, as this GPU sees it.
    pub fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Imported {
    fn drop(&mut self) {
        if let Ok(_here) = self.gpu.enter() {
            // SAFETY: opened in `open` and closed once.
            let _ = unsafe { sys::cuIpcCloseMemHandle(self.address) };
        }
    }
}

/// Memory of the host that GPUs read and write in place, zeroed when made.
///
/// `slice` and `slice_mut` are for times when no GPU writes: after the stream that did is
/// synchronized. The single words are volatile and may be looked at any time.
pub struct Pinned {
    gpu: Arc<Gpu>,
    host: *mut u8,
    device: CUdeviceptr,
    bytes: usize,
}

// SAFETY: the pointer is to memory of its own, which any thread may use.
unsafe impl Send for Pinned {}
// SAFETY: shared use is reading, and volatile words that a GPU may change in any case.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Pinned memory with the same address on every GPU of the process.
    pub fn new(gpu: &Arc<Gpu>, bytes: u64) -> Fallible<Pinned> {
        let _here = gpu.enter()?;
        // At least a word, so that there is an address; whole words for the volatile ones.
        let wanted = size(bytes.max(1).next_multiple_of(8))?;
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        let mut host: *mut c_void = std::ptr::null_mut();
        // SAFETY: a context is current; one pointer is written.
        let result = unsafe { sys::cuMemHostAlloc(&mut host, wanted, flags) };
        gpu.check(result, format_args!("pin {} of host memory", readable(bytes)))?;
        let mut pinned =
            Pinned { gpu: gpu.clone(), host: host.cast(), device: 0, bytes: size(bytes)? };
        // SAFETY: `wanted` bytes were just allocated there, and nobody else knows of them.
        unsafe { std::ptr::write_bytes(pinned.host, 0, wanted) };
        // SAFETY: the pointer is of cuMemHostAlloc with DEVICEMAP; the flags must be 0.
        let result = unsafe { sys::cuMemHostGetDevicePointer_v2(&mut pinned.device, host, 0) };
        gpu.check(result, format_args!("map pinned memory"))?;
        Ok(pinned)
    }

    /// Where the GPU sees it.
    pub fn device_address(&self) -> u64 {
        self.device
    }

    /// How many bytes it has.
    pub fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    /// Its bytes, while no GPU writes them.
    pub fn slice(&self) -> &[u8] {
        // SAFETY: allocated with at least so many bytes, and initialized.
        unsafe { std::slice::from_raw_parts(self.host, self.bytes) }
    }

    /// Its bytes, while no GPU uses them.
    pub fn slice_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `slice`, and borrowed once.
        unsafe { std::slice::from_raw_parts_mut(self.host, self.bytes) }
    }

    /// The word at this index, as it is now.
    pub fn read_u32(&self, index: usize) -> u32 {
        // SAFETY: `word` checks the bounds; the memory is page-aligned.
        unsafe { self.word(index).read_volatile() }
    }

    /// Changes the word at this index; a GPU that polls it sees the change.
    pub fn write_u32(&self, index: usize, value: u32) {
        // SAFETY: `word` checks the bounds; the memory is page-aligned.
        unsafe { self.word(index).write_volatile(value) }
    }

    fn word(&self, index: usize) -> *mut u32 {
        assert!(index < self.bytes / 4, "word {index} of {} pinned bytes", self.bytes);
        self.host.cast::<u32>().wrapping_add(index)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Ok(_here) = self.gpu.enter() {
            // SAFETY: allocated in `new` and freed once.
            let _ = unsafe { sys::cuMemFreeHost(self.host.cast()) };
        }
    }
}

/// A count of bytes as the driver takes it.
fn size(bytes: u64) -> Fallible<usize> {
    usize::try_from(bytes)
        .map_err(|_| Diagnostic::error("E0605", format!("{bytes} bytes are too many")))
}
