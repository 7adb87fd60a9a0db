//! Low-rank caches: 32 query heads over 8 KV heads of 128 channels in bf16, pages of 64 tokens.

mod append;
mod calibrate;
mod decode;

use kv_compress::cache::PageLayout;
use kv_compress::{HeadRanks, LayerRanks};
use longkv_attention::HeadShape;

const Q_HEADS: usize = 32;
const KV_HEADS: usize = 8;
const DIM: usize = 128;
const PAGE: usize = 64;

/// Ranks (r_k, r_v) of the eight KV heads.
type Ranks = [(usize, usize); KV_HEADS];

/// Half of the dimensions, spread over the heads from 16 to 128.
const MIXED: Ranks = [(16, 128), (48, 96), (128, 112), (32, 16), (64, 64), (16, 16), (96, 80), (80, 32)];
/// Half of the dimensions of every head: the bytes of [`MIXED`].
const UNIFORM: Ranks = [(64, 64); KV_HEADS];
/// One head in full among seven of the least rank.
const ONE_WIDE: Ranks = [(16, 16), (16, 16), (16, 16), (128, 128), (16, 16), (16, 16), (16, 16), (16, 16)];
/// The bytes of [`ONE_WIDE`], as even as ranks can be.
const EVEN: Ranks = [(32, 32), (32, 32), (32, 32), (32, 16), (32, 32), (32, 32), (32, 32), (32, 16)];

fn shape() -> HeadShape {
    HeadShape::new(Q_HEADS, KV_HEADS, DIM, DIM).expect("a valid shape")
}

fn layout(ranks: &Ranks) -> PageLayout {
    let heads = ranks.iter().map(|&(k, v)| HeadRanks { k, v }).collect();
    PageLayout::new(&LayerRanks::new(&shape(), heads).expect("valid ranks"), PAGE).expect("a page size")
}

criterion::criterion_group!(benches, append::gpu, calibrate::cpu, decode::cpu, decode::gpu);
