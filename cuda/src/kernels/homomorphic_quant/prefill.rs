//! Prefill on quantized pages: `hack_prefill`.

use std::marker::PhantomData;

use crate::Error;
use crate::kernels::split::check_soft_cap;
use crate::launch::{Arg, Device, Function, LaunchConfig};
use crate::memory::{View, ViewMut};
use crate::params::{HackDecodeParams, HackPrefillParams};
use crate::storage::Storage;
use crate::table::Instance;

use super::decode::check_params;
use super::{DecodeVariant, Method, SideArgs, elements, pool_bytes};

const THREADS: u32 = 128;
/// Rows (queries × query heads of a KV head) of a tile of the tensor cores.
const TILE_ROWS: usize = 16;

/// What a [`Prefill`] kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PrefillVariant {
    /// Bits of key codes.
    pub k_bits: usize,
    /// Bits of value codes.
    pub v_bits: usize,
    /// Tokens of a block.
    pub partition: usize,
    /// Channels of q and K.
    pub qk_dim: usize,
    /// Channels of V and the output.
    pub v_dim: usize,
    /// Whether scores are soft-capped.
    pub soft_cap: bool,
}

impl PrefillVariant {
    /// The pages stream as through the ring of a team of four warps of `hack_decode`.
    const fn stream(&self) -> DecodeVariant {
        DecodeVariant {
            method: Method::Codes,
            k_bits: self.k_bits,
            v_bits: self.v_bits,
            partition: self.partition,
            qk_dim: self.qk_dim,
            v_dim: self.v_dim,
            column_tiles: 4,
            soft_cap: self.soft_cap,
        }
    }

    /// Rows (queries × query heads of a KV head) that one block works on: 16 for each of four warps, or for two or four of them
    /// together where outputs and scores take too many registers.
    pub const fn rows(&self) -> usize {
        const WARPS: usize = 4;
        let sharers = if self.v_dim > 128 && self.partition > 64 {
            4
        } else if self.v_dim > 128 || (self.v_dim > 96 && (self.qk_dim > 128 || self.partition > 64)) {
            2
        } else {
            1
        };
        TILE_ROWS * WARPS / sharers
    }

    /// Dynamic shared memory of a block, in bytes: the queries, and the ring.
    pub const fn shared_bytes(&self) -> usize {
        self.rows() * self.qk_dim * 2 + self.stream().ring_bytes()
    }
}

/// A raw softmax state, in natural units, as `prefill` of the attention kernels carries it.
#[derive(Debug)]
pub struct StateArgs<'a> {
    /// Unnormalised outputs `[num_queries, q_heads, v_dim]`, 8-byte aligned.
    pub o: ViewMut<'a, f32>,
    /// Maxima and sums `[num_queries, q_heads, 2]`.
    pub ml: ViewMut<'a, f32>,
}

/// Whether a state is there to be continued.
#[derive(Debug)]
pub enum PrefillState<'a> {
    /// No: the state starts empty.
    Empty,
    /// Yes.
    Resume(StateArgs<'a>),
}

/// Where a [`Prefill`] leaves its result.
#[derive(Debug)]
pub enum PrefillResult<'a, E> {
    /// Normalised.
    Output {
        /// What the state starts from.
        state: PrefillState<'a>,
        /// Outputs `[num_queries, q_heads, v_dim]`, aligned to two elements.
        out: ViewMut<'a, E>,
        /// Log-sum-exps `[num_queries, q_heads]`, natural log.
        lse: ViewMut<'a, f32>,
    },
    /// As a state.
    State {
        /// The state.
        state: StateArgs<'a>,
        /// Whether it is continued, or started anew over whatever is there.
        resume: bool,
    },
}

/// `hack_prefill`: attention of ragged batches of queries over a quantized cache. `E` is the storage type of q, of 16-bit tokens
/// and of the output.
#[derive(Debug, Clone)]
pub struct Prefill<F, E> {
    function: F,
    variant: PrefillVariant,
    _element: PhantomData<E>,
}

