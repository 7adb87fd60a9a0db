//! Where a kernel finds keys and values.

use crate::{Error, PageLayout};

/// Where keys and values lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheLayout {
    /// Pages named by a block table.
    Paged {
        /// Tokens per page: a power of two, 8 or more.
        page_size: usize,
        /// Pages in the pool.
        pages: usize,
        /// Entries of the block table per sequence.
        max_pages: usize,
        /// Whether every KV head has its own pages: block table `[kv_heads, batch, max_pages]` instead of
        /// `[batch, max_pages]`.
        per_head: bool,
        /// Strides of K in elements, multiples of 8.
        k: PageLayout,
        /// Strides of V in elements, multiples of 8.
        v: PageLayout,
    },
    /// One run of tokens per sequence, starting where `kv_start` says.
    Contiguous {
        /// Tokens in the cache, all sequences together.
        tokens: usize,
        /// Strides of K in elements, multiples of 8; the page stride is not used.
        k: PageLayout,
        /// Strides of V in elements, multiples of 8; the page stride is not used.
        v: PageLayout,
    },
}

/// A layout as the kernels take it.
#[derive(Debug, Clone, Copy)]
pub(super) struct CacheParams {
    /// Page, token and head stride of K.
    pub(super) k: [i64; 3],
    /// Page, token and head stride of V.
    pub(super) v: [i64; 3],
    /// Head and sequence stride of the block table.
    pub(super) table: [i64; 2],
    pub(super) page_shift: u32,
    pub(super) max_pages: u32,
    pub(super) pages: u32,
    pub(super) tokens: u32,
    pub(super) paged: bool,
}

impl CacheLayout {
    /// The layout as the kernels take it, for `batch` sequences.
    pub(super) fn params(&self, batch: usize) -> Result<CacheParams, Error> {
        let strides = |argument, layout: PageLayout| -> Result<[i64; 3], Error> {
            let stride = |stride| to_stride(argument, stride);
            Ok([stride(layout.page_stride)?, stride(layout.token_stride)?, stride(layout.head_stride)?])
        };
        match *self {
            CacheLayout::Paged { page_size, pages, max_pages, per_head, k, v } => {
                if !page_size.is_power_of_two() || page_size < 8 {
                    return Err(Error::argument("page_size", "a power of two from 8 on", page_size));
                }
                if pages == 0 {
                    return Err(Error::argument("pages", "at least 1", pages));
                }
                if page_size > 1 << 30 {
                    return Err(Error::argument("page_size", "at most 2^30", page_size));
                }
                // Both are below 2^31, so that their product is an i64.
                let table_batch = i64::from(to_u32("max_pages", max_pages)?);
                let table_head = i64::from(to_u32("batch", batch)?) * table_batch;
                Ok(CacheParams {
                    k: strides("k", k)?,
                    v: strides("v", v)?,
                    table: [if per_head { table_head } else { 0 }, table_batch],
                    page_shift: page_size.trailing_zeros(),
                    max_pages: to_u32("max_pages", max_pages)?,
                    pages: to_u32("pages", pages)?,
                    tokens: 0,
                    paged: true,
                })
            }
            CacheLayout::Contiguous { tokens, k, v } => Ok(CacheParams {
                k: strides("k", k)?,
                v: strides("v", v)?,
                table: [0, 0],
                page_shift: 0,
                max_pages: 0,
                pages: 0,
                tokens: to_u32("tokens", tokens)?,
                paged: false,
            }),
        }
    }
}

/// The keys of a sliding window, at least the query's own: the kernels take 0 for no window at all.
pub(super) fn window(window: usize) -> Result<u32, Error> {
    if window == 0 {
        return Err(Error::argument("mask", "a window of at least 1 key", 0));
    }
    to_u32("window", window)
}

/// A count that the device keeps in 31 bits.
pub(super) fn to_u32(argument: &'static str, value: usize) -> Result<u32, Error> {
    u32::try_from(value)
        .ok()
        .filter(|value| *value <= i32::MAX as u32)
        .ok_or_else(|| Error::argument(argument, format!("at most {}", i32::MAX), value))
}

fn to_stride(argument: &'static str, stride: u64) -> Result<i64, Error> {
    i64::try_from(stride)
        .ok()
        .filter(|stride| stride % 8 == 0)
        .ok_or_else(|| Error::argument(argument, "strides that are multiples of 8 elements", stride))
}
