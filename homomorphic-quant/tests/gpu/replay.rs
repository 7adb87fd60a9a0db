//! A step recorded once, append and attention on codes, replayed as tokens and lengths in device memory change.

use std::cell::RefCell;

use attention::gpu::Splits;
use attention::testing::Inputs;
use attention::{AttentionSpec, HeadsView, Mask, Score};
use cuda::status::Fault;
use emulator::Order;
use emulator::rig::{EmulatorRig, Rig, gpu_or_skip};
use half::f16;
use homomorphic_quant::gpu::{
    Append, AppendArgs, AppendConfig, AppendPlan, Decode, DecodeArgs, DecodeConfig, DecodePlan, DecodeStep,
    DecodeStepArgs, Method,
};
use homomorphic_quant::reference;

use crate::append::Grown;
use crate::close::assert_close;
use crate::sequences::{Cached, DeviceTable, Shape, Tokens};

/// New tokens of the two sequences, step by step: prompts, steps in which blocks of 32 close, one that waits, nothing new.
const STEPS: [[usize; 2]; 6] = [[34, 0], [1, 40], [1, 1], [5, 26], [0, 1], [0, 0]];
/// New tokens of a step, over both sequences.
const MAX_NEW: usize = 41;

#[test]
fn emulator() {
    emulator::emulator_or_skip!();
    for order in Order::ALL {
        steps_change_between_replays(&EmulatorRig::new(order));
    }
}

#[test]
fn gpu() {
    if let Some(rig) = gpu_or_skip("replay") {
        steps_change_between_replays(&rig.on_own_stream().expect("a stream of its own"));
    }
}

