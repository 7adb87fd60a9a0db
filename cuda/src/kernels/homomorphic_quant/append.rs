//! Appending to a quantized cache: `hack_append`.

use std::marker::PhantomData;

use crate::Error;
use crate::launch::{Arg, Device, Function, LaunchConfig};
use crate::memory::{View, ViewMut};
use crate::params::HackAppendParams;
use crate::storage::Storage;
use crate::table::Instance;

use super::{PackedSegment, elements, larger, pool_bytes};

const KERNEL: &str = "hack_append";
const THREADS: u32 = 128;

/// What an [`Append`] kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AppendVariant {
    /// Bits of key codes.
    pub k_bits: usize,
    /// Bits of value codes.
    pub v_bits: usize,
    /// Tokens of a block.
    pub partition: usize,
    /// Channels of a key.
    pub qk_dim: usize,
    /// Channels of a value.
    pub v_dim: usize,
}

impl AppendVariant {
    /// One (page, KV head).
    pub const fn segment(&self) -> PackedSegment {
        PackedSegment::new(self.k_bits, self.v_bits, self.partition, self.qk_dim, self.v_dim)
    }

    /// Dynamic shared memory of a block, in bytes: a tile of the block's vectors, groups, sums and a flag.
    pub const fn shared_bytes(&self) -> usize {
        let segment = self.segment();
        let tile = self.partition * (larger(self.qk_dim, self.v_dim) + 8) * 2;
        tile + larger(self.qk_dim, segment.v_groups) * 12 + larger(segment.k_sums, self.v_dim) * 4 + 4
    }

    /// Checks what the kernel reads from `params`, as [`Append::launch`] does.
    ///
    /// # Errors
    /// [`Error::Argument`] names a size or stride that the kernel does not support.
    pub fn check_params(&self, params: &HackAppendParams) -> Result<(), Error> {
        for (argument, value, most) in [
            ("batch", params.batch, 65535),
            ("kv_heads", params.kv_heads, 65535),
            ("max_new", params.max_new, 1 << 30),
        ] {
            if value == 0 || value > most {
                return Err(Error::argument(KERNEL, argument, format_args!("1 to {most}"), value));
            }
        }
        if params.max_kv_len > i32::MAX as u32 || params.sinks > i32::MAX as u32 {
            let found = format_args!("{} and {} sinks", params.max_kv_len, params.sinks);
            return Err(Error::argument(KERNEL, "max_kv_len", format_args!("at most {}", i32::MAX), found));
        }
        let heads = params.kv_heads as usize;
        for (of, stride, dim) in
            [("k_new", params.k_new_stride, self.qk_dim), ("v_new", params.v_new_stride, self.v_dim)]
        {
            let row = elements(&[heads, dim]);
            if stride < 0 || stride % 8 != 0 || (params.num_new > 1 && (stride as usize) < row) {
                let expected = format!("a multiple of 8 elements, at least {row}, between tokens of {of}");
                return Err(Error::argument(KERNEL, "strides", expected, stride));
            }
        }
        let page = elements(&[heads, self.segment().bytes()]);
        if params.page_stride % 16 != 0 || params.page_stride < page as i64 {
            let expected = format!("a multiple of 16, at least {page}");
            return Err(Error::argument(KERNEL, "page_stride", expected, params.page_stride));
        }
        Ok(())
    }
}

/// `hack_append`: quantizes the blocks that new tokens close, and keeps the other new tokens in 16 bits. `E` is the storage
/// type of keys and values, of scales and minima.
#[derive(Debug, Clone)]
pub struct Append<F, E> {
    function: F,
    variant: AppendVariant,
    _element: PhantomData<E>,
}

/// Arguments of [`Append`].
#[derive(Debug)]
pub struct AppendArgs<'a, E> {
    /// Shape and layout.
    pub params: &'a HackAppendParams,
    /// New keys `[num_new, kv_heads, qk_dim]`, 16-byte aligned.
    pub k_new: &'a View<'a, E>,
    /// New values `[num_new, kv_heads, v_dim]`, 16-byte aligned.
    pub v_new: &'a View<'a, E>,
    /// Where each sequence's new tokens start `[batch + 1]`.
    pub new_start: &'a View<'a, u32>,
    /// Tokens of each sequence `[batch]`, the new ones included.
    pub kv_len: &'a View<'a, u32>,
    /// Pages of closed blocks `[batch, max_pages]`, by `params`.
    pub block_table: &'a View<'a, u32>,
    /// Page of each sequence's sinks `[batch]`.
    pub sink_page: &'a View<'a, u32>,
    /// Page of each sequence's open block `[batch]`.
    pub open_page: &'a View<'a, u32>,
    /// The pool of packed pages, 16-byte aligned.
    pub pages: ViewMut<'a, u8>,
    /// The pool of sinks `[num_sink_pages, kv_heads, sinks · (qk_dim + v_dim)]`, 16-byte aligned.
    pub sink_pool: ViewMut<'a, E>,
    /// The pool of open blocks `[num_open_pages, kv_heads, partition · (qk_dim + v_dim)]`, 16-byte aligned.
    pub open_pool: ViewMut<'a, E>,
    /// Status word.
    pub status: ViewMut<'a, u64>,
    /// Start while the previous kernel of the stream drains.
    pub programmatic: bool,
}

