//! Misses from host memory into their slots: `sparse_gather`.

use crate::Error;
use crate::launch::{Arg, Device, Function, LaunchConfig};
use crate::memory::{View, ViewMut};
use crate::params::SparseGatherParams;
use crate::table::Instance;

const KERNEL: &str = "sparse_gather";
const THREADS: u32 = 256;

/// `sparse_gather`: copies the runs that a step missed, one warp to a run.
#[derive(Debug, Clone)]
pub struct Gather<F> {
    function: F,
}

/// Arguments of [`Gather`].
#[derive(Debug)]
pub struct GatherArgs<'a> {
    /// Pools and tables.
    pub params: &'a SparseGatherParams,
    /// Blocks of 8 warps, each with 2 KiB in flight: enough to cover the link's latency, few enough to leave the SMs to others.
    pub blocks: u32,
    /// Pages to fetch `[rows, max_selected, 4]`, as [`SparseMiss`](crate::params::SparseMiss).
    pub misses: &'a View<'a, u32>,
    /// Pages to fetch of each row `[rows]`.
    pub num_misses: &'a View<'a, u32>,
    /// Host page of each page of a request `[rows / kv_heads, max_pages]`.
    pub host_table: &'a View<'a, u32>,
    /// Device run of each slot `[rows, slots]`.
    pub slot_table: &'a View<'a, u32>,
    /// Host memory `[host_pages, kv_heads, run_bytes]`, mapped, 16-byte aligned; memory of the device is refused.
    pub host: &'a View<'a, u8>,
    /// Device memory `[device_pages, run_bytes]`, 16-byte aligned.
    pub device: ViewMut<'a, u8>,
    /// Page of each slot `[rows, slots]`: freed where no page arrived.
    pub owners: ViewMut<'a, u32>,
    /// Status word.
    pub status: ViewMut<'a, u64>,
    /// Start while the previous kernel of the stream drains.
    pub programmatic: bool,
}

impl<F: Function> Gather<F> {
    /// Compiles and loads the kernel.
    pub fn prepare<D: Device<Function = F>>(device: &D) -> Result<Self, Error> {
        Ok(Self { function: device.load(&Instance::new(KERNEL, &[])?)? })
    }

    /// Enqueues the copies.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is out of range, too short, misaligned or in the wrong space.
    pub fn launch(&self, queue: &F::Queue, mut args: GatherArgs<'_>) -> Result<(), Error> {
        let params = args.params;
        // Items of the list, and the next one of a warp behind its end, must fit 32 bits.
        let most = 1 << 30;
        for (argument, value) in [
            ("rows", u64::from(params.rows)),
            ("kv_heads", u64::from(params.kv_heads)),
            ("max_selected", u64::from(params.rows) * u64::from(params.max_selected)),
            ("run_bytes", u64::from(params.run_bytes)),
            ("blocks", u64::from(args.blocks) * 8),
        ] {
            if value == 0 || value > most {
                return Err(Error::argument(KERNEL, argument, format_args!("1 to {most}"), value));
            }
        }
        if !params.run_bytes.is_multiple_of(16) {
            return Err(Error::argument(KERNEL, "run_bytes", "a multiple of 16", params.run_bytes));
        }
        if !params.rows.is_multiple_of(params.kv_heads) {
            let expected = format_args!("a multiple of the {} KV heads", params.kv_heads);
            return Err(Error::argument(KERNEL, "rows", expected, params.rows));
        }
        let product =
            |sizes: &[u32]| sizes.iter().fold(1usize, |all, &size| all.saturating_mul(size as usize));
        args.misses.check(KERNEL, "misses", product(&[params.rows, params.max_selected, 4]), 4)?;
        args.num_misses.check(KERNEL, "num_misses", params.rows as usize, 4)?;
        let table = product(&[params.rows / params.kv_heads, params.max_pages]);
        args.host_table.check(KERNEL, "host_table", table, 4)?;
        args.slot_table.check(KERNEL, "slot_table", product(&[params.rows, params.slots]), 4)?;
        let host = product(&[params.host_pages, params.kv_heads, params.run_bytes]);
        args.host.check(KERNEL, "host", host, 16)?;
        args.host.check_in_host_memory(KERNEL, "host")?;
        args.device.check(KERNEL, "device", product(&[params.device_pages, params.run_bytes]), 16)?;
        args.owners.check(KERNEL, "owners", product(&[params.rows, params.slots]), 4)?;
        args.status.check(KERNEL, "status", 1, 8)?;

        let mut config = LaunchConfig::new(args.blocks, THREADS);
        config.programmatic = args.programmatic;
        let kernel_args = [
            Arg::read("misses", args.misses),
            Arg::read("num_misses", args.num_misses),
            Arg::read("host_table", args.host_table),
            Arg::read("slot_table", args.slot_table),
            Arg::read("host", args.host),
            Arg::write("device", &mut args.device),
            Arg::write("owners", &mut args.owners),
            Arg::write("status", &mut args.status),
            Arg::value("params", params),
        ];
        // SAFETY: the arguments are the kernel's parameters in order and type, and the checks above made every buffer as long as
        // its index range; counts, pages and slots, which lie in device memory, are checked by the kernel.
        unsafe { self.function.launch(queue, &config, &kernel_args) }
    }
}
