//! The whole step: against dense attention, against attention over what was selected, and under random operations.

mod common;

use std::sync::Arc;

use attention::rope::{Rope, RopeConfig};
use attention::testing::Rng;
use attention::{AttentionSpec, DType, Mask};
use common::{DIM, Text, cache, configs, normal, spec, worst};
use sparse_attn::index::gate::GateWeights;
use sparse_attn::metadata::Metadata;
use sparse_attn::{Cache, Capacity, Config, Error, Plan};

/// A context up to the budget is attended as if there were no cache at all, to the last bit; one token more is not.
#[test]
fn contexts_within_the_budget_are_dense_bit_by_bit() {
    let spec = spec(6, 2);
    for (name, config) in configs(96) {
        let (mut cache, id) = cache(&config, spec, 400);
        let limit = cache.plan().effective_budget().tokens;
        assert!((64..=96).contains(&limit), "{name}: {limit} tokens");
        let text = Text::new(&mut Rng::new(1), spec, limit + 4);
        text.prefill(&mut cache, id, 0..limit - 3);
        for token in limit - 3..limit {
            let found = text.decode(&mut cache, id, token);
            assert_eq!(found, text.dense(token + 1, 1), "{name}, token {token}");
            assert!(cache.is_dense(id, 0).unwrap());
            assert_eq!(cache.memory().host, 0, "{name}: nothing leaves the device");
        }
        text.decode(&mut cache, id, limit);
        assert!(!cache.is_dense(id, 0).unwrap(), "{name}");
        assert_eq!(cache.counters().dense_steps, 3, "{name}");
        assert_eq!(cache.check().unwrap(), None, "{name}");
    }
}

/// With a budget that holds the whole context, cut up all the same, every page is selected and the result is dense attention
/// up to rounding.
#[test]
fn a_full_budget_equals_dense() {
    let spec = spec(4, 2);
    // Clusters leave pages in part empty: they take about twice the room.
    for (name, config) in configs(640) {
        let (mut cache, id) = cache(&Config { dense_context: Some(0), ..config }, spec, 300);
        let text = Text::new(&mut Rng::new(2), spec, 300);
        text.prefill(&mut cache, id, 0..200);
        for token in 200..300 {
            let (out, lse) = text.decode(&mut cache, id, token);
            let (expected, expected_lse) = text.dense(token + 1, 1);
            assert!(worst(&out, &expected) < 1e-5, "{name}, token {token}: {}", worst(&out, &expected));
            assert!(worst(&lse, &expected_lse) < 1e-5, "{name}, token {token}");
        }
        let counters = cache.counters();
        assert_eq!((counters.steps, counters.dense_steps, counters.estimated), (100, 0, 0), "{name}");
        for kv_head in 0..2 {
            assert_eq!(cache.read(id, 0, kv_head).unwrap().0.len(), 300 * DIM, "{name}");
        }
        assert_eq!(cache.check().unwrap(), None, "{name}");
    }
}

