//! Flash attention over ragged batches: `prefill_plan`, and `prefill` or `prefill_sm90a`.

use std::marker::PhantomData;

use crate::Error;
use crate::kernels::split::check_soft_cap;
use crate::launch::{Arg, Device, Function, LaunchConfig};
use crate::memory::{View, ViewMut};
use crate::params::{PrefillParams, PrefillTile};
use crate::storage::Storage;
use crate::table::{ArchClass, Instance};

use super::cache::{CacheExtent, check_cache, check_scale, elements, table_len};
use super::prefill_maps::PrefillMaps;

const KEYS: usize = 64;

/// Room for tiles of `rows` rows each that `prefill_plan` may list: sequences and the gaps between them may each end in a tile
/// that is not full.
pub const fn max_tiles(queries: usize, group: usize, rows: usize, batch: usize) -> usize {
    let full = queries.saturating_mul(group).div_ceil(rows);
    if full == 0 { 0 } else { full.saturating_add(batch.saturating_mul(2)) }
}

/// Lengths that `prefill_plan` leaves: one per sequence, or one per KV head and sequence where every head has its own table.
pub fn prefill_valid_lens(params: &PrefillParams) -> usize {
    let tables = if params.table_head_stride == 0 { 1 } else { params.kv_heads as usize };
    elements(&[tables, params.batch as usize])
}

/// Checks what both kernels read from [`PrefillParams`]; everything else follows from buffers and strides.
fn check_params(kernel: &str, params: &PrefillParams) -> Result<(), Error> {
    for (argument, value) in [
        ("batch", params.batch),
        ("kv_heads", params.kv_heads),
        ("group", params.group),
        ("tile_rows", params.tile_rows),
    ] {
        if value == 0 {
            return Err(Error::argument(kernel, argument, "at least 1", value));
        }
    }
    let rows = params.num_queries as usize * params.group as usize;
    if rows + params.max_kv_len as usize > i32::MAX as usize {
        return Err(Error::argument(
            kernel,
            "num_queries",
            format_args!("at most {} rows and keys", i32::MAX),
            format_args!("{rows} rows and {} keys", params.max_kv_len),
        ));
    }
    if u64::from(params.max_tiles) * u64::from(params.kv_heads) > i32::MAX as u64 {
        let expected = format!("at most {} / {} KV heads", i32::MAX, params.kv_heads);
        return Err(Error::argument(kernel, "max_tiles", expected, params.max_tiles));
    }
    Ok(())
}

/// Largest soft cap. The kernels' tanh is off by at most 4e-7, so at this cap a score is off by at most 1e-4.
pub const MAX_SOFT_CAP: f32 = 256.0;

fn check_cap(kernel: &str, capped: bool, soft_cap: f32) -> Result<(), Error> {
    check_soft_cap(kernel, capped, soft_cap)?;
    if !capped || soft_cap <= MAX_SOFT_CAP {
        return Ok(());
    }
    Err(Error::argument(kernel, "soft_cap", format_args!("at most {MAX_SOFT_CAP}"), soft_cap))
}

/// Checks that a list has room for all that `prefill_plan` may put there.
fn check_room(kernel: &str, params: &PrefillParams) -> Result<(), Error> {
    let (queries, group) = (params.num_queries as usize, params.group as usize);
    let tiles = max_tiles(queries, group, params.tile_rows as usize, params.batch as usize);
    if (params.max_tiles as usize) < tiles {
        return Err(Error::argument(kernel, "max_tiles", format_args!("at least {tiles}"), params.max_tiles));
    }
    Ok(())
}

/// What the sequences can index, and the length of their block table.
fn extent_of(params: &PrefillParams, paged: bool) -> CacheExtent {
    CacheExtent {
        pages: paged.then_some((params.num_pages, params.page_shift)),
        tokens: params.num_tokens,
        heads: params.kv_heads,
    }
}

fn table_len_of(params: &PrefillParams) -> usize {
    let strides = [params.table_head_stride, params.table_batch_stride];
    table_len(strides, params.kv_heads, params.batch, params.max_pages)
}

