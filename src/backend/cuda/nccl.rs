//! NCCL, found at run time. Communicators are in a file of their own and named from here.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use cudarc::nccl::sys::{ncclComm_t, ncclConfig_t, ncclUniqueId};

use super::Fallible;
use super::library::{Candidate, Found, from_variable, in_wheels, open, table};
use crate::diag::Diagnostic;

pub use super::comm::{Comm, Messages};

/// Names a libnccl to use instead of the one that the loader finds.
pub const VARIABLE: &str = "KERNELCAST_NCCL";

/// The oldest version that takes a configuration of a communicator in today's form.
const OLDEST: c_int = 21800;

/// No communicator.
const NONE: ncclComm_t = std::ptr::null_mut();

// Values of `ncclResult_t`, taken as numbers: a newer library may know more than the enumeration.
pub(super) const SUCCESS: c_uint = 0;
pub(super) const IN_PROGRESS: c_uint = 7;
const REMOTE_ERROR: c_uint = 6;

table! {
    pub(super) Table {
        version = "ncclGetVersion" (*mut c_int) -> c_uint;
        unique_id = "ncclGetUniqueId" (*mut ncclUniqueId) -> c_uint;
        error_string = "ncclGetErrorString" (c_uint) -> *const c_char;
        last_error = "ncclGetLastError" (ncclComm_t) -> *const c_char;
        init = "ncclCommInitRankConfig" (
            *mut ncclComm_t,
            c_int,
            ncclUniqueId,
            c_int,
            *mut ncclConfig_t
        ) -> c_uint;
        abort = "ncclCommAbort" (ncclComm_t) -> c_uint;
        async_error = "ncclCommGetAsyncError" (ncclComm_t, *mut c_uint) -> c_uint;
        group_start = "ncclGroupStart" () -> c_uint;
        group_end = "ncclGroupEnd" () -> c_uint;
        send = "ncclSend" (
            *const c_void,
            usize,
            c_uint,
            c_int,
            ncclComm_t,
            *mut c_void
        ) -> c_uint;
        recv = "ncclRecv" (*mut c_void, usize, c_uint, c_int, ncclComm_t, *mut c_void) -> c_uint;
        broadcast = "ncclBroadcast" (
            *const c_void,
            *mut c_void,
            usize,
            c_uint,
            c_int,
            ncclComm_t,
            *mut c_void
        ) -> c_uint;
    }
}

/// The library, once loaded.
pub struct Nccl {
    pub(super) table: Table,
    library: Found,
}

/// Asks NCCL not to guard against graphs and other calls of one communicator that run at a time:
/// here they never do, and without the guard a step of 128 MiB is a fifth faster (H100 x 2, NCCL
/// 2.28). A setting of the user's stays.
///
/// To be called first in a process, for the environment is not safe to change beside threads.
pub fn without_graph_mixing() {
    const SETTING: &str = "NCCL_GRAPH_MIXING_SUPPORT";
    if std::env::var_os(SETTING).is_none() {
        // SAFETY: no other thread exists yet; that is the caller's promise.
        unsafe { std::env::set_var(SETTING, "0") };
    }
}

/// Finds NCCL, once a process: where [`VARIABLE`] says, else the one that PyTorch loaded into
/// this process or the loader finds, else in the packages of Python.
///
/// # Errors
/// E0605 with the loader's reasons.
pub fn load() -> Fallible<&'static Nccl> {
    static NCCL: OnceLock<Fallible<Nccl>> = OnceLock::new();
    NCCL.get_or_init(find).as_ref().map_err(Clone::clone)
}

fn find() -> Fallible<Nccl> {
    let candidates = match from_variable(VARIABLE) {
        Some(named) => vec![named],
        None => [Candidate::Name("libnccl.so.2".into())]
            .into_iter()
            .chain(in_wheels("nvidia/nccl/lib/libnccl.so.2"))
            .chain([Candidate::Name("libnccl.so".into())])
            .collect(),
    };
    let library = open(&candidates).map_err(|reasons| {
        let none = Diagnostic::error("E0605", "NCCL's library libnccl.so.2 does not load");
        let said =
            reasons.into_iter().fold(none, |d, r| d.note(format!("the loader says: {r}")));
        said.hint(format!("install NCCL, or set {VARIABLE} to the path of a libnccl.so.2"))
    })?;
    let nccl = Nccl { table: Table::look_up(&library)?, library };
    let version = nccl.version()?;
    if version < OLDEST {
        let text = format!("NCCL {} is too old: {}", readable(version), nccl.library.name);
        return Err(Diagnostic::error("E0605", text).hint("install NCCL 2.18 or newer"));
    }
    Ok(nccl)
}

/// A version as people write it: 22800 is 2.28.0.
fn readable(version: c_int) -> String {
    format!("{}.{}.{}", version / 10000, version % 10000 / 100, version % 100)
}

impl Nccl {
    /// The version as one number: 2.28.0 is 22800.
    pub fn version(&self) -> Fallible<i32> {
        let mut version: c_int = 0;
        // SAFETY: one int is written.
        let result = unsafe { (self.table.version)(&mut version) };
        self.check(result, NONE, "ask NCCL for its version")?;
        Ok(version)
    }

    /// The name or the path that the library was found under.
    pub fn library(&self) -> &str {
        &self.library.name
    }

    /// What the ranks of one communicator must share before they join; made by one of them,
    /// which then listens for the others.
    pub fn unique_id(&self) -> Fallible<[u8; 128]> {
        let mut id = ncclUniqueId { internal: [0; 128] };
        // SAFETY: 128 bytes are written.
        let result = unsafe { (self.table.unique_id)(&mut id) };
        self.check(result, NONE, "make an identity for a communicator")?;
        Ok(id.internal.map(|byte| byte as u8))
    }

    /// Opens a group of this thread: what follows is started together by [`Self::group_end`].
    pub fn group_start(&self) -> Fallible<()> {
        // SAFETY: the call has no arguments and changes the thread's own state.
        let result = unsafe { (self.table.group_start)() };
        self.check(result, NONE, "open a group of messages")
    }

    /// Closes the group. Its messages are in their streams only once [`Comm::settle`]
    /// of each communicator returns.
    pub fn group_end(&self) -> Fallible<()> {
        // SAFETY: as in `group_start`.
        let result = unsafe { (self.table.group_end)() };
        self.check(result, NONE, "start a group of messages")
    }

    /// Passes a success, and what goes on in the background.
    pub(super) fn check(&self, result: c_uint, comm: ncclComm_t, doing: &str) -> Fallible<()> {
        if result == SUCCESS || result == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: for any number, the answer is a constant string.
        let text = unsafe { words((self.table.error_string)(result)) };
        // SAFETY: NCCL does not look at the communicator, and takes null.
        let last = unsafe { words((self.table.last_error)(comm)) };
        let code = if result == REMOTE_ERROR { "E0604" } else { "E0605" };
        let text = text.unwrap_or_else(|| "an unknown error".into());
        let said = Diagnostic::error(code, format!("cannot {doing}: NCCL: {text} ({result})"));
        let said =
            last.into_iter().fold(said, |d, l| d.note(format!("NCCL's last words: {l}")));
        Err(said.hint("NCCL_DEBUG=WARN makes NCCL say more"))
    }
}

/// A string of the library, if it says anything.
///
/// # Safety
/// `text` must be null or a string that ends with a 0.
unsafe fn words(text: *const c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: the caller's promise.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_string())
}
