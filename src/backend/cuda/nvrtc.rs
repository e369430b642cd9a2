//! The run-time compiler: CUDA source to a cubin, with or without a GPU.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::OnceLock;

use super::Fallible;
use super::library::{Candidate, Found, from_variable, in_wheels, open, table};
use crate::diag::Diagnostic;

/// Names a libnvrtc to use instead of the one that the loader finds.
pub const VARIABLE: &str = "KERNELCAST_NVRTC";

/// Lines of the compiler's log that a diagnostic repeats.
const LOG_LINES: usize = 40;

/// `nvrtcProgram` of nvrtc.h.
type Handle = *mut c_void;

// Results are taken as numbers: a newer library may know more than any enumeration.
table! {
    Table {
        version = "nvrtcVersion" (*mut c_int, *mut c_int) -> c_int;
        error_string = "nvrtcGetErrorString" (c_int) -> *const c_char;
        arch_count = "nvrtcGetNumSupportedArchs" (*mut c_int) -> c_int;
        archs = "nvrtcGetSupportedArchs" (*mut c_int) -> c_int;
        create = "nvrtcCreateProgram" (
            *mut Handle,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char
        ) -> c_int;
        destroy = "nvrtcDestroyProgram" (*mut Handle) -> c_int;
        compile = "nvrtcCompileProgram" (Handle, c_int, *const *const c_char) -> c_int;
        cubin_size = "nvrtcGetCUBINSize" (Handle, *mut usize) -> c_int;
        cubin = "nvrtcGetCUBIN" (Handle, *mut c_char) -> c_int;
        log_size = "nvrtcGetProgramLogSize" (Handle, *mut usize) -> c_int;
        log = "nvrtcGetProgramLog" (Handle, *mut c_char) -> c_int;
    }
}

/// The compiler, once loaded.
pub struct Compiler {
    table: Table,
    name: String,
    version: (i32, i32),
    /// Architectures that it makes code for, such as 90, in order.
    archs: Vec<i32>,
    /// What the functions of the table are in.
    _library: Found,
}

impl Compiler {
    /// Finds the compiler, once a process: where [`VARIABLE`] says, else by the loader, else in
    /// the packages of Python.
    ///
    /// # Errors
    /// E0605 with the loader's reasons.
    pub fn load() -> Fallible<&'static Compiler> {
        static COMPILER: OnceLock<Fallible<Compiler>> = OnceLock::new();
        COMPILER.get_or_init(find).as_ref().map_err(Clone::clone)
    }

    /// Major and minor version, such as (13, 0).
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// The name or the path that the library was found under.
    pub fn library(&self) -> &str {
        &self.name
    }

    /// Whether it makes code for this compute capability.
    pub fn supports(&self, arch: (i32, i32)) -> bool {
        self.archs.binary_search(&(arch.0 * 10 + arch.1)).is_ok()
    }

    /// The options that kernels are compiled with.
    pub fn options(&self, arch: (i32, i32), defines: &[(&str, String)]) -> Vec<String> {
        let target = target(&self.archs, arch.0 * 10 + arch.1);
        let mut options =
            vec![format!("--gpu-architecture=sm_{target}"), "--std=c++17".to_string()];
        options.extend(defines.iter().map(|(name, value)| format!("-D{name}={value}")));
        options
    }

    /// Compiles `source`, called `name` in messages, for a compute capability.
    ///
    /// # Errors
    /// E0605 with the compiler's log in the notes.
    pub fn cubin(
        &self,
        source: &str,
        name: &str,
        arch: (i32, i32),
        defines: &[(&str, String)],
    ) -> Fallible<Vec<u8>> {
        let options = self.options(arch, defines);
        let text = |text: &str| {
            CString::new(text).map_err(|_| {
                Diagnostic::error("E0605", format!("{name}: source or options hold a 0 byte"))
            })
        };
        let held: Vec<CString> = options.iter().map(|o| text(o)).collect::<Fallible<_>>()?;
        let pointers: Vec<*const c_char> = held.iter().map(|o| o.as_ptr()).collect();

        let program = Program::new(self, &text(source)?, &text(name)?)?;
        let count = c_int::try_from(pointers.len()).unwrap_or(c_int::MAX);
        // SAFETY: the program is live, and the options' strings outlive the call.
        let result = unsafe { (self.table.compile)(program.raw, count, pointers.as_ptr()) };
        if result != 0 {
            let said = self.failed(result, &format!("compile {name}"));
            let said = said.note(format!("options: {}", options.join(" ")));
            return Err(program.log().into_iter().fold(said, Diagnostic::note));
        }
        for line in program.log() {
            tracing::debug!("{name}: {line}");
        }
        program.cubin(name)
    }

    fn failed(&self, result: c_int, doing: &str) -> Diagnostic {
        // SAFETY: for any number, the answer is a constant string.
        let text = unsafe { (self.table.error_string)(result) };
        let text = match text.is_null() {
            true => "an unknown error".into(),
            // SAFETY: a non-null answer is a string that is never freed.
            false => unsafe { CStr::from_ptr(text) }.to_string_lossy(),
        };
        let (major, minor) = self.version;
        let said = format!("cannot {doing}: {text} ({result})");
        Diagnostic::error("E0605", said)
            .note(format!("the compiler is NVRTC {major}.{minor}, {}", self.name))
    }
}

