//! Summaries: bounds and identities of each, clusters, gates, and what is selected by them.

mod common;

use std::sync::Arc;

use attention::rope::{Rope, RopeConfig};
use attention::testing::Rng;
use attention::{DType, Score};
use common::{DIM, normal};
use proptest::prelude::*;
use sparse_attn::index::clusters::{ClusterIndex, Clustering, k_means};
use sparse_attn::index::gate::{GateIndex, GateWeights};
use sparse_attn::index::pages::{PageIndex, Scorer};
use sparse_attn::index::{Closing, GroupQuery, Index};
use sparse_attn::page::PageSpec;
use sparse_attn::partition::Partitions;
use sparse_attn::select::{Aggregation, SelectRule, choose, select};

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

fn closing<'a>(k: &'a [f32], v: &'a [f32]) -> Closing<'a> {
    Closing { k, k_unrotated: Some(k), v, position: 0 }
}

fn query(q: &[f32]) -> GroupQuery<'_> {
    GroupQuery { q, q_unrotated: Some(q), position: 0 }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Quest, Eq. 2: no key of a page scores higher than the page.
    #[test]
    fn min_and_max_bound_every_key(seed in any::<u64>(), tokens in 1usize..33, scale in -3f64..4.0) {
        let mut rng = Rng::new(seed);
        let k: Vec<f32> = normal(&mut rng, tokens * DIM).iter().map(|x| x * 10f32.powf(scale as f32)).collect();
        let q = normal(&mut rng, DIM);
        let mut summary = vec![0.0; 2 * DIM];
        Scorer::MinMax.summarise(&k, DIM, &mut summary);
        let bound = f64::from(Scorer::MinMax.score(&q, &summary));
        for key in k.chunks_exact(DIM) {
            prop_assert!(dot(&q, key) <= bound + 1e-6 * bound.abs(), "{} over {bound}", dot(&q, key));
        }
    }

    /// Of a page with one key every score is the key's own.
    #[test]
    fn one_key_is_scored_exactly(seed in any::<u64>()) {
        let mut rng = Rng::new(seed);
        let (k, q) = (normal(&mut rng, DIM), normal(&mut rng, DIM));
        for scorer in Scorer::ALL {
            let mut summary = vec![f32::NAN; scorer.vectors() * DIM];
            scorer.summarise(&k, DIM, &mut summary);
            let found = f64::from(scorer.score(&q, &summary));
            prop_assert!((found - dot(&q, &k)).abs() < 1e-5, "{}: {found}, not {}", scorer.name(), dot(&q, &k));
        }
    }
}

/// The identity behind mean and deviation: max(q·min, q·max) = q·(min + max) / 2 + |q|·(max − min) / 2.
#[test]
fn a_box_is_a_centre_and_a_radius() {
    let mut rng = Rng::new(3);
    for tokens in [2usize, 16] {
        let (k, q) = (normal(&mut rng, tokens * DIM), normal(&mut rng, DIM));
        let mut summary = vec![0.0; 2 * DIM];
        Scorer::MinMax.summarise(&k, DIM, &mut summary);
        let (low, high) = summary.split_at(DIM);
        let centre: Vec<f32> = low.iter().zip(high).map(|(a, b)| (a + b) / 2.0).collect();
        let radius: Vec<f32> = low.iter().zip(high).map(|(a, b)| (b - a) / 2.0).collect();
        let size: Vec<f32> = q.iter().map(|q| q.abs()).collect();
        let expected = dot(&q, &centre) + dot(&size, &radius);
        assert!((f64::from(Scorer::MinMax.score(&q, &summary)) - expected).abs() < 1e-5, "{tokens} tokens");
    }
}

