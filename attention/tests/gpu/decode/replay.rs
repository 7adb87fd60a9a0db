//! One recorded step, replayed as the lengths in device memory change.

use std::cell::RefCell;

use emulator::Order;
use emulator::rig::{EmulatorRig, gpu_or_skip};

use super::*;

/// Lengths of three sequences, step by step: growing, empty, past the plan's maximum, right again.
const STEPS: [[u32; 3]; 5] = [[1, 64, 90], [2, 65, 91], [130, 0, 92], [131, 4097, 93], [200, 67, 94]];

#[test]
fn emulator() {
    emulator::emulator_or_skip!();
    for order in Order::ALL {
        lengths_change_between_replays(&EmulatorRig::new(order));
    }
}

#[test]
fn gpu() {
    if let Some(rig) = gpu_or_skip("decode::replay") {
        lengths_change_between_replays(&rig.on_own_stream().expect("a stream of its own"));
    }
}

fn lengths_change_between_replays<R: Rig>(rig: &R) {
    let longest = Case::new((4, 2), (128, 128), 2, &[200, 80, 100], Cache::Nhd(16));
    let tensors = tensors::<bf16>(&longest, 71);
    let plan = plan(rig, &longest, tensors.kv.layout);
    let planner = DecodeStep::prepare(rig.device(), &plan).expect("prepare the plan");
    let kernel = Decode::<_, bf16>::prepare(rig.device(), &plan).expect("prepare the kernel");
    let rows = 3 * longest.q_len * longest.q_heads;

    let (q, k, v) =
        (rig.upload(&tensors.q), rig.upload(&tensors.kv.k_cache), rig.upload(&tensors.kv.v_cache));
    let table = rig.upload(&tensors.kv.block_table);
    let kv_len = RefCell::new(rig.upload(&STEPS[0]));
    let status = RefCell::new(rig.zeroed::<u64>(1));
    let step_workspace = RefCell::new(rig.workspace(plan.step_workspace()));
    let workspace = RefCell::new(rig.workspace(plan.workspace()));
    let out = RefCell::new(rig.poisoned::<bf16>(rows * longest.v_dim));
    let lse = RefCell::new(rig.poisoned::<f32>(rows));
    let poison = (rig.download(&out.borrow()), rig.download(&lse.borrow()));

    let replay = rig.record(Box::new(|| {
        let (table, kv_len) = (rig.view(&table), kv_len.borrow());
        let (mut status, mut step_workspace) = (status.borrow_mut(), step_workspace.borrow_mut());
        let args = DecodeStepArgs {
            kv_len: &rig.view(&kv_len),
            block_table: Some(&table),
            kv_start: None,
            status: rig.view_mut(&mut status),
        };
        let planned = planner
            .run(rig.queue(), args, rig.workspace_view(&mut step_workspace))
            .unwrap_or_else(|error| panic!("plan on {}: {error}", rig.name()));
        // Two layers share the plan; the second writes the same output once more.
        let (mut out, mut lse, mut workspace) = (out.borrow_mut(), lse.borrow_mut(), workspace.borrow_mut());
        for _layer in 0..2 {
            let args = DecodeArgs {
                q: &rig.view(&q),
                k: &rig.view(&k),
                v: &rig.view(&v),
                block_table: Some(&table),
                kv_start: None,
                out: rig.view_mut(&mut out),
                lse: rig.view_mut(&mut lse),
            };
            kernel
                .run(rig.queue(), args, &planned, rig.workspace_view(&mut workspace))
                .unwrap_or_else(|error| panic!("decode on {}: {error}", rig.name()));
        }
    }));

    for lens in STEPS {
        rig.write(&mut kv_len.borrow_mut(), 0, &lens);
        rig.write(&mut status.borrow_mut(), 0, &[0]);
        rig.write(&mut out.borrow_mut(), 0, &poison.0);
        rig.write(&mut lse.borrow_mut(), 0, &poison.1);
        replay();
        let name = format!("lengths {lens:?} on {}", rig.name());
        let (out, lse) = (rig.download(&out.borrow()), rig.download(&lse.borrow()));
        let fault = Fault::decode(rig.download(&status.borrow())[0]);
        let too_long = lens.iter().position(|len| *len > 4096);
        let expected = too_long.map(|index| Fault { code: 1, index: index as u32 });
        assert_eq!(fault, expected, "{name}");
        for (sequence, len) in lens.into_iter().enumerate() {
            let expected = sequence_alone(&longest, &tensors, sequence, len);
            let (first, count) = (sequence * rows / 3, rows / 3);
            let dim = longest.v_dim;
            Comparison::attention(&out[first * dim..][..count * dim], &expected.out, dim)
                .assert(format_args!("out of sequence {sequence}, {name}"));
            Comparison::new(&lse[first..][..count], &expected.lse, Tolerance::LSE)
                .assert(format_args!("lse of sequence {sequence}, {name}"));
        }
    }
    let layouts = [(&step_workspace, plan.step_workspace()), (&workspace, plan.workspace())];
    for (workspace, layout) in layouts {
        assert!(rig.counters_are_zero(&mut workspace.borrow_mut(), layout), "counters on {}", rig.name());
    }
}

/// The oracle for the first `len` keys of one sequence; none where the length is past the plan's maximum.
fn sequence_alone(case: &Case, tensors: &Tensors<bf16>, sequence: usize, len: u32) -> reference::Output {
    let len = if len > 4096 { 0 } else { len };
    let per_sequence = case.q_len * case.q_heads * case.qk_dim;
    let q = &tensors.q[sequence * per_sequence..][..per_sequence];
    let q = HeadsView::nhd(q, case.q_len, case.q_heads, case.qk_dim).expect("q");
    let kv = tensors.kv.first_keys(sequence, len as usize);
    let q = RaggedView::single(q).expect("one sequence");
    reference::prefill_parallel(&case.spec(), &q, &kv, reference::Probabilities::Rounded)
        .expect("a valid case")
}