fn find() -> Fallible<Compiler> {
    let candidates = match from_variable(VARIABLE) {
        Some(named) => vec![named],
        None => ["libnvrtc.so.13", "libnvrtc.so.12"]
            .map(|name| Candidate::Name(name.into()))
            .into_iter()
            .chain(in_wheels("nvidia/cu13/lib/libnvrtc.so.13"))
            .chain(in_wheels("nvidia/cuda_nvrtc/lib/libnvrtc.so.13"))
            .chain(in_wheels("nvidia/cuda_nvrtc/lib/libnvrtc.so.12"))
            .chain([Candidate::Name("libnvrtc.so".into())])
            .collect(),
    };
    let library = open(&candidates).map_err(|reasons| {
        let none =
            Diagnostic::error("E0605", "NVRTC, the CUDA compiler library, does not load");
        let said =
            reasons.into_iter().fold(none, |d, r| d.note(format!("the loader says: {r}")));
        said.hint(format!(
            "pip install nvidia-cuda-nvrtc==13.0.88, or set {VARIABLE} to a libnvrtc.so.13"
        ))
    })?;
    let table = Table::look_up(&library)?;
    let name = library.name.clone();
    let mut compiler =
        Compiler { table, name, version: (0, 0), archs: Vec::new(), _library: library };

    let (mut major, mut minor, mut count): (c_int, c_int, c_int) = (0, 0, 0);
    // SAFETY: two ints are written.
    let result = unsafe { (compiler.table.version)(&mut major, &mut minor) };
    if result != 0 {
        return Err(compiler.failed(result, "ask NVRTC for its version"));
    }
    compiler.version = (major, minor);
    // SAFETY: one int is written.
    let result = unsafe { (compiler.table.arch_count)(&mut count) };
    if result != 0 {
        return Err(compiler.failed(result, "ask NVRTC for its architectures"));
    }
    let mut archs: Vec<c_int> = vec![0; usize::try_from(count).unwrap_or(0)];
    // SAFETY: the array has room for as many ints as the call before said.
    let result = unsafe { (compiler.table.archs)(archs.as_mut_ptr()) };
    if result != 0 {
        return Err(compiler.failed(result, "ask NVRTC for its architectures"));
    }
    archs.sort_unstable();
    compiler.archs = archs;
    Ok(compiler)
}

/// The architecture to compile for: the card's own, or, if the compiler is older than the card,
/// the newest of the same family that it knows, whose code the card runs too.
fn target(known: &[i32], wanted: i32) -> i32 {
    let family = known.iter().filter(|arch| **arch / 10 == wanted / 10 && **arch <= wanted);
    family.max().copied().unwrap_or(wanted)
}

/// A program of the compiler, destroyed when dropped.
struct Program<'a> {
    compiler: &'a Compiler,
    raw: Handle,
}

impl<'a> Program<'a> {
    fn new(compiler: &'a Compiler, source: &CStr, name: &CStr) -> Fallible<Program<'a>> {
        let mut raw: Handle = std::ptr::null_mut();
        let none = std::ptr::null();
        // SAFETY: both strings end with a 0 and are copied; there are no headers.
        let result = unsafe {
            (compiler.table.create)(&mut raw, source.as_ptr(), name.as_ptr(), 0, none, none)
        };
        match result {
            0 => Ok(Program { compiler, raw }),
            _ => Err(compiler.failed(result, "give a source to NVRTC")),
        }
    }

    fn cubin(&self, name: &str) -> Fallible<Vec<u8>> {
        let table = &self.compiler.table;
        let mut size = 0usize;
        // SAFETY: the program is live; one number is written.
        let result = unsafe { (table.cubin_size)(self.raw, &mut size) };
        if result != 0 || size == 0 {
            return Err(self.compiler.failed(result, &format!("get the code of {name}")));
        }
        let mut code = vec![0u8; size];
        // SAFETY: the buffer has the size that the call before gave.
        let result = unsafe { (table.cubin)(self.raw, code.as_mut_ptr().cast()) };
        match result {
            0 => Ok(code),
            _ => Err(self.compiler.failed(result, &format!("get the code of {name}"))),
        }
    }

    /// The lines of the log that are not empty, up to a limit.
    fn log(&self) -> Vec<String> {
        let table = &self.compiler.table;
        let mut size = 0usize;
        // SAFETY: the program is live; one number is written.
        if unsafe { (table.log_size)(self.raw, &mut size) } != 0 || size == 0 {
            return Vec::new();
        }
        let mut text = vec![0u8; size];
        // SAFETY: the buffer has the size that the call before gave.
        if unsafe { (table.log)(self.raw, text.as_mut_ptr().cast()) } != 0 {
            return Vec::new();
        }
        let text = String::from_utf8_lossy(&text);
        let lines = text.trim_end_matches('\0').lines().filter(|line| !line.trim().is_empty());
        lines.take(LOG_LINES).map(str::to_string).collect()
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        // SAFETY: created in `new` and destroyed once.
        let _ = unsafe { (self.compiler.table.destroy)(&mut self.raw) };
    }
}

#[cfg(test)]
mod tests {
    use super::target;

    #[test]
    fn a_card_newer_than_the_compiler_gets_code_of_its_family() {
        let known = [80, 86, 89, 90, 100, 120];
        assert_eq!(target(&known, 90), 90);
        assert_eq!(target(&known, 103), 100);
        assert_eq!(target(&known, 87), 86);
        // Of no family that it knows: the compiler will say so itself.
        assert_eq!(target(&known, 110), 110);
    }
}
