//! Streams and events of a GPU.

use std::ffi::{c_int, c_void};
use std::sync::Arc;

use cudarc::driver::sys::{
    self, CUevent, CUevent_flags_enum, CUgraph, CUresult, CUstream, CUstream_flags_enum,
    CUstreamCaptureMode, CUstreamWaitValue_flags_enum, CUstreamWriteValue_flags_enum,
};
use smallvec::SmallVec;

use super::Fallible;
use super::driver::{Captured, Function, Gpu, driver};
use super::errors::bytes as readable;
use crate::diag::Diagnostic;

/// An argument of a kernel, of the size of its parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arg {
    /// An address, or a number of 64 bits.
    U64(u64),
    U32(u32),
}

impl Arg {
    pub(super) fn bytes(&self) -> usize {
        match self {
            Arg::U64(_) => 8,
            Arg::U32(_) => 4,
        }
    }

    /// Where the value itself lies.
    fn place(&self) -> *mut c_void {
        match self {
            Arg::U64(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Arg::U32(value) => std::ptr::from_ref(value).cast_mut().cast(),
        }
    }
}

/// An ordered queue of work on a GPU. Addresses are taken at their word: they must be valid for
/// the work, and stay so until it is done.
pub struct Stream {
    gpu: Arc<Gpu>,
    raw: CUstream,
}

// SAFETY: a stream is a handle, and the driver locks it in each call.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    pub(super) fn new(gpu: &Arc<Gpu>) -> Fallible<Stream> {
        let _here = gpu.enter()?;
        let mut raw: CUstream = std::ptr::null_mut();
        let flags = CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: a context is current; one pointer is written.
        let result = unsafe { sys::cuStreamCreate(&mut raw, flags) };
        gpu.check(result, format_args!("make a stream"))?;
        Ok(Stream { gpu: gpu.clone(), raw })
    }

    /// The GPU that it is on.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// The driver's own handle, which is also the runtime's.
    pub fn raw(&self) -> CUstream {
        self.raw
    }

    /// Starts a kernel of `grid` blocks of `block` threads; a grid of none is no launch.
    pub fn launch(
        &self,
        f: &Function,
        grid: u32,
        block: u32,
        shared: u32,
        args: &[Arg],
    ) -> Fallible<()> {
        f.takes(&self.gpu, args)?;
        if grid == 0 {
            return Ok(());
        }
        let _here = self.gpu.enter()?;
        let mut places: SmallVec<[*mut c_void; 16]> = args.iter().map(Arg::place).collect();
        let none = std::ptr::null_mut();
        // SAFETY: the places are those of live values of the parameters' sizes, copied before
        // the call returns; what the kernel touches is the caller's promise.
        let result = unsafe {
            sys::cuLaunchKernel(
                f.raw(),
                grid,
                1,
                1,
                block,
                1,
                1,
                shared,
                self.raw,
                places.as_mut_ptr(),
                none,
            )
        };
        let doing = format_args!("launch {} with {grid} blocks of {block} threads", f.name());
        self.gpu.check(result, doing)
    }

    /// Copies from the host; done on return. Not for a stream that is being captured.
    pub fn upload(&self, to: u64, from: &[u8]) -> Fallible<()> {
        if from.is_empty() {
            return Ok(());
        }
        let _here = self.gpu.enter()?;
        // SAFETY: the slice lives until the copy is waited for, below.
        let result = unsafe {
            sys::cuMemcpyHtoDAsync_v2(to, from.as_ptr().cast(), from.len(), self.raw)
        };
        let size = readable(from.len() as u64);
        let sent = self.gpu.check(result, format_args!("copy {size} to it"));
        self.synchronize().and(sent)
    }

    /// Copies to the host; done on return. Not for a stream that is being captured.
    pub fn download(&self, from: u64, to: &mut [u8]) -> Fallible<()> {
        if to.is_empty() {
            return Ok(());
        }
        let _here = self.gpu.enter()?;
        // SAFETY: the slice is borrowed until the copy is waited for, below.
        let result = unsafe {
            sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from, to.len(), self.raw)
        };
        let size = readable(to.len() as u64);
        let sent = self.gpu.check(result, format_args!("copy {size} from it"));
        self.synchronize().and(sent)
    }

    /// Copies between GPUs or within one. The one copy between GPUs that can be captured.
    pub fn copy(&self, to: u64, from: u64, bytes: u64) -> Fallible<()> {
        if bytes == 0 {
            return Ok(());
        }
        let _here = self.gpu.enter()?;
        // SAFETY: that both ranges are valid is the caller's promise.
        let result = unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes as usize, self.raw) };
        self.gpu.check(result, format_args!("copy {} on GPUs", readable(bytes)))
    }

    /// Sets every byte of a range.
    pub fn fill(&self, to: u64, byte: u8, bytes: u64) -> Fallible<()> {
        if bytes == 0 {
            return Ok(());
        }
        let _here = self.gpu.enter()?;
        // SAFETY: that the range is valid is the caller's promise.
        let result = unsafe { sys::cuMemsetD8Async(to, byte, bytes as usize, self.raw) };
        self.gpu.check(result, format_args!("fill {}", readable(bytes)))
    }

    /// Marks the present end of the stream.
    pub fn record(&self, e: &Event) -> Fallible<()> {
        let _here = self.gpu.enter()?;
        // SAFETY: both handles are live; the driver refuses an event of another context.
        let result = unsafe { sys::cuEventRecord(e.raw, self.raw) };
        self.gpu.check(result, format_args!("record an event"))
    }

    /// Later work of this stream waits for the event, which may be another GPU's.
    pub fn wait(&self, e: &Event) -> Fallible<()> {
        let _here = self.gpu.enter()?;
        // SAFETY: both handles are live; the flags must be 0.
        let result = unsafe { sys::cuStreamWaitEvent(self.raw, e.raw, 0) };
        self.gpu.check(result, format_args!("wait for an event"))
    }

    /// Writes a word once the work before is done and its writes are seen by all.
    pub fn write_flag(&self, address: u64, value: u32) -> Fallible<()> {
        let _here = self.gpu.enter()?;
        let flags = CUstreamWriteValue_flags_enum::CU_STREAM_WRITE_VALUE_DEFAULT as u32;
        // SAFETY: that the word is valid is the caller's promise.
        let result = unsafe { sys::cuStreamWriteValue32_v2(self.raw, address, value, flags) };
        self.gpu.check(result, format_args!("write a flag"))
    }

    /// Later work waits until the word is at least `value` (compared as `i32` of the
    /// difference, so it may wrap). Nothing but the word ends the wait: watch it from the host.
    pub fn wait_flag(&self, address: u64, value: u32) -> Fallible<()> {
        let _here = self.gpu.enter()?;
        let mut flags = CUstreamWaitValue_flags_enum::CU_STREAM_WAIT_VALUE_GEQ as u32;
        if self.gpu.flushes_remote_writes() {
            flags |= CUstreamWaitValue_flags_enum::CU_STREAM_WAIT_VALUE_FLUSH as u32;
        }
        // SAFETY: that the word is valid is the caller's promise.
        let result = unsafe { sys::cuStreamWaitValue32_v2(self.raw, address, value, flags) };
        self.gpu.check(result, format_args!("wait for a flag"))
    }

    /// Whether all work is done. The error of failed work comes out here.
    pub fn finished(&self) -> Fallible<bool> {
        let _here = self.gpu.enter()?;
        // SAFETY: the stream is live.
        let result = unsafe { sys::cuStreamQuery(self.raw) };
        answered(&self.gpu, result, "ask whether its work is done")
    }

    /// Waits until all work is done.
    pub fn synchronize(&self) -> Fallible<()> {
        let _here = self.gpu.enter()?;
        // SAFETY: the stream is live.
        let result = unsafe { sys::cuStreamSynchronize(self.raw) };
        self.gpu.check(result, format_args!("finish its work"))
    }

    /// From here on, work is recorded instead of done. Other threads may go on allocating, and
    /// NCCL's own threads may record into this stream.
    pub fn begin_capture(&self) -> Fallible<()> {
        let _here = self.gpu.enter()?;
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is live.
        let result = unsafe { sys::cuStreamBeginCapture_v2(self.raw, mode) };
        self.gpu.check(result, format_args!("begin to record a graph"))
    }

    /// Ends the recording and makes it launchable. Streams that were forked must be joined.
    /// After an error the stream is as it was before `begin_capture`.
    pub fn end_capture(&self) -> Fallible<Captured> {
        let graph = self.end()?;
        Captured::new(&self.gpu, graph)
    }

    /// Ends a recording and throws it away, for when a call in its midst failed.
    pub fn cancel_capture(&self) {
        if let Ok(graph) = self.end() {
            Captured::discard(graph);
        }
    }

    fn end(&self) -> Fallible<CUgraph> {
        let _here = self.gpu.enter()?;
        let mut graph: CUgraph = std::ptr::null_mut();
        // SAFETY: the stream is live; one pointer is written, null after a failure.
        let result = unsafe { sys::cuStreamEndCapture(self.raw, &mut graph) };
        let ended = self.gpu.check(result, format_args!("end the recording of a graph"));
        if let Err(failure) = ended {
            Captured::discard(graph);
            return Err(failure);
        }
        if graph.is_null() {
            let text = format!("GPU {}: a graph was not recorded", self.gpu.ordinal());
            return Err(Diagnostic::error("E0605", text));
        }
        Ok(graph)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Ok(_here) = self.gpu.enter() {
            // SAFETY: made in `new` and destroyed once; queued work still runs to its end.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.raw) };
        }
    }
}

