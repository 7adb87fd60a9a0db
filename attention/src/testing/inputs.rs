//! Random inputs of the kinds that break attention kernels.

use super::Rng;
use crate::Element;

/// A kind of random tensor. All values are finite and storable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Inputs {
    /// N(0, 1).
    Normal,
    /// N(0, 1) with one element in a thousand from N(0, 100): the mix of the FlashAttention-3 paper.
    OutlierElements,
    /// Channels with offsets 3·N(0, 1) and spreads from U(0.1, 2.1): what keys of real models look like, and what per-token
    /// quantization fails on.
    OutlierChannels,
    /// N(0, 64): with queries of the same kind the softmax saturates, one key takes all the weight.
    Saturated,
    /// One N(0, 1) value everywhere: every score ties, every quantization group is constant.
    Constant,
}

impl Inputs {
    /// Every kind.
    pub const ALL: [Inputs; 5] = [
        Inputs::Normal,
        Inputs::OutlierElements,
        Inputs::OutlierChannels,
        Inputs::Saturated,
        Inputs::Constant,
    ];

    /// Values `[vectors, dim]` in f32.
    pub fn values(self, vectors: usize, dim: usize, seed: u64) -> Vec<f32> {
        let mut rng = Rng::new(seed ^ 0x6c6f_6e67_6b76);
        let channels: Vec<(f64, f64)> =
            (0..dim).map(|_| (3.0 * rng.normal(), 0.1 + 2.0 * rng.uniform())).collect();
        let constant = rng.normal();
        let mut value = |channel: usize| match self {
            Inputs::Normal => rng.normal(),
            Inputs::OutlierElements => rng.normal() * if rng.below(1000) == 0 { 10.0 } else { 1.0 },
            Inputs::OutlierChannels => channels[channel].0 + channels[channel].1 * rng.normal(),
            Inputs::Saturated => 8.0 * rng.normal(),
            Inputs::Constant => constant,
        };
        (0..vectors * dim).map(|i| value(i % dim) as f32).collect()
    }

    /// Values `[vectors, dim]` in a storage type.
    pub fn generate<T: Element>(self, vectors: usize, dim: usize, seed: u64) -> Vec<T> {
        self.values(vectors, dim, seed).into_iter().map(T::from_f32).collect()
    }
}

/// Lengths at which tiled loops go wrong: 0, 1, and around one and two tiles.
pub fn edge_lengths(tile: usize) -> Vec<usize> {
    let mut lengths =
        vec![0, 1, tile.saturating_sub(1), tile, tile + 1, 2 * tile - 1, 2 * tile, 2 * tile + 1];
    lengths.sort_unstable();
    lengths.dedup();
    lengths
}

/// (query heads, KV heads) of real models: every ratio that occurs, powers of two or not.
pub const fn head_ratios() -> [(usize, usize); 7] {
    [(4, 4), (6, 2), (8, 2), (5, 1), (14, 2), (8, 1), (16, 1)]
}

/// A buffer of NaN, to be wholly overwritten by what is tested.
pub fn poison<T: Element>(len: usize) -> Vec<T> {
    vec![T::from_f32(f32::NAN); len]
}

/// Page ids `0..pages` in random order.
pub fn shuffled_pages(pages: usize, seed: u64) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..pages as u32).collect();
    Rng::new(seed).shuffle(&mut ids);
    ids
}

/// Copies packed vectors `[tokens, heads, dim]` of ragged sequences into NaN-filled pages.
///
/// `cu_seqlens` `[batch + 1]`; `block_table` `[batch, max_pages]` names the page of every `page_size` tokens; element
/// `offset(page, slot, head)` is where a vector goes, in a store of `len` elements.
///
/// # Panics
/// When the table is too short, or a vector falls outside the store.
#[allow(clippy::too_many_arguments)]
pub fn paged_copy<T: Element>(
    packed: &[T],
    heads: usize,
    dim: usize,
    cu_seqlens: &[u32],
    block_table: &[u32],
    page_size: usize,
    len: usize,
    offset: impl Fn(usize, usize, usize) -> usize,
) -> Vec<T> {
    let mut store = poison(len);
    let batch = cu_seqlens.len() - 1;
    let max_pages = block_table.len() / batch.max(1);
    for sequence in 0..batch {
        for (i, token) in (cu_seqlens[sequence] as usize..cu_seqlens[sequence + 1] as usize).enumerate() {
            assert!(i / page_size < max_pages, "sequence {sequence} is longer than its pages");
            let page = block_table[sequence * max_pages + i / page_size] as usize;
            for head in 0..heads {
                let to = offset(page, i % page_size, head);
                store[to..to + dim].copy_from_slice(&packed[(token * heads + head) * dim..][..dim]);
            }
        }
    }
    store
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_what_they_say() {
        let spread = |values: &[f32]| {
            let values: Vec<f64> = values.iter().map(|&x| f64::from(x)).collect();
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            (values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt()
        };
        let (vectors, dim) = (512, 32);
        for kind in Inputs::ALL {
            let values = kind.values(vectors, dim, 3);
            assert_eq!(values.len(), vectors * dim);
            assert!(values.iter().all(|x| x.is_finite()), "{kind:?}");
            assert_eq!(values, kind.values(vectors, dim, 3), "{kind:?}: a seed names its values");
            if kind != Inputs::Constant {
                assert_ne!(values, kind.values(vectors, dim, 4), "{kind:?}");
            }
            let spread = spread(&values);
            let expected = match kind {
                Inputs::Normal => 0.95..1.05,
                Inputs::OutlierElements => 0.95..1.3,
                Inputs::OutlierChannels => 2.0..5.0,
                Inputs::Saturated => 7.5..8.5,
                Inputs::Constant => 0.0..1e-5,
            };
            assert!(expected.contains(&spread), "{kind:?}: spread {spread}");
        }
    }

    #[test]
    fn lengths_and_pages() {
        assert_eq!(edge_lengths(64), [0, 1, 63, 64, 65, 127, 128, 129]);
        assert_eq!(edge_lengths(1), [0, 1, 2, 3]);
        let mut pages = shuffled_pages(9, 1);
        assert_ne!(pages, (0..9).collect::<Vec<_>>());
        pages.sort_unstable();
        assert_eq!(pages, (0..9).collect::<Vec<_>>());
        assert!(poison::<half::bf16>(3).iter().all(|x| x.is_nan()));
    }
}
