//! The oracle against closed forms, against attention from its definition, and against itself over other storage.

mod common;

use attention::reference::{Output, Probabilities, decode, decode_parallel, prefill, prefill_parallel};
use attention::testing::{
    Comparison, Inputs, Rng, Tolerance, edge_lengths, head_ratios, paged_copy, shuffled_pages,
};
use attention::{
    AttentionSpec, BlockTable, Element, Error, Fault, FaultCode, HeadShape, HeadsView, Mask, PageLayout,
    PageStore, PagedKv, PagedLengths, RaggedKv, RaggedView, Score,
};
use common::{Sequence, by_definition, spec};
use half::{bf16, f16};
use longkv_attention as attention;
use proptest::prelude::*;

const EXACT: Tolerance = Tolerance::new(1e-12, 1e-12);

fn oracle<Q: Element, T: Element>(spec: &AttentionSpec, sequence: &Sequence<Q, T>) -> Output {
    let q = RaggedView::single(sequence.q()).unwrap();
    let kv = RaggedKv::single(sequence.k(), sequence.v()).unwrap();
    prefill(spec, &q, &kv, Probabilities::Exact).unwrap()
}

fn assert_output(case: &str, output: &Output, out: &[f64], lse: &[f64], tolerance: Tolerance) {
    Comparison::of_f64(&output.out, out, tolerance).assert(format!("{case}, out"));
    Comparison::of_f64(&output.lse, lse, tolerance).assert(format!("{case}, lse"));
}

fn masks() -> impl Strategy<Value = Mask> {
    prop_oneof![
        Just(Mask::Full),
        Just(Mask::Causal),
        (1usize..40, 0usize..6).prop_map(|(window, sinks)| Mask::SlidingWindow { window, sinks }),
        (0usize..40).prop_map(|prefix| Mask::Prefix { prefix }),
    ]
}

fn shapes() -> impl Strategy<Value = HeadShape> {
    let groups = prop::sample::select(vec![1, 3, 4, 5, 7, 8, 16]);
    let dims =
        prop::sample::select(vec![(64, 64), (96, 96), (128, 128), (256, 256), (48, 16), (16, 112), (1, 3)]);
    (groups, 1usize..3, dims)
        .prop_map(|(group, kv_heads, (qk, v))| HeadShape::new(group * kv_heads, kv_heads, qk, v).unwrap())
}

fn check_definition<Q: Element, T: Element>(
    spec: &AttentionSpec,
    queries: usize,
    keys: usize,
    kind: Inputs,
    seed: u64,
) {
    let sequence = Sequence::<Q, T>::new(spec.shape, queries, keys, kind, seed);
    // The masks once more, written as a matrix.
    let visible = |query: usize, key: usize| {
        let (position, key) = (keys as i64 - queries as i64 + query as i64, key as i64);
        match spec.mask {
            Mask::Causal => key <= position,
            Mask::SlidingWindow { window, sinks } => {
                key <= position && (key > position - window as i64 || key < sinks as i64)
            }
            Mask::Prefix { prefix } => key <= position || key < prefix as i64,
            _ => true,
        }
    };
    let (out, lse) = by_definition(spec, &sequence, visible);
    let case = format!(
        "{spec:?}, {queries} queries of {}, {keys} keys of {}, {kind:?}, seed {seed}",
        Q::DTYPE,
        T::DTYPE
    );
    let output = oracle(spec, &sequence);
    assert_output(&case, &output, &out, &lse, Tolerance::new(1e-10, 1e-10));
    assert!(output.faults.is_empty());
}

