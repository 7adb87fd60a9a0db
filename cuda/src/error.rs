//! The one error type of this crate.

use crate::probe::{Unavailable, Version};
use crate::table::Arch;

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
    #[error("{call} failed with NVRTC error {code}{}{log}", if .log.is_empty() { "" } else { ":\n" })]
    Nvrtc {
        /// Name of the NVRTC function.
        call: &'static str,
        /// The raw `nvrtcResult`.
        code: i32,
        /// NVRTC's log, where there is one.
        log: String,
    },

    /// This NVRTC is older than the architecture.
    #[error(
        "NVRTC {version} cannot compile for {arch}, it knows {known:?}: use a newer NVRTC or prebuilt cubins"
    )]
    NvrtcArch {
        /// The architecture asked for.
        arch: Arch,
        /// NVRTC's version.
        version: Version,
        /// The architectures it knows, as `major * 10 + minor`.
        known: Vec<u32>,
    },

    /// A folder of prebuilt cubins cannot be used: its manifest is missing or damaged, or a file in it is.
    #[error("prebuilt cubins in {folder}: {reason}")]
    Prebuilt {
        /// The folder.
        folder: String,
        /// What is wrong with it.
        reason: String,
    },

    /// A prebuilt cubin was made from other sources than this crate's.
    #[error(
        "{kernel} for {arch} in {folder} was built from other sources (digest {found}, this crate has {expected})"
    )]
    Stale {
        /// The kernel and its constants.
        kernel: String,
        /// Target architecture.
        arch: String,
        /// The folder of prebuilt cubins.
        folder: String,
        /// Digest of this crate's sources for the kernel.
        expected: String,
        /// Digest in the manifest.
        found: String,
    },

    /// The driver refuses a cubin.
    #[error(
        "{call} refuses {kernel} for {arch} ({origin}) with CUDA error {code}; the driver supports CUDA {driver}"
    )]
    Load {
        /// Name of the driver function.
        call: &'static str,
        /// The raw `CUresult`.
        code: u32,
        /// The kernel and its constants.
        kernel: String,
        /// Architecture of the cubin.
        arch: String,
        /// Where the cubin came from.
        origin: String,
        /// CUDA version of the driver; a compiler of a later major version makes cubins that it cannot read.
        driver: Version,
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
        match self {
            Error::Driver { code, .. } | Error::Load { code, .. } => {
                matches!(code, 214 | 700 | 702 | 710 | 714..=719 | 721)
            }
            _ => false,
        }
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
