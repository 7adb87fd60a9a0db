//! What stands in for the emulator where it could not be built: everything that loads a kernel says why.

use std::convert::Infallible;

use cuda::Error;
use cuda::launch::{Arg, Device, Function, LaunchConfig};
use cuda::table::{Arch, Instance};

use crate::queue::Queue;

/// The emulator as a device; here it can load nothing.
#[derive(Debug, Clone, Copy)]
pub struct Emulator {
    arch: Arch,
}

impl Emulator {
    /// An emulator of an sm_90a device.
    pub fn new() -> Self {
        Self::with_arch(Arch::new(9, 0))
    }

    /// An emulator that refuses kernels that do not run on `arch`.
    pub fn with_arch(arch: Arch) -> Self {
        Self { arch }
    }

    /// Whether the emulator was built, or why not.
    pub fn available() -> Result<(), String> {
        Err(env!("EMULATOR_UNAVAILABLE").to_string())
    }
}

impl Default for Emulator {
    fn default() -> Self {
        Self::new()
    }
}

impl Device for Emulator {
    type Function = EmulatedKernel;

    fn load(&self, instance: &Instance) -> Result<EmulatedKernel, Error> {
        Err(Error::NotPrepared { kernel: instance.label(), reason: env!("EMULATOR_UNAVAILABLE").to_string() })
    }

    fn arch(&self) -> Arch {
        self.arch
    }
}

/// A kernel compiled for the CPU; here there is none.
#[derive(Debug, Clone)]
pub struct EmulatedKernel {
    never: Infallible,
}

impl Function for EmulatedKernel {
    type Queue = Queue;

    fn instance(&self) -> &Instance {
        match self.never {}
    }

    unsafe fn launch(&self, _: &Queue, _: &LaunchConfig, _: &[Arg<'_>]) -> Result<(), Error> {
        match self.never {}
    }
}