proptest! {
    #![proptest_config(common::config(48))]

    #[test]
    fn equals_the_definition(
        shape in shapes(), mask in masks(), queries in 0usize..7, keys in 0usize..40,
        kind in prop::sample::select(Inputs::ALL.to_vec()), cap in prop::option::of(1.0f32..60.0), seed in 0u64..1 << 40
    ) {
        let mut spec = spec(shape, mask);
        if let Some(cap) = cap {
            spec.score = spec.score.with_soft_cap(cap).unwrap();
        }
        match seed % 4 {
            0 => check_definition::<f32, f32>(&spec, queries, keys, kind, seed),
            1 => check_definition::<f16, f16>(&spec, queries, keys, kind, seed),
            2 => check_definition::<bf16, bf16>(&spec, queries, keys, kind, seed),
            _ => check_definition::<f32, bf16>(&spec, queries, keys, kind, seed),
        }
    }

    /// A batch of ragged sequences, packed or paged in any page order and layout, is each sequence alone.
    #[test]
    fn storage_does_not_matter(
        shape in shapes(), mask in masks(), page_size in prop::sample::select(vec![8usize, 16, 32, 64, 128]),
        lengths in prop::collection::vec((0usize..4, prop_oneof![0usize..3, 0usize..150]), 1..5), hnd in any::<bool>(),
        per_head in any::<bool>(), seed in 0u64..1 << 40
    ) {
        let spec = spec(shape, mask);
        let sequences: Vec<Sequence<f32, f16>> = (0..)
            .zip(&lengths)
            .map(|(i, &(queries, keys))| Sequence::new(shape, queries, keys, Inputs::Normal, seed + i))
            .collect();
        let alone: Vec<Output> = sequences.iter().map(|sequence| oracle(&spec, sequence)).collect();
        let expected_out: Vec<f64> = alone.iter().flat_map(|output| output.out.clone()).collect();
        let expected_lse: Vec<f64> = alone.iter().flat_map(|output| output.lse.clone()).collect();
        let case = format!("{spec:?}, pages of {page_size}, {lengths:?}, hnd {hnd}, per head {per_head}, seed {seed}");

        let batch = Batch::new(&sequences);
        let q = batch.q(shape);
        let kv = batch.kv(shape);
        let ragged = prefill(&spec, &q, &kv, Probabilities::Exact).unwrap();
        // Each row reads the same numbers in the same order, so results are equal to the bit.
        prop_assert_eq!(&ragged.out, &expected_out, "{}", &case);
        prop_assert_eq!(&ragged.lse, &expected_lse, "{}", &case);
        prop_assert_eq!(&prefill_parallel(&spec, &q, &kv, Probabilities::Exact).unwrap(), &ragged);

        // One page more than any sequence needs, whose id is out of range and must not be read.
        let max_pages = batch.max_keys().div_ceil(page_size) + 1;
        let rows = if per_head { shape.kv_heads() * lengths.len() } else { lengths.len() };
        let total = rows * max_pages;
        let mut ids = shuffled_pages(total, seed);
        let store_heads = if per_head { 1 } else { shape.kv_heads() };
        let (k, v) = batch.stores(shape, &ids, page_size, total, hnd, per_head);
        let layout = |dim| {
            if hnd { PageLayout::hnd(page_size, store_heads, dim) } else { PageLayout::nhd(page_size, store_heads, dim) }
        };
        let k = PageStore::new(&k, total, page_size, store_heads, shape.qk_dim(), layout(shape.qk_dim())).unwrap();
        let v = PageStore::new(&v, total, page_size, store_heads, shape.v_dim(), layout(shape.v_dim())).unwrap();
        let mut tokens = Vec::new();
        for row in 0..rows {
            tokens.push(lengths[row % lengths.len()].1 as u32);
            ids[row * max_pages + (tokens[row] as usize).div_ceil(page_size)] = u32::MAX;
        }
        let table = if per_head {
            BlockTable::per_head(&ids, shape.kv_heads(), lengths.len(), max_pages)
        } else {
            BlockTable::shared(&ids, lengths.len(), max_pages)
        };
        let kv = PagedKv::new(k, v, table.unwrap(), PagedLengths::Tokens(&tokens)).unwrap();
        let paged = prefill(&spec, &q, &kv, Probabilities::Exact).unwrap();
        prop_assert_eq!(&paged, &ragged, "{}", &case);
        prop_assert_eq!(&prefill_parallel(&spec, &q, &kv, Probabilities::Exact).unwrap(), &ragged);
    }

    /// Permuting keys together with their values changes nothing but rounding, where no mask depends on positions.
    #[test]
    fn keys_are_a_set(shape in shapes(), keys in 1usize..40, seed in 0u64..1 << 40) {
        let spec = spec(shape, Mask::Full);
        let mut sequence = Sequence::<f32, f32>::new(shape, 2, keys, Inputs::OutlierElements, seed);
        let before = oracle(&spec, &sequence);
        let order = shuffled_pages(keys, seed);
        let permuted = |x: &[f32]| -> Vec<f32> {
            let token = x.len() / keys;
            order.iter().flat_map(|&t| x[t as usize * token..][..token].to_vec()).collect()
        };
        (sequence.k, sequence.v) = (permuted(&sequence.k), permuted(&sequence.v));
        assert_output(&format!("{spec:?}, {keys} keys, seed {seed}"), &oracle(&spec, &sequence), &before.out, &before.lse, EXACT);
    }

    /// Rounding P moves an output by at most half a unit of P's type per value, weighted as the values are.
    #[test]
    fn rounded_probabilities_stay_in_bounds(shape in shapes(), keys in 1usize..60, seed in 0u64..1 << 40) {
        let spec = spec(shape, Mask::Causal);
        let sequence = Sequence::<f32, bf16>::new(shape, 2, keys, Inputs::Normal, seed);
        let q = RaggedView::single(sequence.q()).unwrap();
        let kv = RaggedKv::single(sequence.k(), sequence.v()).unwrap();
        let exact = prefill(&spec, &q, &kv, Probabilities::Exact).unwrap();
        let rounded = prefill(&spec, &q, &kv, Probabilities::Rounded).unwrap();
        prop_assert_eq!(&exact.lse, &rounded.lse, "the sum takes P unrounded");
        let largest = sequence.v.iter().map(|v| v.to_f64().abs()).fold(0.0, f64::max);
        let bound = bf16::DTYPE.epsilon() / 2.0 * largest * 1.0001;
        for (exact, rounded) in exact.out.iter().zip(&rounded.out) {
            prop_assert!((exact - rounded).abs() <= bound, "{exact} and {rounded}, bound {bound}");
        }
        // One key has weight 1, which every type holds; more keys do get rounded.
        if keys == 1 { prop_assert_eq!(&exact.out, &rounded.out) }
        if keys > 8 { prop_assert_ne!(&exact.out, &rounded.out) }
    }
}