#[test]
fn summaries_by_hand() {
    // Two tokens of two channels: (1, −2) and (3, 4).
    for (scorer, expected) in [
        (Scorer::MinMax, vec![1.0, -2.0, 3.0, 4.0]),
        (Scorer::CuboidMean, vec![2.0, 1.0, 1.0, 3.0]),
        (Scorer::MeanStd { weight: 0.5 }, vec![2.0, 1.0, 1.0, 3.0]),
        (Scorer::Mean, vec![2.0, 1.0]),
    ] {
        let mut summary = vec![f32::NAN; expected.len()];
        scorer.summarise(&[1.0, -2.0, 3.0, 4.0], 2, &mut summary);
        assert_eq!(summary, expected, "{}", scorer.name());
    }
    let mut index = PageIndex::new(Scorer::Mean, 2, 2);
    assert!(index.close(&closing(&[0.0; 6], &[0.0; 6])).is_err(), "half a chunk");
    assert_eq!(index.close(&closing(&[0.0; 8], &[0.0; 8])).unwrap().sizes, [2, 2]);
    assert_eq!((index.partitions(), index.bytes()), (2, 2 * 2 * 2));
}

/// Every token is in exactly one cluster, the sinks in one of their own, and the sums are those of its tokens.
#[test]
fn clusters_hold_every_token_once() {
    let mut rng = Rng::new(7);
    let clustering = Clustering { segment: 50, cluster: 8, iterations: 5 };
    for tokens in [1usize, 4, 5, 54, 130] {
        let (k, v) = (normal(&mut rng, tokens * DIM), normal(&mut rng, tokens * DIM));
        let mut index = ClusterIndex::new(clustering, 4, DIM, DIM);
        let arrangement = index.close(&closing(&k, &v)).unwrap();
        let mut sorted = arrangement.order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..tokens as u32).collect::<Vec<_>>(), "{tokens} tokens");
        assert_eq!(arrangement.sizes[0], tokens.min(4));
        assert_eq!(arrangement.order[..tokens.min(4)], [0, 1, 2, 3][..tokens.min(4)]);
        let mut first = 0;
        for (number, &size) in arrangement.sizes.iter().enumerate() {
            let members = &arrangement.order[first..first + size];
            let estimate = index.estimate(number).unwrap();
            assert_eq!(estimate.tokens, size);
            for channel in 0..DIM {
                let sum = |values: &[f32]| {
                    members.iter().map(|&m| f64::from(values[m as usize * DIM + channel])).sum::<f64>()
                };
                assert!((f64::from(estimate.value_sum[channel]) - sum(&v)).abs() < 1e-4);
                assert!((f64::from(estimate.centroid[channel]) - sum(&k) / size as f64).abs() < 1e-5);
            }
            // No cluster reaches over the end of a segment.
            let segment = |member: u32| (member.max(4) - 4) / 50;
            assert!(members.iter().all(|&m| segment(m) == segment(members[0])), "{tokens} tokens, {number}");
            first += size;
        }
        assert_eq!((first, index.estimate(arrangement.sizes.len())), (tokens, None));
    }
}

/// Well separated groups of keys are found.
#[test]
fn k_means_finds_groups() {
    let mut rng = Rng::new(9);
    let centres = normal(&mut rng, 4 * DIM);
    let group = |token: usize| token / 8 % 4;
    let mut k = Vec::new();
    for token in 0..64 {
        let noise = normal(&mut rng, DIM);
        k.extend(centres[group(token) * DIM..][..DIM].iter().zip(noise).map(|(c, n)| 5.0 * c + 0.1 * n));
    }
    let assigned = k_means(&k, DIM, &Clustering { segment: 64, cluster: 8, iterations: 10 });
    for a in 0..64 {
        for b in 0..64 {
            let (together, alike) = (assigned[a] == assigned[b], group(a) == group(b));
            assert!(alike || !together, "tokens {a} and {b}");
        }
    }
}

