//! The paged cache, and attention over it, against plain vectors.

use attention::reference::Probabilities;
use attention::testing::{Comparison, Inputs, Rng, Tolerance, edge_lengths};
use attention::{
    AttentionSpec, BlockTable, FaultCode, HeadShape, HeadsView, Mask, RaggedKv, RaggedView, Score,
};
use half::{bf16, f16};
use kv_compress::cache::{LayerCache, PageLayout, PagedView, SequenceId};
use kv_compress::reference::{Attend, attend, decode_in_parts, output_starts, query_starts};
use kv_compress::{Error, HeadRanks, LayerRanks};

const DIM: usize = 64;

fn ranks(pairs: &[(usize, usize)]) -> LayerRanks {
    let shape = HeadShape::new(pairs.len(), pairs.len(), DIM, DIM).unwrap();
    LayerRanks::new(&shape, pairs.iter().map(|&(k, v)| HeadRanks { k, v }).collect()).unwrap()
}

fn cache(ranks: &LayerRanks, page_size: usize, pages: usize) -> LayerCache<f16> {
    LayerCache::new(PageLayout::new(ranks, page_size).unwrap(), pages).unwrap()
}

/// Keys `[tokens, Σ r_k]` and values `[tokens, Σ r_v]`.
fn tokens(ranks: &LayerRanks, tokens: usize, seed: u64) -> (Vec<f32>, Vec<f32>) {
    let row = |of: fn(&HeadRanks) -> usize| ranks.heads().iter().map(of).sum::<usize>();
    let kind = Inputs::Normal;
    (kind.values(tokens, row(|r| r.k), seed), kind.values(tokens, row(|r| r.v), seed + 1))
}

fn gathered(cache: &LayerCache<f16>, id: SequenceId) -> Vec<(Vec<f16>, Vec<f16>)> {
    let heads = 0..cache.layout().ranks().kv_heads();
    let of = |head| {
        let (mut keys, mut values) = (vec![f16::ONE; 3], Vec::new());
        cache.gather(id, head, &mut keys, &mut values).unwrap();
        (keys, values)
    };
    heads.map(of).collect()
}

/// What [`gathered`] must give for these rows.
fn expected(ranks: &LayerRanks, keys: &[f32], values: &[f32]) -> Vec<(Vec<f16>, Vec<f16>)> {
    let cut = |rows: &[f32], of: fn(&HeadRanks) -> usize| -> Vec<Vec<f16>> {
        let row: usize = ranks.heads().iter().map(of).sum();
        let mut start = 0;
        let columns = ranks.heads().iter().map(|head| {
            let columns = start..start + of(head);
            start = columns.end;
            rows.chunks_exact(row)
                .flat_map(|row| row[columns.clone()].iter().map(|&x| f16::from_f32(x)))
                .collect()
        });
        columns.collect()
    };
    cut(keys, |r| r.k).into_iter().zip(cut(values, |r| r.v)).collect()
}

#[test]
fn tokens_come_back_in_any_chunks() {
    let ranks = ranks(&[(16, 48), (64, 16), (32, 32)]);
    for page_size in [16, 64] {
        for chunks in [&[1usize; 40][..], &[40], &[13, 1, 1, 7, 18], &[0, 16, 0, 24]] {
            let mut cache = cache(&ranks, page_size, 4);
            let id = cache.create().unwrap();
            let (keys, values) = tokens(&ranks, 40, 7);
            let (mut k, mut v) = (&keys[..], &values[..]);
            for &count in chunks {
                let (k_new, k_rest) = k.split_at(count * keys.len() / 40);
                let (v_new, v_rest) = v.split_at(count * values.len() / 40);
                cache.append(id, k_new, v_new).unwrap();
                (k, v) = (k_rest, v_rest);
            }
            assert_eq!(cache.tokens(id).unwrap(), 40);
            assert!(
                gathered(&cache, id) == expected(&ranks, &keys, &values),
                "pages of {page_size}, {chunks:?}"
            );
        }
    }
}

