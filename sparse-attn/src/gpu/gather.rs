//! Misses over the host link, into their slots.

use cuda::kernels::sparse_attn as kernels;
use cuda::launch::{Device, Function};
use cuda::memory::{View, ViewMut};
use cuda::params::SparseGatherParams;

use super::ResolveConfig;
use crate::Error;
use crate::page::PageSpec;

/// What a gather is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GatherConfig {
    /// The step that says what is missing.
    pub resolve: ResolveConfig,
    /// KV heads of a request; rows are requests · KV heads.
    pub kv_heads: usize,
    /// What a page looks like.
    pub page: PageSpec,
    /// Pages that a request may have.
    pub max_pages: usize,
    /// Pages of host memory, each with a run per KV head.
    pub host_pages: usize,
    /// Runs of device memory.
    pub device_pages: usize,
    /// Blocks of the launch: each keeps 16 KiB in flight. A PCIe 5 link wants about 100 KiB, and what is beyond that slows
    /// down the kernels beside it.
    pub blocks: usize,
}

/// A checked gather.
#[derive(Debug, Clone, Copy)]
pub struct GatherPlan {
    blocks: u32,
    params: SparseGatherParams,
}

impl GatherPlan {
    /// Plans a gather. Needs no device and no workspace.
    ///
    /// # Errors
    /// [`Error::Argument`] when a size is 0 or past 32 bits, or rows are no whole requests.
    pub fn new(config: GatherConfig) -> Result<Self, Error> {
        let size = |argument, value: usize| {
            let fits = u32::try_from(value).ok().filter(|&value| value > 0 && value <= 1 << 30);
            fits.ok_or_else(|| Error::argument(argument, "1 to 2³⁰", value))
        };
        let ResolveConfig { rows, max_selected, slots, .. } = config.resolve;
        size("max_selected", rows.saturating_mul(max_selected))?;
        let params = SparseGatherParams {
            rows: size("rows", rows)?,
            kv_heads: size("kv_heads", config.kv_heads)?,
            max_selected: size("max_selected", max_selected)?,
            slots: size("slots", slots)?,
            max_pages: size("max_pages", config.max_pages)?,
            host_pages: size("host_pages", config.host_pages)?,
            device_pages: size("device_pages", config.device_pages)?,
            run_bytes: size("page", config.page.bytes())?,
        };
        if !rows.is_multiple_of(config.kv_heads) {
            return Err(Error::argument(
                "rows",
                format!("a multiple of the {} KV heads", config.kv_heads),
                rows,
            ));
        }
        // The kernel's warps must fit 32 bits too.
        let blocks = size("blocks", config.blocks.saturating_mul(8))? / 8;
        Ok(GatherPlan { blocks, params })
    }

    /// Bytes that cross the link for so many misses.
    pub fn bytes_moved(&self, misses: usize) -> u64 {
        misses as u64 * u64::from(self.params.run_bytes)
    }
}

/// A prepared gather.
#[derive(Debug, Clone)]
pub struct Gather<F> {
    plan: GatherPlan,
    kernel: kernels::Gather<F>,
}

/// Arguments of [`Gather::run`].
#[derive(Debug)]
pub struct GatherArgs<'a> {
    /// Pages to fetch `[rows, max_selected, 4]`, as [`Resolve`](super::Resolve) lists them.
    pub misses: &'a View<'a, u32>,
    /// Pages to fetch of each row `[rows]`.
    pub num_misses: &'a View<'a, u32>,
    /// Host page of each page of a request `[rows / kv_heads, max_pages]`.
    pub host_table: &'a View<'a, u32>,
    /// Device run of each slot `[rows, slots]`.
    pub slot_table: &'a View<'a, u32>,
    /// Host memory `[host_pages, kv_heads, K|V, tokens, dim]` as bytes, mapped, 16-byte aligned; memory of the device is
    /// refused.
    pub host: &'a View<'a, u8>,
    /// Device memory `[device_pages, K|V, tokens, dim]` as bytes, 16-byte aligned.
    pub device: ViewMut<'a, u8>,
    /// Page of each slot `[rows, slots]`: [`NONE`](crate::metadata::NONE) afterwards where no page arrived.
    pub owners: ViewMut<'a, u32>,
    /// Status word, with the row: [`FaultCode::BadLength`](attention::FaultCode::BadLength) for more misses than the list holds,
    /// [`FaultCode::BadIndex`](attention::FaultCode::BadIndex) for a slot or device run out of range, both skipped;
    /// [`FaultCode::BadPage`](attention::FaultCode::BadPage) for a page or host page out of range, whose slot becomes zeros.
    pub status: ViewMut<'a, u64>,
}

impl<F: Function> Gather<F> {
    /// Compiles and loads the kernel. May block.
    ///
    /// # Errors
    /// [`Error::Cuda`] when it cannot be loaded.
    pub fn prepare<D: Device<Function = F>>(device: &D, plan: &GatherPlan) -> Result<Self, Error> {
        Ok(Self { plan: *plan, kernel: kernels::Gather::prepare(device)? })
    }

    /// Enqueues the copies and returns.
    ///
    /// # Errors
    /// [`Error::Cuda`] names an argument that does not fit.
    pub fn run(&self, queue: &F::Queue, args: GatherArgs<'_>) -> Result<(), Error> {
        let args = kernels::GatherArgs {
            params: &self.plan.params,
            blocks: self.plan.blocks,
            misses: args.misses,
            num_misses: args.num_misses,
            host_table: args.host_table,
            slot_table: args.slot_table,
            host: args.host,
            device: args.device,
            owners: args.owners,
            status: args.status,
            programmatic: false,
        };
        Ok(self.kernel.launch(queue, args)?)
    }
}
