//! A sparse cache on the CPU: a prompt, some decoded tokens, and what each algorithm reads, fetches and loses.
//!
//! `cargo run --release -p sparse-attn --example quickstart`

use attention::{AttentionSpec, DType, HeadShape, HeadsView, Mask, Score, cpu};
use sparse_attn::{Cache, Capacity, Config, Plan, Queries, Tokens};

const PROMPT: usize = 4000;
const DECODED: usize = 64;
const BUDGET: usize = 512;
const DIM: usize = 64;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // A layer of 8 query heads over 2 KV heads of 64 channels, attended causally.
    let shape = HeadShape::new(8, 2, DIM, DIM)?;
    // Four times the usual scale: attention over random vectors would be flat, where that of a model is sharp.
    let score = Score::new(4.0 / (DIM as f32).sqrt())?;
    let spec = AttentionSpec { shape, score, mask: Mask::Causal };
    let (k, v) = (drift(PROMPT + DECODED, 2, 1), drift(PROMPT + DECODED, 2, 2));
    let q = drift(PROMPT + DECODED, 8, 3);
    let (q_row, kv_row) = (8 * DIM, 2 * DIM);

    println!("{PROMPT} tokens of a prompt, {DECODED} decoded, one layer, a budget of {BUDGET} tokens");
    println!("{:<12} {:>9} {:>9} {:>10} {:>10} {:>9}", "", "budget", "hits", "device", "host", "error");
    for (name, config) in [
        ("quest", Config::quest(BUDGET)),
        ("shadow_kv", Config::shadow_kv(BUDGET)),
        ("retro_infer", retro(BUDGET)),
    ] {
        let config = Config { dtype: DType::F32, buffering: 1.0, ..config };
        let plan = Plan::new(&config, &[spec])?;
        let budget = plan.effective_budget().tokens;
        let capacity = Capacity::of_requests(&plan, 1, PROMPT + DECODED);
        let mut cache = Cache::<f32>::new(plan, capacity)?;
        let request = cache.try_admit()?;

        // The prompt is attended densely, summarised and moved to host memory.
        let queries = Queries { q: &q[..PROMPT * q_row], q_unrotated: None };
        let tokens = Tokens { k: &k[..PROMPT * kv_row], k_unrotated: None, v: &v[..PROMPT * kv_row] };
        let (mut out, mut lse) = (vec![0.0; PROMPT * q_row], vec![0.0; PROMPT * 8]);
        cache.prefill(request, 0, &queries, &tokens, &mut out, &mut lse)?;

        // Every decoded token reads what its budget allows, against dense attention.
        let (mut error, mut size) = (0.0f64, 0.0f64);
        for token in PROMPT..PROMPT + DECODED {
            let queries = Queries { q: &q[token * q_row..][..q_row], q_unrotated: None };
            let part = token * kv_row..(token + 1) * kv_row;
            let tokens = Tokens { k: &k[part.clone()], k_unrotated: None, v: &v[part] };
            let (mut out, mut lse) = ([0.0; 8 * DIM], [0.0; 8]);
            cache.decode(request, 0, &queries, &tokens, &mut out, &mut lse)?;

            let (mut dense, mut dense_lse) = ([0.0; 8 * DIM], [0.0; 8]);
            let held = token + 1;
            let (k, v) = (&k[..held * kv_row], &v[..held * kv_row]);
            let query = HeadsView::nhd(queries.q, 1, 8, DIM)?;
            let (k, v) = (HeadsView::nhd(k, held, 2, DIM)?, HeadsView::nhd(v, held, 2, DIM)?);
            cpu::attend(&spec, query, k, v, &mut dense, &mut dense_lse)?;
            for (a, b) in out.iter().zip(&dense) {
                error += f64::from(a - b).powi(2);
                size += f64::from(*b).powi(2);
            }
        }
        let (counters, memory) = (cache.counters(), cache.memory());
        println!(
            "{name:<12} {budget:>9} {:>8.1}% {:>7} KB {:>7} KB {:>8.1}%",
            100.0 * counters.hit_rate().unwrap_or(0.0),
            memory.device() / 1000,
            memory.host / 1000,
            100.0 * (error / size).sqrt(),
        );
    }
    Ok(())
}

/// RetroInfer with segments for contexts of thousands instead of hundreds of thousands.
fn retro(budget: usize) -> Config {
    use sparse_attn::Algorithm;
    use sparse_attn::index::clusters::Clustering;
    let clustering = Clustering { segment: 1024, ..Clustering::default() };
    let algorithm = Algorithm::Clusters { clustering, reindex: 64, estimate: 0.232 };
    Config { algorithm, ..Config::retro_infer(budget) }
}

/// Vectors `[tokens, heads, DIM]` that change slowly from token to token, as those of a text do.
fn drift(tokens: usize, heads: usize, seed: u64) -> Vec<f32> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut state = vec![0.0f32; heads * DIM];
    let mut all = Vec::with_capacity(tokens * heads * DIM);
    for _ in 0..tokens {
        state.iter_mut().for_each(|x| *x = 0.95 * *x + 1.1 * (rng.f32() - 0.5));
        all.extend_from_slice(&state);
    }
    all
}