#[test]
fn a_fork_shares_its_prefix_and_copies_on_write() {
    let ranks = ranks(&[(16, 16), (48, 32)]);
    let mut cache = cache(&ranks, 16, 8);
    let (keys, values) = tokens(&ranks, 40, 1);
    let first = cache.create().unwrap();
    cache.append(first, &keys, &values).unwrap();
    let before = cache.usage();
    assert_eq!((before.pages, before.shared_pages), (3, 0));
    assert_eq!(before.bytes, 3 * 16 * ranks.elements() * 2, "a page has no padding but its free rows");

    let second = cache.fork(first).unwrap();
    assert_eq!((cache.usage().pages, cache.usage().shared_pages), (3, 3), "a fork costs nothing");
    let (more_keys, more_values) = tokens(&ranks, 1, 5);
    cache.append(second, &more_keys, &more_values).unwrap();
    assert_eq!((cache.usage().pages, cache.usage().shared_pages, cache.usage().copies), (4, 2, 1));
    assert!(gathered(&cache, first) == expected(&ranks, &keys, &values), "the first does not see it");
    let both = |a: &[f32], b: &[f32]| [a, b].concat();
    assert!(
        gathered(&cache, second) == expected(&ranks, &both(&keys, &more_keys), &both(&values, &more_values))
    );
    assert!(cache.modify(|x| x).is_err(), "shared pages are nobody's to change");

    cache.release(first).unwrap();
    assert_eq!((cache.usage().pages, cache.usage().shared_pages), (3, 0));
    cache.truncate(second, 16).unwrap();
    assert_eq!((cache.usage().pages, cache.usage().tokens), (1, 16));
    let error = cache.release(first).unwrap_err();
    assert!(matches!(error, Error::Argument { argument: "sequence", .. }), "{error}");
}

#[test]
fn an_append_that_does_not_fit_changes_nothing() {
    let ranks = ranks(&[(16, 32)]);
    let mut cache = cache(&ranks, 16, 2);
    let id = cache.create().unwrap();
    let (keys, values) = tokens(&ranks, 40, 1);
    cache.append(id, &keys[..20 * 16], &values[..20 * 32]).unwrap();
    let held = gathered(&cache, id);
    let error = cache.append(id, &keys[..20 * 16], &values[..20 * 32]).unwrap_err();
    let out_of_pages = |inner: &attention::Error| matches!(inner, attention::Error::OutOfPages { .. });
    assert!(matches!(&error, Error::Attention(inner) if out_of_pages(inner)), "{error}");
    assert_eq!((cache.tokens(id).unwrap(), cache.usage().pages), (20, 2));
    assert!(gathered(&cache, id) == held);
    for (case, keys, values, named) in [
        ("half a key", &keys[..8], &values[..0], "keys"),
        ("a value too few", &keys[..32], &values[..32], "values"),
    ] {
        match cache.append(id, keys, values) {
            Err(Error::Argument { argument, .. }) => assert_eq!(argument, named, "{case}"),
            other => panic!("{case}: {other:?}"),
        }
    }
    let wide = LayerCache::<f32>::new(PageLayout::new(&ranks, 16).unwrap(), 2);
    assert!(matches!(wide, Err(Error::Argument { argument: "T", .. })), "pages have 16-bit elements");
}

#[test]
fn an_append_of_what_the_storage_type_does_not_hold_changes_nothing() {
    let ranks = ranks(&[(16, 32), (32, 16)]);
    let mut cache = cache(&ranks, 16, 4);
    let id = cache.create().unwrap();
    let (keys, values) = tokens(&ranks, 20, 1);
    cache.append(id, &keys, &values).unwrap();
    // A shared page: an append that began would copy it.
    cache.fork(id).unwrap();
    let (held, usage) = (gathered(&cache, id), cache.usage());
    for (x, stored) in [(1e5, f64::INFINITY), (-1e5, f64::NEG_INFINITY), (f32::NAN, f64::NAN)] {
        for (named, at) in [("keys", 0), ("keys", 20 * 48 - 1), ("values", 48 + 5)] {
            let (mut keys, mut values) = (keys.clone(), values.clone());
            if named == "keys" {
                keys[at] = x
            } else {
                values[at] = x
            }
            match cache.append(id, &keys, &values) {
                Err(Error::NotFinite { argument, index, value }) => {
                    assert_eq!(
                        (argument, index, value.to_bits()),
                        (named, at, stored.to_bits()),
                        "{x} in {named}"
                    )
                }
                other => panic!("{x} in {named} at {at}: {other:?}"),
            }
            assert_eq!((cache.tokens(id).unwrap(), cache.usage()), (20, usage), "{x} in {named}");
            assert!(gathered(&cache, id) == held, "{x} in {named}");
        }
    }
    let mut wide_range = LayerCache::<bf16>::new(cache.layout().clone(), 2).unwrap();
    let id = wide_range.create().unwrap();
    wide_range.append(id, &[1e5; 48], &[-1e5; 48]).unwrap();
}