/// The step's output is attention over exactly what was selected and what is open, and it is not farther from the dense one
/// than twice the missed mass times the largest value.
#[test]
fn output_is_attention_over_the_selection() {
    let spec = spec(6, 2);
    for (name, config) in configs(96).into_iter().filter(|(name, _)| *name != "retro_infer") {
        let text = Text::new(&mut Rng::new(3), spec, 330);
        let (mut cache, id) = cache(&config, spec, 400);
        text.prefill(&mut cache, id, 0..250);
        for token in 250..330 {
            cache.append(id, 0, &text.tokens(token..token + 1)).unwrap();
            let queries = text.queries(token..token + 1);
            let selection = cache.select(id, 0, &queries).unwrap();
            let heads = selection.heads().to_vec();
            let mut resolved = cache.resolve(id, selection).unwrap();
            let (mut out, mut lse) = (vec![0.0; 6 * DIM], vec![0.0; 6]);
            assert!(cache.attend(id, &queries, &resolved, &mut out, &mut lse).is_err(), "not gathered");
            cache.gather(id, &mut resolved).unwrap();
            cache.attend(id, &queries, &resolved, &mut out, &mut lse).unwrap();
            assert_eq!(cache.check().unwrap(), None, "{name}, token {token}");

            let page = cache.plan().page().tokens();
            let (dense, dense_lse) = text.dense(token + 1, 1);
            for (kv_head, head) in heads.iter().enumerate() {
                let closed = (token + 1) / cache_chunk(&config) * cache_chunk(&config);
                let mut seen: Vec<usize> =
                    head.pages.iter().flat_map(|&p| p as usize * page..(p as usize + 1) * page).collect();
                seen.extend(closed..token + 1);
                assert!(seen.len() <= 96, "{name}: {} tokens read", seen.len());
                assert!(seen.contains(&0) && seen.contains(&token), "{name}: sinks and the last token");
                for q_head in spec.shape.q_heads_of(kv_head) {
                    let (expected, expected_lse) = attend(&text, token, q_head, kv_head, &seen);
                    let at = q_head * DIM..(q_head + 1) * DIM;
                    assert!(worst(&out[at.clone()], &expected) < 1e-5, "{name}, token {token}");
                    assert!((lse[q_head] - expected_lse).abs() < 1e-5, "{name}, token {token}");
                    let mass = (lse[q_head] - dense_lse[q_head]).exp();
                    let largest = (0..=token)
                        .map(|t| &text.v[(t * 2 + kv_head) * DIM..][..DIM])
                        .map(|v| v.iter().map(|x| x * x).sum::<f32>().sqrt())
                        .fold(0.0, f32::max);
                    let error = out[at.clone()].iter().zip(&dense[at]).map(|(a, b)| (a - b).powi(2));
                    let error = error.sum::<f32>().sqrt();
                    assert!(error <= 2.0 * (1.0 - mass) * largest + 1e-4, "{name}: {error}, mass {mass}");
                }
            }
        }
        let counters = cache.counters();
        assert_eq!(counters.hits + counters.misses, counters.selected, "{name}");
        assert_eq!(counters.steps, 80, "{name}");
        assert!(counters.hits > 0 && counters.misses > 0, "{name}: {counters:?}");
        let page_bytes = cache.plan().page().bytes() as u64;
        assert_eq!(counters.bytes_in, counters.misses * page_bytes, "{name}");
    }
}

fn cache_chunk(config: &Config) -> usize {
    match config.algorithm {
        sparse_attn::Algorithm::Pages { chunk, .. } => chunk,
        _ => unreachable!("chunks only"),
    }
}

/// Attention of one query head over some tokens, in f64.
fn attend(text: &Text, token: usize, q_head: usize, kv_head: usize, seen: &[usize]) -> (Vec<f32>, f32) {
    let kv_heads = text.spec.shape.kv_heads();
    let vector = |values: &[f32], t: usize| values[(t * kv_heads + kv_head) * DIM..][..DIM].to_vec();
    let q = &text.q[(token * text.spec.shape.q_heads() + q_head) * DIM..][..DIM];
    let scores: Vec<f64> = seen
        .iter()
        .map(|&t| {
            let dot = q.iter().zip(vector(&text.k, t)).map(|(&q, k)| f64::from(q) * f64::from(k)).sum();
            text.spec.score.apply_f64(dot)
        })
        .collect();
    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|score| (score - most).exp()).sum();
    let mut out = [0.0f64; DIM];
    for (&t, score) in seen.iter().zip(&scores) {
        for (out, v) in out.iter_mut().zip(vector(&text.v, t)) {
            *out += (score - most).exp() / sum * f64::from(v);
        }
    }
    (out.iter().map(|&x| x as f32).collect(), (most + sum.ln()) as f32)
}

