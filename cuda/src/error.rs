//! The one error type of this crate.

use crate::probe::Unavailable;

/// What can go wrong between a kernel's source and its launch.
///
/// No variant holds or formats a `cudarc` error: formatting one asks the driver for its text, which panics where there
/// is no driver.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No usable driver, device or NVRTC.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),

    /// An argument does not fit the kernel: its length, address space, alignment or value.
    #[error("{kernel}: argument `{argument}`: expected {expected}, found {found}")]
    Argument {
        /// Kernel or operation that refused the argument.
        kernel: String,
        /// The argument's name.
        argument: &'static str,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },

    /// The kernel table has no such constant, or does not allow this value.
    #[error("{kernel}: constant {constant} = {found} is not one of the allowed {expected}")]
    Constant {
        /// The kernel.
        kernel: &'static str,
        /// The constant's name.
        constant: String,
        /// The values that the kernel table allows.
        expected: String,
        /// The value asked for.
        found: String,
    },

    /// The kernel does not run on this architecture.
    #[error("{kernel} needs {expected}, the device is {found}")]
    UnsupportedArch {
        /// The kernel.
        kernel: String,
        /// The architectures it can run on.
        expected: String,
        /// The device's architecture.
        found: String,
    },

    /// NVRTC rejected the source.
    #[error("{kernel} does not compile for {arch}:\n{log}")]
    Compile {
        /// The kernel and its constants.
        kernel: String,
        /// Target architecture.
        arch: String,
        /// NVRTC's whole log.
        log: String,
    },

    /// The kernel was never prepared here, so it cannot be launched.
    #[error("{kernel} is not prepared: {reason}")]
    NotPrepared {
        /// The kernel and its constants.
        kernel: String,
        /// Why, and what would prepare it.
        reason: String,
    },

    /// A driver call failed.
    #[error("{call} failed with CUDA error {code}")]
    Driver {
        /// Name of the driver function.
        call: &'static str,
        /// The raw `CUresult`.
        code: u32,
    },

    /// An NVRTC call failed for a reason other than the source.
    #[error("{call} failed with NVRTC error {code}")]
    Nvrtc {
        /// Name of the NVRTC function.
        call: &'static str,
        /// The raw `nvrtcResult`.
        code: i32,
    },

    /// The emulator found the kernel at fault.
    #[error("{kernel} is at fault:\n{report}")]
    Emulated {
        /// The kernel and its constants.
        kernel: String,
        /// What was found, one finding a line.
        report: String,
    },
}

impl Error {
    /// Whether the CUDA context is lost: nothing but a new process helps.
    ///
    /// True for illegal addresses and instructions, misaligned addresses, launch timeouts and failures, hardware stack
    /// errors, ECC errors and device-side asserts.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Error::Driver { code, .. } if matches!(code, 214 | 700 | 702 | 710 | 714..=719 | 721))
    }

    /// Shorthand for [`Error::Argument`].
    pub fn argument(
        kernel: impl Into<String>,
        argument: &'static str,
        expected: impl ToString,
        found: impl ToString,
    ) -> Self {
        Error::Argument {
            kernel: kernel.into(),
            argument,
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }
}
