//! The matrix of correctness: sizes at and beside every tile, formats, paths, alpha and budgets of SMs, taken together.
//!
//! Rows of the table take their path, place and budget in turn, each at its own pace, so that every value of one meets most values
//! of the others; and every path of every kernel and format runs at least once with several K tiles and weights on both sides. On a
//! GPU shapes are those of models, the largest with `EXHAUSTIVE=1`; there a sample of the outputs is held against the oracle, and the
//! receipt as always.

use cuda::memory::View;
use cuda::storage::Storage;
use emulator::Order;
use emulator::rig::{EmulatorRig, GpuRig, Rig, gpu_or_skip};
use half::{bf16, f16};
use hybrid_gemm::gpu::Plan;
use hybrid_gemm::{DType, Element, EpilogueSpec, Format, GemmConfig, Path, PathChoice, Residency, Tiling};

use crate::common::{compare, device};
use crate::product::{Operands, call_each_on, weights};

/// Tokens and shapes of a run.
struct Sizes {
    tokens: &'static [usize],
    shapes: &'static [[usize; 2]],
    budgets: &'static [usize],
    sms: usize,
}

const EMULATED: Sizes = Sizes {
    tokens: &[0, 1, 2, 7, 8, 9, 16, 31, 63, 64, 65, 127, 257],
    shapes: &[[8, 16], [72, 80], [136, 264]],
    budgets: &[1, 2, 5],
    sms: 5,
};
/// Of the shapes of models, those that take seconds.
const QUICK: usize = 7;
const MODELS: Sizes = Sizes {
    tokens: &[0, 1, 2, 7, 8, 9, 16, 31, 33, 63, 64, 65, 127, 128, 255, 256, 257, 511, 513, 1000, 2048, 4097],
    shapes: &[
        [8, 16],
        [64, 64],
        [72, 80],
        [1000, 1000],
        [4096, 4096],
        [6144, 4096],
        [4104, 4088],
        [4096, 14336],
        [28672, 4096],
    ],
    budgets: &[4, 16, 32, 60, 132],
    sms: 132,
};

/// Tokens of a panel of the kernel for many.
const LARGE_PANEL: usize = 256;

/// Whose turn it is.
struct Turns {
    products: usize,
    weights: usize,
    /// Products that ran, and those that no plan was possible for.
    ran: usize,
    dropped: usize,
}