/// Clusters of identical keys are estimated exactly, and random ones better than not at all.
#[test]
fn estimation() {
    let spec = spec(4, 1);
    let (_, config) = configs(96).pop().unwrap();
    let errors = [false, true].map(|equal| {
        [0.0, 1.0].map(|estimate| {
            let mut text = Text::new(&mut Rng::new(5), spec, 200);
            if equal {
                // Few different keys, each many times and together.
                let keys = normal(&mut Rng::new(6), 24 * DIM);
                for (token, k) in text.k.chunks_exact_mut(DIM).enumerate() {
                    k.copy_from_slice(&keys[token / 9 * DIM..][..DIM]);
                }
            }
            let mut config = config.clone();
            if let sparse_attn::Algorithm::Clusters { estimate: share, clustering, .. } =
                &mut config.algorithm
            {
                (*share, clustering.cluster, clustering.segment) = (estimate, 4, 1000);
            }
            let (mut cache, id) = cache(&config, spec, 400);
            text.prefill(&mut cache, id, 0..199);
            let (out, _) = text.decode(&mut cache, id, 199);
            worst(&out, &text.dense(200, 1).0)
        })
    });
    let [[random_without, random_with], [equal_without, equal_with]] = errors;
    println!(
        "worst error: random {random_without} → {random_with}, equal keys {equal_without} → {equal_with}"
    );
    assert!(random_with < random_without);
    assert!(equal_with < 0.02 && equal_with < 0.1 * equal_without);
}

/// A prompt in parts, after decoded tokens: dense over everything that was stored, whatever the order of storage.
#[test]
fn prompts_may_continue() {
    let spec = spec(4, 2);
    for (name, config) in configs(96) {
        let text = Text::new(&mut Rng::new(7), spec, 300);
        let (mut cache, id) = cache(&config, spec, 300);
        text.prefill(&mut cache, id, 0..150);
        (150..180).for_each(|token| drop(text.decode(&mut cache, id, token)));
        let (mut out, mut lse) = (vec![0.0; 120 * 4 * DIM], vec![0.0; 120 * 4]);
        let (queries, tokens) = (text.queries(180..300), text.tokens(180..300));
        cache.prefill(id, 0, &queries, &tokens, &mut out, &mut lse).unwrap();
        let (expected, expected_lse) = text.dense(300, 120);
        assert!(worst(&out, &expected) < 1e-5 && worst(&lse, &expected_lse) < 1e-5, "{name}");
        assert_eq!(cache.tokens(id, 0).unwrap(), 300);
        let refused = cache.append(id, 0, &text.tokens(0..1));
        assert!(matches!(refused, Err(Error::Argument { argument: "tokens", .. })), "{name}: {refused:?}");
    }
}

#[test]
fn gates_run_through_the_whole_step() {
    let spec = spec(4, 2);
    let mut rng = Rng::new(8);
    let mut gate = || {
        let rope = Rope::new(RopeConfig::new(8, 10_000.0), 512).unwrap();
        let (w_q, w_k) = (normal(&mut rng, 8 * 2 * DIM), normal(&mut rng, 8 * 3 * DIM));
        Arc::new(GateWeights::new(w_q, w_k, (2, DIM, 8), rope).unwrap())
    };
    let weights = vec![vec![gate(), gate()]];
    let config = Config { dtype: DType::F32, ..Config::seer(160, weights) };
    let (mut cache, id) = cache(&config, spec, 400);
    let text = Text::new(&mut Rng::new(9), spec, 300);
    text.prefill(&mut cache, id, 0..260);
    (260..300).for_each(|token| drop(text.decode(&mut cache, id, token)));
    assert_eq!(cache.check().unwrap(), None);
    assert_eq!(cache.counters().steps, 40);
    let missing = sparse_attn::Tokens { k_unrotated: None, ..text.tokens(0..1) };
    let refused = cache.append(id, 0, &missing);
    assert!(matches!(refused, Err(Error::Argument { argument: "k_unrotated", .. })), "{refused:?}");
    assert!(Plan::new(&config, &[spec, spec]).is_err(), "gates for one layer");
}