/// A point in a stream.
pub struct Event {
    gpu: Arc<Gpu>,
    raw: CUevent,
}

// SAFETY: an event is a handle, and the driver locks it in each call.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    pub(super) fn new(gpu: &Arc<Gpu>, timed: bool) -> Fallible<Event> {
        let _here = gpu.enter()?;
        let mut raw: CUevent = std::ptr::null_mut();
        let flags = match timed {
            true => CUevent_flags_enum::CU_EVENT_DEFAULT as u32,
            false => CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32,
        };
        // SAFETY: a context is current; one pointer is written.
        let result = unsafe { sys::cuEventCreate(&mut raw, flags) };
        gpu.check(result, format_args!("make an event"))?;
        Ok(Event { gpu: gpu.clone(), raw })
    }

    /// Whether the stream has come to it; true if it was never recorded.
    pub fn finished(&self) -> Fallible<bool> {
        let _here = self.gpu.enter()?;
        // SAFETY: the event is live.
        let result = unsafe { sys::cuEventQuery(self.raw) };
        answered(&self.gpu, result, "ask for an event")
    }

    /// Waits until the stream has come to it.
    pub fn synchronize(&self) -> Fallible<()> {
        let _here = self.gpu.enter()?;
        // SAFETY: the event is live.
        let result = unsafe { sys::cuEventSynchronize(self.raw) };
        self.gpu.check(result, format_args!("wait for an event"))
    }

    /// Milliseconds from `since` to this one; both timed, recorded and finished.
    pub fn elapsed_ms(&self, since: &Event) -> Fallible<f32> {
        type Elapsed = unsafe extern "C" fn(*mut f32, CUevent, CUevent) -> CUresult;
        let _here = self.gpu.enter()?;
        let driver = driver()?;
        // Drivers before CUDA 12.8 have only the first version, which takes the same.
        // SAFETY: the signature is that of cuda.h for both.
        let elapsed = unsafe { driver.symbol::<Elapsed>("cuEventElapsedTime_v2") };
        // SAFETY: as above.
        let elapsed =
            elapsed.or_else(|_| unsafe { driver.symbol::<Elapsed>("cuEventElapsedTime") })?;
        let mut milliseconds = 0.0f32;
        // SAFETY: both events are live; one number is written.
        let result = unsafe { elapsed(&mut milliseconds, since.raw, self.raw) };
        self.gpu.check(result, format_args!("measure between two events"))?;
        Ok(milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(_here) = self.gpu.enter() {
            // SAFETY: made in `new` and destroyed once.
            let _ = unsafe { sys::cuEventDestroy_v2(self.raw) };
        }
    }
}

/// Yes, not yet, or an error.
fn answered(gpu: &Gpu, result: CUresult, doing: &str) -> Fallible<bool> {
    const NOT_READY: c_int = CUresult::CUDA_ERROR_NOT_READY as c_int;
    match result as c_int {
        NOT_READY => Ok(false),
        _ => gpu.check(result, format_args!("{doing}")).map(|()| true),
    }
}
