//! Appending to a low-rank KV cache: `fdc_append`.

use std::marker::PhantomData;

use crate::Error;
use crate::kernels::attention::cache::elements;
use crate::kernels::attention::{AppendTables, Rotary};
use crate::launch::{Arg, Device, Function, LaunchConfig};
use crate::memory::{View, ViewMut};
use crate::params::FdcAppendParams;
use crate::storage::Storage;
use crate::table::Instance;

use super::heads::{check_heads, check_page, k_channels, pages_len, v_channels};

const KERNEL: &str = "fdc_append";
const THREADS: u32 = 128;
const ROWS: u32 = 64;

/// `fdc_append`: rotates queries and keys, projects them and the values onto each head's basis, and writes keys and values
/// to their slots. `E` is the storage type of all of them.
#[derive(Debug, Clone)]
pub struct FdcAppend<F, E> {
    function: F,
    head_dim: usize,
    rotary: Rotary,
    _element: PhantomData<E>,
}

/// Queries and their projection.
#[derive(Debug)]
pub struct FdcQueries<'a, E> {
    /// New queries `[tokens, kv_heads, group, head_dim]`, 16-byte aligned.
    pub q_new: &'a View<'a, E>,
    /// R_q head after head `[head_dim, r_k]`, 16-byte aligned.
    pub project: &'a View<'a, E>,
    /// Out: projected queries `[tokens, Σ group · r_k]`, 16-byte aligned; 0 where the token is skipped.
    pub q: ViewMut<'a, E>,
}

/// Arguments of [`FdcAppend`].
#[derive(Debug)]
pub struct FdcAppendArgs<'a, E> {
    /// Shape and layout.
    pub params: &'a FdcAppendParams,
    /// Given exactly where `group` is not 0.
    pub queries: Option<FdcQueries<'a, E>>,
    /// New keys `[tokens, kv_heads, head_dim]`, 16-byte aligned; `[tokens, Σ r_k]` without `project_k`.
    pub k_new: &'a View<'a, E>,
    /// New values `[tokens, kv_heads, head_dim]`, 16-byte aligned; `[tokens, Σ r_v]` without `project_v`.
    pub v_new: &'a View<'a, E>,
    /// R_k head after head `[head_dim, r_k]`, 16-byte aligned; missing where keys come reduced, which then cannot rotate.
    pub project_k: Option<&'a View<'a, E>>,
    /// R_v head after head `[head_dim, r_v]`, 16-byte aligned; missing where values come reduced.
    pub project_v: Option<&'a View<'a, E>>,
    /// Given exactly where something rotates.
    pub tables: Option<AppendTables<'a>>,
    /// Slot of each token `[tokens]`; a negative one skips the token.
    pub slot: &'a View<'a, i64>,
    /// The cache's pages, 16-byte aligned.
    pub pages: ViewMut<'a, E>,
    /// Status word.
    pub status: ViewMut<'a, u64>,
    /// Start while the previous kernel of the stream drains.
    pub programmatic: bool,
}

/// Tiles of rows that `rows` rows of one KV head have.
pub fn append_tiles(rows: u32) -> u32 {
    rows.div_ceil(ROWS)
}

impl<F: Function, E: Storage> FdcAppend<F, E> {
    /// Compiles and loads the kernel.
    pub fn prepare<D: Device<Function = F>>(
        device: &D,
        head_dim: usize,
        rotary: Rotary,
    ) -> Result<Self, Error> {
        let constants = [("HEAD_DIM", head_dim as i64), ("KV_DTYPE", E::DTYPE), ("ROTARY", rotary as i64)];
        let function = device.load(&Instance::new(KERNEL, &constants)?)?;
        Ok(Self { function, head_dim, rotary, _element: PhantomData })
    }

    /// Dynamic shared memory of a block in bytes: 64 rows, and a projection of full rank.
    pub fn shared_bytes(&self) -> usize {
        (ROWS as usize + self.head_dim) * self.head_dim * size_of::<E>()
    }

