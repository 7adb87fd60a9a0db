//! CUDA graphs by stream capture: record a step once, replay it with one call.

use std::fmt;
use std::sync::Arc;

use cudarc::driver::{CudaStream, sys};

use super::call::{check, make_current};
use super::gpu::Gpu;
use crate::Error;

/// Launches recorded from a stream. Keeps the kernels it launches loaded; the memory they work on is the caller's.
pub struct Graph {
    gpu: Gpu,
    graph: sys::CUgraph,
    executable: sys::CUgraphExec,
}

// SAFETY: graphs belong to a context, not to a thread. A `Graph` is not `Sync`, so no two threads use it at once, which is
// what the driver asks for.
unsafe impl Send for Graph {}

/// A capture that is ended when dropped, so that an error or a panic in the middle does not leave the stream capturing.
struct Capture<'a> {
    stream: &'a CudaStream,
    open: bool,
}

impl Capture<'_> {
    fn end(&mut self) -> Result<sys::CUgraph, Error> {
        self.open = false;
        let mut graph = std::ptr::null_mut();
        // SAFETY: the pointer is valid for one handle, and the stream is capturing since `Graph::capture`.
        let result = unsafe { sys::cuStreamEndCapture(self.stream.cu_stream(), &mut graph) };
        check("cuStreamEndCapture", result)?;
        Ok(graph)
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        if self.open
            && let Ok(graph) = self.end()
            && !graph.is_null()
        {
            // SAFETY: the graph was just created and nobody else has it.
            let result = unsafe { sys::cuGraphDestroy(graph) };
            self.stream.context().record_err(result.result());
        }
    }
}

impl Graph {
    /// Records what `enqueue` puts on `stream`. Nothing runs.
    ///
    /// `enqueue` must not allocate, synchronize or copy from pageable memory; the `run` functions of this project keep to
    /// that once their kernels are prepared. If the context tracks slices with events (it does from its second stream on),
    /// turn that off before capturing, or the first wait for work outside the capture invalidates it.
    ///
    /// # Errors
    /// What `enqueue` returns; [`Error::Driver`] with code 900 for a stream that cannot be captured (the default stream),
    /// 901 if something in between invalidated the capture. In every case the stream is as before.
    pub fn capture<E: From<Error>>(
        gpu: &Gpu,
        stream: &Arc<CudaStream>,
        enqueue: impl FnOnce(&Arc<CudaStream>) -> Result<(), E>,
    ) -> Result<Self, E> {
        gpu.check_stream("graph", stream)?;
        gpu.bind()?;
        // Thread-local: another thread's allocation must not break this capture.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream belongs to the context that is current.
        let result = unsafe { sys::cuStreamBeginCapture_v2(stream.cu_stream(), mode) };
        check("cuStreamBeginCapture", result)?;
        let mut capture = Capture { stream, open: true };
        enqueue(stream)?;
        gpu.bind()?;
        let graph = capture.end()?;
        let mut recorded = Graph { gpu: gpu.clone(), graph, executable: std::ptr::null_mut() };
        // SAFETY: the pointer is valid for one handle, and the graph was just recorded.
        let result = unsafe { sys::cuGraphInstantiateWithFlags(&mut recorded.executable, graph, 0) };
        check("cuGraphInstantiate", result)?;
        Ok(recorded)
    }

    /// Enqueues everything recorded on a stream, which need not be the one it was recorded from.
    ///
    /// # Safety
    /// Every buffer that a recorded launch uses must still be allocated, and nobody else may use it until the replay is
    /// done, as if the launches were enqueued again.
    pub unsafe fn replay(&self, stream: &CudaStream) -> Result<(), Error> {
        self.gpu.check_stream("graph", stream)?;
        self.gpu.bind()?;
        // SAFETY: the executable graph and the stream belong to the context that is current; the buffers are the caller's
        // promise.
        let result = unsafe { sys::cuGraphLaunch(self.executable, stream.cu_stream()) };
        check("cuGraphLaunch", result)
    }

    /// Number of recorded operations.
    pub fn nodes(&self) -> Result<usize, Error> {
        let mut count = 0;
        // SAFETY: without an array the driver only writes the count, for which the pointer is valid.
        let result = unsafe { sys::cuGraphGetNodes(self.graph, std::ptr::null_mut(), &mut count) };
        check("cuGraphGetNodes", result)?;
        Ok(count)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let context = self.gpu.context();
        make_current(context);
        if !self.executable.is_null() {
            // SAFETY: created in `capture` and destroyed once; the driver keeps what a running replay needs.
            let result = unsafe { sys::cuGraphExecDestroy(self.executable) };
            context.record_err(result.result());
        }
        // SAFETY: created in `capture` and destroyed once.
        let result = unsafe { sys::cuGraphDestroy(self.graph) };
        context.record_err(result.result());
    }
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graph").field("gpu", &self.gpu).finish_non_exhaustive()
    }
}
