//! Communicators of NCCL: joined and used within a time limit, and given up after it.
//!
//! They are non-blocking: a call returns at once, and a thread of NCCL's works on. Until that
//! one is through ([`Comm::settle`]), the messages are not in their streams and the communicator
//! takes no other call. [`Comm::group`] does all of it.

use std::ffi::{c_int, c_uint};
use std::mem::size_of;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cudarc::nccl::sys::{ncclComm_t, ncclConfig_t, ncclDataType_t, ncclUniqueId};

use super::Fallible;
use super::driver::{Gpu, Stream, is_bound};
use super::nccl::{IN_PROGRESS, Nccl, SUCCESS};
use crate::diag::Diagnostic;

/// `NCCL_CONFIG_UNDEF_INT`: NCCL's own choice.
const UNDEFINED: c_int = c_int::MIN;

/// How long an abort may take before it is left to end by itself.
const ABORT_LIMIT: Duration = Duration::from_secs(5);

/// All messages are bytes: NCCL moves them and need not know what they are.
const BYTES: c_uint = ncclDataType_t::ncclUint8 as c_uint;

/// One rank's end of a communicator.
///
/// Graphs that recorded its messages must be dropped before it: NCCL does not let go of a
/// communicator, by abort or otherwise, while such a graph lives. Dropping it is an abort, so
/// wait for its streams before.
pub struct Comm {
    nccl: &'static Nccl,
    /// Null once it was aborted.
    raw: Mutex<Handle>,
    size: usize,
    rank: usize,
    blocking: bool,
}

/// A communicator's pointer.
#[derive(Clone, Copy)]
struct Handle(ncclComm_t);

// SAFETY: a communicator may be used by any thread, by one at a time: it is behind a lock.
unsafe impl Send for Handle {}

/// An open group of messages of one communicator.
pub struct Messages<'a> {
    comm: &'a Comm,
    raw: ncclComm_t,
}

impl Comm {
    /// Joins rank `rank` of `size`, on the GPU that is bound to this thread.
    ///
    /// # Errors
    /// E0604 if the other ranks have not joined by the deadline; nothing is left behind then.
    pub fn join(
        nccl: &'static Nccl,
        id: [u8; 128],
        size: usize,
        rank: usize,
        deadline: Instant,
    ) -> Fallible<Comm> {
        if !is_bound()? {
            return Err(Diagnostic::error("E0502", "a communicator needs a thread with a GPU"));
        }
        let (result, raw) = init(nccl, id, size, rank, false);
        let comm = Comm { nccl, raw: Mutex::new(Handle(raw)), size, rank, blocking: false };
        nccl.check(result, raw, &comm.doing("join"))?;
        comm.settled(deadline, "join")?;
        Ok(comm)
    }

    /// Joins with a communicator whose calls return when they are done, with no limit but the
    /// one on joining. After the deadline a thread is left that waits on inside NCCL.
    pub fn join_blocking(
        nccl: &'static Nccl,
        gpu: &Arc<Gpu>,
        id: [u8; 128],
        size: usize,
        rank: usize,
        deadline: Instant,
    ) -> Fallible<Comm> {
        let (done, joined) = channel();
        let gpu = gpu.clone();
        let work = move || {
            let made = gpu.bind().and_then(|()| {
                let (result, raw) = init(nccl, id, size, rank, true);
                // Made first: whatever becomes of it, it is closed when dropped.
                let raw = Mutex::new(Handle(raw));
                let comm = Comm { nccl, raw, size, rank, blocking: true };
                nccl.check(result, std::ptr::null_mut(), &comm.doing("join"))?;
                Ok(comm)
            });
            // If nobody waits any more, the communicator comes back and is dropped.
            let _ = done.send(made);
        };
        let thread = std::thread::Builder::new().name(format!("nccl-join-{rank}"));
        thread.spawn(work).map_err(|error| {
            Diagnostic::error("E0605", format!("cannot start a thread for NCCL: {error}"))
        })?;
        let left = deadline.saturating_duration_since(Instant::now());
        joined.recv_timeout(left).unwrap_or_else(|_| Err(late(rank, size, "join")))
    }

