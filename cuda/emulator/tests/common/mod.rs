//! Launching the planted kernels.

use cuda::Error;
use cuda::launch::{Arg, Device, Function, LaunchConfig};
use cuda::table::{Instance, Kernel};
use emulator::{EmulatedKernel, Emulator, Queue};

mod list {
    include!("../planted/list.rs");
}

/// The planted kernel of this name, with these values of its constants.
pub fn load(emulator: &Emulator, name: &str, values: &[i64]) -> EmulatedKernel {
    let kernel: &'static Kernel =
        list::KERNELS.iter().find(|kernel| kernel.name == name).unwrap_or_else(|| panic!("no kernel {name}"));
    emulator.load(&Instance { kernel, values: values.to_vec() }).expect("planted kernels are built")
}

/// Launches with blocks of the size that the list gives.
pub fn launch(
    emulator: &Emulator,
    queue: &Queue,
    name: &str,
    values: &[i64],
    (blocks, shared): (u32, u32),
    args: &[Arg<'_>],
) -> Result<(), Error> {
    let kernel = load(emulator, name, values);
    let config = LaunchConfig::new(blocks, kernel.instance().kernel.threads).shared(shared);
    // SAFETY: the tests pass buffers and values that live through the call; the emulator checks the rest, which is what
    // these tests are about.
    unsafe { kernel.launch(queue, &config, args) }
}

/// The report of a launch that must be found at fault.
pub fn report_of(result: Result<(), Error>) -> String {
    match result {
        Err(Error::Emulated { report, .. }) => report,
        other => panic!("expected a report, found {other:?}"),
    }
}