/// Zero-padded keys and values of full size give the same attention: the definition of a reduced basis.
#[test]
fn reduced_attention_is_zero_padded_dense_attention() {
    let pairs = [(16, 48), (64, 16), (32, 64), (48, 32)];
    let ranks = ranks(&pairs);
    let mut rng = Rng::new(3);
    for (group, mask, cap) in [
        (1, Mask::Causal, None),
        (4, Mask::Causal, Some(20.0)),
        (7, Mask::SlidingWindow { window: 20, sinks: 2 }, None),
    ] {
        let case = format!("group {group}, {mask:?}, cap {cap:?}");
        let lengths: Vec<usize> = edge_lengths(16).into_iter().chain([100]).collect();
        let mut cache = cache(&ranks, 16, 64);
        // Pages that are not in order: every second sequence is made, released and its pages given to others.
        let litter = cache.create().unwrap();
        let (k, v) = tokens(&ranks, 50, 1);
        cache.append(litter, &k, &v).unwrap();
        let mut ids = Vec::new();
        for (i, &length) in lengths.iter().enumerate() {
            let id = cache.create().unwrap();
            let (k, v) = tokens(&ranks, length, 10 + i as u64);
            cache.append(id, &k, &v).unwrap();
            if i == 2 {
                cache.release(litter).unwrap();
            }
            ids.push(id);
        }
        let (table, held) = cache.block_table(&ids, 8).unwrap();
        let batch = ids.len();
        let queries: Vec<u32> =
            lengths.iter().map(|&length| (length > 3) as u32 + (length % 2) as u32 + 1).collect();
        let cu_seqlens: Vec<u32> = std::iter::once(0)
            .chain(queries.iter().scan(0, |sum, &n| {
                *sum += n;
                Some(*sum)
            }))
            .collect();
        let total = cu_seqlens[batch] as usize;
        let (q_starts, o_starts) = (query_starts(&ranks, group), output_starts(&ranks, group));
        let q_heads = group * pairs.len();
        let q: Vec<f16> = (0..total * q_starts[q_heads]).map(|_| f16::from_f64(rng.normal())).collect();
        let mut score = Score::new(0.125).unwrap();
        if let Some(cap) = cap {
            score = score.with_soft_cap(cap).unwrap();
        }
        let view = PagedView {
            layout: cache.layout(),
            pages: cache.pages().unwrap(),
            block_table: BlockTable::shared(&table, batch, 8).unwrap(),
            lengths: &held,
        };
        let found =
            attend(&Attend { group, score, mask }, &q, &cu_seqlens, &view, Probabilities::Exact).unwrap();
        assert!(found.faults.is_empty(), "{case}");

        // The same with every vector padded to DIM.
        let pad = |row: &[f16], to: &mut Vec<f16>| {
            to.extend(row);
            to.resize(to.len() + DIM - row.len(), f16::ZERO);
        };
        let mut padded_q = Vec::new();
        for row in q.chunks_exact(q_starts[q_heads]) {
            (0..q_heads).for_each(|head| pad(&row[q_starts[head]..q_starts[head + 1]], &mut padded_q));
        }
        let (mut padded_k, mut padded_v) = (Vec::new(), Vec::new());
        for &id in &ids {
            let heads = gathered(&cache, id);
            for token in 0..cache.tokens(id).unwrap() {
                for ((k, v), (r_k, r_v)) in heads.iter().zip(pairs) {
                    pad(&k[token * r_k..(token + 1) * r_k], &mut padded_k);
                    pad(&v[token * r_v..(token + 1) * r_v], &mut padded_v);
                }
            }
        }
        let shape = HeadShape::new(q_heads, pairs.len(), DIM, DIM).unwrap();
        let all: usize = lengths.iter().sum();
        let kv_starts: Vec<u32> = std::iter::once(0)
            .chain(lengths.iter().scan(0, |sum, &n| {
                *sum += n as u32;
                Some(*sum)
            }))
            .collect();
        let kv = RaggedKv::new(
            HeadsView::nhd(&padded_k, all, pairs.len(), DIM).unwrap(),
            HeadsView::nhd(&padded_v, all, pairs.len(), DIM).unwrap(),
            &kv_starts,
        )
        .unwrap();
        let padded_q = HeadsView::nhd(&padded_q, total, q_heads, DIM).unwrap();
        let dense = attention::reference::prefill(
            &AttentionSpec { shape, score, mask },
            &RaggedView::new(padded_q, &cu_seqlens).unwrap(),
            &kv,
            Probabilities::Exact,
        )
        .unwrap();
        Comparison::of_f64(&found.lse, &dense.lse, Tolerance::new(1e-12, 1e-12)).assert(&case);
        let mut cut = Vec::new();
        for row in dense.out.chunks_exact(q_heads * DIM) {
            for head in 0..q_heads {
                let (kept, rest) =
                    row[head * DIM..(head + 1) * DIM].split_at(o_starts[head + 1] - o_starts[head]);
                cut.extend_from_slice(kept);
                assert!(rest.iter().all(|&x| x == 0.0), "{case}: padding stays zero");
            }
        }
        Comparison::of_f64(&found.out, &cut, Tolerance::new(1e-12, 1e-12)).assert(&case);
    }
}

