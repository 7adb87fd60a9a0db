//! Device time between two points of a stream.

use std::time::Duration;

use cudarc::driver::{CudaEvent, CudaStream, sys};

use super::call::failed;
use super::gpu::Gpu;
use crate::Error;

/// A pair of events that keep time (`cudarc`'s do not unless asked).
#[derive(Debug)]
pub struct Timer {
    gpu: Gpu,
    start: CudaEvent,
    stop: CudaEvent,
}

impl Timer {
    /// Two new events.
    pub fn new(gpu: &Gpu) -> Result<Self, Error> {
        let event = || {
            gpu.context()
                .new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT))
                .map_err(failed("cuEventCreate"))
        };
        Ok(Timer { gpu: gpu.clone(), start: event()?, stop: event()? })
    }

    /// Notes the time at which the stream's work so far is done.
    pub fn start(&self, stream: &CudaStream) -> Result<(), Error> {
        self.gpu.check_stream("timer", stream)?;
        self.start.record(stream).map_err(failed("cuEventRecord"))
    }

    /// Notes the time at which the stream's work so far is done.
    pub fn stop(&self, stream: &CudaStream) -> Result<(), Error> {
        self.gpu.check_stream("timer", stream)?;
        self.stop.record(stream).map_err(failed("cuEventRecord"))
    }

    /// Waits for [`stop`](Self::stop)'s point and gives the time since [`start`](Self::start)'s.
    ///
    /// # Errors
    /// Code 400 (`CUDA_ERROR_INVALID_HANDLE`) if one of the two was never recorded; whatever the work between them failed
    /// with.
    pub fn elapsed(&self) -> Result<Duration, Error> {
        type ElapsedTime = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> u32;
        const CALL: &str = "cuEventElapsedTime";
        self.stop.synchronize().map_err(failed("cuEventSynchronize"))?;
        // Bindings of CUDA 13 know this function as `_v2` only, which drivers of the 12 series lack and where calling it
        // panics. Every driver has the plain one.
        // SAFETY: `CUresult cuEventElapsedTime(float *pMilliseconds, CUevent hStart, CUevent hEnd)`.
        let elapsed = unsafe { self.gpu.driver().symbol::<ElapsedTime>(c"cuEventElapsedTime") };
        let elapsed = elapsed.ok_or(Error::Driver { call: CALL, code: NOT_FOUND })?;
        let mut milliseconds = 0.0f32;
        // SAFETY: the pointer is valid for one float, and both events are alive.
        match unsafe { elapsed(&mut milliseconds, self.start.cu_event(), self.stop.cu_event()) } {
            0 => Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3)),
            code => Err(Error::Driver { call: CALL, code }),
        }
    }
}

/// `CUDA_ERROR_NOT_FOUND`: a named symbol does not exist.
const NOT_FOUND: u32 = 500;