/// `prefill_plan`: checks a batch on the device and lists the tiles of its queries, longest first.
#[derive(Debug, Clone)]
pub struct PrefillPlan<F> {
    function: F,
}

/// Arguments of [`PrefillPlan`].
#[derive(Debug)]
pub struct PrefillPlanArgs<'a> {
    /// Shape, layout and mask; both kernels get the same.
    pub params: &'a PrefillParams,
    /// First query of each sequence, then one past the last `[batch + 1]`.
    pub cu_queries: &'a View<'a, u32>,
    /// Keys of each sequence `[batch]`.
    pub kv_len: &'a View<'a, u32>,
    /// First token of each sequence in a contiguous cache `[batch]`; exactly one of this and `block_table` is given.
    pub kv_start: Option<&'a View<'a, u32>>,
    /// Page ids, by the table strides of `params`.
    pub block_table: Option<&'a View<'a, u32>>,
    /// Out: `kv_len`, or 0 where the sequence cannot be read `[prefill_valid_lens]`, see [`prefill_valid_lens`].
    pub valid_len: ViewMut<'a, u32>,
    /// Scratch `[2, batch]`.
    pub cost: ViewMut<'a, u32>,
    /// Out: the tiles `[max_tiles]`, 16-byte aligned.
    pub tiles: ViewMut<'a, PrefillTile>,
    /// Out: how many there are `[1]`.
    pub tile_count: ViewMut<'a, u32>,
    /// One counter, zero before the first launch.
    pub arrivals: ViewMut<'a, u32>,
    /// Status word.
    pub status: ViewMut<'a, u64>,
}

impl<F: Function> PrefillPlan<F> {
    /// Compiles and loads the kernel.
    pub fn prepare<D: Device<Function = F>>(device: &D) -> Result<Self, Error> {
        Ok(Self { function: device.load(&Instance::new("prefill_plan", &[])?)? })
    }

    /// Enqueues the plan of one batch.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short, misaligned, missing or in the wrong space.
    pub fn launch(&self, queue: &F::Queue, mut args: PrefillPlanArgs<'_>) -> Result<(), Error> {
        const KERNEL: &str = "prefill_plan";
        const THREADS: u32 = 256;
        const WARPS: usize = 8;
        let params = args.params;
        check_params(KERNEL, params)?;
        check_room(KERNEL, params)?;
        let batch = params.batch as usize;
        extent_of(params, args.block_table.is_some()).check_places(
            KERNEL,
            args.block_table,
            args.kv_start,
            batch,
            || table_len_of(params),
        )?;
        args.cu_queries.check(KERNEL, "cu_queries", batch + 1, 4)?;
        args.kv_len.check(KERNEL, "kv_len", batch, 4)?;
        args.valid_len.check(KERNEL, "valid_len", prefill_valid_lens(params), 4)?;
        args.cost.check(KERNEL, "cost", elements(&[2, batch]), 4)?;
        args.tiles.check(KERNEL, "tiles", params.max_tiles as usize, 16)?;
        args.tile_count.check(KERNEL, "tile_count", 1, 4)?;
        args.arrivals.check(KERNEL, "arrivals", 1, 4)?;
        args.status.check(KERNEL, "status", 1, 8)?;

        let shared = (WARPS + 1) * size_of::<u32>();
        let config = LaunchConfig::new(params.batch, THREADS).shared(shared as u32);
        let kernel_args = [
            Arg::read("cu_queries", args.cu_queries),
            Arg::read("kv_len", args.kv_len),
            Arg::read_optional("kv_start", args.kv_start),
            Arg::read_optional("block_table", args.block_table),
            Arg::write("valid_len", &mut args.valid_len),
            Arg::write("cost", &mut args.cost),
            Arg::write("tiles", &mut args.tiles),
            Arg::write("tile_count", &mut args.tile_count),
            Arg::write("arrivals", &mut args.arrivals),
            Arg::write("status", &mut args.status),
            Arg::value("params", params),
        ];
        // SAFETY: the arguments are the kernel's parameters in order and type; the checks above made every buffer as long as
        // one block per sequence reads and writes, and the list as long as the tiles of disjoint runs of queries can be.
        unsafe { self.function.launch(queue, &config, &kernel_args) }
    }
}