/// Sequences packed into one batch.
struct Batch {
    q: Vec<f32>,
    k: Vec<f16>,
    v: Vec<f16>,
    cu_q: Vec<u32>,
    cu_k: Vec<u32>,
}

impl Batch {
    fn new(sequences: &[Sequence<f32, f16>]) -> Self {
        let prefix = |lengths: Vec<usize>| {
            lengths.iter().fold(vec![0u32], |mut sums, &n| {
                sums.push(sums[sums.len() - 1] + n as u32);
                sums
            })
        };
        Batch {
            q: sequences.iter().flat_map(|s| s.q.clone()).collect(),
            k: sequences.iter().flat_map(|s| s.k.clone()).collect(),
            v: sequences.iter().flat_map(|s| s.v.clone()).collect(),
            cu_q: prefix(sequences.iter().map(|s| s.queries).collect()),
            cu_k: prefix(sequences.iter().map(|s| s.keys).collect()),
        }
    }

    fn max_keys(&self) -> usize {
        self.cu_k.windows(2).map(|pair| (pair[1] - pair[0]) as usize).max().unwrap_or(0)
    }

    fn q(&self, shape: HeadShape) -> RaggedView<'_, f32> {
        let tokens = self.cu_q[self.cu_q.len() - 1] as usize;
        let view = HeadsView::nhd(&self.q, tokens, shape.q_heads(), shape.qk_dim()).unwrap();
        RaggedView::new(view, &self.cu_q).unwrap()
    }

    fn kv(&self, shape: HeadShape) -> RaggedKv<'_, f16> {
        let tokens = self.cu_k[self.cu_k.len() - 1] as usize;
        let k = HeadsView::nhd(&self.k, tokens, shape.kv_heads(), shape.qk_dim()).unwrap();
        let v = HeadsView::nhd(&self.v, tokens, shape.kv_heads(), shape.v_dim()).unwrap();
        RaggedKv::new(k, v, &self.cu_k).unwrap()
    }

    /// Keys and values in NaN-filled pages, through a table shared by heads or one per head.
    fn stores(
        &self,
        shape: HeadShape,
        ids: &[u32],
        page_size: usize,
        pages: usize,
        hnd: bool,
        per_head: bool,
    ) -> (Vec<f16>, Vec<f16>) {
        let heads = shape.kv_heads();
        let store = |packed: &[f16], dim: usize| -> Vec<f16> {
            let store_heads = if per_head { 1 } else { heads };
            let offset = |page: usize, slot: usize, head: usize| {
                let vector = if hnd { head * page_size + slot } else { slot * store_heads + head };
                (page * page_size * store_heads + vector) * dim
            };
            let len = pages * page_size * store_heads * dim;
            if !per_head {
                return paged_copy(packed, heads, dim, &self.cu_k, ids, page_size, len, offset);
            }
            let mut all = vec![f16::NAN; len];
            for (head, ids) in ids.chunks(ids.len() / heads).enumerate() {
                let one: Vec<f16> = packed.chunks(dim).skip(head).step_by(heads).flatten().copied().collect();
                let copy = paged_copy(&one, 1, dim, &self.cu_k, ids, page_size, len, offset);
                all.iter_mut().zip(copy).filter(|(_, x)| !x.is_nan()).for_each(|(to, x)| *to = x);
            }
            all
        };
        (store(&self.k, shape.qk_dim()), store(&self.v, shape.v_dim()))
    }
}

