//! Arguments that do not fit are named before anything is launched.

use cuda::memory::ViewMut;
use cuda::workspace::{ALIGNMENT, HostWorkspace};
use emulator::rig::EmulatorRig;

use super::*;

#[test]
fn arguments_that_do_not_fit_are_named() {
    emulator::emulator_or_skip!();
    let rig = EmulatorRig::new(emulator::Order::Forward);
    let case = Case::new((4, 2), (64, 64), 1, &[40, 20], Cache::Nhd(16));
    let tensors = tensors::<f16>(&case, 71);
    let plan = plan(&rig, &case, tensors.kv.layout);
    let planner = DecodeStep::prepare(rig.device(), &plan).expect("prepare the plan");
    let kernel = Decode::<_, f16>::prepare(rig.device(), &plan).expect("prepare the kernel");
    let (step_bytes, bytes) = (plan.step_workspace().bytes(), plan.workspace().bytes());
    let table = rig.upload(&tensors.kv.block_table);

    let step = |kv_len: usize, table: Option<usize>, bytes: usize, workspace: &mut HostWorkspace| {
        let kv_len = rig.upload(&lens(&case)[..kv_len]);
        let table = table.map(|len| rig.upload(&tensors.kv.block_table[..len]));
        let table = table.as_ref().map(|table| rig.view(table));
        let mut status = rig.zeroed::<u64>(1);
        let args = DecodeStepArgs {
            kv_len: &rig.view(&kv_len),
            block_table: table.as_ref(),
            kv_start: None,
            status: rig.view_mut(&mut status),
        };
        *workspace = HostWorkspace::zeroed(bytes);
        planner.run(rig.queue(), args, workspace.view_mut()).map(|_| ())
    };
    let entries = tensors.kv.block_table.len();
    let mut workspace = HostWorkspace::zeroed(0);
    step(2, Some(entries), step_bytes, &mut workspace).expect("valid arguments");
    for (argument, result) in [
        ("kv_len", step(1, Some(entries), step_bytes, &mut workspace)),
        ("block_table", step(2, Some(entries - 1), step_bytes, &mut workspace)),
        ("block_table", step(2, None, step_bytes, &mut workspace)),
        ("workspace", step(2, Some(entries), step_bytes - ALIGNMENT, &mut workspace)),
    ] {
        let error = result.expect_err(argument).to_string();
        assert!(error.contains(&format!("`{argument}`")), "{argument}: {error}");
    }

    let kv_len = rig.upload(&lens(&case));
    let mut status = rig.zeroed::<u64>(1);
    let mut step_workspace = HostWorkspace::zeroed(step_bytes);
    let args = DecodeStepArgs {
        kv_len: &rig.view(&kv_len),
        block_table: Some(&rig.view(&table)),
        kv_start: None,
        status: rig.view_mut(&mut status),
    };
    let planned = planner.run(rig.queue(), args, step_workspace.view_mut()).expect("plan the step");
    let rows = 2 * 4;
    let good = [rows * 64, tensors.kv.k_cache.len(), tensors.kv.v_cache.len(), rows * 64, rows];
    let run = |len: [usize; 5], table: Option<&_>, bytes: usize| {
        let [q, k, v] = [len[0], len[1], len[2]].map(|len| rig.zeroed::<f16>(len));
        let (mut out, mut lse) = (rig.zeroed::<f16>(len[3]), rig.zeroed::<f32>(len[4]));
        let table = table.map(|table| rig.view(table));
        let args = DecodeArgs {
            q: &rig.view(&q),
            k: &rig.view(&k),
            v: &rig.view(&v),
            block_table: table.as_ref(),
            kv_start: None,
            out: rig.view_mut(&mut out),
            lse: rig.view_mut(&mut lse),
        };
        kernel.run(rig.queue(), args, &planned, HostWorkspace::zeroed(bytes).view_mut())
    };
    run(good, Some(&table), bytes).expect("valid arguments");
    for (index, argument) in ["q", "k", "v", "out", "lse"].into_iter().enumerate() {
        let mut short = good;
        short[index] -= 1;
        let error = run(short, Some(&table), bytes).expect_err(argument).to_string();
        assert!(error.contains(&format!("`{argument}`")), "{argument}: {error}");
    }
    let error = run(good, None, bytes).expect_err("no block table").to_string();
    assert!(error.contains("`block_table`"), "{error}");
    let error = run(good, Some(&table), bytes - ALIGNMENT).expect_err("a short workspace").to_string();
    assert!(error.contains("`workspace`"), "{error}");

    // A kernel of another plan.
    let other = super::plan(&rig, &Case { q_len: 2, ..case.clone() }, tensors.kv.layout);
    let other = Decode::<_, f16>::prepare(rig.device(), &other).expect("prepare the kernel");
    let [q, k, v] = [2 * good[0], good[1], good[2]].map(|len| rig.zeroed::<f16>(len));
    let (mut out, mut lse) = (rig.zeroed::<f16>(2 * good[3]), rig.zeroed::<f32>(2 * good[4]));
    let args = DecodeArgs {
        q: &rig.view(&q),
        k: &rig.view(&k),
        v: &rig.view(&v),
        block_table: Some(&rig.view(&table)),
        kv_start: None,
        out: rig.view_mut(&mut out),
        lse: rig.view_mut(&mut lse),
    };
    let mut workspace = HostWorkspace::zeroed(4 * bytes);
    let view: ViewMut<'_, u8> = workspace.view_mut();
    match other.run(rig.queue(), args, &planned, view) {
        Err(Error::Argument { argument, .. }) => assert_eq!(argument, "step"),
        result => panic!("{result:?}"),
    }
}
