//! Compiled kernels on a GPU.

use std::ffi::{CString, c_int, c_void};
use std::sync::Arc;

use cudarc::driver::sys::{self, CUfunction, CUfunction_attribute, CUmodule, CUresult};

use super::Fallible;
use super::driver::{Arg, Gpu, driver};
use crate::diag::Diagnostic;

/// The kernels of one cubin, loaded on one GPU.
pub struct Module {
    loaded: Arc<Loaded>,
}

/// What is unloaded when the last function of the module is gone.
struct Loaded {
    gpu: Arc<Gpu>,
    raw: CUmodule,
}

// SAFETY: a module is a handle that any thread may use.
unsafe impl Send for Loaded {}
// SAFETY: as above; it never changes.
unsafe impl Sync for Loaded {}

/// A kernel; keeps its module loaded. A graph does not: give it to `Captured::keep`.
#[derive(Clone)]
pub struct Function {
    module: Arc<Loaded>,
    raw: CUfunction,
    name: String,
    registers: i32,
    local_bytes: i32,
    /// Sizes of the parameters in bytes; none if the driver cannot tell.
    parameters: Vec<usize>,
}

// SAFETY: a function is a handle that any thread may use.
unsafe impl Send for Function {}
// SAFETY: as above; `set_shared` is a call that the driver locks.
unsafe impl Sync for Function {}

impl Module {
    pub(super) fn new(gpu: &Arc<Gpu>, cubin: &[u8]) -> Fallible<Module> {
        // The driver reads the image's length from its header: it must at least have one.
        if cubin.len() < 64 || !cubin.starts_with(b"\x7fELF") {
            let text = format!("the compiled kernels are not a cubin: {} bytes", cubin.len());
            return Err(Diagnostic::error("E0605", text));
        }
        let _here = gpu.enter()?;
        let mut raw: CUmodule = std::ptr::null_mut();
        // SAFETY: the image is a whole ELF file from the compiler, read during the call only.
        let result =
            unsafe { sys::cuModuleLoadData(&mut raw, cubin.as_ptr().cast::<c_void>()) };
        gpu.check(result, format_args!("load its compiled kernels"))?;
        Ok(Module { loaded: Arc::new(Loaded { gpu: gpu.clone(), raw }) })
    }

    /// The kernel of this name, which must be declared `extern "C"`.
    pub fn function(&self, name: &str) -> Fallible<Function> {
        let gpu = &self.loaded.gpu;
        let _here = gpu.enter()?;
        let text = CString::new(name).unwrap_or_default();
        let mut raw: CUfunction = std::ptr::null_mut();
        // SAFETY: the module is loaded and the name ends with a 0.
        let result =
            unsafe { sys::cuModuleGetFunction(&mut raw, self.loaded.raw, text.as_ptr()) };
        gpu.check(result, format_args!("find the kernel {name}"))?;
        let mut function = Function {
            module: self.loaded.clone(),
            raw,
            name: name.into(),
            registers: 0,
            local_bytes: 0,
            parameters: parameters(raw),
        };
        function.registers =
            function.attribute(CUfunction_attribute::CU_FUNC_ATTRIBUTE_NUM_REGS)?;
        function.local_bytes =
            function.attribute(CUfunction_attribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?;
        Ok(function)
    }
}

impl Function {
    /// Allows blocks with so many bytes of dynamic shared memory; above 48 KiB this is needed.
    pub fn set_shared(&self, bytes: u32) -> Fallible<()> {
        let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let _here = self.module.gpu.enter()?;
        let value = c_int::try_from(bytes).unwrap_or(c_int::MAX);
        // SAFETY: the function is that of a loaded module.
        let result = unsafe { sys::cuFuncSetAttribute(self.raw, most, value) };
        let doing = format_args!("give {} {bytes} bytes of shared memory", self.name);
        self.module.gpu.check(result, doing)
    }

    /// The name that it was found by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Registers a thread.
    pub fn registers(&self) -> i32 {
        self.registers
    }

    /// Bytes of local memory a thread; more than 0 means spills or arrays outside registers.
    pub fn local_bytes(&self) -> i32 {
        self.local_bytes
    }

    /// How many blocks of this shape a multiprocessor holds at once.
    pub fn blocks_per_multiprocessor(&self, threads: u32, shared: u32) -> Fallible<u32> {
        let _here = self.module.gpu.enter()?;
        let mut blocks: c_int = 0;
        let threads = c_int::try_from(threads).unwrap_or(c_int::MAX);
        // SAFETY: the function is that of a loaded module; one int is written.
        let result = unsafe {
            sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(
                &mut blocks,
                self.raw,
                threads,
                shared as usize,
            )
        };
        self.module
            .gpu
            .check(result, format_args!("ask how many blocks of {} fit", self.name))?;
        Ok(u32::try_from(blocks).unwrap_or(0))
    }

    pub(super) fn raw(&self) -> CUfunction {
        self.raw
    }

    /// Refuses arguments that are not the kernel's parameters: the driver would read past them.
    pub(super) fn takes(&self, gpu: &Gpu, args: &[Arg]) -> Fallible<()> {
        let own = self.module.gpu.ordinal();
        if own != gpu.ordinal() {
            let text = format!("{} of GPU {own} launched on GPU {}", self.name, gpu.ordinal());
            return Err(Diagnostic::error("E0502", text));
        }
        let given = args.iter().map(Arg::bytes);
        if self.parameters.is_empty() || self.parameters.iter().copied().eq(given.clone()) {
            return Ok(());
        }
        let given: Vec<usize> = given.collect();
        let text = format!(
            "{} takes parameters of {:?} bytes and was given {given:?}",
            self.name, self.parameters
        );
        Err(Diagnostic::error("E0502", text))
    }

    fn attribute(&self, attribute: CUfunction_attribute) -> Fallible<i32> {
        let mut value: c_int = 0;
        // SAFETY: the function is that of a loaded module; one int is written.
        let result = unsafe { sys::cuFuncGetAttribute(&mut value, attribute, self.raw) };
        self.module
            .gpu
            .check(result, format_args!("ask for {attribute:?} of {}", self.name))?;
        Ok(value)
    }
}

/// Sizes of a kernel's parameters, from drivers of CUDA 12.4 and newer.
fn parameters(function: CUfunction) -> Vec<usize> {
    type Info = unsafe extern "C" fn(CUfunction, usize, *mut usize, *mut usize) -> CUresult;
    let Ok(driver) = driver() else { return Vec::new() };
    // SAFETY: the signature is that of cuda.h.
    let Ok(info) = (unsafe { driver.symbol::<Info>("cuFuncGetParamInfo") }) else {
        return Vec::new();
    };
    let (mut sizes, mut offset, mut size) = (Vec::new(), 0usize, 0usize);
    // SAFETY: the function is that of a loaded module; an index past the last parameter is
    // answered with an error and nothing else.
    while unsafe { info(function, sizes.len(), &mut offset, &mut size) } as u32 == 0 {
        sizes.push(size);
    }
    sizes
}

impl Drop for Loaded {
    fn drop(&mut self) {
        if let Ok(_here) = self.gpu.enter() {
            // SAFETY: loaded in `new` and unloaded once; functions hold this.
            let _ = unsafe { sys::cuModuleUnload(self.raw) };
        }
    }
}
