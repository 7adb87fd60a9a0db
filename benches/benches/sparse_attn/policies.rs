//! What replacement policies hit on one drifting trace, and what a step costs them on the CPU. The hit rates are printed: no
//! measure of time shows them.

use ::sparse_attn::BucketedLru;
use ::sparse_attn::bucketed_lru::BUCKETS;
use ::sparse_attn::replacement::{Belady, ExactLru, Random, Replacement, hit_rate};
use ::sparse_attn::trace::Drift;
use criterion::{BenchmarkId, Criterion};

/// Slots as a multiple of the pages selected at a step.
const RATIOS: [usize; 3] = [2, 4, 6];

pub(super) fn hit_rates(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("sparse-attn/hit-rate/cpu-reference/u32");
    group.sample_size(10);
    let trace = Drift { pages: 4096, selected: 64, steps: 400, correlation: 0.95, seed: 2 }.trace();
    let steps = || trace.stream(0);
    for ratio in RATIOS {
        let slots = 64 * ratio;
        for name in ["bucketed", "exact", "random", "belady"] {
            let policy = || -> Box<dyn Replacement> {
                match name {
                    "bucketed" => Box::new(<BucketedLru>::new(slots, BUCKETS).expect("valid buckets")),
                    "exact" => Box::new(ExactLru::new(slots)),
                    "random" => Box::new(Random::new(slots, 5)),
                    _ => Box::new(Belady::new(slots, steps())),
                }
            };
            let rate = hit_rate(&mut *policy(), steps()).expect("room for every step");
            println!("sparse-attn/hit-rate/{name}/{ratio}x: {rate:.4}");
            group.bench_function(BenchmarkId::new(name, format!("{ratio}x")), |bencher| {
                bencher.iter(|| hit_rate(&mut *policy(), steps()).expect("room for every step"));
            });
        }
    }
}