/// Whether there is a plan for a product; the product is held against the oracle, all of it or a sample. `w` is the dequantized matrix,
/// `host` its columns in memory of the host.
pub(crate) fn product<R: Rig, X: Storage + Element>(
    rig: &R,
    operands: &Operands<X, f32>,
    (w, host): (&[f32], &View<'_, u8>),
    (max_tokens, tokens): (usize, usize),
    (path, budget, sms): (Path, usize, usize),
) -> bool {
    let placement = *operands.weights.placement();
    let tiling = placement.tiling();
    let (n, k) = (tiling.n(), tiling.k());
    let case = format!(
        "{tokens} of {max_tokens} tokens × [{n}, {k}] of {}, {} of {} columns in host memory, {path}, {budget} SMs, on {}, \
         seeds 1 to 4",
        tiling.format(),
        placement.host_columns(),
        tiling.column_tiles(),
        rig.name()
    );
    let config = GemmConfig {
        epilogue: EpilogueSpec::plain(DType::F32),
        path: PathChoice::Only(path),
        sm_budget: Some(budget),
        ..GemmConfig::new(max_tokens, <X as Element>::DTYPE, device(sms))
    };
    let plan = match Plan::new(placement, config) {
        Ok(plan) => plan,
        // Too small a budget, or a path that is another without host columns: said, and tested elsewhere.
        Err(hybrid_gemm::Error::NoPath(reason))
            if reason.contains("no weights in host memory") || reason.contains("the budget is") =>
        {
            return false;
        }
        Err(error) => panic!("{case}: {error}"),
    };
    let schedules = plan.schedules(tokens).unwrap_or_else(|e| panic!("{case}: {e}"));
    let outcome = &call_each_on(rig, &plan, operands, host, &[schedules], false)
        .unwrap_or_else(|e| panic!("{case}: {e}"))[0];
    assert_eq!(outcome.fault, None, "{case}");
    assert_eq!(outcome.traffic, plan.predict(tokens).expect("a prediction").traffic, "{case}");
    let untouched = outcome.out[tokens * n..].iter().all(|value| value.to_bits() == u32::MAX);
    assert!(untouched, "{case}: rows past the tokens were written");
    // All outputs of small products, a sample of large ones.
    let outputs = tokens * n;
    let step = (outputs / 512).max(1);
    let (mut found, mut exact, mut scale) = (Vec::new(), Vec::new(), 0.0f64);
    for index in (0..outputs).step_by(step) {
        let (token, feature) = (index / n, index % n);
        let (x, w) = (&operands.x[token * k..][..k], &w[feature * k..][..k]);
        let (mut sum, mut absolute) = (0.0f64, 0.0f64);
        for (x, w) in x.iter().zip(w) {
            let term = f64::from(x.to_f32()) * f64::from(*w);
            sum += term;
            absolute += term.abs();
        }
        found.push(outcome.out[index]);
        exact.push(sum);
        scale = scale.max(absolute);
    }
    compare(&case, &found, &exact, scale);
    true
}

/// Products of one kernel: its most tokens, and those of the list from `from` on that it takes. Turns begin at a number of the kernel's
/// own.
fn kernel<R: Rig, X: Storage + Element>(
    rig: &R,
    sizes: &Sizes,
    name: &str,
    format: Format,
    (from, max_tokens): (usize, usize),
) {
    let first = name.bytes().map(usize::from).sum();
    let turns = &mut Turns { products: first, weights: first, ran: 0, dropped: 0 };
    let max_tokens = max_tokens.min(sizes.tokens.iter().copied().max().unwrap_or(0));
    let direct = |alpha| Path::Direct { alpha };
    let paths = match max_tokens > 64 {
        true => vec![direct(1.0), direct(0.0), direct(0.5), direct(0.25), Path::Staged { slab_columns: 2 }],
        false => vec![direct(1.0), direct(1.0), Path::Staged { slab_columns: 1 }],
    };
    let tokens: Vec<usize> =
        sizes.tokens.iter().copied().filter(|tokens| (from..=max_tokens).contains(tokens)).collect();
    for [n, k] in sizes.shapes {
        turns.weights += 1;
        let fraction = [0.0, 0.5, 1.0, 0.25][turns.weights % 4];
        let tiling = Tiling::new(*n, *k, format).expect("a tiling");
        let weights = weights::<X>(1, tiling, Residency::HbmFraction(fraction));
        let most = tokens.iter().copied().max().unwrap_or(0).max(from.max(1));
        let operands = Operands::<X, f32>::new(2, most, weights, EpilogueSpec::plain(DType::F32));
        let (w, host) = (operands.weights.dequantize(), rig.pin(operands.weights.host_bytes()));
        for tokens in &tokens {
            turns.products += 1;
            let path = paths[turns.products % paths.len()];
            let budget = sizes.budgets[turns.products / paths.len() % sizes.budgets.len()];
            // Outputs may be hundreds of megabytes, so rows past the tokens are few; up to a panel of them only one dataflow is planned.
            let rows = most.min((tokens + turns.products % 2 * 3).max(LARGE_PANEL + 1));
            match product(rig, &operands, (&w, &rig.view(&host)), (rows, *tokens), (path, budget, sizes.sms))
            {
                true => turns.ran += 1,
                false => turns.dropped += 1,
            }
        }
    }
    // Nothing is in the way of these: each runs.
    let slab = match format {
        Format::Float(_) => 64,
        Format::Int8 | Format::Fp8Rows | Format::Fp8Blocks => 128,
        Format::Int4 { .. } | Format::Int4ZeroPoints { .. } => 256,
    };
    let tiling = Tiling::with_tile_k(136, 264, format, slab).expect("a tiling");
    assert!(tiling.k_tiles() > 1, "{format}");
    let tokens = max_tokens.min(257);
    let weights = weights::<X>(3, tiling, Residency::HbmFraction(0.4));
    let operands = Operands::<X, f32>::new(4, tokens, weights, EpilogueSpec::plain(DType::F32));
    let (w, host) = (operands.weights.dequantize(), rig.pin(operands.weights.host_bytes()));
    for path in paths {
        let ran =
            product(rig, &operands, (&w, &rig.view(&host)), (tokens, tokens), (path, sizes.sms, sizes.sms));
        assert!(ran, "{tokens} tokens of {format}: {path} has no plan");
        turns.ran += 1;
    }
    assert!(
        turns.ran > 5 && turns.ran >= turns.dropped,
        "{name}: {} ran, {} dropped",
        turns.ran,
        turns.dropped
    );
}

/// A test of each kernel and format, so that each ends in seconds on a GPU too.
macro_rules! kernels {
    ($($name:ident: $x:ty, $format:expr, $tokens:expr;)+) => {$(
        mod $name {
            use super::*;

            #[test]
            fn emulator() {
                emulator::emulator_or_skip!();
                // One order: the tests of each kernel go through all of them.
                let rig = EmulatorRig::new(Order::Random(5));
                kernel::<_, $x>(&rig, &EMULATED, stringify!($name), $format, $tokens);
            }

            #[test]
            fn gpu() {
                if let Some(rig) = gpu_or_skip(concat!("matrix::", stringify!($name))) {
                    kernel::<_, $x>(&rig, &of_models(&rig), stringify!($name), $format, $tokens);
                }
            }
        }
    )+};
}

kernels! {
    bf16_up_to_8: bf16, Format::Float(DType::BF16), (0, 8);
    f16_up_to_16: f16, Format::Float(DType::F16), (9, 16);
    bf16_up_to_64: bf16, Format::Float(DType::BF16), (33, 64);
    int8_up_to_8: f16, Format::Int8, (0, 8);
    int8_up_to_16: bf16, Format::Int8, (9, 16);
    int4_128_up_to_16: bf16, Format::Int4 { group: 128 }, (9, 16);
    int4_32_up_to_64: f16, Format::Int4 { group: 32 }, (33, 64);
    zero_points_128_up_to_16: bf16, Format::Int4ZeroPoints { group: 128 }, (9, 16);
    zero_points_32_up_to_64: f16, Format::Int4ZeroPoints { group: 32 }, (33, 64);
    fp8_rows_up_to_8: f16, Format::Fp8Rows, (0, 8);
    fp8_blocks_up_to_16: bf16, Format::Fp8Blocks, (9, 16);
    fp8_blocks_up_to_64: bf16, Format::Fp8Blocks, (33, 64);
    bf16_many: bf16, Format::Float(DType::BF16), (65, usize::MAX);
    f16_many: f16, Format::Float(DType::F16), (65, usize::MAX);
    int8_many: bf16, Format::Int8, (65, usize::MAX);
    int4_128_many: bf16, Format::Int4 { group: 128 }, (65, usize::MAX);
    int4_64_many: f16, Format::Int4 { group: 64 }, (65, usize::MAX);
    zero_points_128_many: bf16, Format::Int4ZeroPoints { group: 128 }, (65, usize::MAX);
    zero_points_64_many: f16, Format::Int4ZeroPoints { group: 64 }, (65, usize::MAX);
    fp8_blocks_many: bf16, Format::Fp8Blocks, (65, usize::MAX);
}

/// Shapes of models, with budgets that the GPU has.
fn of_models(rig: &GpuRig) -> Sizes {
    let sms = cuda::launch::Device::sm_count(rig.device()).map_or(132, |count| count as usize);
    let budgets: Vec<usize> = MODELS.budgets.iter().map(|budget| (*budget).min(sms)).collect();
    let exhaustive = std::env::var("EXHAUSTIVE").is_ok_and(|value| value == "1");
    let shapes = if exhaustive { MODELS.shapes } else { &MODELS.shapes[..QUICK] };
    Sizes { sms, shapes, budgets: budgets.leak(), ..MODELS }
}
