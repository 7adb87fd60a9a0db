//! Loading and launching.

use std::ffi::{CString, c_char, c_void};

use cuda::Error;
use cuda::launch::{Access, Arg, Device, Function, LaunchConfig, check_config};
use cuda::memory::Space;
use cuda::table::{Arch, Instance};

use crate::ffi;
use crate::queue::{Order, Queue, Statistics, Traffic};
use crate::report;
use crate::tensor_map;

/// Blocks of a grid that the checker's records can tell apart.
const MAX_BLOCKS: u64 = (1 << 25) - 2;

/// The emulator as a device: it runs kernels on host memory.
#[derive(Debug, Clone, Copy)]
pub struct Emulator {
    arch: Arch,
}

impl Emulator {
    /// An emulator of an sm_90a device, which runs portable kernels and Hopper's.
    pub fn new() -> Self {
        Self::with_arch(Arch::new(9, 0))
    }

    /// An emulator that refuses kernels that do not run on `arch`.
    pub fn with_arch(arch: Arch) -> Self {
        Self { arch }
    }

    /// Whether the emulator was built, or why not.
    pub fn available() -> Result<(), String> {
        Ok(())
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
        if !instance.kernel.arch.runs_on(self.arch) {
            return Err(Error::UnsupportedArch {
                kernel: instance.label(),
                expected: instance.kernel.arch.to_string(),
                found: self.arch.to_string(),
            });
        }
        match ffi::entry(&instance.label()) {
            Some(entry) => Ok(EmulatedKernel { instance: instance.clone(), entry }),
            None => Err(Error::NotPrepared {
                kernel: instance.label(),
                reason: "the emulator is built for the shipped rows that the kernel table marks as emulated"
                    .to_string(),
            }),
        }
    }

    fn arch(&self) -> Arch {
        self.arch
    }
}

/// A kernel compiled for the CPU.
#[derive(Debug, Clone)]
pub struct EmulatedKernel {
    instance: Instance,
    entry: *const ffi::Entry,
}

// SAFETY: `entry` points to a constant of this executable.
unsafe impl Send for EmulatedKernel {}
// SAFETY: as above; it is never written.
unsafe impl Sync for EmulatedKernel {}