/// The gate is what its formula says, written out for one block.
#[test]
fn gates_by_their_formula() {
    let (group, gate_dim, block) = (2, 8, 4);
    let mut rng = Rng::new(11);
    let (w_q, w_k) = (normal(&mut rng, gate_dim * group * DIM), normal(&mut rng, gate_dim * 3 * DIM));
    let rope = || Rope::new(RopeConfig::new(gate_dim, 10_000.0), 64).unwrap();
    let weights = GateWeights::new(w_q.clone(), w_k.clone(), (group, DIM, gate_dim), rope()).unwrap();
    let (k, q) = (normal(&mut rng, 3 * block * DIM), normal(&mut rng, group * DIM));
    let mut index = GateIndex::new(Arc::new(weights), block);
    let tokens = Closing { k: &k, k_unrotated: Some(&k), v: &k, position: 8 };
    assert_eq!(index.close(&tokens).unwrap().sizes, [block; 3]);
    assert!(index.close(&Closing { k_unrotated: None, ..tokens }).is_err());
    let mut scores = Vec::new();
    index.score(&GroupQuery { q: &q, q_unrotated: Some(&q), position: 30 }, &mut scores).unwrap();
    assert!(
        index.score(&GroupQuery { q: &q, q_unrotated: None, position: 30 }, &mut scores.clone()).is_err()
    );

    let product =
        |w: &[f32], x: &[f32]| w.chunks_exact(x.len()).map(|row| dot(row, x) as f32).collect::<Vec<_>>();
    let mut gate_q = product(&w_q, &q);
    rope().apply(&mut gate_q, 1, &[30]).unwrap();
    for (number, &score) in scores.iter().enumerate() {
        let keys = &k[number * block * DIM..][..block * DIM];
        let column = |channel: usize| keys.iter().skip(channel).step_by(DIM).copied();
        let mut pooled: Vec<f32> = (0..DIM).map(|c| column(c).fold(f32::MIN, f32::max)).collect();
        pooled.extend((0..DIM).map(|c| column(c).fold(f32::MAX, f32::min)));
        pooled.extend((0..DIM).map(|c| column(c).sum::<f32>() / block as f32));
        let mut gate_k = product(&w_k, &pooled);
        rope().apply(&mut gate_k, 1, &[8 + (number * block) as u32]).unwrap();
        assert!((f64::from(score) - dot(&gate_q, &gate_k)).abs() < 1e-3, "block {number}");
    }
    assert!(GateWeights::new(w_q, w_k, (group, DIM, gate_dim + 1), rope()).is_err());
}

fn rule(pages: usize, sinks: usize, recent: usize, estimate: f64) -> SelectRule {
    let score = Score::new(1.0).unwrap();
    SelectRule { aggregation: Aggregation::Raw, score, pages, sinks, recent, estimate }
}

#[test]
fn kept_partitions_come_first_and_pages_must_fit() {
    let spec = PageSpec::new(8, DIM, DIM, DType::F32).unwrap();
    let mut partitions = Partitions::default();
    for tokens in [4, 8, 20, 8, 8, 16, 8] {
        partitions.push(&spec, tokens); // pages 0 | 1 | 2-4 | 5 | 6 | 7-8 | 9
    }
    let scores = [0.0, 5.0, 9.0, 1.0, 3.0, 4.0, 2.0];
    for (name, rule, pages, estimated) in [
        ("best that fit", rule(4, 0, 0, 0.0), &[1, 2, 3, 4][..], &[][..]),
        ("the best does not fit: nothing after it", rule(2, 0, 0, 0.0), &[], &[]),
        ("sinks and recent", rule(5, 1, 1, 0.0), &[0, 2, 3, 4, 9], &[]),
        ("estimates follow the ranking", rule(4, 0, 0, 0.2), &[1, 2, 3, 4], &[4, 5]),
        ("everything", rule(99, 1, 1, 1.0), &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], &[]),
        ("kept ones alone", rule(2, 1, 1, 0.0), &[0, 9], &[]),
    ] {
        let found = choose(&scores, &partitions, &rule);
        assert_eq!((found.pages.as_slice(), found.estimated.as_slice()), (pages, estimated), "{name}");
    }
}

