//! Operands that reach past 4 GiB: offsets of 32 bits, whether they count elements or bytes, lead to another place. Most of the
//! memory is never touched, so that the emulator has room for it.

use bytemuck::Zeroable;
use cuda::kernels::hybrid_gemm::{
    HybridGemmArgs, HybridGemmExperts, HybridLargeM, HybridSmallM, WeightFormat,
};
use cuda::launch::Function;
use cuda::memory::{View, ViewMut};
use cuda::params::{HybridGemmExpert, HybridGemmParams, HybridGemmSchedule, HybridGemmTraffic};
use cuda::status::Fault;
use cuda::storage::Storage;
use emulator::Order;
use emulator::rig::{EmulatorRig, Rig, gpu_or_skip, pinned_or_skip, zeroed_or_skip};
use half::bf16;
use hybrid_gemm::gpu::{GroupedPlan, Plan};
use hybrid_gemm::{
    Alpha, DType, EpilogueSpec, Format, GemmConfig, Path, PathChoice, Residency, Tiling, Weights,
};

use crate::common::{compare, device, random};
use crate::matrix;
use crate::product::{Operands, fit, weights};

/// Bytes from a column of weights to the next.
const COLUMN_STRIDE: usize = (9 << 29) + 16;
/// Two columns in host memory and two in HBM, the last one not full; two K tiles.
const SHAPE: [usize; 2] = [250, 136];

/// Either kernel.
enum Kernel<F> {
    Small(HybridSmallM<F, bf16>),
    Large(HybridLargeM<F, bf16>),
}

impl<F: Function> Kernel<F> {
    fn launch(&self, queue: &F::Queue, args: HybridGemmArgs<'_, bf16, f32>) -> Result<(), cuda::Error> {
        match self {
            Kernel::Small(kernel) => kernel.launch(queue, args),
            Kernel::Large(kernel) => kernel.launch(queue, args),
        }
    }
}

/// Matrices whose last rows lie past 4 GiB: tokens, elements of bf16 and of f32 between two rows.
struct Rows {
    tokens: usize,
    x: usize,
    out: usize,
}

/// Columns of weights `COLUMN_STRIDE` apart, from `first` on.
fn write_columns<R: Rig>(rig: &R, to: &mut R::Buffer<u8>, columns: &[u8], column_bytes: usize) {
    for (index, column) in columns.chunks(column_bytes).enumerate() {
        rig.write(to, index * COLUMN_STRIDE, column);
    }
}

