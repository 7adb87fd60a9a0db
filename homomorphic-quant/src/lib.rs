//! Attention computed directly on quantized KV codes (HACK).
//!
//! Keys and values are stored as 2, 4 or 8-bit codes in partitions of Π tokens or channels; scores and outputs are
//! integer matrix products of these codes with 8-bit queries and probabilities, corrected by cached sums. Nothing is
//! dequantized.
//!
//! Source: the HACK paper (USENIX ATC '26; its arXiv v1 differs in the quantization axes).
//!
//! # Example
//!
//! A prompt of 100 tokens goes into a 2-bit cache; a query attends to it on the codes:
//!
//! ```
//! use attention::{AttentionSpec, HeadShape, HeadsView, Mask, Score};
//! use homomorphic_quant::{Bits, Cache, Capacity, Config, KvShape, reference};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let config = Config::new(Bits::Two, Bits::Two); // Π = 64, 4 sink tokens, bf16
//! let shape = KvShape { kv_heads: 2, qk_dim: 128, v_dim: 128 };
//! let mut cache = Cache::new(&config, 0, shape, Capacity::of_tokens(&config, 1, 200))?;
//! let mut sequence = cache.sequence();
//!
//! let keys: Vec<f32> = (0..100 * 2 * 128).map(|i| (i as f32 * 0.37).sin()).collect();
//! let values = vec![2.0; 100 * 2 * 128]; // [tokens, kv_heads, v_dim]
//! let (k, v) = (HeadsView::nhd(&keys, 100, 2, 128)?, HeadsView::nhd(&values, 100, 2, 128)?);
//! cache.append(&mut sequence, k, v)?;
//! assert_eq!(sequence.blocks().len(), 1); // 4 sinks, 64 tokens in codes, 32 in the open block
//!
//! let spec = AttentionSpec { shape: HeadShape::new(8, 2, 128, 128)?, score: Score::new(0.088)?, mask: Mask::Causal };
//! let q = vec![0.5; 8 * 128]; // [1, q_heads, qk_dim]
//! let (mut out, mut lse) = (vec![0.0; 8 * 128], vec![0.0; 8]);
//! reference::attend(&spec, &cache, &sequence, HeadsView::nhd(&q, 1, 8, 128)?, None, &mut out, &mut lse)?;
//! assert!(out.iter().all(|x| (x - 2.0).abs() < 1e-2)); // a mean of equal values
//! # Ok(())
//! # }
//! ```
//!
//! # Map
//!
//! | module or type | what it is |
//! |---|---|
//! | [`Config`] | widths, partition Π, sinks, storage type, rounding, layout, and overrides per layer and head |
//! | [`quantizer`] | the quantizer as operations: bit-exact on every backend |
//! | [`homomorphic`] | the product itself (Eq. 4), for matrices of any kind |
//! | [`Cache`], [`Sequence`] | one layer's sinks, closed blocks and open blocks, in pages that sequences share |
//! | [`HeadBlock`] | a closed block of one KV head in the clear |
//! | [`page`] | the bytes of pages, in every layout |
//! | [`mod@reference`] | decode and prefill on the CPU, and the f64 oracle |
//! | [`wire`] | the cache as a stream, from node to node |
//! | `gpu` | the kernels, with feature `cuda` |
//! | [`Error`] | what a caller can get wrong |

mod block;
pub mod cache;
pub mod config;
mod error;
#[cfg(feature = "cuda")]
pub mod gpu;
pub mod homomorphic;
pub mod page;
pub mod quantizer;
pub mod reference;
pub mod wire;

pub use block::{BlockPlace, HeadBlock};
pub use cache::{Cache, Capacity, KvShape, Sequence};
pub use config::{Bits, BitsOverride, Config, HeadBits, Layout, OpenBlock, Rounding};
pub use error::Error;
