//! The f32 path against the oracle.

mod common;

use attention::reference::{Probabilities, prefill_parallel};
use attention::testing::{Comparison, Inputs, Tolerance, calc_diff, edge_lengths, poison};
use attention::{AttentionSpec, Element, Error, HeadShape, HeadsView, Mask, RaggedKv, RaggedView, cpu};
use common::{Sequence, spec};
use half::{bf16, f16};
use longkv_attention as attention;
use proptest::prelude::*;

fn attend<T: Element>(spec: &AttentionSpec, sequence: &Sequence<f32, T>) -> (Vec<f32>, Vec<f32>) {
    let rows = sequence.queries * spec.shape.q_heads();
    let (mut out, mut lse) = (poison(rows * spec.shape.v_dim()), poison(rows));
    cpu::attend(spec, sequence.q(), sequence.k(), sequence.v(), &mut out, &mut lse).unwrap();
    (out, lse)
}

fn check<T: Element>(spec: &AttentionSpec, queries: usize, keys: usize, kind: Inputs, seed: u64) {
    let sequence = Sequence::<f32, T>::new(spec.shape, queries, keys, kind, seed);
    let (out, lse) = attend(spec, &sequence);
    let q = RaggedView::single(sequence.q()).unwrap();
    let kv = RaggedKv::single(sequence.k(), sequence.v()).unwrap();
    let expected = prefill_parallel(spec, &q, &kv, Probabilities::Exact).unwrap();
    let case = format!("{spec:?}, {queries} queries, {keys} keys of {}, {kind:?}, seed {seed}", T::DTYPE);
    // An f32 score of size s is off by about s · 1e-7, and a weight by that much relative.
    let (scores, values) = match kind {
        Inputs::Saturated => (1e-3, 64.0),
        Inputs::OutlierElements | Inputs::OutlierChannels => (2e-4, 16.0),
        Inputs::Normal | Inputs::Constant => (1e-5, 8.0),
    };
    Comparison::new(&out, &expected.out, Tolerance::new(scores * values, 1e-5))
        .assert(format!("{case}, out"));
    Comparison::new(&lse, &expected.lse, Tolerance::new(scores, 1e-6)).assert(format!("{case}, lse"));
    let out: Vec<f64> = out.into_iter().map(f64::from).collect();
    let diff = calc_diff(&out, &expected.out);
    assert!(diff < 1e-8, "{case}: diff {diff:e}");
}

/// Lengths around the tile of 32 keys, the block of 32 queries and the split of 1024 keys.
#[test]
fn lengths_around_tiles_blocks_and_splits() {
    let shape = HeadShape::new(6, 2, 64, 64).unwrap();
    for keys in edge_lengths(32) {
        for queries in [0, 1, 31, 32, 33] {
            check::<f32>(&spec(shape, Mask::Causal), queries, keys, Inputs::Normal, 1);
        }
    }
    for keys in edge_lengths(1024) {
        for queries in [1, 8, 9] {
            check::<bf16>(&spec(shape, Mask::Causal), queries, keys, Inputs::Normal, 2);
        }
    }
}

proptest! {
    #![proptest_config(common::config(48))]

    #[test]
    fn equals_the_oracle(
        (group, kv_heads) in (prop::sample::select(vec![1usize, 3, 4, 5, 7, 8, 16]), 1usize..3),
        (qk_dim, v_dim) in prop::sample::select(vec![(64, 64), (96, 96), (128, 128), (256, 256), (40, 24), (7, 129)]),
        (queries, keys) in prop_oneof![(0usize..70, 0usize..200), (1usize..4, 1000usize..1100)],
        mask in prop::sample::select(vec![
            Mask::Full, Mask::Causal, Mask::SlidingWindow { window: 50, sinks: 0 },
            Mask::SlidingWindow { window: 33, sinks: 4 }, Mask::Prefix { prefix: 40 }
        ]),
        kind in prop::sample::select(Inputs::ALL.to_vec()), cap in prop::option::of(5.0f32..60.0), seed in 0u64..1 << 40
    ) {
        let mut spec = spec(HeadShape::new(group * kv_heads, kv_heads, qk_dim, v_dim).unwrap(), mask);
        if let Some(cap) = cap {
            spec.score = spec.score.with_soft_cap(cap).unwrap();
        }
        match seed % 3 {
            0 => check::<f32>(&spec, queries, keys, kind, seed),
            1 => check::<f16>(&spec, queries, keys, kind, seed),
            _ => check::<bf16>(&spec, queries, keys, kind, seed),
        }
    }
}

