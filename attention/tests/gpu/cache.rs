//! Keys and values of a test case: packed for the oracle, and in the case's cache for the kernel.

use attention::gpu::CacheLayout;
use attention::testing::{Inputs, paged_copy, shuffled_pages};
use attention::{Element, HeadsView, PageLayout, RaggedKv};
use longkv_attention as attention;

/// Where a case keeps its keys and values.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Cache {
    /// `[pages, page_size, kv_heads, dim]`.
    Nhd(usize),
    /// `[pages, kv_heads, page_size, dim]`.
    Hnd(usize),
    /// `[tokens, kv_heads, dim]`.
    Contiguous,
}

/// Keys and values of a batch.
pub(crate) struct KeysValues<E> {
    kv_heads: usize,
    dims: (usize, usize),
    /// Packed keys `[tokens, kv_heads, qk_dim]`.
    k: Vec<E>,
    /// Packed values `[tokens, kv_heads, v_dim]`.
    v: Vec<E>,
    /// First token of each sequence, then the number of tokens.
    pub(crate) cu_seqlens: Vec<u32>,
    /// Keys in the cache; what belongs to nobody is NaN.
    pub(crate) k_cache: Vec<E>,
    /// Values in the cache; what belongs to nobody is NaN.
    pub(crate) v_cache: Vec<E>,
    /// Entries of unused pages are out of range: nobody may read them. Empty for a contiguous cache.
    pub(crate) block_table: Vec<u32>,
    /// Where the kernel finds it all.
    pub(crate) layout: CacheLayout,
}

impl<E: Element> KeysValues<E> {
    /// Random keys of the given kind and normal values, `dims` channels each, in a cache of scattered pages.
    pub(crate) fn random(
        kv_lens: &[usize],
        kv_heads: usize,
        dims: (usize, usize),
        cache: Cache,
        inputs: Inputs,
        seed: u64,
    ) -> Self {
        let (qk_dim, v_dim) = dims;
        let mut cu_seqlens = vec![0u32];
        cu_seqlens.extend(kv_lens.iter().scan(0, |sum, len| {
            *sum += *len as u32;
            Some(*sum)
        }));
        let tokens = kv_lens.iter().sum::<usize>();
        let k: Vec<E> = inputs.generate(tokens * kv_heads, qk_dim, seed + 1);
        let v: Vec<E> = Inputs::Normal.generate(tokens * kv_heads, v_dim, seed + 2);
        let (page_size, layout): (usize, fn(usize, usize, usize) -> PageLayout) = match cache {
            Cache::Nhd(page_size) => (page_size, PageLayout::nhd),
            Cache::Hnd(page_size) => (page_size, PageLayout::hnd),
            Cache::Contiguous => {
                let layout = CacheLayout::Contiguous {
                    tokens,
                    k: PageLayout::nhd(1, kv_heads, qk_dim),
                    v: PageLayout::nhd(1, kv_heads, v_dim),
                };
                let (k_cache, v_cache) = (k.clone(), v.clone());
                let block_table = Vec::new();
                return KeysValues {
                    kv_heads,
                    dims,
                    k,
                    v,
                    cu_seqlens,
                    k_cache,
                    v_cache,
                    block_table,
                    layout,
                };
            }
        };
        // One page more than needed, so that one is nobody's.
        let pages = kv_lens.iter().map(|len| len.div_ceil(page_size)).sum::<usize>() + 1;
        let max_pages = kv_lens.iter().max().map_or(0, |len| len.div_ceil(page_size)) + 1;
        let mut free = shuffled_pages(pages, seed).into_iter();
        let mut block_table = vec![u32::MAX; kv_lens.len() * max_pages];
        for (entries, len) in block_table.chunks_mut(max_pages).zip(kv_lens) {
            entries[..len.div_ceil(page_size)].fill_with(|| free.next().expect("enough pages"));
        }
        let store = |packed: &[E], dim: usize| {
            let layout = layout(page_size, kv_heads, dim);
            let place = |page: usize, slot: usize, head: usize| {
                layout.offset(page as u64, slot as u64, head as u64).expect("small offsets") as usize
            };
            let len = pages * page_size * kv_heads * dim;
            paged_copy(packed, kv_heads, dim, &cu_seqlens, &block_table, page_size, len, place)
        };
        KeysValues {
            k_cache: store(&k, qk_dim),
            v_cache: store(&v, v_dim),
            layout: CacheLayout::Paged {
                page_size,
                pages,
                max_pages,
                per_head: false,
                k: layout(page_size, kv_heads, qk_dim),
                v: layout(page_size, kv_heads, v_dim),
            },
            kv_heads,
            dims,
            k,
            v,
            cu_seqlens,
            block_table,
        }
    }

    /// The packed keys and values, for the oracle.
    pub(crate) fn packed(&self) -> RaggedKv<'_, E> {
        let tokens = self.cu_seqlens[self.cu_seqlens.len() - 1] as usize;
        let view = |data, dim| HeadsView::nhd(data, tokens, self.kv_heads, dim).expect("packed vectors");
        RaggedKv::new(view(&self.k, self.dims.0), view(&self.v, self.dims.1), &self.cu_seqlens)
            .expect("keys and values of the same tokens")
    }

    /// The same cache with its pages in reverse order.
    pub(crate) fn reverse_pages(mut self) -> Self {
        let CacheLayout::Paged { pages, .. } = self.layout else { panic!("not paged") };
        for store in [&mut self.k_cache, &mut self.v_cache] {
            let page = store.len() / pages;
            *store = store.chunks(page).rev().flatten().copied().collect();
        }
        for id in self.block_table.iter_mut().filter(|id| **id != u32::MAX) {
            *id = pages as u32 - 1 - *id;
        }
        self
    }
}