/// Forks read the same pages and go on for themselves; nothing is copied, and the last one out leaves the pools empty.
#[test]
fn forks_share_pages() {
    let spec = spec(4, 2);
    for (name, config) in configs(96) {
        let plan = Plan::new(&config, &[spec]).unwrap();
        let mut cache = Cache::<f32>::new(plan.clone(), Capacity::of_requests(&plan, 2, 400)).unwrap();
        let text = Text::new(&mut Rng::new(10), spec, 340);
        let first = cache.try_admit().unwrap();
        text.prefill(&mut cache, first, 0..270);
        (270..300).for_each(|token| drop(text.decode(&mut cache, first, token)));
        let before = cache.memory().host;
        let second = cache.fork(first).unwrap();
        assert_eq!(cache.memory().host, before, "{name}: no page was copied");
        for token in 300..340 {
            // Slots differ, results do not, up to the order of hits and misses.
            let (a, b) = (text.decode(&mut cache, first, token), text.decode(&mut cache, second, token));
            assert!(worst(&a.0, &b.0) < 1e-5, "{name}, token {token}");
            assert_eq!(cache.check().unwrap(), None, "{name}, token {token}");
        }
        cache.free(first).unwrap();
        assert!(matches!(cache.tokens(first, 0), Err(Error::StaleRequest { .. })));
        assert!(matches!(cache.free(first), Err(Error::StaleRequest { .. })));
        text.decode(&mut cache, second, 0);
        cache.free(second).unwrap();
        assert_eq!((cache.memory().device(), cache.memory().host), (0, 0), "{name}");
        assert_eq!(cache.budget().free(), cache.budget().capacity(), "{name}");
    }
}

#[test]
fn stale_selections_are_refused() {
    let spec = spec(4, 2);
    let (_, config) = configs(96).swap_remove(0);
    let plan = Plan::new(&config, &[spec]).unwrap();
    let mut cache = Cache::<f32>::new(plan.clone(), Capacity::of_requests(&plan, 2, 400)).unwrap();
    let text = Text::new(&mut Rng::new(11), spec, 330);
    let (a, b) = (cache.try_admit().unwrap(), cache.try_admit().unwrap());
    text.prefill(&mut cache, a, 0..200);
    text.prefill(&mut cache, b, 0..200);
    let selection = cache.select(a, 0, &text.queries(199..200)).unwrap();
    assert!(matches!(cache.resolve(b, selection.clone()), Err(Error::StaleSelection { .. })));
    let mut resolved = cache.resolve(a, selection.clone()).unwrap();
    cache.append(a, 0, &text.tokens(200..216)).unwrap();
    assert!(matches!(cache.resolve(a, selection.clone()), Err(Error::StaleSelection { .. })));
    assert!(matches!(cache.prefetch(a, &selection), Err(Error::StaleSelection { .. })));
    assert!(matches!(cache.gather(a, &mut resolved), Err(Error::StaleSelection { .. })));
    assert_eq!(cache.check().unwrap(), None);
}

/// What was fetched ahead is a hit.
#[test]
fn prefetched_pages_are_hits() {
    let spec = spec(4, 2);
    for (name, config) in configs(96) {
        let text = Text::new(&mut Rng::new(12), spec, 330);
        let (mut cache, id) = cache(&config, spec, 400);
        text.prefill(&mut cache, id, 0..300);
        let queries = text.queries(300..301);
        let selection = cache.select(id, 0, &queries).unwrap();
        cache.prefetch(id, &selection).unwrap();
        let prefetched = cache.counters().prefetched;
        let resolved = cache.resolve(id, selection).unwrap();
        assert!(prefetched > 0, "{name}");
        assert_eq!(resolved.heads().iter().map(|head| head.misses.len()).sum::<usize>(), 0, "{name}");
        assert_eq!(cache.check().unwrap(), None, "{name}");
    }
}

#[test]
fn refused_configurations_name_the_argument() {
    let spec = spec(4, 2);
    let good = || Config { dtype: DType::F32, ..Config::quest(160) };
    let plan = Plan::new(&good(), &[spec]).unwrap();
    assert_eq!(plan.effective_budget().tokens, 160);
    let retro = || Config { dtype: DType::F32, ..Config::retro_infer(160) };
    for (config, layers, named) in [
        (Config { budget: 63, ..good() }, vec![spec], "budget"),
        (Config { page: 12, ..good() }, vec![spec], "page tokens"),
        (Config { page: 32, ..good() }, vec![spec], "partition"),
        (Config { buffering: -1.0, ..good() }, vec![spec], "buffering"),
        (Config { min_buffering: 9.0, ..good() }, vec![spec], "min_buffering"),
        (good(), vec![], "layers"),
        (good(), vec![spec, common::spec(2, 2)], "layers"),
        (retro(), vec![spec], "budget"),
    ] {
        match Plan::new(&config, &layers) {
            Err(Error::Argument { argument, .. }) => assert_eq!(argument, named),
            other => panic!("{named}: {other:?}"),
        }
    }
    // Windows are attended densely, whatever their length.
    let windowed = AttentionSpec { mask: Mask::sliding_window(64, 0).unwrap(), ..spec };
    assert_eq!(Plan::new(&good(), &[windowed]).unwrap().dense_tokens(0), usize::MAX);
    // The least budget works.
    assert!(Plan::new(&Config { budget: 64, ..good() }, &[spec]).is_ok());
    let half = Config { dtype: DType::F16, ..good() };
    let plan = Plan::new(&half, &[spec]).unwrap();
    let refused = Cache::<f32>::new(plan, Capacity { device_pages: 1, host_pages: 1, max_tokens: 1 });
    assert!(matches!(refused, Err(Error::Argument { argument: "dtype", .. })));
}

