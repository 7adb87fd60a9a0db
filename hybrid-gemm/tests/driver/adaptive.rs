//! The tuner's timer: events around the launches of each candidate, and nothing again for a shape that is known.

use cuda::driver::{Gpu, SideStream};
use half::bf16;
use hybrid_gemm::gpu::{DeviceTimer, Plan, ResidentWeights};
use hybrid_gemm::tuner::{TIMED, Tuner};
use hybrid_gemm::{
    DType, DeviceProfile, EpilogueSpec, Format, GemmConfig, Path, PathChoice, Placement, Residency, RowMajor,
    Weights,
};

use crate::support::fake_driver::{FakeDriver, Setup, with_driver};

const ORDERED: Setup = Setup { options: &[], variables: &[("FAKE_CUDA_ORDER", "1")] };
const N: usize = 2048;
const K: usize = 512;

fn open(fake: &FakeDriver) -> (Gpu, std::sync::Arc<cuda::cudarc::driver::CudaStream>, ResidentWeights) {
    let mut sizes = vec![8; 14];
    sizes.push(size_of::<cuda::params::HybridGemmParams>());
    fake.parameters(&sizes);
    let context = fake.context(0);
    // SAFETY: nothing runs, so no slice needs an event.
    unsafe { context.disable_event_tracking() };
    let gpu = Gpu::new(&context).unwrap();
    let stream = context.new_stream().unwrap();
    let values = vec![bf16::from_f32(0.5); N * K];
    let matrix = RowMajor::from_slice(&values, [N, K]).unwrap();
    let weights = Weights::pack(matrix, Format::Float(DType::BF16), Residency::Host).unwrap();
    let weights = ResidentWeights::new(&gpu, &stream, &weights).unwrap();
    (gpu, stream, weights)
}

fn config(max_tokens: usize) -> GemmConfig {
    let epilogue = EpilogueSpec { bias: true, residual: true, ..EpilogueSpec::plain(DType::F32) };
    let device = DeviceProfile { sm_count: 132, ..DeviceProfile::gh200() };
    GemmConfig { epilogue, ..GemmConfig::new(max_tokens, DType::BF16, device) }
}

#[test]
fn paths_are_timed_on_the_device_once_per_shape() {
    with_driver("adaptive::paths_are_timed_on_the_device_once_per_shape", ORDERED, |fake| {
        let (gpu, stream, weights) = open(fake);
        let placement = *weights.weights().placement();
        let side = SideStream::new(&gpu, gpu.context().new_stream().unwrap(), 3).unwrap();
        let mut timer = DeviceTimer::<bf16>::new(&gpu, &stream, Some(side), &weights).unwrap();
        let mut tuner = Tuner::new();
        let considered = Plan::new(placement, config(1024)).unwrap().considered().clone();
        let ranked: Vec<Path> =
            Tuner::rank(&considered, 1024, TIMED).into_iter().map(|(path, _)| path).collect();
        assert_eq!(ranked.len(), TIMED, "{ranked:?}");

        // The clock has another opinion than the model: the second candidate is the fastest.
        fake.elapsed(&[3.0, 1.0, 2.0]);
        fake.log();
        let plan = Plan::tuned(placement, config(1024), &mut tuner, &mut timer).unwrap();
        let log = fake.log();
        let launches = log.iter().filter(|line| line.starts_with("cuLaunchKernelEx hybrid_large_m")).count();
        // Seven rounds and one that does not count; a staged candidate launches once per slab.
        assert!(launches >= 8 * TIMED && launches % 8 == 0, "{launches} launches");
        match ranked[1] {
            Path::Staged { .. } => assert!(plan.is_staged(), "{}", plan.explain(1024)),
            Path::Direct { .. } => {
                let taken = format!("taken    {}", ranked[1]);
                assert!(plan.explain(1024).contains(&taken), "no {taken} in {}", plan.explain(1024));
            }
            Path::Multicast { .. } => panic!("{ranked:?}: a path without a kernel"),
        }
        // An event before the launches of a round and one behind them.
        let marks: Vec<&str> = log
            .iter()
            .filter(|line| line.contains(&format!("stream={}", stream_name(&log))))
            .filter_map(|line| line.split(' ').next())
            .filter(|word| ["cuEventRecord", "cuLaunchKernelEx"].contains(word))
            .collect();
        assert_eq!(marks.first(), Some(&"cuEventRecord"));
        assert_eq!(marks.last(), Some(&"cuEventRecord"));

        // The same bucket of the same device: nothing is timed again.
        let again = Plan::tuned(placement, config(1000), &mut tuner, &mut timer).unwrap();
        assert_eq!(again.is_staged(), plan.is_staged());
        assert!(!fake.log().iter().any(|line| line.starts_with("cuLaunchKernelEx")));
        // Another bucket, and another device.
        Plan::tuned(placement, config(300), &mut tuner, &mut timer).unwrap();
        assert!(fake.log().iter().any(|line| line.starts_with("cuLaunchKernelEx")));
        let other = DeviceProfile { name: "another".into(), ..config(1024).device };
        Plan::tuned(placement, GemmConfig { device: other, ..config(1024) }, &mut tuner, &mut timer).unwrap();
        assert!(fake.log().iter().any(|line| line.starts_with("cuLaunchKernelEx")));
    });
}

