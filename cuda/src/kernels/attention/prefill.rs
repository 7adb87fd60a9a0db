//! Flash attention over ragged batches: `prefill`.

use std::marker::PhantomData;

use crate::Error;
use crate::launch::{Arg, Device, Function, LaunchConfig};
use crate::memory::{View, ViewMut};
use crate::params::PrefillParams;
use crate::storage::Storage;
use crate::table::Instance;

use super::cache::{CacheExtent, check_cache, elements, table_len};

const KERNEL: &str = "prefill";
const THREADS: u32 = 128;
const KEYS: usize = 64;

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
}

impl PrefillVariant {
    /// Rows (query tokens × query heads of a KV head) that one block works on.
    pub fn rows(&self) -> usize {
        if self.qk_dim <= 128 && self.v_dim <= 128 { 128 } else { 64 }
    }

    /// Dynamic shared memory of a block, in bytes: queries, a tile of K, a tile of V and a flag.
    pub fn shared_bytes(&self) -> usize {
        self.rows() * self.qk_dim * 2 + KEYS * (self.qk_dim + self.v_dim) * 2 + size_of::<u32>()
    }
}

/// `prefill`. `E` is the storage type of q, K, V and the output.
#[derive(Debug, Clone)]
pub struct Prefill<F, E> {
    function: F,
    variant: PrefillVariant,
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
        /// Maxima and sums `[num_queries, q_heads, 2]`, natural units.
        ml: ViewMut<'a, f32>,
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
    /// First query of each sequence, then the number of queries `[batch + 1]`.
    pub cu_queries: &'a View<'a, u32>,
    /// Keys of each sequence `[batch]`.
    pub kv_len: &'a View<'a, u32>,
    /// First token of each sequence of a contiguous cache `[batch]`.
    pub kv_start: Option<&'a View<'a, u32>>,
    /// Page ids of a paged cache, by the table strides of `params`.
    pub block_table: Option<&'a View<'a, u32>>,
    /// Where the result goes.
    pub result: PrefillResult<'a, E>,
    /// Status word.
    pub status: ViewMut<'a, u64>,
    /// Start while the previous kernel of the stream drains.
    pub programmatic: bool,
}

impl<F: Function, E: Storage> Prefill<F, E> {
    /// Compiles and loads the kernel for `variant`.
    pub fn prepare<D: Device<Function = F>>(device: &D, variant: PrefillVariant) -> Result<Self, Error> {
        let instance = Instance::new(
            KERNEL,
            &[
                ("QK_DIM", variant.qk_dim as i64),
                ("V_DIM", variant.v_dim as i64),
                ("KV_DTYPE", E::DTYPE),
                ("PAGED", i64::from(variant.paged)),
                ("SOFT_CAP", i64::from(variant.soft_cap)),
                ("CARRY", i64::from(variant.carry)),
            ],
        )?;
        Ok(Self { function: device.load(&instance)?, variant, _element: PhantomData })
    }

    /// Enqueues one prefill.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short, misaligned, missing or in the wrong space.
    pub fn launch(&self, queue: &F::Queue, mut args: PrefillArgs<'_, E>) -> Result<(), Error> {
        let params = args.params;
        let PrefillVariant { qk_dim, v_dim, paged, soft_cap, carry } = self.variant;
        for (argument, value) in
            [("batch", params.batch), ("kv_heads", params.kv_heads), ("group", params.group)]
        {
            if value == 0 {
                return Err(Error::argument(KERNEL, argument, "at least 1", value));
            }
        }
        let out_rows =
            elements(&[params.num_queries as usize, params.kv_heads as usize, params.group as usize]);
        let rows = params.num_queries as usize * params.group as usize;
        if rows > i32::MAX as usize || params.max_kv_len > i32::MAX as u32 {
            return Err(Error::argument(
                KERNEL,
                "num_queries",
                format_args!("at most {} rows and keys", i32::MAX),
                format_args!("{rows} rows and {} keys", params.max_kv_len),
            ));
        }
        if soft_cap && (params.soft_cap.is_nan() || params.soft_cap <= 0.0) {
            return Err(Error::argument(KERNEL, "soft_cap", "a positive number", params.soft_cap));
        }
        let batch = params.batch as usize;
        let extent = CacheExtent {
            pages: paged.then_some((params.num_pages, params.page_shift)),
            tokens: params.num_tokens,
            heads: params.kv_heads,
        };
        args.q.check(KERNEL, "q", elements(&[out_rows, qk_dim]), 16)?;
        let k_strides = [params.k_page_stride, params.k_token_stride, params.k_head_stride];
        let v_strides = [params.v_page_stride, params.v_token_stride, params.v_head_stride];
        check_cache(KERNEL, "k", args.k, qk_dim, extent, k_strides)?;
        check_cache(KERNEL, "v", args.v, v_dim, extent, v_strides)?;
        extent.check_places(KERNEL, args.block_table, args.kv_start, batch, || {
            table_len(
                [params.table_head_stride, params.table_batch_stride],
                params.kv_heads,
                params.batch,
                params.max_pages,
            )
        })?;
        args.cu_queries.check(KERNEL, "cu_queries", batch + 1, 4)?;
        args.kv_len.check(KERNEL, "kv_len", batch, 4)?;
        args.status.check(KERNEL, "status", 1, 8)?;
        let (first, second) = match (&mut args.result, carry) {
            (PrefillResult::Output { out, lse }, false) => {
                out.check(KERNEL, "out", elements(&[out_rows, v_dim]), 2 * size_of::<E>() as u64)?;
                lse.check(KERNEL, "lse", out_rows, 4)?;
                (Arg::write("out", out), Arg::write("lse", lse))
            }
            (PrefillResult::State { o, ml }, true) => {
                o.check(KERNEL, "state_o", elements(&[out_rows, v_dim]), 8)?;
                ml.check(KERNEL, "state_ml", elements(&[out_rows, 2]), 4)?;
                (Arg::write("state_o", o), Arg::write("state_ml", ml))
            }
            (_, true) => return Err(Error::argument(KERNEL, "result", "a state", "an output")),
            (_, false) => return Err(Error::argument(KERNEL, "result", "an output", "a state")),
        };

        // Every sequence may end in a tile that is not full.
        let tiles = rows.div_ceil(self.variant.rows()) + batch - 1;
        let tiles = if rows == 0 { 0 } else { u32::try_from(tiles).unwrap_or(u32::MAX) };
        let mut config = LaunchConfig::new((tiles, params.kv_heads), THREADS);
        config = config.shared(self.variant.shared_bytes() as u32);
        config.programmatic = args.programmatic;
        let kernel_args = [
            Arg::read("q", args.q),
            Arg::read("k", args.k),
            Arg::read("v", args.v),
            Arg::read("cu_queries", args.cu_queries),
            Arg::read("kv_len", args.kv_len),
            Arg::read_optional("kv_start", args.kv_start),
            Arg::read_optional("block_table", args.block_table),
            first,
            second,
            Arg::write("status", &mut args.status),
            Arg::value("params", params),
        ];
        // SAFETY: the arguments are the kernel's parameters in order and type. The checks above made every buffer as long
        // as the kernel's index range; lengths, page ids and `cu_queries`, which lie in device memory, are checked by the
        // kernel before it reads by them.
        unsafe { self.function.launch(queue, &config, &kernel_args) }
    }
}
