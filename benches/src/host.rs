//! Benches of what the host does: criterion times them as ever, and what a target is judged by is written down.

use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId};
use serde_json::json;

use crate::figure::{self, FIGURES_VARIABLE, Summary};

/// Times `run` and writes a figure called `name` down.
pub fn time<T>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    id: BenchmarkId,
    name: &str,
    mut run: impl FnMut() -> T,
) {
    duration(group, id, name, "wall time on the host", || {
        let started = Instant::now();
        std::hint::black_box(run());
        started.elapsed()
    });
}

/// The same for a `run` that says itself how long it took, by a clock that `note` names.
pub fn duration(
    group: &mut BenchmarkGroup<'_, WallTime>,
    id: BenchmarkId,
    name: &str,
    note: &str,
    mut run: impl FnMut() -> Duration,
) {
    let mut samples = Vec::new();
    group.bench_function(id, |bencher| {
        bencher.iter_custom(|iterations| {
            let times = (0..iterations).map(|_| {
                let time = run();
                samples.push(time.as_secs_f64() * 1e6);
                time
            });
            times.sum()
        });
    });
    // None if criterion's filter left the case out.
    let Some(summary) = Summary::of(&samples) else { return };
    let line = json!({
        "bench": name,
        "implementation": figure::OURS,
        "median_us": summary.median,
        "p10_us": summary.p10,
        "p90_us": summary.p90,
        "samples": summary.samples,
        "note": note,
    });
    figure::append(FIGURES_VARIABLE, &line);
}
