//! Recorded work that is launched as one.

use std::any::Any;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUgraph, CUgraphExec, CUgraphNode, CUgraphNodeType};

use super::Fallible;
use super::driver::{Gpu, Stream};

/// What a stream recorded, ready to be launched any number of times, one launch at a time.
///
/// A communicator whose messages were recorded cannot be closed before the graph is: NCCL waits
/// for that without end. Give the communicator, and the kernels' functions, to [`Self::keep`],
/// or hold them in fields that are dropped later.
pub struct Captured {
    gpu: Arc<Gpu>,
    graph: CUgraph,
    exec: CUgraphExec,
    kept: Vec<Box<dyn Any + Send>>,
}

// SAFETY: a graph may be used by any thread, by one at a time: it is not Sync.
unsafe impl Send for Captured {}

impl Captured {
    /// Makes a graph launchable; it is destroyed with this, or here on a failure.
    pub(super) fn new(gpu: &Arc<Gpu>, graph: CUgraph) -> Fallible<Captured> {
        let here = gpu.enter();
        let mut exec: CUgraphExec = std::ptr::null_mut();
        let made = here.and_then(|_here| {
            // SAFETY: the graph is whole and live; one pointer is written.
            let result = unsafe { sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0) };
            gpu.check(result, format_args!("make a recorded graph launchable"))
        });
        if let Err(failure) = made {
            Captured::discard(graph);
            return Err(failure);
        }
        Ok(Captured { gpu: gpu.clone(), graph, exec, kept: Vec::new() })
    }

    /// Destroys a graph that nothing was made of; null is none.
    pub(super) fn discard(graph: CUgraph) {
        if !graph.is_null() {
            // SAFETY: the graph is live, and nobody else has it.
            let _ = unsafe { sys::cuGraphDestroy(graph) };
        }
    }

    /// Keeps what the graph uses until the graph is destroyed.
    pub fn keep(&mut self, used: impl Any + Send) {
        self.kept.push(Box::new(used));
    }

    /// Puts the recorded work into the stream.
    pub fn launch(&self, stream: &Stream) -> Fallible<()> {
        let _here = self.gpu.enter()?;
        // SAFETY: the graph and the stream are live.
        let result = unsafe { sys::cuGraphLaunch(self.exec, stream.raw()) };
        self.gpu.check(result, format_args!("launch a graph"))
    }

    /// Sends the graph to the GPU, so that the first launch is as quick as the others.
    pub fn upload(&self, stream: &Stream) -> Fallible<()> {
        let _here = self.gpu.enter()?;
        // SAFETY: the graph and the stream are live.
        let result = unsafe { sys::cuGraphUpload(self.exec, stream.raw()) };
        self.gpu.check(result, format_args!("send a graph to it"))
    }

    /// Kinds of the graph's nodes, in the order in which the driver lists them: that of the
    /// recording.
    pub fn nodes(&self) -> Fallible<Vec<&'static str>> {
        let _here = self.gpu.enter()?;
        let doing = "list the nodes of a graph";
        let mut count = 0usize;
        // SAFETY: without an array, only the count is written.
        let result =
            unsafe { sys::cuGraphGetNodes(self.graph, std::ptr::null_mut(), &mut count) };
        self.gpu.check(result, format_args!("{doing}"))?;
        let mut nodes: Vec<CUgraphNode> = vec![std::ptr::null_mut(); count];
        if count > 0 {
            // SAFETY: the array has room for `count` nodes.
            let result =
                unsafe { sys::cuGraphGetNodes(self.graph, nodes.as_mut_ptr(), &mut count) };
            self.gpu.check(result, format_args!("{doing}"))?;
            nodes.truncate(count);
        }
        nodes.into_iter().map(|node| self.kind(node)).collect()
    }

    fn kind(&self, node: CUgraphNode) -> Fallible<&'static str> {
        // A newer driver may know kinds that the enumeration does not: taken as a number.
        let mut kind = 0u32;
        let place = std::ptr::from_mut(&mut kind).cast::<CUgraphNodeType>();
        // SAFETY: the node is one of the live graph; a number of 32 bits is written.
        let result = unsafe { sys::cuGraphNodeGetType(node, place) };
        self.gpu.check(result, format_args!("ask for the kind of a graph's node"))?;
        const KINDS: [&str; 14] = [
            "kernel",
            "memcpy",
            "memset",
            "host",
            "graph",
            "empty",
            "event wait",
            "event record",
            "semaphore signal",
            "semaphore wait",
            "alloc",
            "free",
            "batch mem op",
            "conditional",
        ];
        Ok(KINDS.get(kind as usize).copied().unwrap_or("other"))
    }
}

impl Drop for Captured {
    fn drop(&mut self) {
        if let Ok(_here) = self.gpu.enter() {
            // SAFETY: both were made for this and are destroyed once; the driver puts it off
            // until a launch under way has ended.
            let _ = unsafe { sys::cuGraphExecDestroy(self.exec) };
            Captured::discard(self.graph);
        }
    }
}
