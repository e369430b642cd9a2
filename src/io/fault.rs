//! Wording shared by every file problem: operating system errors and lists of names.
//! Knows nothing of file formats.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::diag::Diagnostic;

/// How many names a message lists before it counts the rest.
const SHOWN: usize = 3;

/// `E0601`: the operating system refused `action` ("read", "write", ...) on `path`.
pub(super) fn os(action: &str, path: &Path, error: &io::Error) -> Diagnostic {
    let message = format!("cannot {action} {}: {error}", path.display());
    let diagnostic = Diagnostic::error("E0601", message);
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            diagnostic.hint("free space there or choose another place; nothing was published")
        }
        io::ErrorKind::FileTooLarge => diagnostic
            .hint("raise the limit of a file's size (ulimit -f); nothing was published"),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            diagnostic.hint("check who may read and write there")
        }
        _ => diagnostic,
    }
}

/// Opens a regular file for reading; a pipe or device is refused.
pub(super) fn open_regular(path: &Path) -> io::Result<File> {
    // Opening a pipe would otherwise wait for a writer.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(file)
}

/// All bytes of a regular file that has at most `most` of them.
pub(crate) fn read_whole(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // One more than allowed, since a file may grow while it is read.
    open_regular(path)?.take(most + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        let why = format!("it has more than {} MiB", most >> 20);
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    Ok(bytes)
}

/// `a.weight, b.weight, c.weight and 4 more`.
pub(super) fn some_names<S: AsRef<str>>(names: &[S]) -> String {
    let shown: Vec<&str> = names.iter().take(SHOWN).map(AsRef::as_ref).collect();
    match names.len().saturating_sub(SHOWN) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// `1 tensor`, `2 tensors`.
pub(super) fn count(n: usize, noun: &str) -> String {
    if n == 1 { format!("1 {noun}") } else { format!("{n} {noun}s") }
}
