//! Slabs that a copy engine brings, in the emulator as early as copies can be and as late as they may be.

use cuda::params;
use cuda::storage::Storage;
use emulator::rig::{EmulatorRig, Rig, gpu_or_skip};
use emulator::{CopyTime, Order, SideCopies};
use half::{bf16, f16};
use hybrid_gemm::epilogue::Activation;
use hybrid_gemm::gpu::Plan;
use hybrid_gemm::pack::TILE_ROWS;
use hybrid_gemm::{
    Alpha, DType, Element, EpilogueSpec, Format, GemmConfig, GemmPlan, MappedFile, Path, PathChoice,
    Residency, Tiling, Weights, simulate::simulate,
};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::common::{device, random};
use crate::product::{Operands, call_each, check, fit, verify, weights};

emulator::device_test!(checkpoints_are_staged_row_by_row);
// Copies come early in the first order, late in the others.
emulator::device_test!(
    [emulator::Order::Forward, emulator::Order::Random(1)];
    slabs_give_the_same_bits,
    a_bad_schedule_costs_its_own_columns,
);

fn config<X: Element>(max_tokens: usize, path: Path) -> GemmConfig {
    let epilogue = EpilogueSpec::plain(DType::F32);
    GemmConfig { epilogue, path: PathChoice::Only(path), ..GemmConfig::new(max_tokens, X::DTYPE, device(5)) }
}

/// Staged and direct give the same bits; each byte of the host part crosses the link once, as simulated.
fn same_bits<R: Rig, X: Storage + Element>(
    rig: &R,
    (max_tokens, tokens): (usize, usize),
    operands: &Operands<X, f32>,
    slab_columns: usize,
) {
    let placement = *operands.weights.placement();
    let tiling = placement.tiling();
    let staged = Path::Staged { slab_columns };
    let case = format!(
        "{tokens} of {max_tokens} tokens × [{}, {}] of {}, {} host columns in slabs of {slab_columns}, on {}",
        tiling.n(),
        tiling.k(),
        tiling.format(),
        placement.host_columns(),
        rig.name()
    );
    let direct = check(rig, &case, config::<X>(max_tokens, Path::Direct { alpha: 1.0 }), operands, tokens);
    let config = fit(rig, config::<X>(max_tokens, staged));
    let plan = Plan::new(placement, config.clone()).expect("a plan");
    let launches = placement.host_columns().div_ceil(slab_columns) + usize::from(placement.hbm_columns() > 0);
    let schedules = plan.schedules(tokens).expect("schedules");
    assert_eq!(schedules.len(), launches, "{case}");
    // Twice: a call finds the ring as the one before has left it.
    let outcomes = call_each(rig, &plan, operands, &[schedules.clone(), schedules], false).expect("launches");
    let planned = GemmPlan::new(placement, config).expect("a plan");
    for outcome in &outcomes {
        let found = verify(&case, &plan, operands, tokens, outcome);
        assert!(found == direct, "{case}: other bits than the direct path");
        assert_eq!(outcome.traffic.link_bytes, placement.host_bytes(), "{case}: 1.00 × W");
        assert_eq!(outcome.traffic.staged_bytes, placement.host_bytes(), "{case}");
        if planned.panel() == hybrid_gemm::plan::LARGE_PANEL || tokens <= planned.panel() {
            let simulated = simulate(&planned, staged, tokens).expect("a simulation");
            assert_eq!(outcome.traffic, simulated.traffic, "{case}");
        }
    }
}

fn slabs_give_the_same_bits<R: Rig>(rig: &R) {
    let [host, part] = [Residency::Host, Residency::HbmFraction(0.3)];
    let operands = |n, k, format, tokens, residency| {
        let tiling = Tiling::new(n, k, format).expect("a tiling");
        let weights = weights::<bf16>(61, tiling, residency);
        Operands::<bf16, f32>::new(62, tokens, weights, EpilogueSpec::plain(DType::F32))
    };
    let bf16 = Format::Float(DType::BF16);
    // More slabs than slots, a last slab that is not full, one slab for all.
    for (max_tokens, tokens, [n, k], format, residency, slab_columns) in [
        (8, 8, [330, 200], bf16, host, 1),
        (16, 5, [330, 520], Format::Int8, part, 2),
        (8, 8, [520, 80], bf16, part, 64),
        (260, 258, [330, 136], bf16, part, 1),
        (130, 130, [330, 264], Format::Int8, host, 2),
        (70, 66, [150, 520], Format::Int4 { group: 128 }, host, 1),
        (70, 66, [150, 520], Format::Int4ZeroPoints { group: 128 }, host, 1),
        (16, 5, [330, 520], Format::Fp8Blocks, part, 2),
        // Every other slab begins in the middle of a block.
        (16, 5, [330, 520], Format::Fp8Blocks, part, 1),
        (130, 130, [330, 264], Format::Fp8Blocks, host, 1),
    ] {
        let operands = operands(n, k, format, max_tokens, residency);
        same_bits(rig, (max_tokens, tokens), &operands, slab_columns);
    }
}

