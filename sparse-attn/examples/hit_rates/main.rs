//! Hit rate against capacity, of every replacement policy, as a table and a plot.
//!
//! `cargo run --release -p sparse-attn --example hit_rates [-- TRACE… [--svg FILE]]`
//!
//! Without a trace it takes queries that drift at three speeds. A trace is a file as `sparse_attn::trace` describes it; all of
//! its streams count, each with a cache of its own.

mod plot;

use sparse_attn::bucketed_lru::{BUCKETS, BucketedLru};
use sparse_attn::metadata::SlotScan;
use sparse_attn::replacement::{Belady, ExactLru, Random, Replacement};
use sparse_attn::trace::{Drift, Trace};

/// Slots, in multiples of what the widest step selects.
const RATIOS: [usize; 6] = [1, 2, 3, 4, 5, 6];
const POLICIES: [&str; 5] = ["Belady", "exact LRU", "64 buckets", "8 buckets", "random"];

/// Hits over all streams, each with `slots` slots.
fn rate(policy: &str, slots: usize, trace: &Trace) -> Result<f64, sparse_attn::Error> {
    let (mut hits, mut selected) = (0, 0);
    for stream in trace.streams() {
        let mut cache: Box<dyn Replacement> = match policy {
            "Belady" => Box::new(Belady::new(slots, trace.stream(stream))),
            "exact LRU" => Box::new(ExactLru::new(slots)),
            "8 buckets" => Box::new(BucketedLru::<SlotScan>::new(slots, 8)?),
            "random" => Box::new(Random::new(slots, u64::from(stream))),
            _ => Box::new(BucketedLru::<SlotScan>::new(slots, BUCKETS)?),
        };
        for step in trace.stream(stream) {
            hits += cache.step(step)?;
            selected += step.len();
        }
    }
    Ok(hits as f64 / selected.max(1) as f64)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (mut traces, mut svg) = (Vec::new(), None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--svg" => svg = Some(arguments.next().ok_or("--svg needs a file")?),
            file => traces.push((file.to_string(), Trace::from_text(&std::fs::read_to_string(file)?)?)),
        }
    }
    if traces.is_empty() {
        for correlation in [0.8, 0.95, 0.99] {
            let drift = Drift { pages: 4096, selected: 64, steps: 400, correlation, seed: 1 };
            traces.push((format!("drift, ρ = {correlation}"), drift.trace()));
        }
    }

    let mut panels = Vec::new();
    for (name, trace) in traces {
        let widest = trace.widest();
        println!("{name}: {} steps of up to {widest} pages", trace.steps().len());
        print!("{:<12}", "slots");
        RATIOS.iter().for_each(|ratio| print!("{:>9}", ratio * widest));
        println!();
        let mut lines = Vec::new();
        for policy in POLICIES {
            let mut points = Vec::new();
            print!("{policy:<12}");
            for ratio in RATIOS {
                let rate = rate(policy, ratio * widest, &trace)?;
                print!("{rate:>9.4}");
                points.push((ratio as f64, rate));
            }
            println!();
            lines.push((policy, points));
        }
        println!();
        panels.push((name, lines));
    }
    let file = svg.unwrap_or_else(|| {
        std::env::temp_dir().join("sparse-attn-hit-rates.svg").to_string_lossy().into_owned()
    });
    std::fs::write(&file, plot::draw(&panels))?;
    println!("plot: {file}");
    Ok(())
}