#[test]
fn bad_rows_are_skipped_and_named() {
    let ranks = ranks(&[(16, 16), (32, 16)]);
    let mut cache = cache(&ranks, 16, 4);
    let id = cache.create().unwrap();
    let (k, v) = tokens(&ranks, 20, 1);
    cache.append(id, &k, &v).unwrap();
    let (good, _) = cache.block_table(&[id], 2).unwrap();
    let table = [good.clone(), good.clone(), vec![good[0], 99], good].concat();
    let lengths = [20, 33, 20, 0];
    let q = vec![bf16::ONE; 4 * 2 * (16 + 32)];
    let view = PagedView {
        layout: cache.layout(),
        pages: cache.pages().unwrap(),
        block_table: BlockTable::shared(&table, 4, 2).unwrap(),
        lengths: &lengths,
    };
    let of = Attend { group: 2, score: Score::new(0.1).unwrap(), mask: Mask::Causal };
    let found = attend(&of, &q, &[0, 1, 2, 3, 4], &view, Probabilities::Rounded).unwrap();
    let faults: Vec<_> = found.faults.iter().map(|fault| (fault.code, fault.index)).collect();
    assert_eq!(faults, [(FaultCode::BadLength, 1), (FaultCode::BadPage, 2)]);
    for (sequence, (out, lse)) in found.out.chunks_exact(64).zip(found.lse.chunks_exact(4)).enumerate() {
        let seen = sequence == 0;
        assert_eq!(out.iter().any(|&x| x != 0.0), seen, "sequence {sequence}");
        assert!(lse.iter().all(|x| x.is_finite() == seen && !x.is_nan()), "sequence {sequence}: {lse:?}");
    }
    let short = attend(&of, &q[1..], &[0, 1, 2, 3, 4], &view, Probabilities::Exact);
    assert!(matches!(short, Err(Error::Argument { argument: "q", .. })));
}

#[test]
fn parts_merge_to_the_whole() {
    let ranks = ranks(&[(16, 48), (64, 16)]);
    for length in [0, 1, 15, 16, 17, 100] {
        let mut cache = cache(&ranks, 16, 8);
        let id = cache.create().unwrap();
        let (k, v) = tokens(&ranks, length, 4);
        cache.append(id, &k, &v).unwrap();
        let (table, lengths) = cache.block_table(&[id], 8).unwrap();
        let of = Attend { group: 3, score: Score::new(0.125).unwrap(), mask: Mask::Causal };
        let q: Vec<f32> = Inputs::Saturated.values(3, 16 + 64, 9);
        let view = PagedView {
            layout: cache.layout(),
            pages: cache.pages().unwrap(),
            block_table: BlockTable::shared(&table, 1, 8).unwrap(),
            lengths: &lengths,
        };
        let whole = attend(&of, &q, &[0, 1], &view, Probabilities::Exact).unwrap();
        let (keys, values): (Vec<_>, Vec<_>) = gathered(&cache, id).into_iter().unzip();
        for part in [1, 3, 16, 33, 1000] {
            let parts = decode_in_parts(&of, &ranks, &q, &keys, &values, part).unwrap();
            let case = format!("{length} tokens in parts of {part}");
            Comparison::of_f64(&parts.out, &whole.out, Tolerance::new(1e-12, 1e-12)).assert(&case);
            Comparison::of_f64(&parts.lse, &whole.lse, Tolerance::new(1e-12, 1e-12)).assert(&case);
        }
    }
}