/// Random operations of each configuration.
const OPERATIONS: usize = 20_000;

/// Requests come, grow and go: pools and tables agree throughout, refused requests harm nobody, and all is empty at the end.
#[test]
fn random_requests_leave_nothing_behind() {
    let spec = spec(2, 2);
    for (number, (name, config)) in configs(96).into_iter().enumerate() {
        let config = Config { buffering: 3.0, min_buffering: 0.5, ..config };
        let plan = Plan::new(&config, &[spec]).unwrap();
        let device_pages = plan.request_pages(3.0, 240) + 2 * plan.request_pages(0.5, 240);
        let capacity = Capacity { device_pages, host_pages: 4 * plan.host_pages(240), max_tokens: 240 };
        let mut cache = Cache::<f32>::new(plan, capacity).unwrap();
        let mut rng = Rng::new(30 + number as u64);
        let text = Text::new(&mut rng, spec, 240);
        let mut live: Vec<(sparse_attn::RequestId, usize)> = Vec::new();
        let (mut refused, mut admitted) = (0, 0);
        // 10⁵ over all configurations.
        for operation in 0..OPERATIONS {
            let pick = rng.below(live.len().max(1));
            match (rng.below(14), live.get(pick).copied()) {
                (0 | 1, _) => match cache.try_admit() {
                    Ok(id) => {
                        admitted += 1;
                        live.push((id, 0));
                    }
                    Err(Error::Refused { .. }) => refused += 1,
                    Err(error) => panic!("{name}: {error}"),
                },
                (2, Some((id, tokens))) => match cache.fork(id) {
                    Ok(copy) => live.push((copy, tokens)),
                    Err(Error::Refused { .. }) => refused += 1,
                    Err(error) => panic!("{name}: {error}"),
                },
                (3, Some((id, _))) if live.len() > 1 => {
                    cache.free(id).unwrap();
                    live.swap_remove(pick);
                }
                (4, Some((id, _))) => drop(cache.grow(id).unwrap()),
                (5, Some((id, tokens))) if tokens + 60 <= 240 => {
                    text.prefill(&mut cache, id, tokens..tokens + 60);
                    live[pick].1 += 60;
                }
                (6, _) => drop(cache.reclaim(rng.below(8))),
                (_, Some((id, tokens))) if tokens < 240 => {
                    let (out, _) = text.decode(&mut cache, id, tokens);
                    assert!(out.iter().all(|x| x.is_finite()), "{name}, operation {operation}");
                    live[pick].1 += 1;
                }
                _ => {}
            }
            // Bytes take longest to compare; tables are looked at every time.
            if operation % 50 == 0 || operation + 50 > OPERATIONS {
                assert_eq!(cache.check().unwrap(), None, "{name}, operation {operation}");
            }
            for (id, _) in &live {
                for kv_head in 0..2 {
                    let fault = cache.lru(*id, 0, kv_head).unwrap().check();
                    assert_eq!(fault, None, "{name}, operation {operation}");
                }
            }
            let held: usize = cache.budget().grants().map(|(_, grant)| grant.held).sum();
            assert_eq!(held + cache.budget().free(), device_pages, "{name}, operation {operation}");
            assert!(cache.budget().grants().all(|(_, grant)| grant.held >= grant.floor));
        }
        assert!(refused > 0 && admitted > 3, "{name}: {admitted} admitted, {refused} refused");
        live.into_iter().for_each(|(id, _)| cache.free(id).unwrap());
        assert_eq!((cache.memory().device(), cache.memory().host), (0, 0), "{name}");
    }
}

