//! Keys and values of a test case: packed for the oracle, and in the case's cache for the kernel.

use attention::gpu::CacheLayout;
use attention::testing::{Inputs, poison, shuffled_pages};
use attention::{Element, HeadsView, Mask, PageLayout, RaggedKv};
use longkv_attention as attention;

/// Where a case keeps its keys and values.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Cache {
    /// `[pages, page_size, kv_heads, dim]`.
    Nhd(usize),
    /// `[pages, kv_heads, page_size, dim]`.
    Hnd(usize),
    /// `[pages, page_size, dim]`: every KV head has pages of its own.
    PerHead(usize),
    /// `[tokens, kv_heads, dim]`.
    Contiguous,
    /// `[kv_heads, tokens, dim]`: sequences in reverse order, memory of nobody before, between and after them.
    Gaps,
    /// The same with eight elements between heads, at strides that no tensor map can hold.
    OddGaps,
}

/// Tokens of nobody beside a sequence of a cache with gaps.
const GAP: usize = 5;

/// Keys and values of a batch.
pub(crate) struct KeysValues<E> {
    kv_heads: usize,
    dims: (usize, usize),
    /// Packed keys `[tokens, kv_heads, qk_dim]`.
    k: Vec<E>,
    /// Packed values `[tokens, kv_heads, v_dim]`.
    v: Vec<E>,
    /// First packed token of each sequence, then the number of tokens.
    cu_seqlens: Vec<u32>,
    /// Keys in the cache; what belongs to nobody is NaN.
    pub(crate) k_cache: Vec<E>,
    /// Values in the cache; what belongs to nobody is NaN.
    pub(crate) v_cache: Vec<E>,
    /// `[batch, max_pages]`, or `[kv_heads, batch, max_pages]`. Entries of unused pages are out of range: nobody may read
    /// them. Empty for a contiguous cache.
    pub(crate) block_table: Vec<u32>,
    /// First token of each sequence of a contiguous cache `[batch]`. Empty for a paged one.
    pub(crate) kv_start: Vec<u32>,
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
        let mut cu_seqlens = vec![0u32];
        cu_seqlens.extend(kv_lens.iter().scan(0, |sum, len| {
            *sum += *len as u32;
            Some(*sum)
        }));
        let tokens = kv_lens.iter().sum::<usize>();
        let mut made = KeysValues {
            kv_heads,
            dims,
            k: inputs.generate(tokens * kv_heads, dims.0, seed + 1),
            v: Inputs::Normal.generate(tokens * kv_heads, dims.1, seed + 2),
            cu_seqlens,
            k_cache: Vec::new(),
            v_cache: Vec::new(),
            block_table: Vec::new(),
            kv_start: Vec::new(),
            layout: CacheLayout::Contiguous {
                tokens,
                k: PageLayout::nhd(1, kv_heads, dims.0),
                v: PageLayout::nhd(1, kv_heads, dims.1),
            },
        };
        let slots = match cache {
            Cache::Nhd(page_size) => made.scatter(kv_lens, page_size, PageLayout::nhd, false, seed),
            Cache::Hnd(page_size) => made.scatter(kv_lens, page_size, PageLayout::hnd, false, seed),
            Cache::PerHead(page_size) => made.scatter(kv_lens, page_size, PageLayout::nhd, true, seed),
            Cache::Contiguous => {
                made.kv_start = made.cu_seqlens[..kv_lens.len()].to_vec();
                tokens * kv_heads
            }
            Cache::Gaps | Cache::OddGaps => {
                let between = if matches!(cache, Cache::OddGaps) { 8 } else { 0 };
                let mut next = GAP;
                made.kv_start = vec![0; kv_lens.len()];
                for (start, len) in made.kv_start.iter_mut().zip(kv_lens).rev() {
                    *start = next as u32;
                    next += len + GAP;
                }
                let layout = |dim| {
                    let dense = PageLayout::hnd(next, kv_heads, dim);
                    PageLayout { head_stride: dense.head_stride + between, ..dense }
                };
                made.layout = CacheLayout::Contiguous { tokens: next, k: layout(dims.0), v: layout(dims.1) };
                // Room for what lies between heads.
                (next + 1) * kv_heads
            }
        };
        (made.k_cache, made.v_cache) = (poison(slots * dims.0), poison(slots * dims.1));
        for (sequence, &len) in kv_lens.iter().enumerate() {
            for token in 0..len {
                for head in 0..kv_heads {
                    made.store(sequence, token, head);
                }
            }
        }
        made
    }

    /// Gives every sequence pages in random order; vectors that the pages hold.
    fn scatter(
        &mut self,
        kv_lens: &[usize],
        page_size: usize,
        layout: fn(usize, usize, usize) -> PageLayout,
        per_head: bool,
        seed: u64,
    ) -> usize {
        let (tables, heads) = if per_head { (self.kv_heads, 1) } else { (1, self.kv_heads) };
        // One page more than needed, so that one is nobody's.
        let pages = tables * kv_lens.iter().map(|len| len.div_ceil(page_size)).sum::<usize>() + 1;
        let max_pages = kv_lens.iter().max().map_or(0, |len| len.div_ceil(page_size)) + 1;
        let mut free = shuffled_pages(pages, seed).into_iter();
        self.block_table = vec![u32::MAX; tables * kv_lens.len() * max_pages];
        for (row, entries) in self.block_table.chunks_mut(max_pages).enumerate() {
            let used = kv_lens[row % kv_lens.len()].div_ceil(page_size);
            entries[..used].fill_with(|| free.next().expect("enough pages"));
        }
        // Pages of one head: whichever head a page belongs to, its vectors start at the same place.
        let layout = |dim| PageLayout {
            head_stride: if per_head { 0 } else { layout(page_size, heads, dim).head_stride },
            ..layout(page_size, heads, dim)
        };
        let (k, v) = (layout(self.dims.0), layout(self.dims.1));
        self.layout = CacheLayout::Paged { page_size, pages, max_pages, per_head, k, v };
        pages * page_size * heads
    }

    fn batch(&self) -> usize {
        self.cu_seqlens.len() - 1
    }

    fn len(&self, sequence: usize) -> usize {
        (self.cu_seqlens[sequence + 1] - self.cu_seqlens[sequence]) as usize
    }

    /// Entry of the block table for a token.
    fn entry(&self, sequence: usize, token: usize, head: usize) -> usize {
        let CacheLayout::Paged { page_size, max_pages, per_head, .. } = self.layout else {
            panic!("not paged")
        };
        let table = if per_head { head } else { 0 };
        (table * self.batch() + sequence) * max_pages + token / page_size
    }

    /// Where the cache keeps a token's key and value.
    fn places(&self, sequence: usize, token: usize, head: usize) -> (usize, usize) {
        let (page, slot, k, v) = match self.layout {
            CacheLayout::Paged { page_size, k, v, .. } => {
                let page = self.block_table[self.entry(sequence, token, head)];
                (page.into(), token % page_size, k, v)
            }
            CacheLayout::Contiguous { k, v, .. } => (0, self.kv_start[sequence] as usize + token, k, v),
        };
        let place = |layout: PageLayout| {
            layout.offset(page, slot as u64, head as u64).expect("small offsets") as usize
        };
        (place(k), place(v))
    }

    /// Copies a token's packed key and value to the cache.
    fn store(&mut self, sequence: usize, token: usize, head: usize) {
        let from = (self.cu_seqlens[sequence] as usize + token) * self.kv_heads + head;
        let (k, v) = self.places(sequence, token, head);
        let (qk_dim, v_dim) = self.dims;
        self.k_cache[k..k + qk_dim].copy_from_slice(&self.k[from * qk_dim..][..qk_dim]);
        self.v_cache[v..v + v_dim].copy_from_slice(&self.v[from * v_dim..][..v_dim]);
    }

    /// Multiplies every key by the factor of its token.
    pub(crate) fn scale_keys(&mut self, factor: impl Fn(usize) -> f32) {
        for sequence in 0..self.batch() {
            for token in 0..self.len(sequence) {
                let first = (self.cu_seqlens[sequence] as usize + token) * self.kv_heads;
                for x in &mut self.k[first * self.dims.0..][..self.kv_heads * self.dims.0] {
                    *x = E::from_f32(x.to_f32() * factor(token));
                }
                (0..self.kv_heads).for_each(|head| self.store(sequence, token, head));
            }
        }
    }

    /// The packed keys and values, for the oracle.
    pub(crate) fn packed(&self) -> RaggedKv<'_, E> {
        let tokens = self.cu_seqlens[self.batch()] as usize;
        let view = |data, dim| HeadsView::nhd(data, tokens, self.kv_heads, dim).expect("packed vectors");
        RaggedKv::new(view(&self.k, self.dims.0), view(&self.v, self.dims.1), &self.cu_seqlens)
            .expect("keys and values of the same tokens")
    }

    /// The first `len` keys and values of one sequence, for the oracle.
    pub(crate) fn first_keys(&self, sequence: usize, len: usize) -> RaggedKv<'_, E> {
        let first = self.cu_seqlens[sequence] as usize;
        let (k, v) = (self.kv_heads * self.dims.0, self.kv_heads * self.dims.1);
        let (k, v) = (&self.k[first * k..][..len * k], &self.v[first * v..][..len * v]);
        let view = |data, dim| HeadsView::nhd(data, len, self.kv_heads, dim).expect("packed vectors");
        RaggedKv::single(view(k, self.dims.0), view(v, self.dims.1)).expect("keys and values")
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

    /// The same cache as if it had let go of every key that none of `queries` sees: NaN in its place, and no page for it
    /// where a whole page is hidden. Returns how many keys were hidden.
    pub(crate) fn forget_hidden(&mut self, mask: Mask, queries: impl Fn(usize) -> usize) -> usize {
        let mut hidden = 0;
        for sequence in 0..self.batch() {
            let (len, queries) = (self.len(sequence), queries(sequence));
            let seen: Vec<bool> = (0..len)
                .map(|key| (0..queries).any(|query| mask.keys(query, queries, len).contains(key)))
                .collect();
            hidden += seen.iter().filter(|seen| !**seen).count();
            for head in 0..self.kv_heads {
                for token in (0..len).filter(|&token| !seen[token]) {
                    let (k, v) = self.places(sequence, token, head);
                    self.k_cache[k..k + self.dims.0].fill(E::from_f32(f32::NAN));
                    self.v_cache[v..v + self.dims.1].fill(E::from_f32(f32::INFINITY));
                }
            }
            let CacheLayout::Paged { page_size, .. } = self.layout else { continue };
            for head in 0..self.kv_heads {
                for first in (0..len).step_by(page_size) {
                    if !seen[first..len.min(first + page_size)].contains(&true) {
                        let entry = self.entry(sequence, first, head);
                        self.block_table[entry] = u32::MAX;
                    }
                }
            }
        }
        hidden
    }
}