fn steps_change_between_replays<R: Rig>(rig: &R) {
    let shape = Shape::new((4, 2), 64, (2, 4), 32);
    let (heads, dim) = (shape.heads(), shape.dims.0);
    let lens = STEPS.iter().fold([0, 0], |sum, new| [sum[0] + new[0], sum[1] + new[1]]);
    let kinds = (Inputs::OutlierChannels, Inputs::Normal);
    let tokens: [Tokens<f16>; 2] = [0, 1].map(|s: usize| Tokens::new(&shape, lens[s], kinds, 21 + s as u64));
    let Grown { pools, table, pages, sinks, open, .. } = Grown::<R, f16>::new(rig, &shape, 2, 96, 23);

    let append_plan = AppendPlan::new(AppendConfig {
        pools,
        batch: 2,
        max_new: MAX_NEW,
        num_new: MAX_NEW,
        max_kv_len: 96,
        strides: None,
    })
    .expect("a plan of the append");
    let spec = AttentionSpec {
        shape: heads,
        score: Score::new((dim as f32).powf(-0.5)).expect("a finite scale"),
        mask: Mask::Causal,
    };
    let plan = DecodePlan::new(DecodeConfig {
        method: Method::Codes,
        pools,
        shape: heads,
        score: spec.score,
        mask: spec.mask,
        batch: 2,
        q_len: 1,
        max_kv_len: 96,
        splits: Splits::Balanced,
        sm_count: cuda::launch::Device::sm_count(rig.device()).unwrap_or(2),
    })
    .expect("a plan of the attention");
    let append = Append::<_, f16>::prepare(rig.device(), &append_plan).expect("prepare the append");
    let planner = DecodeStep::prepare(rig.device(), &plan).expect("prepare the plan");
    let decode = Decode::<_, f16>::prepare(rig.device(), &plan).expect("prepare the attention");

    let row = shape.kv_heads * dim;
    let (k_new, v_new) =
        (RefCell::new(rig.zeroed::<f16>(MAX_NEW * row)), RefCell::new(rig.zeroed::<f16>(MAX_NEW * row)));
    let (new_start, kv_len) = (RefCell::new(rig.zeroed::<u32>(3)), RefCell::new(rig.zeroed::<u32>(2)));
    let q = RefCell::new(rig.zeroed::<f16>(2 * shape.q_heads * dim));
    let (pages, sinks, open) = (RefCell::new(pages), RefCell::new(sinks), RefCell::new(open));
    let table = DeviceTable::new(rig, &table);
    let status = RefCell::new(rig.zeroed::<u64>(1));
    let step_workspace = RefCell::new(rig.workspace(plan.step_workspace()));
    let workspace = RefCell::new(rig.workspace(plan.workspace()));
    let out = RefCell::new(rig.poisoned::<f16>(2 * shape.q_heads * dim));
    let lse = RefCell::new(rig.poisoned::<f32>(2 * shape.q_heads));
    let poison = (rig.download(&out.borrow()), rig.download(&lse.borrow()));

    let replay = rig.record(Box::new(|| {
        let (k_new, v_new, new_start) = (k_new.borrow(), v_new.borrow(), new_start.borrow());
        let (kv_len, q) = (kv_len.borrow(), q.borrow());
        let (mut pages, mut sinks, mut open) = (pages.borrow_mut(), sinks.borrow_mut(), open.borrow_mut());
        let (mut status, mut out, mut lse) = (status.borrow_mut(), out.borrow_mut(), lse.borrow_mut());
        let (mut step_workspace, mut workspace) = (step_workspace.borrow_mut(), workspace.borrow_mut());
        let done = table.with(rig, |places| {
            append.run(
                rig.queue(),
                AppendArgs {
                    k_new: &rig.view(&k_new),
                    v_new: &rig.view(&v_new),
                    new_start: &rig.view(&new_start),
                    kv_len: &rig.view(&kv_len),
                    places,
                    pages: rig.view_mut(&mut pages),
                    sink_pool: rig.view_mut(&mut sinks),
                    open_pool: rig.view_mut(&mut open),
                    status: rig.view_mut(&mut status),
                },
            )?;
            let args =
                DecodeStepArgs { kv_len: &rig.view(&kv_len), places, status: rig.view_mut(&mut status) };
            let planned = planner.run(rig.queue(), args, rig.workspace_view(&mut step_workspace))?;
            let args = DecodeArgs {
                q: &rig.view(&q),
                pages: &rig.view(&pages),
                sink_pool: &rig.view(&sinks),
                open_pool: &rig.view(&open),
                places,
                out: rig.view_mut(&mut out),
                lse: rig.view_mut(&mut lse),
            };
            decode.run(rig.queue(), args, &planned, rig.workspace_view(&mut workspace))
        });
        done.unwrap_or_else(|error| panic!("on {}: {error}", rig.name()));
    }));

    let mut so_far = [0, 0];
    for (index, new) in STEPS.into_iter().enumerate() {
        let from = so_far;
        so_far = [from[0] + new[0], from[1] + new[1]];
        let rows = |values: &dyn Fn(usize) -> Vec<f16>| -> Vec<f16> {
            (0..2).flat_map(|s| values(s)[from[s] * row..so_far[s] * row].to_vec()).collect()
        };
        let queries: Vec<f16> = Inputs::Normal.generate(2 * shape.q_heads, dim, 31 + index as u64);
        rig.write(&mut k_new.borrow_mut(), 0, &rows(&|s| tokens[s].k.clone()));
        rig.write(&mut v_new.borrow_mut(), 0, &rows(&|s| tokens[s].v.clone()));
        rig.write(&mut new_start.borrow_mut(), 0, &[0, new[0] as u32, (new[0] + new[1]) as u32]);
        rig.write(&mut kv_len.borrow_mut(), 0, &so_far.map(|len| len as u32));
        rig.write(&mut q.borrow_mut(), 0, &queries);
        rig.write(&mut out.borrow_mut(), 0, &poison.0);
        rig.write(&mut lse.borrow_mut(), 0, &poison.1);
        replay();
        let name = format!("step {index} of {new:?} on {}", rig.name());
        assert_eq!(Fault::decode(rig.download(&status.borrow())[0]), None, "{name}");

        // The CPU's cache of the same tokens has the same codes.
        let cached: Vec<Tokens<f16>> = (0..2)
            .map(|s| Tokens {
                len: so_far[s],
                k: tokens[s].k[..so_far[s] * row].to_vec(),
                v: tokens[s].v[..so_far[s] * row].to_vec(),
            })
            .collect();
        let cached = Cached::new(&shape, &cached);
        let q: Vec<f32> = queries.iter().map(|x| x.to_f32()).collect();
        let (mut expected_out, mut expected_lse) = (Vec::new(), Vec::new());
        for (sequence, q) in cached.sequences.iter().zip(q.chunks_exact(shape.q_heads * dim)) {
            let q = HeadsView::nhd(q, 1, shape.q_heads, dim).expect("queries");
            let (mut o, mut l) = (vec![f32::NAN; shape.q_heads * dim], vec![f32::NAN; shape.q_heads]);
            reference::attend(&spec, &cached.cache, sequence, q, None, &mut o, &mut l).expect("a valid case");
            expected_out.extend(o.into_iter().map(f64::from));
            expected_lse.extend(l.into_iter().map(f64::from));
        }
        let (out, lse) = (rig.download(&out.borrow()), rig.download(&lse.borrow()));
        assert_close((&out, &lse), (&expected_out, &expected_lse), dim, &name);
    }
    drop(replay);
    for (workspace, layout) in [(&step_workspace, plan.step_workspace()), (&workspace, plan.workspace())] {
        assert!(rig.counters_are_zero(&mut workspace.borrow_mut(), layout), "counters on {}", rig.name());
    }
}