/// Arguments of [`Prefill`].
#[derive(Debug)]
pub struct PrefillArgs<'a, E> {
    /// Cache, heads, mask and score; `q_len` is the most queries that a sequence has.
    pub params: &'a HackDecodeParams,
    /// Query tokens of all sequences.
    pub num_queries: u32,
    /// Whether the cache holds the queries' own tokens, or all that it holds comes before them.
    pub cached: bool,
    /// Queries `[num_queries, q_heads, qk_dim]`, 16-byte aligned.
    pub q: &'a View<'a, E>,
    /// The pool of packed pages, 16-byte aligned.
    pub pages: &'a View<'a, u8>,
    /// The pool of sinks `[num_sink_pages, kv_heads, sinks · (qk_dim + v_dim)]`, 16-byte aligned.
    pub sink_pool: &'a View<'a, E>,
    /// The pool of open blocks `[num_open_pages, kv_heads, partition · (qk_dim + v_dim)]`, 16-byte aligned.
    pub open_pool: &'a View<'a, E>,
    /// Where the sequences lie.
    pub places: SideArgs<'a>,
    /// First query of each sequence, then one past the last `[batch + 1]`.
    pub cu_queries: &'a View<'a, u32>,
    /// Tokens that the cache holds of each sequence `[batch]`.
    pub kv_len: &'a View<'a, u32>,
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
            "hack_prefill",
            &[
                ("K_BITS", variant.k_bits as i64),
                ("V_BITS", variant.v_bits as i64),
                ("PARTITION", variant.partition as i64),
                ("QK_DIM", variant.qk_dim as i64),
                ("V_DIM", variant.v_dim as i64),
                ("KV_DTYPE", E::DTYPE),
                ("SOFT_CAP", i64::from(variant.soft_cap)),
            ],
        )?;
        Ok(Self { function: device.load(&instance)?, variant, _element: PhantomData })
    }

    /// Enqueues one layer's prefill. Lengths, pages and query ranges are checked on the device.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short, misaligned or in the wrong space.
    pub fn launch(&self, queue: &F::Queue, mut args: PrefillArgs<'_, E>) -> Result<(), Error> {
        const KERNEL: &str = "hack_prefill";
        let params = args.params;
        let PrefillVariant { partition, qk_dim, v_dim, soft_cap, .. } = self.variant;
        check_params(KERNEL, params)?;
        if params.partition as usize != partition {
            return Err(Error::argument(KERNEL, "partition", partition, params.partition));
        }
        check_soft_cap(KERNEL, soft_cap, params.soft_cap)?;
        // Rows and positions are 32-bit on the device.
        let (group, heads) = (params.group as usize, params.kv_heads as usize);
        for (argument, value) in [
            ("num_queries", u64::from(args.num_queries) * u64::from(params.group)),
            ("max_kv_len", u64::from(params.max_kv_len) + u64::from(params.q_len)),
        ] {
            if value > i32::MAX as u64 {
                return Err(Error::argument(KERNEL, argument, format_args!("at most {}", i32::MAX), value));
            }
        }
        let batch = params.batch as usize;
        let rows = elements(&[args.num_queries as usize, heads, group]);
        args.q.check(KERNEL, "q", elements(&[rows, qk_dim]), 16)?;
        let page = elements(&[heads, self.variant.stream().segment().bytes()]);
        if params.page_stride % 16 != 0 || params.page_stride < page as i64 {
            let expected = format!("a multiple of 16, at least {page}");
            return Err(Error::argument(KERNEL, "page_stride", expected, params.page_stride));
        }
        args.pages.check(KERNEL, "pages", pool_bytes(params.num_pages, params.page_stride, page), 16)?;
        let side = |pages: u32, tokens: usize| elements(&[pages as usize, heads, tokens, qk_dim + v_dim]);
        let sinks = side(params.num_sink_pages, params.sinks as usize);
        args.sink_pool.check(KERNEL, "sink_pool", sinks, 16)?;
        args.open_pool.check(KERNEL, "open_pool", side(params.num_open_pages, partition), 16)?;
        args.places.check(KERNEL, params)?;
        args.cu_queries.check(KERNEL, "cu_queries", batch + 1, 4)?;
        args.kv_len.check(KERNEL, "kv_len", batch, 4)?;
        args.status.check(KERNEL, "status", 1, 8)?;

        let check_state = |state: &StateArgs<'_>| {
            state.o.check(KERNEL, "state_o", elements(&[rows, v_dim]), 8)?;
            state.ml.check(KERNEL, "state_ml", elements(&[rows, 2]), 4)
        };
        let (output, mut state, resume) = match args.result {
            PrefillResult::Output { state: PrefillState::Empty, out, lse } => (Some((out, lse)), None, false),
            PrefillResult::Output { state: PrefillState::Resume(state), out, lse } => {
                (Some((out, lse)), Some(state), true)
            }
            PrefillResult::State { state, resume } => (None, Some(state), resume),
        };
        state.as_ref().map_or(Ok(()), check_state)?;
        let keep = output.is_none();
        let (mut out, mut lse) = output.unzip();
        if let (Some(out), Some(lse)) = (&out, &lse) {
            out.check(KERNEL, "out", elements(&[rows, v_dim]), 2 * size_of::<E>() as u64)?;
            lse.check(KERNEL, "lse", rows, 4)?;
        }
        let (state_o, state_ml) = state.as_mut().map(|state| (&mut state.o, &mut state.ml)).unzip();

        let prefill_params = HackPrefillParams {
            cache: *params,
            num_queries: args.num_queries,
            cached: u32::from(args.cached),
            resume: u32::from(resume),
            keep: u32::from(keep),
        };
        let tiles = (params.q_len as usize * group).div_ceil(self.variant.rows()) as u32;
        let mut config = LaunchConfig::new((tiles, params.batch.saturating_mul(params.kv_heads)), THREADS);
        config = config.shared(self.variant.shared_bytes() as u32);
        config.programmatic = args.programmatic;
        let kernel_args = [
            Arg::read("q", args.q),
            Arg::read("pages", args.pages),
            Arg::read("block_table", args.places.block_table),
            Arg::read("sink_pool", args.sink_pool),
            Arg::read("open_pool", args.open_pool),
            Arg::read("sink_page", args.places.sink_page),
            Arg::read("open_page", args.places.open_page),
            Arg::read("cu_queries", args.cu_queries),
            Arg::read("kv_len", args.kv_len),
            Arg::write_optional("out", out.as_mut()),
            Arg::write_optional("lse", lse.as_mut()),
            Arg::write_optional("state_o", state_o),
            Arg::write_optional("state_ml", state_ml),
            Arg::write("status", &mut args.status),
            Arg::value("params", &prefill_params),
        ];
        // SAFETY: the arguments are the kernel's parameters in order and type. The checks above made every buffer as long as the
        // kernel's index range; it checks lengths, pages and query ranges itself and clamps page ids to their pools; it reads a
        // state only where one was given, and writes either it or the outputs.
        unsafe { self.function.launch(queue, &config, &kernel_args) }
    }
}
