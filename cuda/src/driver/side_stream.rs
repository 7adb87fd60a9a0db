//! A stream of copies beside the stream of kernels.

use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream, sys};

use super::call::{check, failed};
use super::gpu::Gpu;
use crate::Error;
use crate::memory::{Space, View, ViewMut};
use crate::side_queue::{SideQueue, check_copy};

/// A stream of the caller's on which a copy engine works beside the kernels of another one, with an event per slot.
///
/// Copies read device memory or mapped host memory at the address that the device has for it. Nothing but this object may use the
/// stream while copies are under way; whoever enqueues on the main stream behind [`SideQueue::before`] is behind the copies too.
#[derive(Debug)]
pub struct SideStream {
    gpu: Gpu,
    stream: Arc<CudaStream>,
    /// The main stream's place that copies wait for.
    readers: CudaEvent,
    /// The last copy of each slot.
    filled: Vec<CudaEvent>,
    /// The end of a call that stopped in the middle.
    end: CudaEvent,
}

impl SideStream {
    /// Marks for `slots` slots on a stream of the GPU's context.
    ///
    /// # Errors
    /// [`Error::Argument`] for a stream of another context; [`Error::Driver`].
    pub fn new(gpu: &Gpu, stream: Arc<CudaStream>, slots: usize) -> Result<Self, Error> {
        gpu.check_stream("copy", &stream)?;
        // cudarc's default has no timing, which makes waiting cheaper.
        let event = || gpu.context().new_event(None).map_err(failed("cuEventCreate"));
        let filled = (0..slots).map(|_| event()).collect::<Result<_, _>>()?;
        Ok(SideStream { gpu: gpu.clone(), readers: event()?, end: event()?, stream, filled })
    }

    fn check_main(&self, main: &CudaStream) -> Result<(), Error> {
        self.gpu.check_stream("copy", main)?;
        if main.cu_stream() == self.stream.cu_stream() {
            let expected = "another stream than the copies'";
            return Err(Error::argument("copy", "stream", expected, "the same stream"));
        }
        Ok(())
    }
}

impl SideQueue for SideStream {
    type Main = CudaStream;

    fn slots(&self) -> usize {
        self.filled.len()
    }

    fn after(&mut self, main: &CudaStream) -> Result<(), Error> {
        self.check_main(main)?;
        self.readers.record(main).map_err(failed("cuEventRecord"))?;
        self.stream.wait(&self.readers).map_err(failed("cuStreamWaitEvent"))
    }

    unsafe fn copy(
        &mut self,
        slot: usize,
        from: &View<'_, u8>,
        to: &mut ViewMut<'_, u8>,
    ) -> Result<(), Error> {
        check_copy(self.slots(), slot, from, to)?;
        let own = Space::Device(self.gpu.device().ordinal);
        for (argument, space) in [("from", from.space()), ("to", to.space())] {
            if space != own {
                return Err(Error::argument("copy", argument, own, space));
            }
        }
        self.gpu.bind()?;
        if !from.is_empty() {
            // SAFETY: both lie in memory of this device, `to` is long enough, and that they stay valid and unshared until the
            // copy is done is the caller's promise. With unified addressing the driver tells mapped host memory by its address.
            let result = unsafe {
                sys::cuMemcpyAsync(to.address(), from.address(), from.bytes(), self.stream.cu_stream())
            };
            check("cuMemcpyAsync", result)?;
        }
        self.filled[slot].record(&self.stream).map_err(failed("cuEventRecord"))
    }

    fn before(&mut self, main: &CudaStream, slot: usize) -> Result<(), Error> {
        self.check_main(main)?;
        let slots = self.slots();
        let filled = self
            .filled
            .get(slot)
            .ok_or_else(|| Error::argument("copy", "slot", format_args!("below {slots}"), slot))?;
        main.wait(filled).map_err(failed("cuStreamWaitEvent"))
    }

    fn join(&mut self, main: &CudaStream) -> Result<(), Error> {
        self.check_main(main)?;
        self.end.record(&self.stream).map_err(failed("cuEventRecord"))?;
        main.wait(&self.end).map_err(failed("cuStreamWaitEvent"))
    }
}