/// Which of the kernels a [`Prefill`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum PrefillKernel {
    /// [`Wgmma`](Self::Wgmma) on sm_90a where the kernel table ships it for the sizes, element type, cache, soft cap and carried
    /// state at hand, for that is what it is tested in; else `prefill`.
    #[default]
    Auto,
    /// `prefill`: mma.sync, any device.
    MmaSync,
    /// `prefill_sm90a`: warpgroup products, sm_90a, 64 or 128 channels. K and V come by tensor maps where
    /// [`PrefillVariant::tensor_maps`] has them, else by cp.async.
    Wgmma,
    /// The same, K and V by cp.async, which any cache allows.
    WgmmaCopies,
}

/// What a [`Prefill`] kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PrefillVariant {
    /// Channels of q and K.
    pub qk_dim: usize,
    /// Channels of V and the output.
    pub v_dim: usize,
    /// Whether K and V lie in pages.
    pub paged: bool,
    /// Whether scores are soft-capped.
    pub soft_cap: bool,
    /// Whether the kernel keeps raw states instead of writing outputs.
    pub carry: bool,
    /// Which kernel; lists of tiles are the same for both.
    pub kernel: PrefillKernel,
}

impl PrefillVariant {
    /// Checks, without a device, what a launch would refuse whatever its buffers.
    ///
    /// # Errors
    /// [`Error::Constant`] for a size that the kernel is not written for, [`Error::Argument`] for parameters out of range.
    pub fn check(&self, params: &PrefillParams) -> Result<(), Error> {
        let dtype = crate::table::dtype::BF16;
        match self.kernel {
            PrefillKernel::Wgmma | PrefillKernel::WgmmaCopies => self.wgmma_instance(dtype, false)?,
            PrefillKernel::Auto | PrefillKernel::MmaSync => self.instance(dtype)?,
        };
        check_params("prefill", params)?;
        check_cap("prefill", self.soft_cap, params.soft_cap)?;
        check_scale("prefill", params.scale)
    }

    /// How K and V lie as tensor maps, which `prefill_sm90a` loads them by on sm_90a.
    ///
    /// # Errors
    /// [`Error::Argument`] says why they come by cp.async instead: strides at which heads lie neither side by side within a token nor
    /// whole tokens apart, or pages that are not apart by a multiple of 16 bytes; or that no kernel by maps is taken: for [`MmaSync`](PrefillKernel::MmaSync) and
    /// [`WgmmaCopies`](PrefillKernel::WgmmaCopies), for sizes other than 64 and 128 channels, and for
    /// [`Auto`](PrefillKernel::Auto) where none is shipped for these sizes, cache, soft cap and carried state in any element type.
    pub fn tensor_maps(&self, params: &PrefillParams) -> Result<PrefillMaps, Error> {
        PrefillMaps::new(self, params)
    }

    /// The kernel that this is on a device, never [`PrefillKernel::Auto`], and whether K and V come by tensor maps.
    fn on(self, device: &impl Device, dtype: i64, params: &PrefillParams) -> (Self, bool) {
        let maps = self.tensor_maps(params).is_ok();
        let shipped = || self.wgmma_instance(dtype, maps).is_ok_and(|instance| instance.row().is_some());
        let kernel = match self.kernel {
            PrefillKernel::Auto if ArchClass::Hopper.runs_on(device.arch()) && shipped() => {
                PrefillKernel::Wgmma
            }
            PrefillKernel::Auto => PrefillKernel::MmaSync,
            kernel => kernel,
        };
        (PrefillVariant { kernel, ..self }, maps && kernel == PrefillKernel::Wgmma)
    }

    /// Whether `prefill_sm90a` by tensor maps is shipped for some element type.
    pub(super) fn ships_maps(&self) -> bool {
        let shipped = |dtype| self.wgmma_instance(dtype, true).is_ok_and(|instance| instance.row().is_some());
        [crate::table::dtype::F16, crate::table::dtype::BF16].into_iter().any(shipped)
    }

