//! Appending to a KV cache: `append`.

use std::marker::PhantomData;

use crate::Error;
use crate::launch::{Arg, Device, Function, LaunchConfig};
use crate::memory::{View, ViewMut};
use crate::params::AppendParams;
use crate::storage::Storage;
use crate::table::Instance;

use super::cache::{CacheExtent, check_cache, elements};

const KERNEL: &str = "append";
const THREADS: u32 = 128;
/// `page_shift` of a cache that is one run of slots.
const UNPAGED: u32 = 62;

/// Which channels a rotation pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rotary {
    /// Nothing rotates.
    None,
    /// Channel `i` and `i + rotary_dim / 2`.
    HalfSplit,
    /// Channel `2i` and `2i + 1`.
    Interleaved,
}

/// `append`: rotates queries and keys and writes keys and values to their slots. `E` is the storage type of all of them.
#[derive(Debug, Clone)]
pub struct Append<F, E> {
    function: F,
    qk_dim: usize,
    v_dim: usize,
    rotary: Rotary,
    _element: PhantomData<E>,
}

/// Cosines and sines by position, for a rotating [`Append`].
#[derive(Debug, Clone, Copy)]
pub struct AppendTables<'a> {
    /// `[positions, rotary_dim / 2]`, 16-byte aligned.
    pub cos: &'a View<'a, f32>,
    /// `[positions, rotary_dim / 2]`, 16-byte aligned.
    pub sin: &'a View<'a, f32>,
    /// Position of each token `[tokens]`.
    pub position: &'a View<'a, u32>,
}

/// Arguments of [`Append`].
#[derive(Debug)]
pub struct AppendArgs<'a, E> {
    /// Shape and layout.
    pub params: &'a AppendParams,
    /// Queries `[tokens, q_heads, qk_dim]`, rotated in place; given exactly where `q_heads` is not 0.
    pub q_new: Option<ViewMut<'a, E>>,
    /// New keys `[tokens, kv_heads, qk_dim]`, 16-byte aligned.
    pub k_new: &'a View<'a, E>,
    /// New values `[tokens, kv_heads, v_dim]`, 16-byte aligned.
    pub v_new: &'a View<'a, E>,
    /// Given exactly where something rotates.
    pub tables: Option<AppendTables<'a>>,
    /// Slot of each token `[tokens]`; a negative one skips the token.
    pub slot: &'a View<'a, i64>,
    /// Keys of the cache, by the strides of `params`, 16-byte aligned.
    pub k: ViewMut<'a, E>,
    /// Values of the cache, by the strides of `params`, 16-byte aligned.
    pub v: ViewMut<'a, E>,
    /// Status word.
    pub status: ViewMut<'a, u64>,
    /// Start while the previous kernel of the stream drains.
    pub programmatic: bool,
}

impl<F: Function, E: Storage> Append<F, E> {
    /// Compiles and loads the kernel.
    pub fn prepare<D: Device<Function = F>>(
        device: &D,
        (qk_dim, v_dim): (usize, usize),
        rotary: Rotary,
    ) -> Result<Self, Error> {
        let constants = [
            ("QK_DIM", qk_dim as i64),
            ("V_DIM", v_dim as i64),
            ("KV_DTYPE", E::DTYPE),
            ("ROTARY", rotary as i64),
        ];
        let function = device.load(&Instance::new(KERNEL, &constants)?)?;
        Ok(Self { function, qk_dim, v_dim, rotary, _element: PhantomData })
    }