#[test]
fn runs_are_bitwise_equal_on_any_number_of_threads() {
    let shape = HeadShape::new(8, 2, 64, 64).unwrap();
    let spec = spec(shape, Mask::Causal);
    for (queries, keys) in [(1, 5000), (100, 300)] {
        let sequence = Sequence::<f32, f16>::new(shape, queries, keys, Inputs::Normal, 3);
        let expected = attend(&spec, &sequence);
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert_eq!(
                pool.install(|| attend(&spec, &sequence)),
                expected,
                "{queries} queries, {threads} threads"
            );
        }
    }
}

#[test]
fn a_cache_with_room_to_grow_reads_as_a_packed_one() {
    let shape = HeadShape::new(4, 2, 64, 32).unwrap();
    let spec = spec(shape, Mask::Causal);
    let sequence = Sequence::<f32, f32>::new(shape, 2, 75, Inputs::Normal, 4);
    let expected = attend(&spec, &sequence);
    let capacity = 100;
    let grow = |view: HeadsView<'_, f32>| {
        let dim = view.dim();
        let mut cache = vec![f32::NAN; 2 * capacity * dim];
        for (token, head) in (0..75).flat_map(|token| [(token, 0), (token, 1)]) {
            cache[(head * capacity + token) * dim..][..dim].copy_from_slice(view.vector(token, head));
        }
        cache
    };
    let (k, v) = (grow(sequence.k()), grow(sequence.v()));
    let k = HeadsView::strided(&k, 75, 2, 64, 64, capacity * 64).unwrap();
    let v = HeadsView::strided(&v, 75, 2, 32, 32, capacity * 32).unwrap();
    let (mut out, mut lse) = (poison(2 * 4 * 32), poison(2 * 4));
    cpu::attend(&spec, sequence.q(), k, v, &mut out, &mut lse).unwrap();
    assert_eq!((out, lse), expected);
}

#[test]
fn unseen_keys_are_not_read_and_a_seen_nan_shows() {
    let shape = HeadShape::new(1, 1, 16, 16).unwrap();
    let mut sequence = Sequence::<f32, bf16>::new(shape, 40, 40, Inputs::Normal, 5);
    sequence.k[39 * 16..].fill(bf16::NAN);
    sequence.v[39 * 16..].fill(bf16::NAN);
    let (out, lse) = attend(&spec(shape, Mask::Causal), &sequence);
    assert!(out[..39 * 16].iter().chain(&lse[..39]).all(|x| x.is_finite()));
    assert!(out[39 * 16..].iter().chain(&lse[39..]).all(|x| x.is_nan()));
}

#[test]
fn shapes_that_do_not_fit_are_errors() {
    let shape = HeadShape::new(4, 2, 8, 4).unwrap();
    let s = Sequence::<f32, f32>::new(shape, 2, 3, Inputs::Normal, 1);
    let named = |shape: (usize, usize, usize, usize), v: HeadsView<'_, f32>, out: usize, lse: usize| {
        let spec = spec(HeadShape::new(shape.0, shape.1, shape.2, shape.3).unwrap(), Mask::Full);
        match cpu::attend(&spec, s.q(), s.k(), v, &mut vec![0.0; out], &mut vec![0.0; lse]) {
            Err(Error::Argument { argument, .. }) => argument,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(named((2, 2, 8, 4), s.v(), 32, 8), "q");
    assert_eq!(named((4, 4, 8, 4), s.v(), 32, 8), "k");
    assert_eq!(named((4, 2, 8, 5), s.v(), 32, 8), "v");
    assert_eq!(named((4, 2, 8, 4), s.v().slice(1..3), 32, 8), "v");
    assert_eq!(named((4, 2, 8, 4), s.v(), 31, 8), "out");
    assert_eq!(named((4, 2, 8, 4), s.v(), 32, 9), "lse");
}