#[test]
fn equal_scores_give_the_mean() {
    for (q_heads, kv_heads) in head_ratios() {
        for keys in edge_lengths(32) {
            let shape = HeadShape::new(q_heads, kv_heads, 64, 96).unwrap();
            let mut sequence = Sequence::<f32, f32>::new(shape, 1, keys, Inputs::Normal, 1);
            sequence.q.fill(0.0);
            let output = oracle(&spec(shape, Mask::Causal), &sequence);
            let case = format!("{shape}, {keys} keys");
            for head in 0..q_heads {
                let values =
                    |c: usize| (0..keys).map(move |t| (t * kv_heads + shape.kv_head_of(head)) * 96 + c);
                let mean: Vec<f64> = (0..96)
                    .map(|c| values(c).map(|i| f64::from(sequence.v[i])).sum::<f64>() / keys.max(1) as f64)
                    .collect();
                Comparison::of_f64(&output.out[head * 96..][..96], &mean, EXACT).assert(&case);
                assert!((output.lse[head] - (keys as f64).ln()).abs() < 1e-12 || keys == 0, "{case}");
            }
            if keys == 0 {
                assert!(output.lse.iter().all(|&lse| lse == f64::NEG_INFINITY), "{case}");
                assert!(output.out.iter().all(|&x| x == 0.0), "{case}");
            }
        }
    }
}

#[test]
fn a_dominant_key_takes_all() {
    let shape = HeadShape::new(3, 1, 4, 2).unwrap();
    let keys = 50;
    for hot in [0, 1, 25, 49] {
        let mut sequence = Sequence::<f32, bf16>::new(shape, 1, keys, Inputs::Normal, 2);
        sequence.q.fill(1.0);
        sequence.k.fill(bf16::ZERO);
        sequence.k[hot * 4..][..4].fill(bf16::from_f32(1000.0));
        let output = oracle(&spec(shape, Mask::Causal), &sequence);
        // Score 4000 · 1/2 against 0: exp(-2000) is 0 even in f64.
        for head in 0..3 {
            assert_eq!(output.out[head * 2], sequence.v[hot * 2].to_f64(), "key {hot}");
            assert_eq!(output.lse[head], 2000.0, "key {hot}");
        }
    }
}

#[test]
fn soft_cap_bounds_the_scores() {
    let shape = HeadShape::new(1, 1, 1, 1).unwrap();
    let capped = Score::new(2.0).unwrap().with_soft_cap(5.0).unwrap();
    let spec = AttentionSpec { shape, score: capped, mask: Mask::Full };
    let sequence =
        Sequence { shape, queries: 1, keys: 2, q: vec![1.0f32], k: vec![1e6f32, 0.5], v: vec![1.0f32, 0.0] };
    let output = oracle(&spec, &sequence);
    let other = 5.0 * (1.0f64 / 5.0).tanh();
    assert!((output.out[0] - 1.0 / (1.0 + (other - 5.0).exp())).abs() < 1e-12);
    assert!((output.lse[0] - (5f64.exp() + other.exp()).ln()).abs() < 1e-12);
}