    /// Enqueues the append.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short, misaligned, missing or in the wrong space.
    pub fn launch(&self, queue: &F::Queue, mut args: AppendArgs<'_, E>) -> Result<(), Error> {
        let params = args.params;
        let (tokens, rotary_dim) = (params.tokens as usize, params.rotary_dim as usize);
        if params.kv_heads == 0 {
            return Err(Error::argument(KERNEL, "kv_heads", "at least 1", 0));
        }
        let rotates = self.rotary != Rotary::None;
        if rotary_dim > self.qk_dim || !rotary_dim.is_multiple_of(16) || rotates == (rotary_dim == 0) {
            let expected = if rotates {
                format!("a multiple of 16 from 16 to {}", self.qk_dim)
            } else {
                "0, since nothing rotates".to_string()
            };
            return Err(Error::argument(KERNEL, "rotary_dim", expected, rotary_dim));
        }
        // New vectors: the last token's heads end within the buffer.
        let new_len = |argument, stride: i64, heads: u32, dim: usize| {
            let row = elements(&[heads as usize, dim]);
            if stride < 0
                || stride % (16 / size_of::<E>() as i64) != 0
                || (tokens > 1 && (stride as usize) < row)
            {
                let expected = format!("a multiple of 16 bytes, at least {row} elements");
                return Err(Error::argument(KERNEL, argument, expected, stride));
            }
            Ok(if tokens == 0 { 0 } else { elements(&[tokens - 1, stride as usize]).saturating_add(row) })
        };
        let k_len = new_len("k_new", params.k_new_stride, params.kv_heads, self.qk_dim)?;
        let v_len = new_len("v_new", params.v_new_stride, params.kv_heads, self.v_dim)?;
        args.k_new.check(KERNEL, "k_new", k_len, 16)?;
        args.v_new.check(KERNEL, "v_new", v_len, 16)?;
        match (&args.q_new, params.q_heads) {
            (None, 0) => {}
            (Some(q_new), heads) if heads > 0 => {
                let len = new_len("q_new", params.q_new_stride, heads, self.qk_dim)?;
                q_new.check(KERNEL, "q_new", len, 16)?;
            }
            (q_new, heads) => {
                let found = if q_new.is_some() { "given" } else { "missing" };
                return Err(Error::argument(
                    KERNEL,
                    "q_new",
                    format_args!("as q_heads = {heads} asks"),
                    found,
                ));
            }
        }
        match (&args.tables, rotates) {
            (None, false) => {}
            (Some(tables), true) => {
                let len = params.positions as usize * (rotary_dim / 2);
                tables.cos.check(KERNEL, "cos", len, 16)?;
                tables.sin.check(KERNEL, "sin", len, 16)?;
                tables.position.check(KERNEL, "position", tokens, 4)?;
            }
            (tables, _) => {
                let found = if tables.is_some() { "given" } else { "missing" };
                return Err(Error::argument(
                    KERNEL,
                    "tables",
                    format_args!("as {:?} asks", self.rotary),
                    found,
                ));
            }
        }
        args.slot.check(KERNEL, "slot", tokens, 8)?;
        args.status.check(KERNEL, "status", 1, 8)?;
        let slots = u64::try_from(params.num_slots).map_err(|_| {
            Error::argument(KERNEL, "num_slots", "a number of slots", format_args!("{}", params.num_slots))
        })?;
        let too_many = |_| Error::argument(KERNEL, "num_slots", "less than 2^32 pages or slots", slots);
        let extent = if params.page_shift == UNPAGED {
            CacheExtent {
                pages: None,
                tokens: u32::try_from(slots).map_err(too_many)?,
                heads: params.kv_heads,
            }
        } else {
            if params.page_shift > 30 {
                return Err(Error::argument(KERNEL, "page_shift", "0 to 30, or 62", params.page_shift));
            }
            let pages = u32::try_from(slots.div_ceil(1 << params.page_shift)).map_err(too_many)?;
            CacheExtent { pages: Some((pages, params.page_shift)), tokens: 0, heads: params.kv_heads }
        };
        let k_strides = [params.k_page_stride, params.k_token_stride, params.k_head_stride];
        let v_strides = [params.v_page_stride, params.v_token_stride, params.v_head_stride];
        check_cache(KERNEL, "k", &args.k.part(0..args.k.len())?, self.qk_dim, extent, k_strides)?;
        check_cache(KERNEL, "v", &args.v.part(0..args.v.len())?, self.v_dim, extent, v_strides)?;

        let mut config = LaunchConfig::new(params.tokens, THREADS);
        config.programmatic = args.programmatic;
        let tables = args.tables.as_ref();
        let kernel_args = [
            Arg::write_optional("q_new", args.q_new.as_mut()),
            Arg::read("k_new", args.k_new),
            Arg::read("v_new", args.v_new),
            Arg::read_optional("cos", tables.map(|tables| tables.cos)),
            Arg::read_optional("sin", tables.map(|tables| tables.sin)),
            Arg::read_optional("position", tables.map(|tables| tables.position)),
            Arg::read("slot", args.slot),
            Arg::write("k", &mut args.k),
            Arg::write("v", &mut args.v),
            Arg::write("status", &mut args.status),
            Arg::value("params", params),
        ];
        // SAFETY: the arguments are the kernel's parameters in order and type. The checks above made every buffer as long
        // as the kernel's index range; slots and positions, which lie in device memory, are checked by the kernel.
        unsafe { self.function.launch(queue, &config, &kernel_args) }
    }
}
