//! Launching the planted kernels.

use bytemuck::Pod;
use cuda::Error;
use cuda::launch::{Arg, Device, Function, LaunchConfig};
use cuda::memory::{View, ViewMut};
use cuda::table::{Instance, Kernel};
use cuda::tensor_map::TensorShape;
use emulator::{EmulatedKernel, Emulator, Queue};
use half::bf16;

mod list {
    include!("../planted/list.rs");
}

/// The planted kernel of this name, with these values of its constants.
pub(crate) fn load(name: &str, values: &[i64]) -> EmulatedKernel {
    let kernel: &'static Kernel =
        list::KERNELS.iter().find(|kernel| kernel.name == name).unwrap_or_else(|| panic!("no kernel {name}"));
    let instance = Instance { kernel, values: values.to_vec() };
    Emulator::new().load(&instance).expect("planted kernels are built")
}

/// Launches with blocks of the size that the list gives, and `shared` bytes of shared memory.
pub(crate) fn launch(
    kernel: &EmulatedKernel,
    queue: &Queue,
    blocks: u32,
    shared: u32,
    args: &[Arg<'_>],
) -> Result<(), Error> {
    let config = LaunchConfig::new(blocks, kernel.instance().kernel.threads).shared(shared);
    // SAFETY: the tests pass buffers and values that live through the call; the emulator checks the rest, which is what
    // these tests are about.
    unsafe { kernel.launch(queue, &config, args) }
}

/// Launches one block without shared memory, as one that may start early or not.
pub(crate) fn launch_as(
    kernel: &EmulatedKernel,
    queue: &Queue,
    programmatic: bool,
    args: &[Arg<'_>],
) -> Result<(), Error> {
    let config = LaunchConfig { programmatic, ..LaunchConfig::new(1, kernel.instance().kernel.threads) };
    // SAFETY: as in `launch`.
    unsafe { kernel.launch(queue, &config, args) }
}

/// A buffer that a kernel reads.
pub(crate) fn read<T: Pod>(name: &'static str, data: &[T]) -> Arg<'static> {
    let view = View::host(data);
    Arg::read(name, &view).detach()
}

/// A buffer that a kernel reads and no kernel before it writes.
pub(crate) fn constant<T: Pod>(name: &'static str, data: &[T]) -> Arg<'static> {
    let view = View::host(data);
    Arg::constant(name, Some(&view)).detach()
}

/// A buffer that a kernel writes.
pub(crate) fn write<T: Pod>(name: &'static str, data: &mut [T]) -> Arg<'static> {
    let mut view = ViewMut::host(data);
    Arg::write(name, &mut view).detach()
}

/// A tensor map of 16-bit elements.
pub(crate) fn tensor(name: &'static str, data: &[bf16], shape: TensorShape) -> Arg<'static> {
    let view = View::host(data);
    Arg::tensor(name, &view, shape).detach()
}

/// Numbers without a pattern.
pub(crate) fn numbers(count: usize) -> Vec<u32> {
    (0..count as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u32).collect()
}

trait Detach {
    fn detach(self) -> Arg<'static>;
}

impl Detach for Arg<'_> {
    /// A buffer argument holds an address, not a borrow; the tests keep the buffer alive.
    fn detach(self) -> Arg<'static> {
        match self {
            Arg::Buffer { name, address, bytes, space, stream, access } => {
                Arg::Buffer { name, address, bytes, space, stream, access }
            }
            Arg::Tensor { name, address, bytes, space, stream, tensor } => {
                Arg::Tensor { name, address, bytes, space, stream, tensor }
            }
            Arg::Value { .. } => unreachable!("only memory is detached"),
        }
    }
}