/// A timer's candidates are those of the plan that asks, not of one before; the tuner's choices are those of plans like it.
#[test]
fn other_plans_are_timed_anew() {
    with_driver("adaptive::other_plans_are_timed_anew", ORDERED, |fake| {
        let (gpu, stream, weights) = open(fake);
        let placement = *weights.weights().placement();
        let side = SideStream::new(&gpu, gpu.context().new_stream().unwrap(), 3).unwrap();
        let mut timer = DeviceTimer::<bf16>::new(&gpu, &stream, Some(side), &weights).unwrap();
        let mut tuner = Tuner::new();
        fake.elapsed(&[1.0]);
        for budget in [132, 32, 132] {
            let config = GemmConfig { sm_budget: Some(budget), ..config(1024) };
            fake.log();
            // Another tuner each time, so that it asks the clock.
            let plan = Plan::tuned(placement, config, &mut Tuner::new(), &mut timer).unwrap();
            assert_eq!(plan.considered().sm_budget(), budget);
            let grid = format!(" grid={budget},1,1 ");
            let log = fake.log();
            let launches: Vec<_> = log.iter().filter(|line| line.starts_with("cuLaunchKernelEx")).collect();
            assert!(!launches.is_empty() && launches.iter().all(|line| line.contains(&grid)), "{launches:?}");
        }
        // Paths that are not open to a plan are not taken from one to which they were.
        let slabs = PathChoice::Only(Path::Staged { slab_columns: 4 });
        for (path, staged) in [(slabs, true), (PathChoice::Direct, false), (slabs, true)] {
            let config = GemmConfig { path, ..config(1024) };
            let plan = Plan::tuned(placement, config, &mut tuner, &mut timer).unwrap();
            assert_eq!(plan.is_staged(), staged, "{path:?}");
        }
        // Nor are the weights of another placement timed.
        let elsewhere = Placement::packed(*placement.tiling(), Residency::HbmFraction(0.5)).unwrap();
        let error = Plan::tuned(elsewhere, config(1024), &mut tuner, &mut timer).unwrap_err().to_string();
        assert!(error.contains("placement"), "{error}");
    });
}

/// The stream that kernels were launched on.
fn stream_name(log: &[String]) -> &str {
    let launch = log.iter().find(|line| line.starts_with("cuLaunchKernelEx")).expect("a launch");
    launch.rsplit('=').next().expect("a stream")
}

#[test]
fn staged_paths_need_a_side_stream() {
    with_driver("adaptive::staged_paths_need_a_side_stream", ORDERED, |fake| {
        let (gpu, stream, weights) = open(fake);
        let placement = *weights.weights().placement();
        let mut timer = DeviceTimer::<bf16>::new(&gpu, &stream, None, &weights).unwrap();
        fake.elapsed(&[1.0]);
        let plan = Plan::tuned(placement, config(1024), &mut Tuner::new(), &mut timer).unwrap();
        assert!(!plan.is_staged(), "{}", plan.explain(1024));
        // What the driver says while it is timed reaches the caller.
        fake.fail("cuEventSynchronize", 700);
        let error = Plan::tuned(placement, config(1024), &mut Tuner::new(), &mut timer).unwrap_err();
        assert!(error.to_string().contains("700"), "{error}");
    });
}
