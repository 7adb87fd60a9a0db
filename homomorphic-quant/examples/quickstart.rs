//! A quantized cache on the CPU: a prompt, a decoded token, what it costs in bytes and in error, and a trip over the wire.
//!
//! `cargo run --release -p homomorphic-quant --example quickstart`

use attention::{AttentionSpec, HeadShape, HeadsView, Mask, Score};
use homomorphic_quant::page::PageLayout;
use homomorphic_quant::reference::{Prefill, attend, oracle, prefill};
use homomorphic_quant::wire::{Header, Model, Receiver, Sender};
use homomorphic_quant::{Bits, Cache, Capacity, Config, KvShape};

const TOKENS: usize = 2000;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // A layer of 8 query heads over 2 KV heads of 128 channels, attended causally.
    let shape = HeadShape::new(8, 2, 128, 128)?;
    let spec = AttentionSpec { shape, score: Score::new(128f32.sqrt().recip())?, mask: Mask::Causal };
    let kv = KvShape { kv_heads: 2, qk_dim: 128, v_dim: 128 };

    let mut rng = fastrand::Rng::with_seed(1);
    let mut random = |len: usize| -> Vec<f32> { (0..len).map(|_| rng.f32() * 2.0 - 1.0).collect() };
    let (q, k, v) = (random(TOKENS * 8 * 128), random(TOKENS * 2 * 128), random(TOKENS * 2 * 128));
    let next_q = random(8 * 128);

    println!("{TOKENS} tokens, one layer; 16-bit keys and values take {} bytes", TOKENS * 2 * 2 * 128 * 2);
    for bits in Bits::ALL {
        let config = Config::new(bits, bits); // Π = 64, 4 sinks, bf16, rounded to nearest
        let mut cache = Cache::new(&config, 0, kv, Capacity::of_tokens(&config, 1, TOKENS))?;
        let mut sequence = cache.sequence();

        // The prompt sees itself in 16 bits; then it is codes.
        let (mut out, mut lse) = (vec![0.0; TOKENS * 8 * 128], vec![0.0; TOKENS * 8]);
        prefill(
            &spec,
            &mut cache,
            &mut sequence,
            HeadsView::nhd(&q, TOKENS, 8, 128)?,
            HeadsView::nhd(&k, TOKENS, 2, 128)?,
            HeadsView::nhd(&v, TOKENS, 2, 128)?,
            Prefill::Exact,
            &mut out,
            &mut lse,
        )?;

        // A query over the cache, on the codes, against f64 attention over what they stand for.
        let (mut out, mut lse) = (vec![0.0; 8 * 128], vec![0.0; 8]);
        let query = HeadsView::nhd(&next_q, 1, 8, 128)?;
        let begin = std::time::Instant::now();
        attend(&spec, &cache, &sequence, query, None, &mut out, &mut lse)?;
        let time = begin.elapsed();
        let exact = oracle(&spec, &cache, &sequence, query)?;
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let error = norm(&mut out.iter().zip(&exact.out).map(|(&a, b)| f64::from(a) - b))
            / norm(&mut exact.out.iter().copied());

        // To another node and back into the same state.
        let model = Model { layers: 1, kv_heads: 2, qk_dim: 128, v_dim: 128 };
        let header = Header {
            tag: 1,
            tokens: TOKENS as u64,
            model,
            config: config.clone(),
            page_layout: PageLayout::Canonical,
        };
        let mut sender = Sender::new(Vec::new(), header)?;
        sender.layer(&cache, &sequence)?;
        let stream = sender.finish()?;
        let mut other = Cache::new(&config, 0, kv, Capacity::of_tokens(&config, 1, TOKENS))?;
        let mut receiver = Receiver::new(1, model, &[&mut other], TOKENS)?;
        receiver.receive(&stream[..], &mut [&mut other])?;
        let received = receiver.finish().map_err(|_| "the stream was not complete")?.remove(0);
        assert_eq!(other.block_bytes(&received, 0, 1)?, cache.block_bytes(&sequence, 0, 1)?);

        println!(
            "{bits}: {} bytes, {} on the wire; one query in {time:.1?}, 8-bit queries and probabilities cost {error:.1e}",
            cache.content_bytes(TOKENS),
            stream.len()
        );
    }
    Ok(())
}