/// Rows of a checkpoint, whose last column has fewer than 64.
fn checkpoints_are_staged_row_by_row<R: Rig>(rig: &R) {
    let folder = tempfile::tempdir().expect("a folder");
    let (n, k) = (330, 72);
    let path = folder.path().join("model.safetensors");
    let values: Vec<f16> = random(63, n * k);
    let view = TensorView::new(Dtype::F16, vec![n, k], bytemuck::cast_slice(&values)).expect("a tensor");
    safetensors::serialize_to_file([("w", view)], None, &path).expect("a file");
    let tensor = MappedFile::open(&path).and_then(|file| file.tensor("w")).expect("the tensor");
    let weights = Weights::in_place(&tensor, Residency::Host).expect("weights");
    let operands = Operands::<f16, f32>::new(64, 16, weights, EpilogueSpec::plain(DType::F32));
    same_bits(rig, (16, 11), &operands, 1);
}

/// A launch that refuses its schedule clears its columns and no others, says which, and books its slab, which was copied all the
/// same: in both kernels, with gates too, for the columns in HBM, the first slab and one that is not full.
fn a_bad_schedule_costs_its_own_columns<R: Rig>(rig: &R) {
    let plain = EpilogueSpec::plain(DType::F32);
    let gated = EpilogueSpec { activation: Activation::SwiGlu, ..plain };
    for (max_tokens, tokens, n, epilogue) in [(8, 5, 400, gated), (70, 66, 330, plain)] {
        let tiling = Tiling::new(n, 72, Format::Float(DType::BF16)).expect("a tiling");
        let weights = weights::<bf16>(67, tiling, Residency::HbmFraction(0.2));
        let operands = Operands::<bf16, f32>::new(68, max_tokens, weights, epilogue);
        let placement = *operands.weights.placement();
        let config = GemmConfig { epilogue, ..config::<bf16>(max_tokens, Path::Staged { slab_columns: 2 }) };
        let plan = Plan::new(placement, fit(rig, config)).expect("a plan");
        let good = plan.schedules(tokens).expect("schedules");
        let mut calls = vec![good.clone()];
        for launch in 0..good.len() {
            let mut schedules = good.clone();
            match launch % 2 {
                0 => schedules[launch].tokens = max_tokens as u32 + 1,
                _ => schedules[launch].hbm_columns -= 1,
            }
            calls.push(schedules);
        }
        let outcomes = call_each(rig, &plan, &operands, &calls, false).expect("launches");
        let case = format!("{tokens} of {max_tokens} tokens on {}", rig.name());
        verify(&case, &plan, &operands, tokens, &outcomes[0]);
        let (columns, outputs) = (epilogue.out_columns(n), epilogue.out_columns(TILE_ROWS));
        for (launch, outcome) in outcomes[1..].iter().enumerate() {
            let case = format!("{case}, launch {launch}");
            let own = &good[launch];
            let fault = outcome.fault.unwrap_or_else(|| panic!("{case}: not refused"));
            let code = if launch % 2 == 0 { params::FAULT_BAD_LENGTH } else { params::FAULT_BAD_RANGE };
            assert_eq!((fault.code, fault.index), (code, own.first_column), "{case}");
            let first = own.first_column as usize * outputs;
            let cleared = first..(first + own.hbm_columns as usize * outputs).min(columns);
            for (index, (found, good)) in outcome.out.iter().zip(&outcomes[0].out).enumerate() {
                let expected =
                    if cleared.contains(&(index % columns)) { 0.0f32.to_bits() } else { good.to_bits() };
                assert_eq!(
                    found.to_bits(),
                    expected,
                    "{case}: row {}, column {}",
                    index / columns,
                    index % columns
                );
            }
            let [found, all] = [outcome.traffic, outcomes[0].traffic];
            assert_eq!((found.link_bytes, found.link_tiles), (all.link_bytes, all.link_tiles), "{case}");
            assert_eq!(found.staged_bytes, placement.host_bytes(), "{case}: 1.00 × W");
            assert!(found.flops < all.flops && found.hbm_weight_bytes < all.hbm_weight_bytes, "{case}");
        }
    }
}

