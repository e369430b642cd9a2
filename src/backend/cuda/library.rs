//! Where shared libraries are found, and why not: the loader, a variable, Python's wheels.
//! Knows nothing of what is in them.

use std::error::Error;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LOCAL, RTLD_NOW};

use super::Fallible;
use crate::diag::Diagnostic;

/// A library that was opened, and stays open as long as the process.
pub(super) struct Found {
    library: Library,
    /// The name or the path that it was found under.
    pub(super) name: String,
}

/// A library that may be asked for: a name for the loader, or a path.
pub(super) enum Candidate {
    Name(String),
    Path(PathBuf),
}

/// A table of a library's functions, each looked up once; a missing one is a diagnostic.
macro_rules! table {
    ($scope:vis $table:ident { $($field:ident = $symbol:literal ($($arg:ty),*) -> $ret:ty;)* }) => {
        $scope struct $table {
            $($scope $field: unsafe extern "C" fn($($arg),*) -> $ret,)*
        }

        impl $table {
            fn look_up(found: &$crate::backend::cuda::library::Found) -> Fallible<$table> {
                Ok($table {
                    $($field: {
                        type Signature = unsafe extern "C" fn($($arg),*) -> $ret;
                        // SAFETY: the signature is the one that the library's header gives.
                        unsafe { found.symbol::<Signature>($symbol)? }
                    },)*
                })
            }
        }
    };
}
pub(super) use table;

impl Found {
    /// A function of the library.
    ///
    /// # Safety
    /// `T` must be the type of a pointer to that function.
    pub(super) unsafe fn symbol<T: Copy>(&self, symbol: &str) -> Fallible<T> {
        // SAFETY: that `T` is the symbol's type is the caller's promise.
        match unsafe { self.library.get::<T>(symbol) } {
            Ok(found) => Ok(*found),
            Err(error) => {
                let text = format!("{} has no function {symbol}", self.name);
                Err(Diagnostic::error("E0605", text)
                    .note(format!("the loader says: {}", reason(&error)))
                    .hint("it is too old, or not the library that its name says"))
            }
        }
    }

    /// Whether the library has a function of this name.
    pub(super) fn has(&self, symbol: &str) -> bool {
        // SAFETY: the address is not used.
        unsafe { self.library.get::<*const ()>(symbol) }.is_ok()
    }
}

/// Opens the first candidate that opens.
///
/// # Errors
/// The loader's reason for each.
pub(super) fn open(candidates: &[Candidate]) -> Result<Found, Vec<String>> {
    let mut reasons = Vec::new();
    for candidate in candidates {
        let (opened, name) = match candidate {
            Candidate::Name(name) => (dlopen(name, RTLD_NOW | RTLD_LOCAL), name.clone()),
            Candidate::Path(path) => (open_path(path), path.display().to_string()),
        };
        match opened {
            Ok(library) => return Ok(Found { library, name }),
            Err(error) => reasons.push(reason(&error)),
        }
    }
    Err(reasons)
}

/// Opens a library by its path. What it opens by name itself, such as NVRTC's builtins, is
/// mostly beside it, where the loader does not look: that is opened first, for all to see.
fn open_path(path: &Path) -> Result<Library, libloading::Error> {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let stem = file.split(".so").next().unwrap_or_default();
    for beside in listed(path.parent().unwrap_or(Path::new("."))) {
        let name = beside.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !name.starts_with(&format!("{stem}-builtins.so")) {
            continue;
        }
        match dlopen(beside.as_os_str(), RTLD_NOW | RTLD_GLOBAL) {
            // Never closed: the library proper opens it again when it compiles.
            Ok(library) => std::mem::forget(library),
            Err(error) => tracing::debug!("{name}: {}", reason(&error)),
        }
    }
    dlopen(path.as_os_str(), RTLD_NOW | RTLD_GLOBAL)
}

fn dlopen(
    name: impl Into<OsString>,
    flags: std::ffi::c_int,
) -> Result<Library, libloading::Error> {
    // SAFETY: the libraries asked for are NVIDIA's own, whose initializers only set up their
    // own state.
    unsafe { Library::open(Some(name.into()), flags) }
}

/// What the loader says; the error's own text is only which call failed.
fn reason(error: &libloading::Error) -> String {
    error.source().map_or_else(|| error.to_string(), |cause| cause.to_string())
}

/// The library that a variable of the environment names, which is then the only candidate.
pub(super) fn from_variable(variable: &str) -> Option<Candidate> {
    let path = std::env::var_os(variable).filter(|value| !value.is_empty())?;
    Some(Candidate::Path(PathBuf::from(path)))
}

/// The files of this relative path in the folders that Python packages are installed to.
pub(super) fn in_wheels(relative: &str) -> impl Iterator<Item = Candidate> {
    let files = packages().into_iter().map(move |folder| folder.join(relative));
    files.filter(|path| path.exists()).map(Candidate::Path)
}

/// Folders of installed Python packages: of an active environment, then of the `python3`s in
/// PATH in their order.
fn packages() -> Vec<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let mut prefixes: Vec<PathBuf> = ["VIRTUAL_ENV", "CONDA_PREFIX"]
        .into_iter()
        .filter_map(variable)
        .map(Into::into)
        .collect();
    for folder in std::env::split_paths(&variable("PATH").unwrap_or_default()) {
        let python = folder.join("python3");
        if !python.exists() {
            continue;
        }
        // A virtual environment's python is a link, and its packages are where the link is.
        let real = python.canonicalize().ok();
        let real = real.as_deref().and_then(Path::parent).and_then(Path::parent);
        prefixes.extend(folder.parent().map(Path::to_path_buf));
        prefixes.extend(real.map(Path::to_path_buf));
    }
    prefixes.push(PathBuf::from("/usr/local"));

    let mut found: Vec<PathBuf> =
        std::env::split_paths(&variable("PYTHONPATH").unwrap_or_default()).collect();
    for prefix in prefixes {
        for version in listed(&prefix.join("lib")) {
            let name = version.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if !name.starts_with("python3") {
                continue;
            }
            for kind in ["site-packages", "dist-packages"] {
                let folder = version.join(kind);
                if folder.is_dir() && !found.contains(&folder) {
                    found.push(folder);
                }
            }
        }
    }
    found
}

/// What is in a folder, in order of names; nothing if it cannot be read.
fn listed(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths
}
