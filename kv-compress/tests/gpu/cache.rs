//! Keys and values of a test case: packed and padded for the dense oracle, and in ragged pages for the kernel.

use attention::testing::{Inputs, poison, shuffled_pages};
use attention::{BlockTable, Element, HeadShape, HeadsView, RaggedKv};
use kv_compress::cache::{PageLayout, PagedView};
use kv_compress::{HeadRanks, LayerRanks};

/// Ranks `(r_k, r_v)` of a shape's KV heads.
pub(crate) fn ranks(shape: &HeadShape, pairs: &[(usize, usize)]) -> LayerRanks {
    let heads = pairs.iter().map(|&(k, v)| HeadRanks { k, v }).collect();
    LayerRanks::new(shape, heads).expect("valid ranks")
}

/// Low-rank keys and values of a batch.
pub(crate) struct Pages<E> {
    pub(crate) layout: PageLayout,
    head_dim: usize,
    /// First token of each sequence, then the number of tokens.
    pub(crate) cu_seqlens: Vec<u32>,
    pub(crate) lengths: Vec<u32>,
    /// Keys `[tokens, kv_heads, head_dim]`, 0 past the rank.
    padded_k: Vec<E>,
    /// Values `[tokens, kv_heads, head_dim]`, 0 past the rank.
    padded_v: Vec<E>,
    /// `[pages, page_elements]`; what belongs to nobody is NaN.
    pub(crate) pages: Vec<E>,
    /// `[batch, max_pages]`; entries of unused pages are out of range: nobody may read them.
    pub(crate) block_table: Vec<u32>,
    pub(crate) max_pages: usize,
}

impl<E: Element> Pages<E> {
    /// Random keys of the given kind and normal values in scattered pages.
    pub(crate) fn random(
        ranks: &LayerRanks,
        head_dim: usize,
        page_size: usize,
        kv_lens: &[usize],
        inputs: Inputs,
        seed: u64,
    ) -> Self {
        let layout = PageLayout::new(ranks, page_size).expect("a valid page size");
        let tokens = kv_lens.iter().sum::<usize>();
        let kv_heads = ranks.kv_heads();
        let mut padded_k: Vec<E> = inputs.generate(tokens * kv_heads, head_dim, seed + 1);
        let mut padded_v: Vec<E> = Inputs::Normal.generate(tokens * kv_heads, head_dim, seed + 2);
        let zero = E::from_f32(0.0);
        for (row, (k, v)) in padded_k.chunks_mut(head_dim).zip(padded_v.chunks_mut(head_dim)).enumerate() {
            let head = layout.head(row % kv_heads);
            k[head.k..].fill(zero);
            v[head.v..].fill(zero);
        }

        // One page more than needed, so that one is nobody's.
        let count = kv_lens.iter().map(|len| len.div_ceil(page_size)).sum::<usize>() + 1;
        let max_pages = kv_lens.iter().max().map_or(0, |len| len.div_ceil(page_size)) + 1;
        let mut free = shuffled_pages(count, seed).into_iter();
        let mut block_table = vec![u32::MAX; kv_lens.len() * max_pages];
        let mut pages = poison(count * layout.page_elements());
        let mut token = 0;
        for (entries, len) in block_table.chunks_mut(max_pages).zip(kv_lens) {
            entries[..len.div_ceil(page_size)].fill_with(|| free.next().expect("enough pages"));
            for i in 0..*len {
                let page = entries[i / page_size] as usize * layout.page_elements();
                let page = &mut pages[page..][..layout.page_elements()];
                for head in 0..kv_heads {
                    let ranks = layout.head(head);
                    let row = ((token + i) * kv_heads + head) * head_dim;
                    layout.keys(head).write(page, i % page_size, &padded_k[row..][..ranks.k]);
                    layout.values(head).write(page, i % page_size, &padded_v[row..][..ranks.v]);
                }
            }
            token += len;
        }
        let mut cu_seqlens = vec![0u32];
        for len in kv_lens {
            cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + *len as u32);
        }
        Pages {
            layout,
            head_dim,
            cu_seqlens,
            lengths: kv_lens.iter().map(|len| *len as u32).collect(),
            padded_k,
            padded_v,
            pages,
            block_table,
            max_pages,
        }
    }

    /// Pages in the pool.
    pub(crate) fn count(&self) -> usize {
        self.pages.len() / self.layout.page_elements()
    }

    /// The cache as the oracle in the reduced basis reads it.
    pub(crate) fn view(&self) -> PagedView<'_, E> {
        PagedView {
            layout: &self.layout,
            pages: &self.pages,
            block_table: BlockTable::shared(&self.block_table, self.lengths.len(), self.max_pages)
                .expect("a block table"),
            lengths: &self.lengths,
        }
    }

    /// Keys and values padded with zeros to the head's full dimension, for the dense oracle.
    pub(crate) fn padded(&self) -> RaggedKv<'_, E> {
        let tokens = self.cu_seqlens[self.cu_seqlens.len() - 1] as usize;
        let heads = self.layout.ranks().kv_heads();
        let view = |data| HeadsView::nhd(data, tokens, heads, self.head_dim).expect("padded vectors");
        RaggedKv::new(view(&self.padded_k), view(&self.padded_v), &self.cu_seqlens).expect("keys and values")
    }

    /// Fills everything before key `first[s]` of each sequence with NaN; pages that only hold such keys are out of range.
    pub(crate) fn hide(&mut self, first: &[usize]) {
        let page_elements = self.layout.page_elements();
        for (sequence, first) in first.iter().enumerate() {
            for (place, id) in self.block_table[sequence * self.max_pages..].iter_mut().enumerate() {
                let Some(hidden) = first.checked_sub(place * self.layout.page_size()) else { break };
                if hidden >= self.layout.page_size() {
                    *id = u32::MAX;
                    continue;
                }
                let page = &mut self.pages[*id as usize * page_elements..][..page_elements];
                for head in 0..self.layout.ranks().kv_heads() {
                    for region in [self.layout.keys(head), self.layout.values(head)] {
                        for token in 0..hidden {
                            region.write(page, token, &vec![E::from_f32(f32::NAN); region.rank()]);
                        }
                    }
                }
                break;
            }
        }
    }

    /// The same cache with its pages in reverse order.
    pub(crate) fn reverse_pages(mut self) -> Self {
        let count = self.count() as u32;
        self.pages = self.pages.chunks(self.layout.page_elements()).rev().flatten().copied().collect();
        for id in self.block_table.iter_mut().filter(|id| **id != u32::MAX) {
            *id = count - 1 - *id;
        }
        self
    }
}