    fn constants(&self, dtype: i64) -> [(&'static str, i64); 6] {
        [
            ("QK_DIM", self.qk_dim as i64),
            ("V_DIM", self.v_dim as i64),
            ("KV_DTYPE", dtype),
            ("PAGED", i64::from(self.paged)),
            ("SOFT_CAP", i64::from(self.soft_cap)),
            ("CARRY", i64::from(self.carry)),
        ]
    }

    fn instance(&self, dtype: i64) -> Result<Instance, Error> {
        Instance::new("prefill", &self.constants(dtype))
    }

    fn wgmma_instance(&self, dtype: i64, tma: bool) -> Result<Instance, Error> {
        let [qk_dim, v_dim, kv_dtype, paged, soft_cap, carry] = self.constants(dtype);
        let tma = ("TMA", i64::from(tma));
        Instance::new("prefill_sm90a", &[qk_dim, v_dim, kv_dtype, paged, soft_cap, carry, tma])
    }

    /// Rows (query tokens × query heads of a KV head) that one block works on.
    pub fn rows(&self) -> usize {
        if self.qk_dim <= 128 && self.v_dim <= 128 { 128 } else { 64 }
    }

    /// Dynamic shared memory of a block, in bytes: queries, tiles of K and of V, what each row sees, the tiles that some row sees,
    /// the item, what the block has drawn, and places of keys or barriers.
    fn shared_bytes(&self, wgmma: bool) -> usize {
        let (seen, item) = (12 * self.rows() + 32, size_of::<PrefillTile>() + 32);
        let (slots, keys, rest) =
            if wgmma { (2, 128, 10 * 8) } else { (1, KEYS, 2 * 2 * KEYS * size_of::<i64>()) };
        let tiles = slots * keys * (self.qk_dim + self.v_dim) * 2;
        self.rows() * self.qk_dim * 2 + tiles + seen + item + 16 + rest
    }
}

/// `prefill` or `prefill_sm90a`. `E` is the storage type of q, K, V and the output.
#[derive(Debug, Clone)]
pub struct Prefill<F, E> {
    function: F,
    variant: PrefillVariant,
    /// Most blocks, which stay: as many as run at a time.
    blocks: u32,
    /// Whether K and V are tensor maps.
    tma: bool,
    _element: PhantomData<E>,
}

/// Where a [`Prefill`] kernel leaves its result.
#[derive(Debug)]
pub enum PrefillResult<'a, E> {
    /// For a variant without `carry`.
    Output {
        /// Outputs `[num_queries, q_heads, v_dim]`, aligned to two elements.
        out: ViewMut<'a, E>,
        /// Log-sum-exps `[num_queries, q_heads]`, natural log.
        lse: ViewMut<'a, f32>,
    },
    /// For a variant with `carry`.
    State {
        /// Unnormalised outputs `[num_queries, q_heads, v_dim]`, 8-byte aligned.
        o: ViewMut<'a, f32>,
        /// Maxima and sums `[num_queries, q_heads, 2]`, natural units, 8-byte aligned.
        ml: ViewMut<'a, f32>,
        /// Outputs `[num_queries, q_heads, v_dim]` of the rows that tiles call finished, aligned to two elements. Without it
        /// these get normalised in place, in `o`.
        out: Option<ViewMut<'a, E>>,
        /// Log-sum-exps `[num_queries, q_heads]` of these rows, natural log. Without it no row is finished.
        lse: Option<ViewMut<'a, f32>>,
    },
}