/// One product, and, by the same kernel, the same columns as those of two experts; every operand reaches past 4 GiB.
fn far<R: Rig>(rig: &R, rows: &Rows, alpha: f64) {
    let [n, k] = SHAPE;
    let tiling = Tiling::with_tile_k(n, k, Format::Float(DType::BF16), 128).expect("a tiling");
    let w = weights::<bf16>(101, tiling, Residency::HbmFraction(0.5));
    let column_bytes = tiling.column_bytes();
    let tokens = rows.tokens;
    let test = format!("far: {tokens} tokens, alpha {alpha}");
    let bytes = COLUMN_STRIDE + column_bytes;
    let reach = |stride: usize, row: usize| (tokens - 1) * stride + row;
    let Some(mut host) = pinned_or_skip::<_, u8>(rig, bytes, &test) else { return };
    let Some(mut hbm) = zeroed_or_skip::<_, u8>(rig, bytes, &test) else { return };
    let Some(mut x) = zeroed_or_skip::<_, bf16>(rig, reach(rows.x, k), &test) else { return };
    let Some(mut residual) = zeroed_or_skip::<_, f32>(rig, reach(rows.out, n), &test) else { return };
    let Some(mut out) = zeroed_or_skip::<_, f32>(rig, reach(rows.out, n), &test) else { return };
    write_columns(rig, &mut host, w.host_bytes(), column_bytes);
    write_columns(rig, &mut hbm, w.hbm_bytes(), column_bytes);
    let (x_values, added): (Vec<bf16>, Vec<f32>) = (random(102, tokens * k), random(103, tokens * n));
    for token in 0..tokens {
        rig.write(&mut x, token * rows.x, &x_values[token * k..][..k]);
        rig.write(&mut residual, token * rows.out, &added[token * n..][..n]);
    }

    let config = GemmConfig {
        epilogue: EpilogueSpec::plain(DType::F32),
        path: PathChoice::Direct,
        alpha: Alpha::Fixed(alpha),
        ..GemmConfig::new(tokens, DType::BF16, device(6))
    };
    let config = fit(rig, config);
    let plan = Plan::new(*w.placement(), config.clone()).expect("a plan");
    let kernel = match plan.is_large() {
        true => Kernel::Large(HybridLargeM::prepare(rig.device(), WeightFormat::Float).expect("a kernel")),
        false => {
            Kernel::Small(HybridSmallM::prepare(rig.device(), WeightFormat::Float, tokens).expect("a kernel"))
        }
    };
    let mut partials = rig.poisoned::<f32>(plan.workspace().bytes() / size_of::<f32>());
    let mut arrivals = rig.zeroed::<u32>(0);
    let mut traffic = rig.zeroed::<HybridGemmTraffic>(1);
    let mut status = rig.zeroed::<u64>(1);
    let params = HybridGemmParams {
        x_stride: rows.x as i64,
        out_stride: rows.out as i64,
        residual_stride: rows.out as i64,
        column_bytes: COLUMN_STRIDE as u64,
        partial_len: (plan.workspace().bytes() / size_of::<f32>()) as u64,
        max_tokens: tokens as u32,
        n: n as u32,
        k: k as u32,
        tile_slabs: 2,
        host_columns: 2,
        hbm_first: 2,
        hbm_columns: 2,
        k_splits: 1,
        out_dtype: f32::DTYPE as u32,
        ..HybridGemmParams::zeroed()
    };
    let blocks = plan.considered().sm_budget() as u32;
    let mut launch = |params: &HybridGemmParams,
                      schedule: HybridGemmSchedule,
                      experts: Option<(&[HybridGemmExpert], &[u32])>| {
        // Nothing of the launch before counts.
        (0..tokens).for_each(|token| rig.write(&mut out, token * rows.out, &[f32::NAN; SHAPE[0]]));
        let schedule = rig.upload(&[schedule]);
        let experts = experts.map(|(table, offsets)| (rig.upload(table), rig.upload(offsets)));
        let experts = experts.as_ref().map(|(table, offsets)| (rig.view(table), rig.view(offsets)));
        let args = HybridGemmArgs {
            params,
            blocks,
            x: &rig.view(&x),
            host: Some(&rig.view(&host)),
            hbm: Some(&rig.view(&hbm)),
            scales: None,
            bias: None,
            residual: Some(&rig.view(&residual)),
            out: rig.view_mut(&mut out),
            partials: rig.view_mut(&mut partials),
            arrivals: rig.view_mut(&mut arrivals),
            schedule: &rig.view(&schedule),
            experts: experts.as_ref().map(|(table, offsets)| HybridGemmExperts { table, offsets }),
            traffic: Some(rig.view_mut(&mut traffic)),
            status: rig.view_mut(&mut status),
        };
        kernel.launch(rig.queue(), args)?;
        assert_eq!(Fault::decode(rig.download(&status)[0]), None, "{test} on {}", rig.name());
        let rows = (0..tokens).map(|token| rig.read(&out, token * rows.out, n));
        Ok::<Vec<Vec<f32>>, cuda::Error>(rows.collect())
    };

    let matrix = w.dequantize();
    let exact = |token: usize, feature: usize| {
        let (x, w) = (&x_values[token * k..][..k], &matrix[feature * k..][..k]);
        x.iter().zip(w).map(|(x, w)| x.to_f64() * f64::from(*w)).sum::<f64>()
    };
    let case = format!("{test} on {}, seeds 101 to 103", rig.name());
    let found = launch(&params, plan.schedule(tokens).expect("a schedule"), None).expect("a launch");
    let expected =
        |token: usize, feature: usize| exact(token, feature) + f64::from(added[token * n + feature]);
    let all = |expected: &dyn Fn(usize, usize) -> f64, columns: usize| -> Vec<f64> {
        (0..tokens * columns).map(|i| expected(i / columns, i % columns)).collect()
    };
    // Norms of rows of such values are about 35.
    compare(&case, &found.concat(), &all(&expected, n), 35.0 * 35.0);

    // Each expert has one column of either memory; that of the second starts past 4 GiB.
    let of_expert = Tiling::with_tile_k(122, k, Format::Float(DType::BF16), 128).expect("a tiling");
    let placement =
        hybrid_gemm::Placement::packed(of_expert, Residency::HbmFraction(0.5)).expect("a placement");
    let group = GroupedPlan::new(vec![placement; 2], config).expect("a plan");
    let far_offset = COLUMN_STRIDE as u64;
    let expert =
        |offset| HybridGemmExpert { host_offset: offset, hbm_offset: offset, host_columns: 1, padding: 0 };
    let params = HybridGemmParams {
        column_bytes: column_bytes as u64,
        host_bytes: bytes as u64,
        hbm_bytes: bytes as u64,
        n: 122,
        host_columns: 1,
        hbm_first: 0,
        hbm_columns: 0,
        experts: 2,
        ..params
    };
    let (table, offsets) = ([expert(0), expert(far_offset)], [0, 1, tokens as u32]);
    let found = launch(&params, group.schedule(), Some((&table, &offsets))).expect("a launch");
    // A stride of columns that the kernel's check of experts would multiply past 64 bits.
    let wide = HybridGemmParams { column_bytes: 1 << 63, ..params };
    let refused = launch(&wide, group.schedule(), Some((&table, &offsets))).expect_err("another stride");
    assert!(matches!(refused, cuda::Error::Argument { argument: "column_bytes", .. }), "{refused}");
    let expected = |token: usize, feature: usize| {
        // Feature 64 and those behind it are the column in HBM.
        let column = usize::from(token > 0) + 2 * (feature / 64);
        exact(token, column * 64 + feature % 64) + f64::from(added[token * n + feature])
    };
    let found: Vec<f32> = found.iter().flat_map(|row| row[..122].to_vec()).collect();
    compare(&format!("{case}, experts"), &found, &all(&expected, 122), 35.0 * 35.0);
}

