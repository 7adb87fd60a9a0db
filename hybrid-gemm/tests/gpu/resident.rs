//! Weights in real pinned memory, read over the link. Needs a GPU.

mod pinned_weights {
    use cuda::driver::Gpu;
    use cuda::memory::{View, ViewMut};
    use cuda::status::StatusWord;
    use cuda::workspace::Workspace;
    use emulator::rig::gpu_or_skip;
    use half::bf16;
    use hybrid_gemm::gpu::{DeviceReceipt, DeviceSchedule, Gemm, GemmArgs, Plan, ResidentWeights};
    use hybrid_gemm::{
        DType, DeviceProfile, EpilogueSpec, Format, GemmConfig, MatrixView, Residency, Tiling, reference,
    };

    use crate::common::{compare, random};
    use crate::product::weights;

    /// Both kernels, all in host memory and half of it; the weights are dropped while the kernel may still read them.
    #[test]
    fn gpu() {
        if gpu_or_skip("resident::pinned_weights").is_none() {
            return;
        }
        let gpu = Gpu::open(0).expect("the GPU that was just there");
        let stream = gpu.default_stream();
        let ([n, k], epilogue) = ([1000, 1032], EpilogueSpec::plain(DType::F32));
        for (tokens, residency) in
            [(7, Residency::Host), (64, Residency::HbmFraction(0.5)), (300, Residency::HbmFraction(0.25))]
        {
            let case = format!("{tokens} tokens, {residency:?}, seeds 51 and 52");
            let tiling = Tiling::new(n, k, Format::Float(DType::BF16)).expect("a tiling");
            let host = weights::<bf16>(51, tiling, residency);
            let device = DeviceProfile { sm_count: gpu.sm_count() as usize, ..DeviceProfile::h200() };
            let config = GemmConfig { epilogue, ..GemmConfig::new(tokens, DType::BF16, device) };
            let plan = Plan::new(*host.placement(), config).expect("a plan");
            let gemm = Gemm::<_, bf16>::prepare(&gpu, &plan).expect("prepare");
            let resident = ResidentWeights::new(&gpu, &stream, &host).expect("pinned weights");
            let x: Vec<bf16> = random(52, tokens * k);
            let on_device = stream.clone_htod(&x).expect("copy");
            let mut out = stream.clone_htod(&vec![f32::NAN; tokens * n]).expect("copy");
            let schedule = plan.schedule(tokens).expect("a schedule");
            let schedule = DeviceSchedule::new(&stream, &schedule).expect("allocate");
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
                gemm.run(&stream, args, workspace.view_mut(&stream))
            });
            launched.unwrap_or_else(|error| panic!("{case}: {error}"));
            drop(resident);
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
