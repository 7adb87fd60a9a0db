//! Rows into messages and out of them: `pack`.

use crate::Error;
use crate::launch::{Arg, Device, Function, LaunchConfig};
use crate::memory::{View, ViewMut};
use crate::params::{PACK_BUFFERS, PackCopy, PackParams};
use crate::table::Instance;

const KERNEL: &str = "pack";
const THREADS: u32 = 256;
const BUFFERS: usize = PACK_BUFFERS as usize;

/// `pack`: copies rows of bytes, each list of copies in one launch.
#[derive(Debug, Clone)]
pub struct Pack<F> {
    function: F,
    /// Blocks that fill the device.
    blocks: u32,
}

/// Arguments of [`Pack`].
#[derive(Debug)]
pub struct PackArgs<'a, 'b> {
    /// Copies `[count]`, 16-byte aligned; `count` are done.
    pub copies: &'a View<'b, PackCopy>,
    /// How many of them, at most 65535.
    pub count: u32,
    /// What copies read, by number: up to three, 16-byte aligned.
    pub sources: &'a [View<'b, u8>],
    /// What copies write, by number: up to three, 16-byte aligned.
    pub destinations: &'a mut [ViewMut<'b, u8>],
    /// Status word.
    pub status: ViewMut<'b, u64>,
}

impl<F: Function> Pack<F> {
    /// Compiles and loads the kernel.
    pub fn prepare<D: Device<Function = F>>(device: &D) -> Result<Self, Error> {
        // Without a number of SMs, a few: a copy of more than one block is what an emulator should meet.
        let blocks = device.sm_count().map_or(8, |sms| 4 * sms);
        Ok(Self { function: device.load(&Instance::new(KERNEL, &[])?)?, blocks })
    }

    /// Enqueues the copies. The kernel checks each: one outside its buffers is skipped and reported.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is out of range, too short, misaligned or in the wrong space.
    pub fn launch(&self, queue: &F::Queue, mut args: PackArgs<'_, '_>) -> Result<(), Error> {
        if args.count > u32::from(u16::MAX) {
            return Err(Error::argument(KERNEL, "count", "at most 65535 copies", args.count));
        }
        args.copies.check(KERNEL, "copies", args.count as usize, 16)?;
        args.status.check(KERNEL, "status", 1, 8)?;
        for (argument, found) in [("sources", args.sources.len()), ("destinations", args.destinations.len())]
        {
            if found > BUFFERS {
                return Err(Error::argument(KERNEL, argument, format_args!("at most {BUFFERS}"), found));
            }
        }
        let mut params = PackParams { source_bytes: [0; BUFFERS], destination_bytes: [0; BUFFERS] };
        for (source, bytes) in args.sources.iter().zip(&mut params.source_bytes) {
            source.check(KERNEL, "sources", source.len(), 16)?;
            *bytes = source.len() as u64;
        }
        for (destination, bytes) in args.destinations.iter().zip(&mut params.destination_bytes) {
            destination.check(KERNEL, "destinations", destination.len(), 16)?;
            *bytes = destination.len() as u64;
        }
        const SOURCES: [&str; BUFFERS] = ["source0", "source1", "source2"];
        const DESTINATIONS: [&str; BUFFERS] = ["destination0", "destination1", "destination2"];
        let mut kernel_args: Vec<Arg<'_>> =
            (0..BUFFERS).map(|i| Arg::read_optional(SOURCES[i], args.sources.get(i))).collect();
        let mut destinations = args.destinations.iter_mut();
        kernel_args.extend(DESTINATIONS.map(|name| Arg::write_optional(name, destinations.next())));
        kernel_args.push(Arg::read("copies", args.copies));
        kernel_args.push(Arg::write("status", &mut args.status));
        kernel_args.push(Arg::value("params", &params));
        let config = LaunchConfig::new((self.blocks.div_ceil(args.count.max(1)), args.count), THREADS);
        // SAFETY: the arguments are the kernel's parameters in order and type; `copies` is as long as the grid indexes it, and the
        // kernel checks each copy against the sizes of the buffers before it touches them.
        unsafe { self.function.launch(queue, &config, &kernel_args) }
    }
}
