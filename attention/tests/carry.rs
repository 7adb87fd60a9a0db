//! Attention carried from block to block equals attention at once, whatever the placement of tokens.

mod common;

use attention::reference::{Carry, Output, Probabilities, prefill};
use attention::softmax_state::Real;
use attention::testing::{Comparison, Inputs, Rng, Tolerance};
use attention::{AttentionSpec, Element, Error, HeadShape, HeadsView, Mask, RaggedKv, RaggedView};
use common::{Sequence, spec};
use half::bf16;
use longkv_attention as attention;
use proptest::prelude::*;

/// The tokens at `positions` of a packed tensor `[tokens, heads, dim]`.
fn gather<T: Element>(view: HeadsView<'_, T>, positions: &[u64]) -> Vec<T> {
    positions
        .iter()
        .flat_map(|&token| (0..view.heads()).flat_map(move |head| view.vector(token as usize, head).to_vec()))
        .collect()
}

/// Deals `tokens` tokens to `shards` shards at random; shards may be empty.
fn deal(tokens: usize, shards: usize, rng: &mut Rng) -> Vec<Vec<u64>> {
    let mut dealt = vec![Vec::new(); shards];
    for token in 0..tokens {
        dealt[rng.below(shards)].push(token as u64);
    }
    dealt
}

/// One shard of queries over all shards of keys, in random order, half of them through a second carry that is merged.
fn sharded<R: Real>(
    spec: &AttentionSpec,
    sequence: &Sequence<f32, bf16>,
    queries: &[u64],
    shards: &[Vec<u64>],
    rng: &mut Rng,
) -> Output {
    let shape = spec.shape;
    let q = gather(sequence.q(), queries);
    let q = HeadsView::nhd(&q, queries.len(), shape.q_heads(), shape.qk_dim()).unwrap();
    let mut carries = [Carry::<R>::new(shape, queries.len()), Carry::new(shape, queries.len())];
    let mut order: Vec<usize> = (0..shards.len()).collect();
    rng.shuffle(&mut order);
    for shard in order {
        let keys = &shards[shard];
        let (k, v) = (gather(sequence.k(), keys), gather(sequence.v(), keys));
        let k = HeadsView::nhd(&k, keys.len(), shape.kv_heads(), shape.qk_dim()).unwrap();
        let v = HeadsView::nhd(&v, keys.len(), shape.kv_heads(), shape.v_dim()).unwrap();
        carries[rng.below(2)].absorb(spec, q, queries, k, v, keys).unwrap();
    }
    let [mut carry, other] = carries;
    carry.merge(&other).unwrap();
    carry.finish()
}

proptest! {
    #![proptest_config(common::config(32))]

    #[test]
    fn any_placement_is_the_whole(
        group in 1usize..5, tokens in 1usize..40, shards in 1usize..6, kind in prop::sample::select(Inputs::ALL.to_vec()),
        mask in prop::sample::select(vec![
            Mask::Full, Mask::Causal, Mask::SlidingWindow { window: 9, sinks: 2 }, Mask::Prefix { prefix: 5 }
        ]),
        seed in 0u64..1 << 40
    ) {
        let shape = HeadShape::new(2 * group, 2, 24, 16).unwrap();
        let spec = spec(shape, mask);
        let sequence = Sequence::<f32, bf16>::new(shape, tokens, tokens, kind, seed);
        let kv = RaggedKv::single(sequence.k(), sequence.v()).unwrap();
        let whole = prefill(&spec, &RaggedView::single(sequence.q()).unwrap(), &kv, Probabilities::Exact).unwrap();
        let mut rng = Rng::new(seed);
        let key_shards = deal(tokens, shards, &mut rng);
        for queries in deal(tokens, shards, &mut rng) {
            let case = format!("{spec:?}, {kind:?}, {tokens} tokens in {shards} shards, seed {seed}");
            let rows = |x: &[f64], len: usize| -> Vec<f64> {
                queries.iter().flat_map(|&token| x[token as usize * len..][..len].to_vec()).collect()
            };
            let out = rows(&whole.out, shape.q_heads() * shape.v_dim());
            let lse = rows(&whole.lse, shape.q_heads());
            let exact = sharded::<f64>(&spec, &sequence, &queries, &key_shards, &mut rng);
            Comparison::of_f64(&exact.out, &out, Tolerance::new(1e-11, 1e-11)).assert(format!("{case}, f64 out"));
            Comparison::of_f64(&exact.lse, &lse, Tolerance::new(1e-11, 1e-11)).assert(format!("{case}, f64 lse"));
            // An f32 score of size s is off by s · 2^-24 or so, and a weight by that much relative.
            let (scores, values) = match kind {
                Inputs::Saturated => (1e-3, 64.0),
                Inputs::OutlierElements | Inputs::OutlierChannels => (1e-4, 16.0),
                _ => (1e-5, 8.0),
            };
            let rounded = sharded::<f32>(&spec, &sequence, &queries, &key_shards, &mut rng);
            Comparison::of_f64(&rounded.out, &out, Tolerance::new(scores * values, 1e-5)).assert(format!("{case}, f32 out"));
            Comparison::of_f64(&rounded.lse, &lse, Tolerance::new(scores, 1e-6)).assert(format!("{case}, f32 lse"));
        }
    }
}

#[test]
fn no_key_yet_is_an_empty_state() {
    let shape = HeadShape::new(2, 1, 4, 3).unwrap();
    let output = Carry::<f32>::new(shape, 2).finish();
    assert_eq!(output.out, [0.0; 12]);
    assert_eq!(output.lse, [f64::NEG_INFINITY; 4]);
}

#[test]
fn shapes_that_do_not_fit_change_nothing() {
    let shape = HeadShape::new(2, 1, 4, 3).unwrap();
    let spec = spec(shape, Mask::Causal);
    let s = Sequence::<f32, f32>::new(shape, 2, 3, Inputs::Normal, 1);
    let mut carry = Carry::<f32>::new(shape, 2);
    let before = carry.clone();
    let named = |result: Result<(), Error>| match result {
        Err(Error::Argument { argument, .. }) => argument,
        other => panic!("{other:?}"),
    };
    let other = common::spec(HeadShape::new(2, 2, 4, 3).unwrap(), Mask::Causal);
    assert_eq!(named(carry.absorb(&other, s.q(), &[0, 1], s.k(), s.v(), &[0, 1, 2])), "spec");
    assert_eq!(named(carry.absorb(&spec, s.q().slice(0..1), &[0], s.k(), s.v(), &[0, 1, 2])), "q");
    assert_eq!(named(carry.absorb(&spec, s.q(), &[0], s.k(), s.v(), &[0, 1, 2])), "query_positions");
    assert_eq!(named(carry.absorb(&spec, s.q(), &[0, 1], s.k(), s.v().slice(0..2), &[0, 1, 2])), "v");
    assert_eq!(named(carry.absorb(&spec, s.q(), &[0, 1], s.k(), s.v(), &[0, 1])), "key_positions");
    assert_eq!(named(carry.merge(&Carry::new(shape, 3))), "other");
    assert_eq!(carry, before);
}
