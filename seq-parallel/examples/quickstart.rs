//! Prefills one made-up prompt on four ranks in every way, and shows what each sends and waits for.
//!
//! `cargo run -p seq-parallel --example quickstart`

use attention::{AttentionSpec, HeadShape, HeadsView, Mask, Score};
use seq_parallel::placement::{Placement, Sequence, Shards};
use seq_parallel::ring::{Direction, Inputs, RingPlan};
use seq_parallel::schedule::Work;
use seq_parallel::transport::sim::{Link, Sim};
use seq_parallel::transport::{Transport, local};
use seq_parallel::ulysses::UlyssesPlan;
use seq_parallel::{Error, Output};

const TOKENS: usize = 512;
const RANKS: usize = 4;
const HEADS: (usize, usize) = (8, 4);
const DIM: usize = 64;

fn main() -> Result<(), Error> {
    let shape = HeadShape::new(HEADS.0, HEADS.1, DIM, DIM)?;
    let spec = AttentionSpec { shape, score: Score::new((DIM as f32).sqrt().recip())?, mask: Mask::Causal };
    let mut rng = fastrand::Rng::with_seed(1);
    let mut random =
        |heads: usize| -> Vec<f32> { (0..TOKENS * heads * DIM).map(|_| rng.f32() - 0.5).collect() };
    let (q, k, v) = (random(HEADS.0), random(HEADS.1), random(HEADS.1));

    // What one rank computes.
    let (mut whole, mut lse) = (vec![0.0; q.len()], vec![0.0; TOKENS * HEADS.0]);
    let view = |data, heads| HeadsView::nhd(data, TOKENS, heads, DIM);
    attention::cpu::attend(
        &spec,
        view(&q, HEADS.0)?,
        view(&k, HEADS.1)?,
        view(&v, HEADS.1)?,
        &mut whole,
        &mut lse,
    )?;

    println!("{TOKENS} tokens, {shape}, {RANKS} ranks with links of 1 MB/ms and 1,000 pairs per ms:\n");
    println!(
        "{:<24} {:>9} {:>12} {:>12} {:>12} {:>11}",
        "", "balance", "bytes sent", "compute ms", "exposed ms", "max error"
    );
    for placement in Placement::ALL {
        let shards = Shards::new([Sequence::new(TOKENS)], placement, RANKS)?;
        let balance = Work::of(&spec.mask, &shards).efficiency();
        for direction in [Direction::PassKv, Direction::PassQ] {
            let plan = RingPlan::new(spec, shards.clone())?.passing(direction);
            let name = format!("{placement} {direction:?}");
            row(&name, balance, &shards, &whole, |end, inputs| plan.run(inputs, end), (&q, &k, &v))?;
        }
    }
    let shards = Shards::new([Sequence::new(TOKENS)], Placement::Contiguous, RANKS)?;
    let plan = UlyssesPlan::new(spec, shards.clone())?;
    row("Ulysses", 1.0, &shards, &whole, |end, inputs| plan.run(inputs, end), (&q, &k, &v))
}

/// Runs one scheme on threads with a modelled clock, and prints what it cost.
fn row(
    name: &str,
    balance: f64,
    shards: &Shards,
    whole: &[f32],
    run: impl Fn(&mut Sim<local::Local>, Inputs<'_, f32, f32>) -> Result<Output, Error> + Sync,
    (q, k, v): (&[f32], &[f32], &[f32]),
) -> Result<(), Error> {
    let link = Link { alpha_s: 1e-5, bytes_per_s: 1e9 };
    let results = local::run(RANKS, |end| -> Result<_, Error> {
        let mut end = Sim::new(end, link, 1e6)?;
        let rank = end.rank();
        let take = |data, heads| shards.take(rank, data, heads * DIM);
        let (q, k, v) = (take(q, HEADS.0)?, take(k, HEADS.1)?, take(v, HEADS.1)?);
        let output = run(&mut end, Inputs { q: &q, k: &k, v: &v })?;
        Ok((output, end.traffic().sent, end.times()))
    })?;
    let mut out = vec![0.0; whole.len()];
    let (mut sent, mut compute, mut exposed) = (0, 0.0f64, 0.0f64);
    for (rank, result) in results.into_iter().enumerate() {
        let (output, bytes, times) = result?;
        shards.put(rank, &output.out, HEADS.0 * DIM, &mut out)?;
        sent += bytes;
        compute = compute.max(times.compute_s);
        exposed = exposed.max(times.exposed_s);
    }
    let error = out.iter().zip(whole).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!(
        "{name:<24} {:>7.1} % {sent:>12} {:>12.2} {:>12.2} {error:>11.1e}",
        100.0 * balance,
        1e3 * compute,
        1e3 * exposed
    );
    Ok(())
}
