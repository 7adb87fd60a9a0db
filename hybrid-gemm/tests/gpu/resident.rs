//! Weights in real pinned memory, read over the link. Needs a GPU.

mod pinned_weights {
    use cuda::driver::{Gpu, SideStream};
    use cuda::memory::{View, ViewMut};
    use cuda::status::StatusWord;
    use cuda::workspace::Workspace;
    use emulator::rig::gpu_or_skip;
    use half::bf16;
    use hybrid_gemm::gpu::{DeviceReceipt, DeviceSchedule, Gemm, GemmArgs, Plan, ResidentWeights};
    use hybrid_gemm::{
        DType, DeviceProfile, EpilogueSpec, Format, GemmConfig, MatrixView, Path, PathChoice, Residency,
        Tiling, reference,
    };

    use crate::common::{compare, random};
    use crate::product::weights;

    /// Both kernels, all in host memory and part of it, in place and by slabs; plan, kernel and weights are dropped while the
    /// kernel may still use them.
    #[test]
    fn gpu() {
        if gpu_or_skip("resident::pinned_weights").is_none() {
            return;
        }
        let gpu = Gpu::open(0).expect("the GPU that was just there");
        let stream = gpu.default_stream();
        let ([n, k], epilogue) = ([1000, 1032], EpilogueSpec::plain(DType::F32));
        let staged = PathChoice::Only(Path::Staged { slab_columns: 3 });
        for (tokens, residency, path) in [
            (7, Residency::Host, PathChoice::Direct),
            (64, Residency::HbmFraction(0.5), PathChoice::Direct),
            (300, Residency::HbmFraction(0.25), PathChoice::Direct),
            (7, Residency::HbmFraction(0.5), staged),
            (300, Residency::Host, staged),
        ] {
            let case = format!("{tokens} tokens, {residency:?}, {path:?}, seeds 51 and 52");
            let tiling = Tiling::new(n, k, Format::Float(DType::BF16)).expect("a tiling");
            let host = weights::<bf16>(51, tiling, residency);
            let device = DeviceProfile { sm_count: gpu.sm_count() as usize, ..DeviceProfile::h200() };
            let config = GemmConfig { epilogue, path, ..GemmConfig::new(tokens, DType::BF16, device) };
            let plan = Plan::new(*host.placement(), config).expect("a plan");
            let gemm = Gemm::<_, bf16>::prepare(&gpu, &plan).expect("prepare");
            let resident = ResidentWeights::new(&gpu, &stream, &host).expect("pinned weights");
            let x: Vec<bf16> = random(52, tokens * k);
            let on_device = stream.clone_htod(&x).expect("copy");
            let mut out = stream.clone_htod(&vec![f32::NAN; tokens * n]).expect("copy");
            let schedules = plan.schedules(tokens).expect("schedules");
            let schedule = DeviceSchedule::new(&stream, &schedules).expect("allocate");
            // SAFETY: all work of this test is ordered by the main stream and the marks of the side stream.
            unsafe { gpu.context().disable_event_tracking() };
            let copies = gpu.context().new_stream().expect("a second stream");
            let mut side = SideStream::new(&gpu, copies, plan.slots()).expect("events");
            let mut receipt = DeviceReceipt::new(&stream).expect("allocate");
            let mut status = StatusWord::new(&stream).expect("allocate");
            let mut workspace = Workspace::zeroed(&stream, plan.workspace().bytes()).expect("allocate");
            let launched = resident.with(&stream, |weights| {
                let args = GemmArgs {
                    x: &View::device(&on_device, &stream),
                    weights,
                    bias: None,
                    residual: None,
                    out: ViewMut::device(&mut out, &stream),
                    strides: None,
                    schedule: &schedule.view(&stream),
                    traffic: Some(receipt.view_mut(&stream)),
                    status: status.view_mut(&stream),
                };
                gemm.run_staged(&stream, &mut side, args, workspace.view_mut(&stream))
            });
            launched.unwrap_or_else(|error| panic!("{case}: {error}"));
            drop((resident, gemm));
            let found = stream.clone_dtoh(&out).expect("copy");
            assert_eq!(status.read(&stream).expect("the status"), None, "{case}");
            let view = MatrixView::new(&x, tokens, k).expect("x");
            let exact = reference::gemm::<bf16, f32>(view, &host, &epilogue, None, None).expect("the oracle");
            // Norms of rows of such values are about 66.
            compare(&case, &found, &exact, 66.0 * 66.0);
            let counted = receipt.read(&stream, &plan).expect("the receipt");
            assert_eq!(counted, plan.predict(tokens).expect("a prediction").traffic, "{case}");
            assert!(counted.link_bytes >= host.placement().host_bytes(), "{case}");
        }
    }
}

