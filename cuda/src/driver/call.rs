//! From the driver's result codes to this crate's errors.

use cudarc::driver::{DriverError, sys};

use crate::Error;

/// Names the call of a `cudarc` error: `.map_err(failed("cuMemAllocAsync"))`.
pub fn failed(call: &'static str) -> impl FnOnce(DriverError) -> Error {
    move |error| Error::Driver { call, code: error.0 as u32 }
}

/// The outcome of a raw driver call.
pub(super) fn check(call: &'static str, result: sys::CUresult) -> Result<(), Error> {
    result.result().map_err(failed(call))
}