    /// How many ranks it has.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Which of them this one is.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Starts the messages that `body` lists, together, and waits until they are in their
    /// streams (or in the graphs being recorded), not until they have arrived. In `body`, use
    /// only what it is given: the communicator is locked.
    ///
    /// # Errors
    /// E0604, and the communicator aborted, if a peer is not there by the deadline.
    pub fn group(
        &self,
        deadline: Instant,
        body: impl FnOnce(&Messages<'_>) -> Fallible<()>,
    ) -> Fallible<()> {
        let lock = self.locked()?;
        let messages = Messages { comm: self, raw: lock.0 };
        self.nccl.group_start()?;
        let listed = body(&messages);
        // A blocking communicator may stay in this call, and must be abortable while it does.
        let lock = (!self.blocking).then_some(lock);
        // Closed in any case: an open group would take in all that this thread does later.
        let ended = self.nccl.group_end();
        drop(lock);
        listed.and(ended)?;
        self.settle(deadline)
    }

    /// Sends bytes of this rank's GPU to a peer, which must receive as many. Alone, or between
    /// `Nccl::group_start` and `group_end`; either way followed by [`Self::settle`].
    pub fn send(&self, from: u64, bytes: u64, peer: usize, stream: &Stream) -> Fallible<()> {
        let lock = self.locked()?;
        Messages { comm: self, raw: lock.0 }.send(from, bytes, peer, stream)
    }

    /// Receives from a peer as many bytes as it sends. See [`Self::send`].
    pub fn recv(&self, to: u64, bytes: u64, peer: usize, stream: &Stream) -> Fallible<()> {
        let lock = self.locked()?;
        Messages { comm: self, raw: lock.0 }.recv(to, bytes, peer, stream)
    }

    /// Gives all ranks the bytes of `root`, in place. See [`Self::send`].
    pub fn broadcast(&self, at: u64, bytes: u64, root: usize, stream: &Stream) -> Fallible<()> {
        let lock = self.locked()?;
        Messages { comm: self, raw: lock.0 }.broadcast(at, bytes, root, stream)
    }

    /// Waits until NCCL has put what was started into its streams.
    ///
    /// # Errors
    /// E0604, and the communicator aborted, at the deadline; else NCCL's own.
    pub fn settle(&self, deadline: Instant) -> Fallible<()> {
        self.settled(deadline, "start a group of messages")
    }

    /// Whether something has gone wrong since: a peer died, the network failed. To be asked
    /// while the messages are under way.
    pub fn async_error(&self) -> Fallible<()> {
        let lock = self.locked()?;
        self.nccl.check(self.state(lock.0)?, lock.0, &self.doing("exchange messages"))
    }

    /// Ends all that is under way, here and for good; the peers find out by themselves. May be
    /// called by a watching thread, and again. Returns after a few seconds at most: what NCCL
    /// cannot end yet, because a graph holds it, is ended in the background.
    pub fn abort(&self) {
        let mut lock = self.raw.lock().unwrap_or_else(PoisonError::into_inner);
        let handle = std::mem::replace(&mut *lock, Handle(std::ptr::null_mut()));
        drop(lock);
        if handle.0.is_null() {
            return;
        }
        let (nccl, rank) = (self.nccl, self.rank);
        let (done, ended) = channel();
        let work = move || {
            // All of the handle is moved here, not only its pointer, which is not Send.
            let handle: Handle = handle;
            // SAFETY: the pointer was taken from its place under the lock: it is aborted once,
            // and nobody else has it.
            let result = unsafe { (nccl.table.abort)(handle.0) };
            if result != SUCCESS && result != IN_PROGRESS {
                tracing::debug!("rank {rank}: ncclCommAbort gave {result}");
            }
            let _ = done.send(());
        };
        match std::thread::Builder::new().name(format!("nccl-abort-{rank}")).spawn(work) {
            Err(error) => tracing::warn!("rank {rank}: NCCL is not ended: {error}"),
            Ok(_) if ended.recv_timeout(ABORT_LIMIT).is_err() => {
                tracing::warn!("rank {rank}: NCCL has not ended after {ABORT_LIMIT:?}");
            }
            Ok(_) => {}
        }
    }

    fn settled(&self, deadline: Instant, step: &str) -> Fallible<()> {
        let begun = Instant::now();
        loop {
            let lock = self.locked()?;
            let (state, raw) = (self.state(lock.0)?, lock.0);
            if state != IN_PROGRESS {
                return self.nccl.check(state, raw, &self.doing(step));
            }
            drop(lock);
            let now = Instant::now();
            if now >= deadline {
                self.abort();
                return Err(late(self.rank, self.size, step));
            }
            // Mostly it is a matter of microseconds; a first exchange takes a second.
            if now - begun < Duration::from_micros(500) {
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
    }

    /// What `ncclCommGetAsyncError` gives.
    fn state(&self, raw: ncclComm_t) -> Fallible<c_uint> {
        let mut state = SUCCESS;
        // SAFETY: the communicator is live, for its lock is held; one number is written.
        let result = unsafe { (self.nccl.table.async_error)(raw, &mut state) };
        self.nccl.check(result, raw, &self.doing("ask for the state"))?;
        Ok(state)
    }

    /// The lock on a communicator that was not aborted.
    fn locked(&self) -> Fallible<MutexGuard<'_, Handle>> {
        let lock = self.raw.lock().unwrap_or_else(PoisonError::into_inner);
        if lock.0.is_null() {
            let text = format!("rank {} of {}: NCCL was given up before", self.rank, self.size);
            return Err(Diagnostic::error("E0604", text));
        }
        Ok(lock)
    }

    fn doing(&self, step: &str) -> String {
        format!("{step} as rank {} of {}", self.rank, self.size)
    }
}

impl Messages<'_> {
    /// Sends bytes of this rank's GPU to a peer, which must receive as many.
    pub fn send(&self, from: u64, bytes: u64, peer: usize, stream: &Stream) -> Fallible<()> {
        let _here = stream.gpu().enter()?;
        let (from, count, other) = (from as *const _, bytes as usize, peer as c_int);
        let raw_stream = stream.raw().cast();
        // SAFETY: communicator and stream are live; the range is the caller's promise.
        let result = unsafe {
            (self.comm.nccl.table.send)(from, count, BYTES, other, self.raw, raw_stream)
        };
        self.check(result, || format!("send {bytes} bytes to rank {peer}"))
    }

    /// Receives from a peer as many bytes as it sends.
    pub fn recv(&self, to: u64, bytes: u64, peer: usize, stream: &Stream) -> Fallible<()> {
        let _here = stream.gpu().enter()?;
        let (to, count, other) = (to as *mut _, bytes as usize, peer as c_int);
        let raw_stream = stream.raw().cast();
        // SAFETY: communicator and stream are live; the range is the caller's promise.
        let result = unsafe {
            (self.comm.nccl.table.recv)(to, count, BYTES, other, self.raw, raw_stream)
        };
        self.check(result, || format!("receive {bytes} bytes from rank {peer}"))
    }

    /// Gives all ranks the bytes of `root`, in place.
    pub fn broadcast(&self, at: u64, bytes: u64, root: usize, stream: &Stream) -> Fallible<()> {
        let _here = stream.gpu().enter()?;
        let (count, root_rank) = (bytes as usize, root as c_int);
        let raw_stream = stream.raw().cast();
        let (from, to) = (at as *const _, at as *mut _);
        // SAFETY: communicator and stream are live; the range is the caller's promise.
        let result = unsafe {
            let broadcast = self.comm.nccl.table.broadcast;
            broadcast(from, to, count, BYTES, root_rank, self.raw, raw_stream)
        };
        self.check(result, || format!("broadcast {bytes} bytes of rank {root}"))
    }

    fn check(&self, result: c_uint, step: impl FnOnce() -> String) -> Fallible<()> {
        match result {
            SUCCESS | IN_PROGRESS => Ok(()),
            _ => self.comm.nccl.check(result, self.raw, &self.comm.doing(&step())),
        }
    }
}

impl Drop for Comm {
    fn drop(&mut self) {
        self.abort();
    }
}

/// Calls `ncclCommInitRankConfig`: its result, and the communicator, which may be null.
fn init(
    nccl: &Nccl,
    id: [u8; 128],
    size: usize,
    rank: usize,
    blocking: bool,
) -> (c_uint, ncclComm_t) {
    let id = ncclUniqueId { internal: id.map(|byte| byte as _) };
    let mut config = config(blocking);
    let mut raw: ncclComm_t = std::ptr::null_mut();
    // SAFETY: the configuration is whole and says its own size and version; one pointer is
    // written, before the call returns.
    let result =
        unsafe { (nccl.table.init)(&mut raw, size as c_int, id, rank as c_int, &mut config) };
    (result, raw)
}

/// `NCCL_CONFIG_INITIALIZER` of NCCL 2.28, but for `blocking`. Older libraries read the part
/// that they know, newer ones fill in the rest.
fn config(blocking: bool) -> ncclConfig_t {
    ncclConfig_t {
        size: size_of::<ncclConfig_t>(),
        magic: 0xcafe_beef,
        version: 22800,
        blocking: c_int::from(blocking),
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: std::ptr::null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: std::ptr::null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
    }
}

fn late(rank: usize, size: usize, step: &str) -> Diagnostic {
    let text = format!("rank {rank} of {size} could not {step} in time: a peer did not answer");
    Diagnostic::error("E0604", text)
        .hint("look at the other ranks' logs first; NCCL_DEBUG=INFO shows who was waited for")
}