mod pinned_experts {
    use cuda::driver::Gpu;
    use cuda::memory::{View, ViewMut};
    use cuda::status::StatusWord;
    use cuda::workspace::Workspace;
    use emulator::rig::gpu_or_skip;
    use half::bf16;
    use hybrid_gemm::gpu::{
        DeviceSchedule, DeviceTable, GroupedArgs, GroupedGemm, GroupedPlan, ResidentExperts,
    };
    use hybrid_gemm::{
        DType, DeviceProfile, EpilogueSpec, Format, GemmConfig, MatrixView, Residency, Tiling, reference,
    };

    use crate::common::{compare, random};
    use crate::product::weights;

    /// Experts in one pinned arena and in HBM, of which some have no rows; dropped while the kernel may still read them.
    #[test]
    fn gpu() {
        if gpu_or_skip("resident::pinned_experts").is_none() {
            return;
        }
        let gpu = Gpu::open(0).expect("the GPU that was just there");
        let stream = gpu.default_stream();
        let ([n, k], epilogue) = ([768, 1032], EpilogueSpec::plain(DType::F32));
        let tiling = Tiling::new(n, k, Format::Float(DType::BF16)).expect("a tiling");
        let places = [Residency::Host, Residency::HbmFraction(0.5), Residency::Hbm, Residency::Host];
        let experts: Vec<_> =
            (0..).zip(places).map(|(seed, place)| weights::<bf16>(seed, tiling, place)).collect();
        let device = DeviceProfile { sm_count: gpu.sm_count() as usize, ..DeviceProfile::h200() };
        for rows in [[3, 0, 4, 1], [0, 300, 20, 0]] {
            let tokens = rows.iter().sum();
            let config = GemmConfig { epilogue, ..GemmConfig::new(tokens, DType::BF16, device.clone()) };
            let placements = experts.iter().map(|expert| *expert.placement()).collect();
            let plan = GroupedPlan::new(placements, config).expect("a plan");
            let gemm = GroupedGemm::<_, bf16>::prepare(&gpu, &plan).expect("prepare");
            let resident = ResidentExperts::new(&gpu, &stream, &experts).expect("pinned weights");
            let x: Vec<bf16> = random(9, tokens * k);
            let on_device = stream.clone_htod(&x).expect("copy");
            let mut ends = vec![0u32];
            rows.iter().for_each(|rows| ends.push(ends[ends.len() - 1] + *rows as u32));
            let offsets = stream.clone_htod(&ends).expect("copy");
            let mut out = stream.clone_htod(&vec![f32::NAN; tokens * n]).expect("copy");
            let table = DeviceTable::new(&stream, &plan).expect("allocate");
            let schedule = DeviceSchedule::new(&stream, &[plan.schedule()]).expect("allocate");
            let mut status = StatusWord::new(&stream).expect("allocate");
            let mut workspace = Workspace::zeroed(&stream, plan.workspace().bytes()).expect("allocate");
            let launched = resident.with(&stream, |weights| {
                let args = GroupedArgs {
                    x: &View::device(&on_device, &stream),
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
            });
            launched.unwrap_or_else(|error| panic!("{rows:?}: {error}"));
            drop((resident, gemm));
            let found = stream.clone_dtoh(&out).expect("copy");
            assert_eq!(status.read(&stream).expect("the status"), None, "{rows:?}");
            for (index, expert) in experts.iter().enumerate() {
                let range = ends[index] as usize..ends[index + 1] as usize;
                let view = MatrixView::new(&x[range.start * k..range.end * k], range.len(), k).expect("x");
                let exact =
                    reference::gemm::<bf16, f32>(view, expert, &epilogue, None, None).expect("the oracle");
                // Norms of rows of such values are about 66.
                compare(
                    &format!("{rows:?}, expert {index}"),
                    &found[range.start * n..range.end * n],
                    &exact,
                    66.0 * 66.0,
                );
            }
        }
    }
}

mod weights_that_are_dropped_in_flight {
    use std::sync::Arc;

