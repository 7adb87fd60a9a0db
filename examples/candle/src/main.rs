//! A decode loop over a paged cache in candle tensors, compared in every step with candle's own ops.
//!
//! `cargo run [-- cpu|cuda[:N] [f32|f16|bf16]]`

use std::process::ExitCode;

use candle_core::{DType, Device, Error, Result, Tensor, bail};
use longkv_candle::{
    AttentionSpec, CacheShape, HeadShape, Mask, PagedAppend, PagedCache, PagedDecode, PagedSequence, Score,
    StepShape, plain,
};

const SHAPE: CacheShape = CacheShape { layers: 2, pages: 32, page_size: 16, kv_heads: 2, head_dim: 64 };
const Q_HEADS: usize = 8;
/// The last sequence is empty until it becomes a fork of the first.
const PROMPTS: [usize; 4] = [37, 5, 120, 0];
const STEPS: usize = 8;
const FORK_AT: usize = 4;
const MAX_PAGES: usize = 16;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let result = arguments(&args).and_then(|(device, dtype)| run(&device, dtype));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

fn arguments(args: &[String]) -> Result<(Device, DType)> {
    let (device, dtype) = match args {
        [] => ("cpu", "f16"),
        [device] => (device.as_str(), "f16"),
        [device, dtype] => (device.as_str(), dtype.as_str()),
        _ => bail!("usage: longkv-candle [cpu|cuda[:N] [f32|f16|bf16]]"),
    };
    let device = match device.split_once(':').unwrap_or((device, "0")) {
        ("cpu", _) => Device::Cpu,
        ("cuda", ordinal) => Device::new_cuda(ordinal.parse()?)?,
        _ => bail!("device: expected cpu, cuda or cuda:N, found {device}"),
    };
    let dtype = match dtype {
        "f32" => DType::F32,
        "f16" => DType::F16,
        "bf16" => DType::BF16,
        _ => bail!("dtype: expected f32, f16 or bf16, found {dtype}"),
    };
    Ok((device, dtype))
}

fn run(device: &Device, dtype: DType) -> Result<()> {
    let CacheShape { kv_heads, head_dim, .. } = SHAPE;
    let spec = AttentionSpec {
        shape: HeadShape::new(Q_HEADS, kv_heads, head_dim, head_dim).map_err(Error::wrap)?,
        score: Score::new((head_dim as f32).powf(-0.5)).map_err(Error::wrap)?,
        mask: Mask::Causal,
    };
    // Rounding of the weights and of the outputs, of values around 1.
    let tolerance = match dtype {
        DType::F32 => 1e-5,
        DType::F16 => 2f32.powi(-9),
        _ => 2f32.powi(-6),
    };
    println!("{} sequences, {spec}, {dtype:?} on {:?}", PROMPTS.len(), device.location(), spec = spec.shape);
    println!("tolerance {tolerance:.1e} against candle's matmul and softmax in f32\n");
    println!("step  tokens                 pages used, shared, copied   largest difference of out, lse");

    let mut rng = fastrand::Rng::with_seed(1);
    let mut cache = PagedCache::new(SHAPE, dtype, device)?;
    let append = PagedAppend::prepare(cache.kv(0)?)?;
    let step_shape = StepShape { batch: PROMPTS.len(), q_len: 1, max_pages: MAX_PAGES };
    let mut decode = PagedDecode::prepare(spec, step_shape, &cache.k(0)?, &cache.v(0)?)?;

    let mut sequences: Vec<PagedSequence> =
        PROMPTS.iter().map(|_| cache.sequence()).collect::<Result<_>>()?;
    let mut new_tokens = PROMPTS.to_vec();
    for step in 0..STEPS {
        if step == FORK_AT {
            sequences[3] = cache.fork(&sequences[0])?;
        }
        // Once per step: room for the new tokens, their slots, the tables and the plan.
        let slots = cache.grow(&mut sequences, &new_tokens)?;
        let tables = cache.tables(&sequences, MAX_PAGES)?;
        let planned = decode.step(&tables.0, &tables.1)?;
        let (mut out_difference, mut lse_difference) = (0f32, 0f32);
        for layer in 0..SHAPE.layers {
            let mut random = |rows: usize, heads: usize| {
                let values = (0..rows * heads * head_dim).map(|_| 4.0 * rng.f32() - 2.0).collect();
                Tensor::from_vec(values, (rows, heads, head_dim), device)?.to_dtype(dtype)
            };
            let tokens = slots.elem_count();
            let (k_new, v_new) = (random(tokens, kv_heads)?, random(tokens, kv_heads)?);
            let q = random(PROMPTS.len(), Q_HEADS)?.unsqueeze(1)?;
            append.append(cache.kv(layer)?, &k_new, &v_new, &slots)?;
            let (k, v) = (cache.k(layer)?, cache.v(layer)?);
            let attended = planned.attend(&q, &k, &v)?;
            let expected = plain::attend(&spec, (&q, &k, &v), (&tables.0, &tables.1))?;
            out_difference = out_difference.max(difference(&attended.out, &expected.out)?);
            lse_difference = lse_difference.max(difference(&attended.lse, &expected.lse)?);
        }
        let usage = cache.usage();
        let lengths = format!("{:?}", tables.0.to_vec1::<u32>()?);
        println!(
            "{step:>4}  {lengths:<21}  {:>10} {:>7} {:>7}   {out_difference:>22.1e} {lse_difference:>10.1e}",
            usage.used, usage.shared, usage.copies
        );
        if out_difference.max(lse_difference) > tolerance
            || out_difference.is_nan()
            || lse_difference.is_nan()
        {
            bail!("step {step} differs by more than {tolerance:.1e}");
        }
        new_tokens = sequences.iter().map(|sequence| usize::from(sequence.tokens() > 0)).collect();
    }
    decode.check()?;
    append.check()?;
    sequences.into_iter().try_for_each(|sequence| cache.release(sequence))?;
    println!("\nall steps agree");
    Ok(())
}

/// Largest absolute difference; equal infinities do not differ, NaN is returned as such.
fn difference(found: &Tensor, expected: &Tensor) -> Result<f32> {
    let flat = |tensor: &Tensor| tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
    let pairs = flat(found)?.into_iter().zip(flat(expected)?);
    let differences = pairs.map(|(x, y)| if x == y { 0.0 } else { (x - y).abs() });
    Ok(differences.fold(0.0, |largest: f32, x| if x.is_nan() || x > largest { x } else { largest }))
}