/// Arguments of [`Prefill`].
#[derive(Debug)]
pub struct PrefillArgs<'a, E> {
    /// Shape, layout and mask.
    pub params: &'a PrefillParams,
    /// Queries `[num_queries, q_heads, qk_dim]`, 16-byte aligned.
    pub q: &'a View<'a, E>,
    /// Keys, by the strides of `params`, 16-byte aligned.
    pub k: &'a View<'a, E>,
    /// Values, by the strides of `params`, 16-byte aligned.
    pub v: &'a View<'a, E>,
    /// Page ids of a paged cache, by the table strides of `params`.
    pub block_table: Option<&'a View<'a, u32>>,
    /// From [`PrefillPlan`], or another list `[max_tiles]`, 16-byte aligned.
    pub tiles: &'a View<'a, PrefillTile>,
    /// How many of them begin rows `[1]`: the first ones; what follows them are further spans, found by `next`.
    pub tile_count: &'a View<'a, u32>,
    /// From [`PrefillPlan`] `[prefill_valid_lens]`, see [`prefill_valid_lens`]; needed where every KV head has its own table.
    pub valid_len: Option<&'a View<'a, u32>>,
    /// Where the result goes.
    pub result: PrefillResult<'a, E>,
    /// One counter, zero before the first launch.
    pub work: ViewMut<'a, u32>,
    /// Status word: [`FaultCode::FAULT_BAD_RANGE`](crate::params::FaultCode) or `FAULT_BAD_INDEX` with a tile that lies outside q,
    /// the cache or the list, and is skipped; one of [`PrefillPlan`] never does.
    pub status: Option<ViewMut<'a, u64>>,
    /// Start while the previous kernel of the stream drains.
    pub programmatic: bool,
}

impl<F: Function, E: Storage> Prefill<F, E> {
    /// Compiles and loads the kernel for `variant`, for launches with parameters of the same strides and heads.
    pub fn prepare<D: Device<Function = F>>(
        device: &D,
        variant: PrefillVariant,
        params: &PrefillParams,
    ) -> Result<Self, Error> {
        let (variant, tma) = variant.on(device, E::DTYPE, params);
        let (instance, of_sm) = match variant.kernel {
            PrefillKernel::Wgmma | PrefillKernel::WgmmaCopies => (variant.wgmma_instance(E::DTYPE, tma)?, 1),
            PrefillKernel::Auto | PrefillKernel::MmaSync => (variant.instance(E::DTYPE)?, 2),
        };
        // Without a number of SMs, a few: more tiles than blocks is what an emulator should meet.
        let blocks = device.sm_count().map_or(3, |sms| of_sm * sms);
        Ok(Self { function: device.load(&instance)?, variant, blocks, tma, _element: PhantomData })
    }

    /// Which kernel this is: never [`PrefillKernel::Auto`], and [`PrefillKernel::Wgmma`] only by tensor maps.
    pub fn kernel(&self) -> PrefillKernel {
        match self.variant.kernel {
            PrefillKernel::Wgmma if !self.tma => PrefillKernel::WgmmaCopies,
            kernel => kernel,
        }
    }