    use cuda::driver::Gpu;
    use cuda::memory::{View, ViewMut};
    use cuda::status::StatusWord;
    use cuda::workspace::Workspace;
    use emulator::rig::gpu_or_skip;
    use half::bf16;
    use hybrid_gemm::gpu::{DeviceSchedule, GemmArgs, Plan, ResidentGemm, ResidentWeights};
    use hybrid_gemm::{
        DType, DeviceProfile, EpilogueSpec, Format, GemmConfig, PathChoice, Residency, Tiling,
    };

    use crate::common::{compare, random};
    use crate::product::weights;

    /// Weights of which milliseconds are read, over the link and from HBM, on a stream without events: their last owner goes right behind
    /// the launch, and memory of the same size is allocated and overwritten at once.
    #[test]
    fn gpu() {
        if gpu_or_skip("resident::weights_that_are_dropped_in_flight").is_none() {
            return;
        }
        let gpu = Gpu::open(0).expect("the GPU that was just there");
        // SAFETY: slices of this test are used on one stream alone, weights apart, which wait for it themselves.
        unsafe { gpu.context().disable_event_tracking() };
        let stream = gpu.context().new_stream().expect("a stream");
        let loading = gpu.default_stream();
        let ([n, k], tokens) = ([16384, 8192], 5);
        let tiling = Tiling::new(n, k, Format::Float(DType::BF16)).expect("a tiling");
        let host = weights::<bf16>(53, tiling, Residency::HbmFraction(0.5));
        let device = DeviceProfile { sm_count: gpu.sm_count() as usize, ..DeviceProfile::h200() };
        let config = GemmConfig {
            epilogue: EpilogueSpec::plain(DType::F32),
            path: PathChoice::Direct,
            ..GemmConfig::new(tokens, DType::BF16, device)
        };
        let plan = Plan::new(*host.placement(), config).expect("a plan");
        let resident = Arc::new(ResidentWeights::new(&gpu, &loading, &host).expect("pinned weights"));
        loading.synchronize().expect("the weights are there");
        let gemm = ResidentGemm::<bf16>::prepare(&gpu, &plan, resident).expect("prepare");
        let x: Vec<bf16> = random(54, tokens * k);
        let on_device = stream.clone_htod(&x).expect("copy");
        let mut out = stream.clone_htod(&vec![f32::NAN; tokens * n]).expect("copy");
        let schedules = plan.schedules(tokens).expect("schedules");
        let schedule = DeviceSchedule::new(&stream, &schedules).expect("allocate");
        let mut status = StatusWord::new(&stream).expect("allocate");
        let mut workspace = Workspace::zeroed(&stream, plan.workspace().bytes()).expect("allocate");
        let args = GemmArgs {
            x: &View::device(&on_device, &stream),
            weights: (),
            bias: None,
            residual: None,
            out: ViewMut::device(&mut out, &stream),
            strides: None,
            schedule: &schedule.view(&stream),
            traffic: None,
            status: status.view_mut(&stream),
        };
        gemm.run(&stream, None, args, workspace.view_mut(&stream)).expect("a launch");
        drop(gemm);
        let mut over = loading.alloc_zeros::<u8>(host.hbm_bytes().len()).expect("the place of the weights");
        loading.memset_zeros(&mut over).expect("overwrite");
        let found = stream.clone_dtoh(&out).expect("copy");
        assert_eq!(status.read(&stream).expect("the status"), None);
        let matrix = host.dequantize();
        let exact = |index: usize| {
            let (x, w) = (&x[index / n * k..][..k], &matrix[index % n * k..][..k]);
            x.iter().zip(w).map(|(x, w)| x.to_f64() * f64::from(*w)).sum::<f64>()
        };
        let sample: Vec<usize> = (0..tokens * n).step_by(61).collect();
        let found: Vec<f32> = sample.iter().map(|index| found[*index]).collect();
        let exact: Vec<f64> = sample.iter().map(|index| exact(*index)).collect();
        // Norms of rows of such values are about 190.
        compare("dropped in flight, seeds 53 and 54", &found, &exact, 190.0 * 190.0);
    }
}
