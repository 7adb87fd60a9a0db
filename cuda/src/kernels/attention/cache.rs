//! Checks of KV caches that the attention kernels share.

use bytemuck::Pod;

use crate::Error;
use crate::memory::View;

/// How much of a cache the kernels can index.
#[derive(Debug, Clone, Copy)]
pub(super) struct CacheExtent {
    /// Pages in the pool and log2 of the tokens in each; `None` for a contiguous cache.
    pub(super) pages: Option<(u32, u32)>,
    /// Tokens of a contiguous cache.
    pub(super) tokens: u32,
    /// KV heads.
    pub(super) heads: u32,
}

impl CacheExtent {
    /// Checks the pool of a paged cache.
    pub(super) fn check_paged(&self, kernel: &str) -> Result<(), Error> {
        let Some((pages, page_shift)) = self.pages else { return Ok(()) };
        if pages == 0 {
            return Err(Error::argument(kernel, "num_pages", "at least 1", 0));
        }
        if !(3..=30).contains(&page_shift) {
            return Err(Error::argument(
                kernel,
                "page_shift",
                "3 to 30: pages of 8 tokens or more",
                page_shift,
            ));
        }
        Ok(())
    }

    /// Checks that a paged cache has a block table, long enough, and a contiguous one its starts, and neither both.
    pub(super) fn check_places(
        &self,
        kernel: &str,
        block_table: Option<&View<'_, u32>>,
        kv_start: Option<&View<'_, u32>>,
        batch: usize,
        table_len: impl FnOnce() -> usize,
    ) -> Result<(), Error> {
        let given = |view: Option<&View<'_, u32>>| if view.is_some() { "given" } else { "missing" };
        match (self.pages, block_table, kv_start) {
            (Some(_), Some(table), None) => {
                self.check_paged(kernel)?;
                table.check(kernel, "block_table", table_len(), 4)
            }
            (None, None, Some(start)) => start.check(kernel, "kv_start", batch, 4),
            (pages, ..) => {
                let expected = match pages {
                    Some(_) => "given, and kv_start missing, for a paged cache",
                    None => "missing, and kv_start given, for a contiguous cache",
                };
                let found = format!("{}, and kv_start {}", given(block_table), given(kv_start));
                Err(Error::argument(kernel, "block_table", expected, found))
            }
        }
    }
}

/// Elements of a block table that `[head, batch]` strides can reach; a head stride of 0 means that heads share it. What no
/// memory can hold, negative strides among it, is `usize::MAX`, which no view has.
pub(in crate::kernels) fn table_len(strides: [i64; 2], heads: u32, batch: u32, max_pages: u32) -> usize {
    let last = |count: u32, stride: i64| {
        usize::try_from(stride).unwrap_or(usize::MAX).saturating_mul(count.saturating_sub(1) as usize)
    };
    if strides.iter().any(|stride| *stride < 0) {
        return usize::MAX;
    }
    last(heads, strides[0]).saturating_add(last(batch, strides[1])).saturating_add(max_pages as usize)
}

/// Checks the factor of scores: kernels take the maximum before it.
pub(super) fn check_scale(kernel: &str, scale: f32) -> Result<(), Error> {
    if scale > 0.0 { Ok(()) } else { Err(Error::argument(kernel, "scale", "a positive number", scale)) }
}

/// Elements of a dense tensor; `usize::MAX`, which no view has, where no memory can hold them.
pub(in crate::kernels) fn elements(extents: &[usize]) -> usize {
    if extents.contains(&0) {
        return 0;
    }
    extents.iter().copied().fold(1, usize::saturating_mul)
}

/// Checks that every vector `[dim]` that `[page, token, head]` strides can reach lies within `view` and starts at a 16-byte
/// boundary.
pub(super) fn check_cache<E: Pod>(
    kernel: &str,
    argument: &'static str,
    view: &View<'_, E>,
    dim: usize,
    extent: CacheExtent,
    strides: [i64; 3],
) -> Result<(), Error> {
    let chunk = 16 / size_of::<E>() as i64;
    if strides.iter().any(|stride| *stride < 0 || stride % chunk != 0) {
        return Err(Error::argument(
            kernel,
            argument,
            format_args!("strides that are multiples of {chunk} elements"),
            format_args!("page, token and head strides of {strides:?}"),
        ));
    }
    let [page, token, head] = strides.map(|stride| stride as u128);
    let (pages, tokens) = match extent.pages {
        Some((pages, page_shift)) => (u128::from(pages), 1u128 << page_shift),
        None => (1, u128::from(extent.tokens)),
    };
    let needed = if pages > 0 && tokens > 0 {
        (pages - 1) * page + (tokens - 1) * token + u128::from(extent.heads - 1) * head + dim as u128
    } else {
        0
    };
    view.check(kernel, argument, usize::try_from(needed).unwrap_or(usize::MAX), 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_saturate() {
        assert_eq!(table_len([0, 4], 8, 3, 4), 12);
        assert_eq!(table_len([12, 4], 2, 3, 4), 24);
        assert_eq!(table_len([0, -1], 8, 3, 4), usize::MAX, "a table that runs backwards");
        assert_eq!(table_len([i64::MAX, i64::MAX], 4, 4, 4), usize::MAX);
        assert_eq!(elements(&[2, 3, 4]), 24);
        assert_eq!(elements(&[1 << 32, 1 << 32]), usize::MAX);
        assert_eq!(elements(&[1 << 32, 1 << 32, 0]), 0);
    }
}