#[test]
fn decode_is_prefill_of_one_query() {
    let shape = HeadShape::new(14, 2, 64, 64).unwrap();
    let spec = spec(shape, Mask::SlidingWindow { window: 20, sinks: 2 });
    let cu_k = [0u32, 30, 30, 95];
    let sequence = Sequence::<bf16, bf16>::new(shape, 3, 95, Inputs::OutlierChannels, 4);
    let kv = RaggedKv::new(sequence.k(), sequence.v(), &cu_k).unwrap();
    let output = decode(&spec, sequence.q(), &kv, Probabilities::Rounded).unwrap();
    let q = RaggedView::new(sequence.q(), &[0, 1, 2, 3]).unwrap();
    assert_eq!(output, prefill(&spec, &q, &kv, Probabilities::Rounded).unwrap());
    assert_eq!(output, decode_parallel(&spec, sequence.q(), &kv, Probabilities::Rounded).unwrap());
    assert!(output.lse[14..28].iter().all(|&lse| lse == f64::NEG_INFINITY), "the empty sequence");
    assert!(output.out[14 * 64..28 * 64].iter().all(|&x| x == 0.0), "the empty sequence");
    assert!(output.lse[..14].iter().chain(&output.lse[28..]).all(|lse| lse.is_finite()));
}

#[test]
fn bad_rows_are_skipped_and_reported() {
    let shape = HeadShape::new(4, 2, 2, 1).unwrap();
    let spec = spec(shape, Mask::Causal);
    let (pages, page_size) = (3, 4);
    let data: Vec<f32> = Inputs::Normal.generate(pages * page_size * 2, 2, 5);
    let k = PageStore::new(&data, pages, page_size, 2, 2, PageLayout::nhd(page_size, 2, 2)).unwrap();
    let v = PageStore::new(&data, pages, page_size, 2, 1, PageLayout::nhd(page_size, 2, 1)).unwrap();
    let q = vec![1.0f32; 3 * 4 * 2];
    let q = HeadsView::nhd(&q, 3, 4, 2).unwrap();

    let shared = [0, 1, 2, 7, 1, 0];
    let lengths = [8, 5, 9];
    let table = BlockTable::shared(&shared, 3, 2).unwrap();
    let kv = PagedKv::new(k, v, table, PagedLengths::Tokens(&lengths)).unwrap();
    let output = decode(&spec, q, &kv, Probabilities::Exact).unwrap();
    let fault = |code, index| Fault { code, index };
    assert_eq!(
        output.faults,
        [fault(FaultCode::BadPage, 1), fault(FaultCode::BadLength, 2)],
        "once for all heads"
    );
    assert!(output.lse[..4].iter().all(|lse| lse.is_finite()));
    assert!(output.lse[4..].iter().all(|&lse| lse == f64::NEG_INFINITY));
    assert!(output.out[4..].iter().all(|&x| x == 0.0));
    assert_eq!(output, decode_parallel(&spec, q, &kv, Probabilities::Exact).unwrap());

    // With a table per head only the heads of the bad row are skipped: row 4 is KV head 1 of sequence 1.
    let per_head = [0, 1, 1, 2, 0, 2, 0, 1, 3, 2, 0, 2];
    let lengths = [8; 6];
    let table = BlockTable::per_head(&per_head, 2, 3, 2).unwrap();
    let kv = PagedKv::new(k, v, table, PagedLengths::Tokens(&lengths)).unwrap();
    let output = decode(&spec, q, &kv, Probabilities::Exact).unwrap();
    assert_eq!(output.faults, [fault(FaultCode::BadPage, 4)]);
    let finite: Vec<bool> = output.lse.iter().map(|lse| lse.is_finite()).collect();
    assert_eq!(finite, [true, true, true, true, true, true, false, false, true, true, true, true]);
}

