//! Experts: one launch, whatever the rows are, and pinned memory that outlives it.

use cuda::driver::{Gpu, Graph};
use cuda::memory::{View, ViewMut};
use cuda::status::StatusWord;
use cuda::workspace::Workspace;
use half::bf16;
use hybrid_gemm::gpu::{DeviceSchedule, DeviceTable, GroupedArgs, GroupedGemm, GroupedPlan, ResidentExperts};
use hybrid_gemm::{DType, DeviceProfile, Format, GemmConfig, Residency, RowMajor, Weights};

use crate::order::operations;
use crate::support::fake_driver::{Setup, with_driver};

#[test]
fn experts_are_one_launch() {
    let setup = Setup { options: &[], variables: &[("FAKE_CUDA_ORDER", "1")] };
    with_driver("grouped::experts_are_one_launch", setup, |fake| {
        let mut sizes = vec![8; 14];
        sizes.push(size_of::<cuda::params::HybridGemmParams>());
        fake.parameters(&sizes);
        let context = fake.context(0);
        // SAFETY: nothing runs, so no slice needs an event.
        unsafe { context.disable_event_tracking() };
        let gpu = Gpu::new(&context).unwrap();
        let stream = context.new_stream().unwrap();
        let (n, k, tokens) = (192, 128, 8);
        let values = vec![bf16::from_f32(0.5); n * k];
        let expert = |residency| {
            let matrix = RowMajor::from_slice(&values, [n, k]).unwrap();
            Weights::pack(matrix, Format::Float(DType::BF16), residency).unwrap()
        };
        let experts = [Residency::Host, Residency::HbmFraction(0.4), Residency::Hbm].map(expert);
        let device = DeviceProfile { sm_count: 132, ..DeviceProfile::h200() };
        let placements = experts.iter().map(|expert| *expert.placement()).collect();
        let plan = GroupedPlan::new(placements, GemmConfig::new(tokens, DType::BF16, device)).unwrap();
        let resident = ResidentExperts::new(&gpu, &stream, &experts).unwrap();
        let host: usize = experts.iter().map(|expert| expert.host_bytes().len()).sum();
        let pinned = format!("cuMemHostAlloc {host} flags=3");
        assert!(fake.log().contains(&pinned), "the host parts of all experts, in one arena");

        let gemm = GroupedGemm::<_, bf16>::prepare(&gpu, &plan).unwrap();
        let x = stream.alloc_zeros::<bf16>(tokens * k).unwrap();
        let offsets = stream.clone_htod(&[0u32, 3, 3, 8]).unwrap();
        let mut out = stream.alloc_zeros::<bf16>(tokens * n).unwrap();
        let table = DeviceTable::new(&stream, &plan).unwrap();
        let schedule = DeviceSchedule::new(&stream, &[plan.schedule()]).unwrap();
        let mut status = StatusWord::new(&stream).unwrap();
        let mut workspace = Workspace::zeroed(&stream, plan.workspace().bytes()).unwrap();
        fake.log();
        let mut run = || {
            resident.with(&stream, |weights| {
                let args = GroupedArgs {
                    x: &View::device(&x, &stream),
                    weights,
                    table: &table.view(&stream),
                    offsets: &View::device(&offsets, &stream),
                    out: ViewMut::device(&mut out, &stream),
                    strides: None,
                    schedule: &schedule.view(&stream),
                    traffic: None,
                    status: status.view_mut(&stream),
                };
                gemm.run(&stream, args, workspace.view_mut(&stream))
            })
        };
        run().unwrap();
        let log = fake.log();
        assert_eq!(log.len(), 1, "one launch and nothing else: {log:?}");
        let launch = &operations(&log)[0];
        assert!(log[0].contains("hybrid_small_m grid=132,1,1 block=128,1,1"), "{log:?}");
        assert_eq!(launch.parameter(10), table.view(&stream).address());
        assert_eq!(launch.parameter(11), View::device(&offsets, &stream).address());
        let graph = Graph::capture(&gpu, &stream, |_| run()).unwrap();
        assert_eq!(graph.nodes().unwrap(), 1);

        fake.log();
        drop(resident);
        assert_eq!(fake.log()[..2], ["cuCtxSynchronize", "cuMemFreeHost"], "behind the launch that reads it");
    });
}
