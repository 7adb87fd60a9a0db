//! From the driver's result codes to this crate's errors.

use cudarc::driver::{CudaContext, DriverError, sys};

use crate::Error;

/// Names the call of a `cudarc` error: `.map_err(failed("cuMemAllocAsync"))`.
pub fn failed(call: &'static str) -> impl FnOnce(DriverError) -> Error {
    move |error| Error::Driver { call, code: error.0 as u32 }
}

/// The outcome of a raw driver call.
pub(super) fn check(call: &'static str, result: sys::CUresult) -> Result<(), Error> {
    result.result().map_err(failed(call))
}

/// Makes a context current on this thread, whatever errors `cudarc` has parked in it: its own call would return those instead.
/// A failure is parked there too.
pub(super) fn make_current(context: &CudaContext) -> bool {
    // SAFETY: the context is alive, `context` holds it.
    let result = unsafe { sys::cuCtxSetCurrent(context.cu_ctx()) }.result();
    context.record_err(result);
    result.is_ok()
}

/// Waits for everything that was enqueued in a context, for destructors: whatever errors `cudarc` has parked in it. Where this gives
/// `false`, as during a capture, nobody knows what still runs, so what it may use must be leaked, not freed. The error is parked for the
/// next call of `cudarc`.
pub fn quiesce(context: &CudaContext) -> bool {
    if !make_current(context) {
        return false;
    }
    // SAFETY: the context is current.
    let result = unsafe { sys::cuCtxSynchronize() }.result();
    context.record_err(result);
    result.is_ok()
}