#[test]
fn short_pages_are_the_tokens_they_hold() {
    let shape = HeadShape::new(3, 1, 16, 8).unwrap();
    let spec = spec(shape, Mask::Full);
    let (page_size, mut rng) = (8, Rng::new(6));
    let valid: Vec<u32> = (0..6).map(|_| rng.below(page_size + 1) as u32).chain([0, 8]).collect();
    let keys: usize = valid.iter().map(|&n| n as usize).sum();
    let sequence = Sequence::<f32, f32>::new(shape, 1, keys, Inputs::Normal, 7);
    let ids = shuffled_pages(valid.len(), 8);
    let (mut k, mut v) = (vec![f32::NAN; 8 * 8 * 16], vec![f32::NAN; 8 * 8 * 8]);
    let mut token = 0;
    for (&page, &valid) in ids.iter().zip(&valid) {
        for slot in 0..valid as usize {
            let to = page as usize * page_size + slot;
            k[to * 16..][..16].copy_from_slice(sequence.k().vector(token, 0));
            v[to * 8..][..8].copy_from_slice(sequence.v().vector(token, 0));
            token += 1;
        }
    }
    let k = PageStore::new(&k, 8, page_size, 1, 16, PageLayout::nhd(page_size, 1, 16)).unwrap();
    let v = PageStore::new(&v, 8, page_size, 1, 8, PageLayout::nhd(page_size, 1, 8)).unwrap();
    let table = BlockTable::shared(&ids, 1, 8).unwrap();
    let kv = PagedKv::new(k, v, table, PagedLengths::Pages { counts: &[8], valid: &valid }).unwrap();
    assert_eq!(decode(&spec, sequence.q(), &kv, Probabilities::Exact).unwrap(), oracle(&spec, &sequence));
}

#[test]
fn a_nan_in_a_seen_key_shows_and_in_an_unseen_one_does_not() {
    let shape = HeadShape::new(1, 1, 2, 2).unwrap();
    let mut sequence = Sequence::<f32, f32>::new(shape, 2, 2, Inputs::Normal, 9);
    sequence.k[2..].fill(f32::NAN);
    sequence.v[2..].fill(f32::NAN);
    let output = oracle(&spec(shape, Mask::Causal), &sequence);
    assert!(output.lse[0].is_finite() && output.out[..2].iter().all(|x| x.is_finite()), "{output:?}");
    assert!(output.lse[1].is_nan() && output.out[2..].iter().all(|x| x.is_nan()), "{output:?}");
}

#[test]
fn outputs_round_once() {
    let output =
        Output { out: vec![1.0 + 2f64.powi(-8) + 2f64.powi(-40)], lse: vec![0.1], faults: Vec::new() };
    assert_eq!(output.out_as::<bf16>()[0].to_f64(), 1.0 + 2f64.powi(-7));
    assert_eq!(output.lse_f32(), [0.1f32]);
}

#[test]
fn shapes_that_do_not_fit_are_errors() {
    let shape = HeadShape::new(4, 2, 8, 4).unwrap();
    let sequence = Sequence::<f32, f32>::new(shape, 2, 3, Inputs::Normal, 1);
    let kv = RaggedKv::single(sequence.k(), sequence.v()).unwrap();
    let q = RaggedView::single(sequence.q()).unwrap();
    let named = |shape: (usize, usize, usize, usize)| {
        let shape = HeadShape::new(shape.0, shape.1, shape.2, shape.3).unwrap();
        match prefill(&spec(shape, Mask::Full), &q, &kv, Probabilities::Exact) {
            Err(Error::Argument { argument, .. }) => argument,
            other => panic!("{shape}: {other:?}"),
        }
    };
    assert_eq!(named((2, 2, 8, 4)), "q");
    assert_eq!(named((4, 2, 4, 4)), "q");
    assert_eq!(named((4, 1, 8, 4)), "k");
    assert_eq!(named((4, 2, 8, 8)), "v");
    let two = RaggedView::one_each(sequence.q()).unwrap();
    let refused = prefill(&spec(shape, Mask::Full), &two, &kv, Probabilities::Exact);
    assert!(matches!(refused, Err(Error::Argument { argument: "q", .. })), "two sequences of q, one of k");
}
