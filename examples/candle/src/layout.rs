//! candle layouts as the crates see memory: packed runs, rows at a stride, pages at strides.
//!
//! Everything here is checked on the CPU as on CUDA, so that what runs on one runs on the other.

use std::ops::Range;

use attention::PageLayout;
use candle_core::{Error, Layout, Result};

use crate::error::argument;

/// Elements to which vectors, strides and offsets are aligned: the kernels load 16 bytes at once.
const ALIGNMENT: usize = 8;

/// A tensor with exactly this shape and no gaps: its range of elements in the storage.
pub(crate) fn packed(
    op: &'static str,
    name: &'static str,
    layout: &Layout,
    shape: &[usize],
) -> Result<Range<usize>> {
    check_shape(op, name, layout, shape)?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => Err(argument(op, name, "a contiguous tensor (call `.contiguous()`)", strides(layout))),
    }
}

/// As [`packed`], at an offset that kernels can load vectors from.
pub(crate) fn packed_vectors(
    op: &'static str,
    name: &'static str,
    layout: &Layout,
    shape: &[usize],
) -> Result<Range<usize>> {
    let range = packed(op, name, layout, shape)?;
    check_offset(op, name, range.start)?;
    Ok(range)
}

/// Rows of packed heads `[tokens, heads, dim]`, as they lie in a projection or a slice of a fused one.
#[derive(Debug, Clone)]
pub(crate) struct Rows {
    /// Elements of the storage from the first row's first to the last row's last.
    pub(crate) range: Range<usize>,
    /// Elements from row to row.
    pub(crate) stride: usize,
}

/// A tensor `[tokens, heads, dim]` whose tokens may lie at any stride.
pub(crate) fn rows(
    op: &'static str,
    name: &'static str,
    layout: &Layout,
    [tokens, heads, dim]: [usize; 3],
) -> Result<Rows> {
    check_shape(op, name, layout, &[tokens, heads, dim])?;
    let [token_stride, head_stride, channel_stride] = *layout.stride() else {
        unreachable!("three dimensions")
    };
    let width = heads * dim;
    if channel_stride != 1 || (heads > 1 && head_stride != dim) {
        let expected = "tokens whose heads are contiguous (call `.contiguous()`)";
        return Err(argument(op, name, expected, strides(layout)));
    }
    // A single row has whatever stride the view that it was cut from had.
    let stride = if tokens > 1 { token_stride } else { width };
    if stride < width || !stride.is_multiple_of(ALIGNMENT) {
        let expected = format!("a stride from token to token of at least {width}, a multiple of {ALIGNMENT}");
        return Err(argument(op, name, expected, strides(layout)));
    }
    let start = layout.start_offset();
    check_offset(op, name, start)?;
    let len = if tokens == 0 { 0 } else { (tokens - 1) * stride + width };
    Ok(Rows { range: start..start + len, stride })
}

/// Pages `[pages, page_size, heads, dim]` of keys or of values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pages {
    pub(crate) pages: usize,
    pub(crate) page_size: usize,
    pub(crate) heads: usize,
    pub(crate) dim: usize,
    pub(crate) strides: PageLayout,
}

impl Pages {
    /// The pages of a tensor, and their elements in its storage.
    pub(crate) fn of(op: &'static str, name: &'static str, layout: &Layout) -> Result<(Pages, Range<usize>)> {
        let (dims, stride) = (layout.dims(), layout.stride());
        let ([pages, page_size, heads, dim], [page_stride, token_stride, head_stride, channel_stride]) =
            (four(op, layout, dims)?, four(op, layout, stride)?);
        if [pages, page_size, heads, dim].contains(&0) {
            let expected = "pages [pages, page_size, kv_heads, head_dim] that are not empty";
            return Err(argument(op, name, expected, format!("{dims:?}")));
        }
        if !page_size.is_power_of_two() || page_size < 8 {
            return Err(argument(op, name, "a page size that is a power of two from 8 on", page_size));
        }
        // A dimension of one has whatever stride the view that it was cut from had.
        let effective = |size: usize, stride: usize| if size > 1 { stride } else { 0 };
        let page_stride = effective(pages, page_stride);
        let (token_stride, head_stride) = (token_stride, effective(heads, head_stride));
        if channel_stride != 1 && dim > 1 {
            let expected = "pages whose channels are contiguous (call `.contiguous()`)";
            return Err(argument(op, name, expected, strides(layout)));
        }
        if [page_stride, token_stride, head_stride].iter().any(|stride| !stride.is_multiple_of(ALIGNMENT)) {
            let expected = format!("strides that are multiples of {ALIGNMENT}");
            return Err(argument(op, name, expected, strides(layout)));
        }
        let start = layout.start_offset();
        check_offset(op, name, start)?;
        let last = (pages - 1) * page_stride + (page_size - 1) * token_stride + (heads - 1) * head_stride;
        let strides = PageLayout {
            page_stride: page_stride as u64,
            token_stride: token_stride as u64,
            head_stride: head_stride as u64,
        };
        Ok((Pages { pages, page_size, heads, dim, strides }, start..start + last + dim))
    }

    /// Slots of the cache: pages times page size.
    pub(crate) fn slots(&self) -> usize {
        self.pages * self.page_size
    }
}

/// Keys and values of one cache tensor `[2, pages, page_size, heads, dim]`: the pages, which are alike, and the elements of
/// keys and of values, which come one after the other.
pub(crate) fn halves(
    op: &'static str,
    name: &'static str,
    layout: &Layout,
) -> Result<(Pages, [Range<usize>; 2])> {
    let [2, ref dims @ ..] = *layout.dims() else {
        let expected = "a cache [2, pages, page_size, kv_heads, head_dim]";
        return Err(argument(op, name, expected, format!("{:?}", layout.dims())));
    };
    let (apart, stride) = (layout.stride()[0], layout.stride()[1..].to_vec());
    let keys = Layout::new(dims.into(), stride, layout.start_offset());
    let (pages, keys) = Pages::of(op, name, &keys)?;
    if apart < keys.len() {
        let expected = "a cache whose keys all come before its values, as in [2, pages, ..]";
        return Err(argument(op, name, expected, strides(layout)));
    }
    let values = keys.start + apart..keys.end + apart;
    check_offset(op, name, values.start)?;
    Ok((pages, [keys, values]))
}

fn four(op: &'static str, layout: &Layout, values: &[usize]) -> Result<[usize; 4]> {
    values.try_into().map_err(|_| {
        let shape = layout.shape().clone();
        Error::UnexpectedNumberOfDims { expected: 4, got: values.len(), shape }
            .context(format!("{op}: pages are [pages, page_size, kv_heads, head_dim]"))
    })
}

fn check_shape(op: &'static str, name: &'static str, layout: &Layout, shape: &[usize]) -> Result<()> {
    if layout.dims() == shape {
        return Ok(());
    }
    let (expected, got) = (shape.into(), layout.shape().clone());
    Err(Error::UnexpectedShape { msg: format!("{op}: argument `{name}`"), expected, got }.bt())
}

fn check_offset(op: &'static str, name: &'static str, offset: usize) -> Result<()> {
    if offset.is_multiple_of(ALIGNMENT) {
        return Ok(());
    }
    Err(argument(op, name, format!("a view at an offset that is a multiple of {ALIGNMENT} elements"), offset))
}

fn strides(layout: &Layout) -> String {
    format!("shape {:?} with strides {:?}", layout.dims(), layout.stride())
}