/// A planted key whose product is far above all others is found by minimum and maximum at least as well as its bound
/// promises, wherever it lies.
#[test]
fn a_needle_is_found() {
    let mut rng = Rng::new(21);
    let (tokens, page) = (2048, 16);
    let spec = PageSpec::new(page, DIM, DIM, DType::F32).unwrap();
    let q = normal(&mut rng, DIM);
    let length = dot(&q, &q).sqrt() as f32;
    for place in [0, 15, 16, 1000, 2047] {
        let mut k = normal(&mut rng, tokens * DIM);
        let best = k.chunks_exact(DIM).map(|key| dot(&q, key)).fold(f64::MIN, f64::max) as f32;
        for (k, q) in k[place * DIM..][..DIM].iter_mut().zip(&q) {
            *k = q / length * ((best + 25.0) / length);
        }
        for scorer in Scorer::ALL {
            let mut index = PageIndex::new(scorer, page, DIM);
            index.close(&closing(&k, &k)).unwrap();
            let mut partitions = Partitions::default();
            (0..tokens / page).for_each(|_| partitions.push(&spec, page));
            let found = select(&index, &partitions, &query(&q), &rule(16, 0, 0, 0.0)).unwrap();
            let has = found.pages.contains(&((place / page) as u32));
            println!("needle at {place}, {}: {}", scorer.name(), if has { "found" } else { "missed" });
            if scorer == Scorer::MinMax {
                let mut scores = Vec::new();
                index.score(&query(&q), &mut scores).unwrap();
                assert!(scores[place / page] >= best + 24.9, "the bound holds the needle");
            }
            assert!(has, "needle at {place}, {}", scorer.name());
        }
    }
}

/// Keys that drift from token to token, as they do along a text: the better a summary tells a page's best key from its spread, the
/// more of the attention its selection captures. An order of these synthetic data, with budgets of a
/// sixteenth; where neighbours capture almost as much, other data turn it around.
#[test]
fn attention_mass_by_scorer() {
    const DIM: usize = 64;
    const TOKENS: usize = 4096;
    const SEEDS: u64 = 16;
    for page in [8, 16, 32, 64] {
        let spec = PageSpec::new(page, DIM, DIM, DType::F32).unwrap();
        let mut partitions = Partitions::default();
        (0..TOKENS / page).for_each(|_| partitions.push(&spec, page));
        let scorers = [Scorer::MeanStd { weight: 0.25 }, Scorer::CuboidMean, Scorer::MinMax];
        // The oracle's mass, then the scorers'.
        let mut mass = [0.0; 4];
        for seed in 0..SEEDS {
            let mut rng = Rng::new(40 + seed);
            let mut k = normal(&mut rng, DIM);
            for _ in 1..TOKENS {
                let last = k[k.len() - DIM..].to_vec();
                let noise = normal(&mut rng, DIM);
                k.extend(
                    last.iter().zip(noise).map(|(last, noise)| 0.9 * last + (1.0f32 - 0.81).sqrt() * noise),
                );
            }
            let q: Vec<f32> = normal(&mut rng, DIM).iter().map(|q| q * 0.3).collect();
            let weights: Vec<f64> = k.chunks_exact(DIM).map(|key| dot(&q, key).exp()).collect();
            let total: f64 = weights.iter().sum();
            let of_page: Vec<f64> =
                weights.chunks_exact(page).map(|page| page.iter().sum::<f64>() / total).collect();
            let rule = rule(256 / page, 0, 0, 0.0);
            let captured = |scores: &[f32]| -> f64 {
                choose(scores, &partitions, &rule).pages.iter().map(|&page| of_page[page as usize]).sum()
            };
            mass[0] += captured(&of_page.iter().map(|&mass| mass as f32).collect::<Vec<_>>());
            for (mass, scorer) in mass[1..].iter_mut().zip(scorers) {
                let mut index = PageIndex::new(scorer, page, DIM);
                index.close(&closing(&k, &k)).unwrap();
                let mut scores = Vec::new();
                index.score(&query(&q), &mut scores).unwrap();
                *mass += captured(&scores);
            }
        }
        let mass = mass.map(|mass| mass / SEEDS as f64);
        println!(
            "pages of {page}: oracle {:.3}, meanstd {:.3}, cuboid {:.3}, minmax {:.3}",
            mass[0], mass[1], mass[2], mass[3]
        );
        assert!(mass.windows(2).all(|pair| pair[0] >= pair[1]), "pages of {page}: {mass:?}");
    }
}
