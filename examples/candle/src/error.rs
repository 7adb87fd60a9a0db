//! Our errors and faults as candle errors.

use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Error, Result};

/// An error of the crates: a CUDA failure stays what it is inside `Error::Cuda`, anything else is a message.
pub(crate) fn ours(op: &'static str) -> impl Fn(attention::Error) -> Error {
    move |error| match error {
        #[cfg(feature = "cuda")]
        attention::Error::Cuda(error) => Error::Cuda(Box::new(error)).bt(),
        error => Error::Msg(format!("{op}: {error}")).bt(),
    }
}

/// An argument that does not fit, in the words of the crates.
pub(crate) fn argument(
    op: &'static str,
    argument: &'static str,
    expected: impl ToString,
    found: impl ToString,
) -> Error {
    ours(op)(attention::Error::argument(argument, expected, found))
}

/// Refuses a tensor of another dtype than the op was prepared for.
pub(crate) fn check_dtype(message: &'static str, expected: DType, got: DType) -> Result<()> {
    if expected == got { Ok(()) } else { Err(Error::UnexpectedDType { msg: message, expected, got }.bt()) }
}

/// Refuses a tensor of another device than the op was prepared for.
pub(crate) fn check_device(op: &'static str, prepared: &Device, found: &Device) -> Result<()> {
    if prepared.same_device(found) {
        return Ok(());
    }
    Err(Error::DeviceMismatchBinaryOp { lhs: prepared.location(), rhs: found.location(), op }.bt())
}

/// A device that there is no backend for.
pub(crate) fn unsupported_device(op: &'static str, device: &Device) -> Error {
    let expected = if cfg!(feature = "cuda") {
        "CPU or CUDA tensors"
    } else {
        "CPU tensors (CUDA tensors need feature `cuda`)"
    };
    argument(op, "device", expected, format!("{:?}", device.location()))
}

/// A row that was skipped: its code (those of [`attention::FaultCode`]) and its index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) code: u32,
    pub(crate) index: u64,
}

impl Fault {
    /// The fault of `what` number `index` as an error.
    pub(crate) fn error(self, op: &'static str, what: &str) -> Error {
        use attention::FaultCode as Code;
        let meaning = match self.code {
            code if code == Code::BadLength as u32 => "its length exceeds its row of the block table",
            code if code == Code::BadPage as u32 => "it names a page outside the cache",
            code if code == Code::BadIndex as u32 => "its slot lies outside the cache",
            _ => "a fault of another kind",
        };
        Error::Msg(format!("{op}: {what} {}: {meaning} (code {})", self.index, self.code)).bt()
    }
}

/// A lock whose contents stay valid when a holder panicked.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
