//! One recorded step of two layers, replayed as the lengths in device memory change.

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

/// A layer's inputs, its kernel, and what it leaves behind.
struct Layer<R: Rig> {
    case: Case,
    tensors: Tensors<bf16>,
    kernel: Decode<R::Function, bf16>,
    q: R::Buffer<bf16>,
    pages: R::Buffer<bf16>,
    workspace: RefCell<R::Workspace>,
    layout: cuda::workspace::Layout,
    out: RefCell<R::Buffer<bf16>>,
    lse: RefCell<R::Buffer<f32>>,
}

impl<R: Rig> Layer<R> {
    fn new(rig: &R, ranks: &[(usize, usize)]) -> Self {
        let case = Case { page_size: 16, ..Case::new(4, 128, ranks, 2, &[200, 80, 100]) };
        let tensors = tensors::<bf16>(&case, 71);
        let plan = plan(rig, &case, &tensors.kv);
        let rows = case.kv_lens.len() * case.q_len * case.group;
        Layer {
            kernel: Decode::prepare(rig.device(), &plan).expect("prepare the kernel"),
            q: rig.upload(&tensors.q),
            pages: rig.upload(&tensors.kv.pages),
            workspace: RefCell::new(rig.workspace(plan.workspace())),
            layout: plan.workspace().clone(),
            out: RefCell::new(rig.poisoned(rows * ranks.iter().map(|(_, v)| v).sum::<usize>())),
            lse: RefCell::new(rig.poisoned(rows * ranks.len())),
            case,
            tensors,
        }
    }

    /// The oracle at other lengths; 0 where one is past the plan's maximum.
    fn expected(&self, lens: [u32; 3]) -> Expected {
        let lengths = lens.map(|len| if len > 4096 { 0 } else { len });
        let view = kv_compress::cache::PagedView { lengths: &lengths, ..self.tensors.kv.view() };
        let attend = Attend { group: self.case.group, score: self.case.score(), mask: self.case.mask };
        let rounded = attention::reference::Probabilities::Rounded;
        let output = reference::attend(&attend, &self.tensors.q, &cu_queries(&self.case), &view, rounded)
            .expect("a valid case");
        Expected { out: output.out, lse: output.lse }
    }
}

fn lengths_change_between_replays<R: Rig>(rig: &R) {
    // One plan of the step serves both.
    let layers = [Layer::new(rig, &[(16, 112), (128, 48)]), Layer::new(rig, &[(64, 64), (32, 16)])];
    let plan = plan(rig, &layers[0].case, &layers[0].tensors.kv);
    let planner = DecodeStep::prepare(rig.device(), &plan).expect("prepare the plan");
    let table = rig.upload(&layers[0].tensors.kv.block_table);
    let kv_len = RefCell::new(rig.upload(&STEPS[0]));
    let status = RefCell::new(rig.zeroed::<u64>(1));
    let step_workspace = RefCell::new(rig.workspace(plan.step_workspace()));

    let replay = rig.record(Box::new(|| {
        let (table, kv_len) = (rig.view(&table), kv_len.borrow());
        let (mut status, mut step_workspace) = (status.borrow_mut(), step_workspace.borrow_mut());
        let args = DecodeStepArgs {
            kv_len: &rig.view(&kv_len),
            block_table: &table,
            status: rig.view_mut(&mut status),
        };
        let step = planner
            .run(rig.queue(), args, rig.workspace_view(&mut step_workspace))
            .unwrap_or_else(|error| panic!("plan on {}: {error}", rig.name()));
        for layer in &layers {
            let (mut out, mut lse) = (layer.out.borrow_mut(), layer.lse.borrow_mut());
            let args = DecodeArgs {
                q: &rig.view(&layer.q),
                pages: &rig.view(&layer.pages),
                block_table: &table,
                out: rig.view_mut(&mut out),
                lse: rig.view_mut(&mut lse),
            };
            let mut workspace = layer.workspace.borrow_mut();
            layer
                .kernel
                .run(rig.queue(), args, &step, rig.workspace_view(&mut workspace))
                .unwrap_or_else(|error| panic!("decode on {}: {error}", rig.name()));
        }
    }));

    for lens in STEPS {
        rig.write(&mut kv_len.borrow_mut(), 0, &lens);
        rig.write(&mut status.borrow_mut(), 0, &[0]);
        for layer in &layers {
            let (mut out, mut lse) = (layer.out.borrow_mut(), layer.lse.borrow_mut());
            let poison =
                (vec![bf16::NAN; rig.download(&out).len()], vec![f32::NAN; rig.download(&lse).len()]);
            rig.write(&mut out, 0, &poison.0);
            rig.write(&mut lse, 0, &poison.1);
        }
        replay();
        let name = format!("lengths {lens:?} on {}", rig.name());
        let too_long = lens.iter().position(|len| *len > 4096);
        let expected = too_long.map(|index| Fault { code: FaultCode::BadLength as u32, index: index as u32 });
        assert_eq!(Fault::decode(rig.download(&status.borrow())[0]), expected, "{name}");
        for layer in &layers {
            let decoded = Decoded {
                out: rig.download(&layer.out.borrow()),
                lse: rig.download(&layer.lse.borrow()),
                fault: None,
            };
            assert_close(&decoded, &layer.expected(lens), &format!("{:?}, {name}", layer.case.ranks));
        }
    }
    assert!(
        rig.counters_are_zero(&mut step_workspace.borrow_mut(), plan.step_workspace()),
        "step counters on {}",
        rig.name()
    );
    for layer in &layers {
        let mut workspace = layer.workspace.borrow_mut();
        assert!(rig.counters_are_zero(&mut workspace, &layer.layout), "counters on {}", rig.name());
    }
}
