//! Three decoding steps over a growing cache, and the same attention from two halves of the cache, merged.
//!
//! `cargo run --release -p longkv-attention --example quickstart`

use std::error::Error;

use longkv_attention::reference::{Probabilities, decode};
use longkv_attention::rope::{Rope, RopeConfig};
use longkv_attention::softmax_state::merge_normalised;
use longkv_attention::{AttentionSpec, HeadShape, HeadsView, Mask, RaggedKv, Score, cpu};

fn main() -> Result<(), Box<dyn Error>> {
    // A layer with 8 query heads over 2 KV heads of 64 channels.
    let shape = HeadShape::new(8, 2, 64, 64)?;
    let spec = AttentionSpec { shape, score: Score::new(1.0 / 8.0)?, mask: Mask::Causal };
    let rope = Rope::new(RopeConfig::new(64, 10_000.0), 4096)?;

    // A cache of 1000 tokens; keys are stored rotated.
    let signal = |i: usize, salt: usize| ((i * 7919 + salt * 104_729) as f32 * 0.001).sin();
    let (mut kv_len, heads, dim) = (1000, shape.kv_heads(), shape.qk_dim());
    let mut keys: Vec<f32> = (0..kv_len * heads * dim).map(|i| signal(i, 1)).collect();
    let mut values: Vec<f32> = (0..kv_len * heads * dim).map(|i| signal(i, 2)).collect();
    let positions: Vec<u32> = (0..kv_len as u32).collect();
    rope.apply(&mut keys, heads, &positions)?;

    let mut out = vec![0.0; shape.q_heads() * shape.v_dim()];
    let mut lse = vec![0.0; shape.q_heads()];
    let mut q = Vec::new();
    for step in 0..3 {
        let position = kv_len as u32;
        let mut key: Vec<f32> = (0..heads * dim).map(|i| signal(i, 10 + step)).collect();
        rope.apply(&mut key, heads, &[position])?;
        keys.extend(key);
        values.extend((0..heads * dim).map(|i| signal(i, 20 + step)));
        kv_len += 1;

        q = (0..shape.q_heads() * dim).map(|i| signal(i, 30 + step)).collect();
        rope.apply(&mut q, shape.q_heads(), &[position])?;
        cpu::attend(
            &spec,
            HeadsView::nhd(&q, 1, shape.q_heads(), dim)?,
            HeadsView::nhd(&keys, kv_len, heads, dim)?,
            HeadsView::nhd(&values, kv_len, heads, dim)?,
            &mut out,
            &mut lse,
        )?;
        println!("step {step}: {kv_len} tokens, lse of head 0 {:.6}, out {:?}", lse[0], &out[..3]);
    }

    // The oracle says how far off f32 was.
    let q = HeadsView::nhd(&q, 1, shape.q_heads(), dim)?;
    let k = HeadsView::nhd(&keys, kv_len, heads, dim)?;
    let v = HeadsView::nhd(&values, kv_len, heads, dim)?;
    let oracle = decode(&spec, q, &RaggedKv::single(k, v)?, Probabilities::Exact)?;
    let largest = |found: &[f32]| {
        found.iter().zip(&oracle.out).map(|(x, y)| (f64::from(*x) - y).abs()).fold(0.0, f64::max)
    };
    println!("largest error of the f32 path: {:.1e}", largest(&out));

    // Two halves of the cache, each attended alone, merge into the whole.
    let half = AttentionSpec { mask: Mask::Full, ..spec };
    let (mut other_out, mut other_lse) = (out.clone(), lse.clone());
    let cut = kv_len / 3;
    cpu::attend(&half, q, k.slice(0..cut), v.slice(0..cut), &mut out, &mut lse)?;
    cpu::attend(&half, q, k.slice(cut..kv_len), v.slice(cut..kv_len), &mut other_out, &mut other_lse)?;
    for head in 0..shape.q_heads() {
        let row = head * shape.v_dim()..(head + 1) * shape.v_dim();
        merge_normalised(&mut out[row.clone()], &mut lse[head], &other_out[row], other_lse[head])?;
    }
    println!("largest error after merging two parts: {:.1e}", largest(&out));
    assert!(largest(&out) < 1e-5, "f32 attention is this close to the oracle");
    Ok(())
}