/// A captured graph with its copies follows the schedules in device memory.
fn replays_follow_the_schedules<R: Rig>(rig: &R) {
    let tiling = Tiling::new(330, 136, Format::Float(DType::BF16)).expect("a tiling");
    let weights = weights::<bf16>(65, tiling, Residency::HbmFraction(0.2));
    let operands = Operands::<bf16, f32>::new(66, 100, weights, EpilogueSpec::plain(DType::F32));
    let path = Path::Staged { slab_columns: 1 };
    let config = fit(rig, config::<bf16>(100, path));
    let plan = Plan::new(*operands.weights.placement(), config).expect("a plan");
    let steps = [100, 1, 0, 70];
    let calls = steps.map(|tokens| plan.schedules(tokens).expect("schedules"));
    let outcomes = call_each(rig, &plan, &operands, &calls, true).expect("replays");
    for (tokens, outcome) in steps.into_iter().zip(&outcomes) {
        let case = format!("replay of {tokens} tokens on {}", rig.name());
        verify(&case, &plan, &operands, tokens, outcome);
        // The copies are part of the graph: without tokens too, and the receipt says so.
        let (traffic, bytes) = (&outcome.traffic, operands.weights.placement().host_bytes());
        assert_eq!((traffic.link_bytes, traffic.staged_bytes), (bytes, bytes), "{case}: 1.00 × W");
    }
}

mod replay {
    use super::*;

    #[test]
    fn emulator() {
        emulator::emulator_or_skip!();
        for order in Order::ALL {
            replays_follow_the_schedules(&EmulatorRig::new(order));
        }
    }

    #[test]
    fn gpu() {
        if let Some(rig) = gpu_or_skip("staged::replay") {
            replays_follow_the_schedules(&rig.on_own_stream().expect("a stream of its own"));
        }
    }
}

/// The emulator's copies would notice a slot that is filled while somebody may read it, and one that nobody waits for.
#[test]
fn early_and_late_copies_are_told_apart() {
    use cuda::memory::{View, ViewMut};
    use cuda::side_queue::SideQueue;
    emulator::emulator_or_skip!();
    let main = emulator::Queue::new(Order::Forward);
    let (from, mut to) = ([7u8; 4], [0u8; 4]);
    for (time, after_copy) in [(CopyTime::Early, 7), (CopyTime::Late, 0)] {
        to.fill(0);
        let mut side = SideCopies::new(time, 1);
        side.after(&main).expect("a mark");
        // SAFETY: both outlive the copy, which nobody else uses meanwhile.
        unsafe { side.copy(0, &View::host(&from), &mut ViewMut::host(&mut to)) }.expect("a copy");
        assert_eq!(to[0], after_copy, "{time:?}");
        assert_eq!(side.unjoined(), usize::from(time == CopyTime::Late), "{time:?}");
        side.before(&main, 0).expect("a mark");
        assert_eq!((to[0], side.unjoined()), (7, 0), "{time:?}");
        // The slot's reader has not been launched yet, so no mark can be behind it.
        side.after(&main).expect("a mark");
        // SAFETY: refused before anything is copied.
        let overtaken = unsafe { side.copy(0, &View::host(&from), &mut ViewMut::host(&mut to)) };
        assert!(overtaken.expect_err("refused").to_string().contains("last reader"), "{time:?}");
    }
}

/// The path follows alpha's absence: a plan of one path has no alpha to set.
#[test]
fn alpha_does_not_move_a_staged_plan() {
    let tiling = Tiling::new(330, 136, Format::Float(DType::BF16)).expect("a tiling");
    let placement = hybrid_gemm::Placement::packed(tiling, Residency::Host).expect("a placement");
    let mut plan =
        Plan::new(placement, config::<bf16>(300, Path::Staged { slab_columns: 2 })).expect("a plan");
    let before = plan.schedules(300).expect("schedules");
    assert!(matches!(plan.set_alpha(Alpha::Fixed(0.5)), Err(hybrid_gemm::Error::NoPath(_))));
    let after = plan.schedules(300).expect("schedules");
    assert_eq!(bytemuck::cast_slice::<_, u8>(&before), bytemuck::cast_slice::<_, u8>(&after));
    assert!(plan.set_alpha(Alpha::Fixed(1.5)).is_err());
    assert!(
        plan.is_staged() && plan.slots() >= 2 && plan.workspace().bytes() >= 2 * 2 * tiling.column_bytes()
    );
}