impl<F: Function, E: Storage> Append<F, E> {
    /// Compiles and loads the kernel for `variant`.
    pub fn prepare<D: Device<Function = F>>(device: &D, variant: AppendVariant) -> Result<Self, Error> {
        let constants = [
            ("K_BITS", variant.k_bits as i64),
            ("V_BITS", variant.v_bits as i64),
            ("PARTITION", variant.partition as i64),
            ("QK_DIM", variant.qk_dim as i64),
            ("V_DIM", variant.v_dim as i64),
            ("KV_DTYPE", E::DTYPE),
        ];
        let function = device.load(&Instance::new(KERNEL, &constants)?)?;
        Ok(Self { function, variant, _element: PhantomData })
    }

    /// Enqueues the append of one layer.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short, misaligned or in the wrong space.
    pub fn launch(&self, queue: &F::Queue, mut args: AppendArgs<'_, E>) -> Result<(), Error> {
        let params = args.params;
        let AppendVariant { partition, qk_dim, v_dim, .. } = self.variant;
        let (batch, heads) = (params.batch as usize, params.kv_heads as usize);
        self.variant.check_params(params)?;
        let new_len = |stride: i64, dim: usize| match params.num_new as usize {
            0 => 0,
            new => elements(&[new - 1, stride as usize]).saturating_add(elements(&[heads, dim])),
        };
        args.k_new.check(KERNEL, "k_new", new_len(params.k_new_stride, qk_dim), 16)?;
        args.v_new.check(KERNEL, "v_new", new_len(params.v_new_stride, v_dim), 16)?;
        args.new_start.check(KERNEL, "new_start", batch + 1, 4)?;
        args.kv_len.check(KERNEL, "kv_len", batch, 4)?;
        let table = pool_bytes(params.batch, params.table_batch_stride, params.max_pages as usize);
        args.block_table.check(KERNEL, "block_table", table, 4)?;
        args.sink_page.check(KERNEL, "sink_page", batch, 4)?;
        args.open_page.check(KERNEL, "open_page", batch, 4)?;
        let page = elements(&[heads, self.variant.segment().bytes()]);
        args.pages.check(KERNEL, "pages", pool_bytes(params.num_pages, params.page_stride, page), 16)?;
        let side = |pages: u32, tokens: usize| elements(&[pages as usize, heads, tokens, qk_dim + v_dim]);
        let sinks = side(params.num_sink_pages, params.sinks as usize);
        args.sink_pool.check(KERNEL, "sink_pool", sinks, 16)?;
        args.open_pool.check(KERNEL, "open_pool", side(params.num_open_pages, partition), 16)?;
        args.status.check(KERNEL, "status", 1, 8)?;

        // An open block of partition − 1 tokens and max_new more close as many blocks.
        let blocks = (params.max_new as usize).div_ceil(partition) as u32;
        let mut config = LaunchConfig::new((blocks, params.kv_heads, params.batch), THREADS);
        config = config.shared(self.variant.shared_bytes() as u32);
        config.programmatic = args.programmatic;
        let kernel_args = [
            Arg::read("k_new", args.k_new),
            Arg::read("v_new", args.v_new),
            Arg::read("new_start", args.new_start),
            Arg::read("kv_len", args.kv_len),
            Arg::read("block_table", args.block_table),
            Arg::read("sink_page", args.sink_page),
            Arg::read("open_page", args.open_page),
            Arg::write("pages", &mut args.pages),
            Arg::write("sink_pool", &mut args.sink_pool),
            Arg::write("open_pool", &mut args.open_pool),
            Arg::write("status", &mut args.status),
            Arg::value("params", params),
        ];
        // SAFETY: the arguments are the kernel's parameters in order and type. The checks above made every buffer as long as
        // the kernel's index range; lengths, ranges and page ids, which lie in device memory, are checked by the kernel.
        unsafe { self.function.launch(queue, &config, &kernel_args) }
    }
}