    /// Enqueues one prefill. The kernel checks the tiles and stays within q, the cache and the list whatever they hold; rows
    /// that are listed twice get the result of either.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short, misaligned, missing or in the wrong space.
    pub fn launch(&self, queue: &F::Queue, mut args: PrefillArgs<'_, E>) -> Result<(), Error> {
        const KERNEL: &str = "prefill";
        let params = args.params;
        let PrefillVariant { qk_dim, v_dim, paged, soft_cap, carry, kernel } = self.variant;
        let wgmma = matches!(kernel, PrefillKernel::Wgmma | PrefillKernel::WgmmaCopies);
        let threads = if wgmma { 384 } else { 128 };
        check_params(KERNEL, params)?;
        check_scale(KERNEL, params.scale)?;
        if params.tile_rows as usize != self.variant.rows() {
            return Err(Error::argument(KERNEL, "tile_rows", self.variant.rows(), params.tile_rows));
        }
        let out_rows =
            elements(&[params.num_queries as usize, params.kv_heads as usize, params.group as usize]);
        check_cap(KERNEL, soft_cap, params.soft_cap)?;
        let extent = extent_of(params, paged);
        args.q.check(KERNEL, "q", elements(&[out_rows, qk_dim]), 16)?;
        let k_strides = [params.k_page_stride, params.k_token_stride, params.k_head_stride];
        let v_strides = [params.v_page_stride, params.v_token_stride, params.v_head_stride];
        check_cache(KERNEL, "k", args.k, qk_dim, extent, k_strides)?;
        check_cache(KERNEL, "v", args.v, v_dim, extent, v_strides)?;
        match (paged, args.block_table) {
            (true, Some(table)) => {
                extent.check_paged(KERNEL)?;
                table.check(KERNEL, "block_table", table_len_of(params), 4)?;
            }
            (false, None) => {}
            (_, table) => {
                let [expected, found] =
                    [paged, table.is_some()].map(|is| if is { "given" } else { "missing" });
                return Err(Error::argument(KERNEL, "block_table", expected, found));
            }
        }
        args.tiles.check(KERNEL, "tiles", params.max_tiles as usize, 16)?;
        args.tile_count.check(KERNEL, "tile_count", 1, 4)?;
        let per_head = params.table_head_stride != 0;
        match args.valid_len {
            Some(lens) => lens.check(KERNEL, "valid_len", prefill_valid_lens(params), 4)?,
            None if per_head => return Err(Error::argument(KERNEL, "valid_len", "given", "missing")),
            None => {}
        }
        let maps = if self.tma { Some(self.variant.tensor_maps(params)?) } else { None };
        let mut kernel_args = vec![Arg::read("q", args.q)];
        match &maps {
            Some(PrefillMaps { k, v, heads }) => kernel_args.extend([
                Arg::tensor("k", args.k, *k),
                Arg::tensor("v", args.v, *v),
                Arg::value("map_heads", heads),
            ]),
            None => kernel_args.extend([Arg::read("k", args.k), Arg::read("v", args.v)]),
        }
        kernel_args.extend([
            Arg::read_optional("block_table", args.block_table),
            Arg::read("tiles", args.tiles),
            Arg::read("tile_count", args.tile_count),
            Arg::read_optional("valid_len", args.valid_len),
        ]);
        match (&mut args.result, carry) {
            (PrefillResult::Output { out, lse }, false) => {
                check_output::<E>((out_rows, v_dim), Some(out), Some(lse))?;
                kernel_args.extend([Arg::write("out", out), Arg::write("lse", lse)]);
            }
            (PrefillResult::State { o, ml, out, lse }, true) => {
                o.check(KERNEL, "state_o", elements(&[out_rows, v_dim]), 8)?;
                ml.check(KERNEL, "state_ml", elements(&[out_rows, 2]), 8)?;
                check_output::<E>((out_rows, v_dim), out.as_ref(), lse.as_ref())?;
                kernel_args.extend([
                    Arg::write("state_o", o),
                    Arg::write("state_ml", ml),
                    Arg::write_optional("out", out.as_mut()),
                    Arg::write_optional("lse", lse.as_mut()),
                ]);
            }
            (_, true) => return Err(Error::argument(KERNEL, "result", "a state", "an output")),
            (_, false) => return Err(Error::argument(KERNEL, "result", "an output", "a state")),
        }
        args.work.check(KERNEL, "work", 1, 4)?;
        args.status.as_ref().map_or(Ok(()), |status| status.check(KERNEL, "status", 1, 8))?;
        kernel_args.extend([
            Arg::write("work", &mut args.work),
            Arg::write_optional("status", args.status.as_mut()),
            Arg::value("params", params),
        ]);

        let blocks = self.blocks.min(params.max_tiles.saturating_mul(params.kv_heads));
        let mut config = LaunchConfig::new(blocks, threads);
        config = config.shared(self.variant.shared_bytes(wgmma) as u32);
        config.programmatic = args.programmatic;
        // SAFETY: the arguments are the kernel's parameters in order and type. The checks above made every buffer as long
        // as the kernel's index range; the kernel checks that tiles lie in q, the cache and the list, and clamps page ids to the
        // pool. Tensor maps end where their tensors do, at the pool's end too.
        unsafe { self.function.launch(queue, &config, &kernel_args) }
    }
}

/// Checks outputs and LSEs for `[rows, v_dim]`, where they are given.
fn check_output<E: Storage>(
    (rows, v_dim): (usize, usize),
    out: Option<&ViewMut<'_, E>>,
    lse: Option<&ViewMut<'_, f32>>,
) -> Result<(), Error> {
    if let Some(out) = out {
        out.check("prefill", "out", elements(&[rows, v_dim]), 2 * size_of::<E>() as u64)?;
    }
    lse.map_or(Ok(()), |lse| lse.check("prefill", "lse", rows, 4))
}