impl EmulatedKernel {
    fn parameters(&self) -> &'static [ffi::Parameter] {
        // SAFETY: the registry holds addresses of constants only.
        let entry = unsafe { &*self.entry };
        // SAFETY: `EMULATOR_ENTRY` makes `count` the number of `parameters`, an array of static storage.
        unsafe { std::slice::from_raw_parts(entry.parameters, entry.count as usize) }
    }

    /// Checks number, kind and size of the arguments against the kernel's C++ parameters, and that buffers are host memory.
    fn check(&self, args: &[Arg<'_>]) -> Result<(), Error> {
        let kernel = || self.instance.label();
        let parameters = self.parameters();
        if parameters.len() != args.len() {
            return Err(Error::argument(
                kernel(),
                "args",
                format_args!("{} arguments", parameters.len()),
                format_args!("{} arguments", args.len()),
            ));
        }
        for (parameter, arg) in parameters.iter().zip(args) {
            let expected = match parameter.is_pointer {
                0 => format!("a value of {} bytes", parameter.bytes),
                _ => "a buffer".to_string(),
            };
            match arg {
                Arg::Buffer { name, space: space @ Space::Device(_), .. }
                | Arg::Tensor { name, space: space @ Space::Device(_), .. } => {
                    return Err(Error::argument(kernel(), name, "host memory", space));
                }
                Arg::Tensor { name, address, bytes, tensor, .. } => {
                    if parameter.is_pointer != 0 || parameter.bytes as usize != size_of::<[u64; 16]>() {
                        return Err(Error::argument(kernel(), name, expected, "a tensor map"));
                    }
                    tensor.check(&kernel(), name, *address, *bytes)?;
                }
                Arg::Buffer { name, .. } if parameter.is_pointer == 0 => {
                    return Err(Error::argument(kernel(), name, expected, "a buffer"));
                }
                Arg::Value { name, bytes }
                    if parameter.is_pointer != 0 || parameter.bytes as usize != bytes.len() =>
                {
                    let found = format!("a value of {} bytes", bytes.len());
                    return Err(Error::argument(kernel(), name, expected, found));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl Function for EmulatedKernel {
    type Queue = Queue;

    fn instance(&self) -> &Instance {
        &self.instance
    }

    /// Runs the launch to its end. On top of what the trait demands, everything that a checker can find is found, so that
    /// a wrong kernel, or wrong buffers, end in [`Error::Emulated`]; `args` must still be valid memory.
    unsafe fn launch(&self, queue: &Queue, config: &LaunchConfig, args: &[Arg<'_>]) -> Result<(), Error> {
        check_config(&self.instance, config)?;
        // ptxas knows nothing of dynamic shared memory, so the row's budget is held to account here.
        if let Some(row) = self.instance.row()
            && config.dynamic_shared > row.shared
        {
            return Err(Error::argument(
                self.instance.label(),
                "dynamic_shared",
                format_args!("at most {} bytes, the budget of the row", row.shared),
                format_args!("{} bytes", config.dynamic_shared),
            ));
        }
        self.check(args)?;
        let blocks = config.grid.count();
        if blocks == 0 {
            return Ok(());
        }
        if blocks > MAX_BLOCKS {
            return Err(Error::argument(
                self.instance.label(),
                "grid",
                format_args!("at most {MAX_BLOCKS} blocks in the emulator"),
                format_args!("{blocks} blocks"),
            ));
        }

        let kernel = c_string(&self.instance.label());
        let mut names = Vec::new();
        let mut buffers = Vec::new();
        // Of each argument that is no value, what the kernel gets: an address, or a map.
        let mut passed = Vec::with_capacity(args.len());
        for arg in args {
            let (name, address, bytes, access, words) = match arg {
                Arg::Value { .. } => {
                    passed.push([0; 16]);
                    continue;
                }
                Arg::Buffer { name, address, bytes, access, .. } => {
                    let mut words = [0; 16];
                    words[0] = *address;
                    (name, address, bytes, *access, words)
                }
                Arg::Tensor { name, address, bytes, tensor, .. } => {
                    (name, address, bytes, Access::Read, tensor_map::encode(*address, tensor))
                }
            };
            let c_name = c_string(name);
            buffers.push(ffi::Buffer {
                name: c_name.as_ptr(),
                address: *address,
                bytes: *bytes as u64,
                writable: u32::from(access == Access::Write),
                constant: u32::from(access == Access::Constant),
                read: 0,
                written: 0,
            });
            names.push((*name, c_name));
            passed.push(words);
        }
        let values: Vec<*const c_void> = args
            .iter()
            .zip(&passed)
            .map(|(arg, words)| match arg {
                Arg::Buffer { .. } | Arg::Tensor { .. } => words.as_ptr().cast(),
                Arg::Value { bytes, .. } => bytes.as_ptr().cast(),
            })
            .collect();
        let (order, seed) = match queue.order() {
            Order::Forward => (0, 0),
            Order::Reverse => (1, 0),
            Order::Random(seed) => (2, seed),
        };
        let mut launch = ffi::Launch {
            entry: self.entry,
            kernel: kernel.as_ptr(),
            grid: [config.grid.x, config.grid.y, config.grid.z],
            block: [config.block.x, config.block.y, config.block.z],
            dynamic_shared: config.dynamic_shared,
            order,
            seed,
            os_threads: queue.os_threads().min(1024) as u32,
            values: values.as_ptr(),
            buffers: buffers.as_mut_ptr(),
            buffer_count: buffers.len() as u64,
            programmatic: u32::from(config.programmatic),
            padding: 0,
            switches: 0,
            barriers: 0,
            collectives: 0,
            mma: 0,
            async_copies: 0,
            spins: 0,
        };
        let mut reports: Vec<String> = Vec::new();
        // SAFETY: every pointer in `launch` outlives the call. `values` has one address per parameter with as many bytes
        // behind it as the parameter has: `check` compared them. The buffers are the caller's duty.
        let status = unsafe { ffi::emulator_launch(&mut launch, push_report, (&raw mut reports).cast()) };

        let mut statistics = Statistics {
            launches: 1,
            switches: launch.switches,
            barriers: launch.barriers,
            collectives: launch.collectives,
            mma: launch.mma,
            async_copies: launch.async_copies,
            spins: launch.spins,
            ..Statistics::default()
        };
        for ((name, _), buffer) in names.iter().zip(&buffers) {
            let traffic: &mut Traffic = statistics.traffic.entry(name).or_default();
            traffic.read += buffer.read;
            traffic.written += buffer.written;
        }
        queue.add(&statistics);
        if status == 0 {
            return Ok(());
        }
        Err(Error::Emulated { kernel: self.instance.label(), report: report::with_lines(&reports.concat()) })
    }
}

fn c_string(text: &str) -> CString {
    CString::new(text.replace('\0', " ")).expect("no zero is left")
}

/// Takes one report of the runtime.
///
/// # Safety
/// `context` is the `Vec<String>` that `launch` passed; `text` has `length` bytes.
unsafe extern "C" fn push_report(context: *mut c_void, text: *const c_char, length: usize) {
    // SAFETY: by this function's contract.
    let reports = unsafe { &mut *context.cast::<Vec<String>>() };
    // SAFETY: likewise.
    let bytes = unsafe { std::slice::from_raw_parts(text.cast::<u8>(), length) };
    reports.push(String::from_utf8_lossy(bytes).into_owned());
}