    /// Enqueues the append.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short, misaligned, missing or in the wrong space.
    pub fn launch(&self, queue: &F::Queue, mut args: FdcAppendArgs<'_, E>) -> Result<(), Error> {
        let params = args.params;
        let heads = &params.heads;
        check_heads(KERNEL, heads, self.head_dim)?;
        let (tokens, count) = (params.tokens as usize, heads.count as usize);
        let (k_channels, v_channels) = (k_channels(heads), v_channels(heads));
        self.check_rotation(&args)?;

        let q_rows = params.tokens.checked_mul(params.group).filter(|rows| *rows <= i32::MAX as u32);
        let q_rows = q_rows.ok_or_else(|| {
            let found = format!("{tokens} tokens of {} queries", params.group);
            Error::argument(KERNEL, "tokens", format_args!("at most {} rows", i32::MAX), found)
        })?;
        for (argument, rows, found) in
            [("q_tiles", q_rows, params.q_tiles), ("kv_tiles", params.tokens, params.kv_tiles)]
        {
            if found != append_tiles(rows) {
                return Err(Error::argument(KERNEL, argument, append_tiles(rows), found));
            }
        }
        let tiles = u64::from(params.q_tiles) + 2 * u64::from(params.kv_tiles);
        let blocks = u32::try_from(tiles * count as u64).ok().filter(|blocks| *blocks <= i32::MAX as u32);
        let blocks = blocks.ok_or_else(|| {
            Error::argument(KERNEL, "tokens", format_args!("at most {} blocks", i32::MAX), tokens)
        })?;

        // New vectors: the last token's heads end within the buffer.
        let new_len = |argument, stride: i64, row: usize| {
            if stride < 0
                || stride % (16 / size_of::<E>() as i64) != 0
                || (tokens > 1 && (stride as usize) < row)
            {
                let expected = format!("a multiple of 16 bytes, at least {row} elements");
                return Err(Error::argument(KERNEL, argument, expected, stride));
            }
            Ok(if tokens == 0 { 0 } else { elements(&[tokens - 1, stride as usize]).saturating_add(row) })
        };
        let wide = count * self.head_dim;
        let k_row = if args.project_k.is_some() { wide } else { k_channels };
        let v_row = if args.project_v.is_some() { wide } else { v_channels };
        args.k_new.check(KERNEL, "k_new", new_len("k_new", params.k_new_stride, k_row)?, 16)?;
        args.v_new.check(KERNEL, "v_new", new_len("v_new", params.v_new_stride, v_row)?, 16)?;
        if let Some(project_k) = args.project_k {
            project_k.check(KERNEL, "project_k", self.head_dim * k_channels, 16)?;
        }
        if let Some(project_v) = args.project_v {
            project_v.check(KERNEL, "project_v", self.head_dim * v_channels, 16)?;
        }
        let group = params.group as usize;
        match (&args.queries, group) {
            (None, 0) => {}
            (Some(queries), 1..) => {
                let row = elements(&[wide, group]);
                queries.q_new.check(KERNEL, "q_new", new_len("q_new", params.q_new_stride, row)?, 16)?;
                queries.project.check(KERNEL, "project_q", self.head_dim * k_channels, 16)?;
                queries.q.check(KERNEL, "q", elements(&[tokens, group, k_channels]), 16)?;
            }
            (queries, group) => {
                let found = if queries.is_some() { "given" } else { "missing" };
                return Err(Error::argument(
                    KERNEL,
                    "queries",
                    format_args!("as a group of {group} asks"),
                    found,
                ));
            }
        }
        args.slot.check(KERNEL, "slot", tokens, 8)?;
        args.status.check(KERNEL, "status", 1, 8)?;
        self.check_pages(params, &args.pages)?;

        let mut config = LaunchConfig::new(blocks, THREADS).shared(self.shared_bytes() as u32);
        config.programmatic = args.programmatic;
        let (q_new, project_q, mut q) = match args.queries {
            Some(queries) => (Some(queries.q_new), Some(queries.project), Some(queries.q)),
            None => (None, None, None),
        };
        let tables = args.tables.as_ref();
        let kernel_args = [
            Arg::read_optional("q_new", q_new),
            Arg::read("k_new", args.k_new),
            Arg::read("v_new", args.v_new),
            Arg::constant("project_q", project_q),
            Arg::constant("project_k", args.project_k),
            Arg::constant("project_v", args.project_v),
            Arg::read_optional("cos", tables.map(|tables| tables.cos)),
            Arg::read_optional("sin", tables.map(|tables| tables.sin)),
            Arg::read_optional("position", tables.map(|tables| tables.position)),
            Arg::read("slot", args.slot),
            Arg::write_optional("q", q.as_mut()),
            Arg::write("pages", &mut args.pages),
            Arg::write("status", &mut args.status),
            Arg::value("params", params),
        ];
        // SAFETY: the arguments are the kernel's parameters in order and type. The checks above made every buffer as long
        // as the kernel's index range; slots and positions, which lie in device memory, are checked by the kernel.
        unsafe { self.function.launch(queue, &config, &kernel_args) }
    }

    /// Tables where something rotates, and then keys that still have their planes.
    fn check_rotation(&self, args: &FdcAppendArgs<'_, E>) -> Result<(), Error> {
        let params = args.params;
        let rotates = self.rotary != Rotary::None;
        let rotary_dim = params.rotary_dim as usize;
        if rotary_dim > self.head_dim || !rotary_dim.is_multiple_of(16) || rotates == (rotary_dim == 0) {
            let expected = if rotates {
                format!("a multiple of 16 from 16 to {}", self.head_dim)
            } else {
                "0, since nothing rotates".to_string()
            };
            return Err(Error::argument(KERNEL, "rotary_dim", expected, rotary_dim));
        }
        if rotates && args.project_k.is_none() {
            return Err(Error::argument(
                KERNEL,
                "project_k",
                "given, since keys rotate before they are reduced",
                "missing",
            ));
        }
        match (&args.tables, rotates) {
            (None, false) => Ok(()),
            (Some(tables), true) => {
                let len = elements(&[params.positions as usize, rotary_dim / 2]);
                tables.cos.check(KERNEL, "cos", len, 16)?;
                tables.sin.check(KERNEL, "sin", len, 16)?;
                tables.position.check(KERNEL, "position", params.tokens as usize, 4)
            }
            (tables, _) => {
                let found = if tables.is_some() { "given" } else { "missing" };
                Err(Error::argument(KERNEL, "tables", format_args!("as {:?} asks", self.rotary), found))
            }
        }
    }

    /// Every slot lies in a page, and every page in the pool.
    fn check_pages(&self, params: &FdcAppendParams, pages: &ViewMut<'_, E>) -> Result<(), Error> {
        let page = check_page(KERNEL, &params.heads, params.page_shift, params.page_stride, size_of::<E>())?;
        let slots = u64::try_from(params.num_slots).map_err(|_| {
            Error::argument(KERNEL, "num_slots", "a number of slots", format_args!("{}", params.num_slots))
        })?;
        let count = usize::try_from(slots.div_ceil(1 << params.page_shift)).unwrap_or(usize::MAX);
        pages.check(KERNEL, "pages", pages_len(count, params.page_stride, page), 16)
    }
}