/// A planted key is attended wherever it lies: in the first page, at a page's edge, in a page that lost its slot (which costs a miss),
/// among the recent ones and in the open page.
#[test]
fn needles_are_read_from_anywhere() {
    let spec = spec(2, 1);
    let (_, config) = configs(96).swap_remove(0);
    for place in [3, 111, 112, 150, 280, 299] {
        let mut text = Text::new(&mut Rng::new(50), spec, 300);
        let needle = normal(&mut Rng::new(51), DIM);
        let length = needle.iter().map(|x| x * x).sum::<f32>().sqrt();
        // Its logit is above all others by more than 5.
        let k = &mut text.k[place * DIM..][..DIM];
        k.iter_mut().zip(&needle).for_each(|(k, x)| *k = x * 30.0 / length);
        for head in 0..2 {
            let q = &mut text.q[(299 * 2 + head) * DIM..][..DIM];
            q.iter_mut().zip(&needle).for_each(|(q, x)| *q = x * 5.0 / length);
        }
        let (mut cache, id) = cache(&config, spec, 400);
        text.prefill(&mut cache, id, 0..200);
        (200..299).for_each(|token| drop(text.decode(&mut cache, id, token)));
        let page = (place / 16) as u32;
        let closed = place / 16 < 299 / 16;
        let resident = cache.lru(id, 0, 0).unwrap().metadata().lookup(page).is_some();
        cache.append(id, 0, &text.tokens(299..300)).unwrap();
        let queries = text.queries(299..300);
        let selection = cache.select(id, 0, &queries).unwrap();
        assert_eq!(selection.heads()[0].pages.contains(&page), closed, "needle at {place}");
        let mut resolved = cache.resolve(id, selection).unwrap();
        let missed = resolved.heads()[0].misses.iter().any(|miss| miss.page == page);
        assert_eq!(missed, closed && !resident, "needle at {place}: a page that is not there costs a miss");
        cache.gather(id, &mut resolved).unwrap();
        let (mut out, mut lse) = (vec![0.0; 2 * DIM], vec![0.0; 2]);
        cache.attend(id, &queries, &resolved, &mut out, &mut lse).unwrap();
        let (dense, dense_lse) = text.dense(300, 1);
        let largest = text.v.chunks_exact(DIM).map(|v| v.iter().map(|x| x * x).sum::<f32>().sqrt());
        let largest = largest.fold(0.0, f32::max);
        for head in 0..2 {
            let mass = (lse[head] - dense_lse[head]).exp();
            let of = head * DIM..(head + 1) * DIM;
            let error = out[of.clone()].iter().zip(&dense[of]).map(|(a, b)| (a - b).powi(2)).sum::<f32>();
            let bound = 2.0 * (1.0 - mass) * largest + 1e-4;
            assert!(mass > 0.99 && error.sqrt() <= bound, "needle at {place}: mass {mass}, error {error}");
        }
    }
}

/// The trace that a cache records, replayed, gives the hits that the cache had.
#[test]
fn recorded_traces_replay() {
    let spec = spec(4, 2);
    let (_, config) = configs(96).swap_remove(0);
    let text = Text::new(&mut Rng::new(14), spec, 330);
    let (mut cache, id) = cache(&config, spec, 400);
    text.prefill(&mut cache, id, 0..200);
    assert!(cache.record(true).is_none());
    (200..330).for_each(|token| drop(text.decode(&mut cache, id, token)));
    let trace = cache.record(false).unwrap();
    assert_eq!((trace.streams(), trace.steps().len()), (vec![0, 1], 2 * 130));
    let selected: usize = trace.steps().iter().map(|step| step.pages.len()).sum();
    assert_eq!(selected as u64, cache.counters().selected);
    let again = sparse_attn::trace::Trace::from_text(&trace.to_text()).unwrap();
    assert_eq!(again, trace);
}
