//! Sequence parallelism on the host: what planning costs, and how much communication a ring exposes on the modelled clock.
//!
//! Times of `ring/sim` are seconds of that clock, which no machine changes: a whole ring against its compute alone.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, criterion_group};
use longkv_attention::{AttentionSpec, HeadShape, Mask, Score};
use longkv_benches::host;
use seq_parallel::placement::{Placement, Sequence, Shards};
use seq_parallel::ring::{Inputs, RingPlan};
use seq_parallel::transport::local;
use seq_parallel::transport::sim::{Link, Sim};

fn spec(q_heads: usize, kv_heads: usize, dim: usize) -> AttentionSpec {
    let shape = HeadShape::new(q_heads, kv_heads, dim, dim).expect("a shape");
    AttentionSpec { shape, score: Score::new(0.125).expect("a scale"), mask: Mask::Causal }
}

/// 1024 ranks, a packed batch of 256 sequences of unequal lengths with cached prefixes.
fn planning(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("seq-parallel/plan/cpu");
    let ranks = 1024;
    let sequences: Vec<Sequence> = (0..256).map(|i| Sequence { cached: i, new: 1000 + 37 * i }).collect();
    for placement in Placement::ALL {
        let id = format!("{ranks} ranks 256 sequences {placement}");
        // Who owns what, and what a rank computes at its first step: all that it needs before the ring starts.
        host::time(
            &mut group,
            BenchmarkId::new("plan", &id),
            &format!("seq-parallel/plan/u32/{placement}"),
            || {
                let shards = Shards::new(sequences.iter().copied(), placement, ranks).expect("shards");
                let plan = RingPlan::new(spec(8, 1, 128), shards).expect("a plan");
                (plan.workspace_bytes(2, 2), plan.tiles(700, 0))
            },
        );
        let shards = Shards::new(sequences.iter().copied(), placement, ranks).expect("shards");
        let plan = RingPlan::new(spec(8, 1, 128), shards).expect("a plan");
        group.bench_function(BenchmarkId::new("tiles of a step", &id), |bencher| {
            bencher.iter(|| black_box(plan.tiles(black_box(700), black_box(300))));
        });
    }
    group.finish();
}

/// A ring of 8 ranks whose blocks take a half, all and twice of the time of a step.
fn exposed(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("seq-parallel/ring/sim");
    group.sample_size(10);
    let (ranks, tokens, heads, dim) = (8, 32, 2, 16);
    let shards = Shards::new([Sequence::new(ranks * tokens)], Placement::Zigzag, ranks).expect("shards");
    let plan = RingPlan::new(spec(heads, heads, dim), shards).expect("a plan");
    let rows = vec![0.5f32; tokens * heads * dim];
    let step_s = 1e-3;
    let pairs_per_s = (tokens * tokens / 2) as f64 / step_s;
    let block = (2 * tokens * heads * dim * size_of::<f32>()) as f64;
    for ratio in [0.5, 1.0, 2.0] {
        let link = Link { alpha_s: 0.0, bytes_per_s: block / (ratio * step_s) };
        let ring = || {
            let ends = local::World::new(ranks).expect("ranks").1;
            let times = local::run_on(ends, |end| {
                let mut end = Sim::new(end, link, pairs_per_s).expect("rates");
                plan.run(Inputs { q: &rows, k: &rows, v: &rows }, &mut end).expect("a ring");
                (end.clock_s(), end.times().compute_s)
            });
            times.into_iter().fold([0.0f64; 2], |[a, b], (c, d)| [a.max(c), b.max(d)])
        };
        for (name, short, part) in [("whole", "whole", 0), ("compute alone", "compute", 1)] {
            let id = BenchmarkId::new(name, format!("{ranks} ranks, communication {ratio} of compute"));
            let figure = format!("seq-parallel/ring-sim/f32/{short}-{ratio:.1}");
            host::duration(&mut group, id, &figure, "seconds of the modelled clock", || {
                Duration::from_secs_f64(ring()[part])
            });
        }
    }
    group.finish();
}

criterion_group!(benches, planning, exposed);