/// Few tokens, each row past the end of the one before by 4 GiB, the last one of X past 2³² elements; many, whose second panel lies
/// there.
fn all<R: Rig>(rig: &R) {
    far(rig, &Rows { tokens: 3, x: (1 << 31) + 8, out: (1 << 30) + 4 }, 1.0);
    far(rig, &Rows { tokens: 258, x: (1 << 24) + 8, out: (1 << 22) + 4 }, 0.5);
}

/// Two orders: what is tested is where things lie, not when.
#[test]
fn emulator() {
    emulator::emulator_or_skip!();
    for order in [Order::Forward, Order::Random(3)] {
        all(&EmulatorRig::new(order));
    }
}

#[test]
fn gpu() {
    if let Some(rig) = gpu_or_skip("far") {
        all(&rig);
    }
}

/// Partial sums of more than 4 GiB, which are too many for the emulator: 1027 weight-stationary columns of 16384 tokens.
#[test]
fn partial_sums_on_the_gpu() {
    let Some(rig) = gpu_or_skip("far::partial_sums_on_the_gpu") else { return };
    let (tokens, sms) = (16384, cuda::launch::Device::sm_count(rig.device()).map_or(132, |sms| sms as usize));
    let tiling = Tiling::with_tile_k(65728, 128, Format::Float(DType::BF16), 64).expect("a tiling");
    let host: Weights = weights::<bf16>(104, tiling, Residency::Host);
    let operands = Operands::<bf16, f32>::new(105, tokens, host, EpilogueSpec::plain(DType::F32));
    let path = Path::Direct { alpha: 0.0 };
    let (w, host) = (operands.weights.dequantize(), rig.pin(operands.weights.host_bytes()));
    let ran = matrix::product(&rig, &operands, (&w, &rig.view(&host)), (tokens, tokens), (path, sms, sms));
    assert!(ran, "there is a plan");
}

/// Launches count chunks in 32 bits, and refuse what might not fit whoever made their parameters: just below the bound and at it.
#[test]
fn launches_count_chunks_in_32_bits() {
    emulator::emulator_or_skip!();
    let rig = EmulatorRig::new(Order::Forward);
    // 2¹⁵ columns of 2⁸ chunks; 2⁸ panels of either kernel.
    let (n, k) = (1 << 21, 1 << 14);
    for (panel, large) in [(64, false), (256, true)] {
        let kernel: Kernel<<EmulatorRig as Rig>::Function> = match large {
            true => {
                Kernel::Large(HybridLargeM::prepare(rig.device(), WeightFormat::Float).expect("a kernel"))
            }
            false => {
                Kernel::Small(HybridSmallM::prepare(rig.device(), WeightFormat::Float, 64).expect("a kernel"))
            }
        };
        for (tokens, named) in [(panel << 8, "chunks of 64 inputs"), (panel * 255, "`x`")] {
            let params = HybridGemmParams {
                x_stride: k,
                out_stride: i64::from(n),
                column_bytes: (k / 64 * 8192) as u64,
                max_tokens: tokens,
                n: n as u32,
                k: k as u32,
                tile_slabs: 4,
                hbm_columns: n as u32 / 64,
                k_splits: 1,
                out_dtype: f32::DTYPE as u32,
                ..HybridGemmParams::zeroed()
            };
            let (mut out, mut partials, mut arrivals, mut status) =
                ([0f32; 1], [0f32; 1], [0u32; 1], [0u64; 1]);
            let (x, schedule) = ([bf16::ZERO], [HybridGemmSchedule::zeroed()]);
            let args = HybridGemmArgs {
                params: &params,
                blocks: 1,
                x: &View::host(&x),
                host: None,
                hbm: None,
                scales: None,
                bias: None,
                residual: None,
                out: ViewMut::host(&mut out),
                partials: ViewMut::host(&mut partials),
                arrivals: ViewMut::host(&mut arrivals),
                schedule: &View::host(&schedule),
                experts: None,
                traffic: None,
                status: ViewMut::host(&mut status),
            };
            let error = kernel.launch(rig.queue(), args).expect_err("refused").to_string();
            assert!(error.contains(named), "{tokens} tokens in panels of {panel}: {error}");
        }
    }
}
