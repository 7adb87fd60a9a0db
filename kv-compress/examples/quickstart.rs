//! Compresses one layer of made-up activations to half its bytes, and shows what that costs.
//!
//! `cargo run -p kv-compress --example quickstart`

use attention::reference::Probabilities;
use attention::{BlockTable, HeadShape, Mask, Score};
use half::f16;
use kv_compress::CompressionPlan;
use kv_compress::cache::{LayerCache, PageLayout, PagedView};
use kv_compress::calibrate::Calibration;
use kv_compress::projection::{Projection, project};
use kv_compress::rank_plan::{Planner, Profile, RankPlan, Weights};
use kv_compress::reference::{Attend, attend};

const TOKENS: usize = 512;
const HIDDEN: usize = 256;
const DIM: usize = 64;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Activations of a layer with 4 query heads over 2 KV heads. Head 1 has more directions than head 0.
    let shape = HeadShape::new(4, 2, DIM, DIM)?;
    let mut rng = fastrand::Rng::with_seed(7);
    let q = rows(&mut rng, &[0.90, 0.90, 0.98, 0.98]);
    let (k, v) = (rows(&mut rng, &[0.90, 0.98]), rows(&mut rng, &[0.92, 0.97]));
    let w_o: Vec<f32> = (0..HIDDEN * 4 * DIM).map(|_| 0.1 * (rng.f32() - 0.5)).collect();
    let scale = (DIM as f32).sqrt().recip();

    let mut calibration = Calibration::new([shape]);
    calibration.layer_mut(0)?.add(&q, &k, &v)?;
    calibration.layer_mut(0)?.set_w_o(&w_o, HIDDEN)?;
    let bases = vec![project(0, &calibration.layers()[0], Projection::Optimal)?];
    let profile = Profile::new(&calibration, &bases, &[scale])?;
    let planner = Planner::new(&profile, &Weights::equal(&profile))?;
    let ranks = planner.within(2 * 2 * DIM)?;
    println!("Half the bytes, by gain:\n{ranks}");

    let exact = attention(
        &CompressionPlan::new(&calibration, Projection::Optimal, &bases, &RankPlan::full(&[shape])?)?,
        &q,
        &k,
        &v,
    )?;
    let uniform = RankPlan::uniform(&[shape], 2 * 2 * DIM)?;
    for (name, ranks) in [("by gain", &ranks), ("uniform", &uniform)] {
        let plan = CompressionPlan::new(&calibration, Projection::Optimal, &bases, ranks)?;
        let found = attention(&plan, &q, &k, &v)?;
        let square = |x: f32| f64::from(x * x);
        let error: f64 = found.iter().zip(&exact).map(|(a, b)| square(a - b)).sum();
        let all: f64 = exact.iter().map(|&x| square(x)).sum();
        println!(
            "{name}: {} bytes per token, relative error of the attention output {:.4}",
            plan.bytes_per_token(),
            (error / all).sqrt()
        );
    }
    Ok(())
}

/// The last token's attention through a cache of the plan, `[q_heads · DIM]`.
fn attention(
    plan: &CompressionPlan,
    q: &[f32],
    k: &[f32],
    v: &[f32],
) -> Result<Vec<f32>, kv_compress::Error> {
    let layer = &plan.layers()[0];
    let mut cache = LayerCache::<f16>::new(PageLayout::new(layer.ranks(), 64)?, TOKENS / 64)?;
    let sequence = cache.create()?;
    cache.append(sequence, &layer.keys(k)?, &layer.values(v)?)?;
    let (table, lengths) = cache.block_table(&[sequence], TOKENS / 64)?;
    let view = PagedView {
        layout: cache.layout(),
        pages: cache.pages()?,
        block_table: BlockTable::shared(&table, 1, TOKENS / 64)?,
        lengths: &lengths,
    };
    // The scale is that of the model's own head size, whatever the ranks.
    let of = Attend { group: 2, score: Score::new((DIM as f32).sqrt().recip())?, mask: Mask::Causal };
    let query = layer.queries(&q[(TOKENS - 1) * 4 * DIM..])?;
    let out = attend(&of, &query, &[0, 1], &view, Probabilities::Exact)?;
    layer.lift(&out.out_as::<f32>())
}

/// `[TOKENS, heads, DIM]` whose channels fall like `decay^i`, mixed with their neighbours.
fn rows(rng: &mut fastrand::Rng, decays: &[f32]) -> Vec<f32> {
    let mut rows = Vec::new();
    for _ in 0..TOKENS {
        for &decay in decays {
            let raw: Vec<f32> = (0..DIM).map(|i| 2.0 * (rng.f32() - 0.5) * decay.powi(i as i32)).collect();
            rows.extend((0..DIM).map(|i| 0.6 * raw[i] + 0.8 * raw[(i * 7 + 3) % DIM]));
        }
    }
    rows
}
