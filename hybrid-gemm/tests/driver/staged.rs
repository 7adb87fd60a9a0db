//! Slabs: no copy overtakes the launch that reads the slot, no launch overtakes the copy of its slab.

use std::sync::Arc;

use cuda::cudarc::driver::CudaStream;
use cuda::driver::{Gpu, Graph, SideStream};
use cuda::memory::{Space, View, ViewMut};
use cuda::side_queue::SideQueue;
use cuda::status::StatusWord;
use cuda::workspace::Workspace;
use half::bf16;
use hybrid_gemm::gpu::{DeviceSchedule, Gemm, GemmArgs, Plan, ResidentGemm, ResidentWeights};
use hybrid_gemm::{
    DType, DeviceProfile, Error, Format, GemmConfig, Path, PathChoice, Residency, RowMajor, Weights,
};

use crate::order::operations;
use crate::support::fake_driver::{FakeDriver, Setup, with_driver};

/// Keeps the order between streams.
const ORDERED: Setup = Setup { options: &[], variables: &[("FAKE_CUDA_ORDER", "1")] };
const N: usize = 8 * 64;
const K: usize = 128;
const TOKENS: usize = 70;

fn weights(residency: Residency) -> Weights {
    let values = vec![bf16::from_f32(0.5); N * K];
    let matrix = RowMajor::from_slice(&values, [N, K]).unwrap();
    Weights::pack(matrix, Format::Float(DType::BF16), residency).unwrap()
}

fn config(path: PathChoice) -> GemmConfig {
    let device = DeviceProfile { sm_count: 132, ..DeviceProfile::h200() };
    GemmConfig { path, ..GemmConfig::new(TOKENS, DType::BF16, device) }
}

/// A staged product on the stand-in, with everything that it needs.
pub(crate) struct Bench {
    pub(crate) gpu: Gpu,
    pub(crate) plan: Plan,
    pub(crate) weights: ResidentWeights,
    gemm: Gemm<cuda::driver::GpuFunction, bf16>,
    main: Arc<CudaStream>,
    side: SideStream,
    schedule: DeviceSchedule,
    workspace: Workspace,
    x: cuda::cudarc::driver::CudaSlice<bf16>,
    out: cuda::cudarc::driver::CudaSlice<bf16>,
    status: StatusWord,
}

impl Bench {
    fn new(fake: &FakeDriver, residency: Residency) -> Self {
        Bench::on_path(fake, residency, Path::Staged { slab_columns: 1 })
    }

    fn on_path(fake: &FakeDriver, residency: Residency, path: Path) -> Self {
        // Pointers, and the parameters.
        let mut sizes = vec![8; 14];
        sizes.push(size_of::<cuda::params::HybridGemmParams>());
        fake.parameters(&sizes);
        let context = fake.context(0);
        // SAFETY: nothing runs, so no slice needs an event.
        unsafe { context.disable_event_tracking() };
        let gpu = Gpu::new(&context).unwrap();
        let [main, copies] = [(); 2].map(|()| context.new_stream().unwrap());
        let weights = weights(residency);
        let plan = Plan::new(*weights.placement(), config(PathChoice::Only(path))).unwrap();
        let bench = Bench {
            weights: ResidentWeights::new(&gpu, &main, &weights).unwrap(),
            gemm: Gemm::prepare(&gpu, &plan).unwrap(),
            side: SideStream::new(&gpu, copies, plan.slots()).unwrap(),
            schedule: DeviceSchedule::new(&main, &plan.schedules(TOKENS).unwrap()).unwrap(),
            workspace: Workspace::zeroed(&main, plan.workspace().bytes()).unwrap(),
            x: main.alloc_zeros(TOKENS * K).unwrap(),
            out: main.alloc_zeros(TOKENS * N).unwrap(),
            status: StatusWord::new(&main).unwrap(),
            gpu,
            plan,
            main,
        };
        fake.log();
        bench
    }

    fn run(&mut self) -> Result<(), Error> {
        let Bench { weights, gemm, main, side, schedule, workspace, x, out, status, .. } = self;
        weights.with(main, |weights| {
            let args = GemmArgs {
                x: &View::device(x, main),
                weights,
                bias: None,
                residual: None,
                out: ViewMut::device(out, main),
                strides: None,
                schedule: &schedule.view(main),
                traffic: None,
                status: status.view_mut(main),
            };
            gemm.run_staged(main, side, args, workspace.view_mut(main))
        })
    }
}

#[test]
fn slabs_go_round_in_order() {
    with_driver("staged::slabs_go_round_in_order", ORDERED, |fake| {
        for (case, residency, slabs, resident) in [
            ("all in host memory", Residency::Host, 8, 0),
            ("a quarter in HBM", Residency::HbmFraction(0.25), 6, 1),
        ] {
            let mut bench = Bench::new(fake, residency);
            let slots = bench.plan.slots();
            assert!(slots >= 2 && slots < slabs, "{case}: more slabs than slots");
            // Twice, as steps follow each other.
            bench.run().unwrap();
            bench.run().unwrap();
            let log = fake.log();
            let operations = operations(&log);
            let indices = |wanted: fn(&crate::order::Operation) -> bool| -> Vec<usize> {
                (0..operations.len()).filter(|index| wanted(&operations[*index])).collect()
            };
            let (copies, launches) =
                (indices(crate::order::Operation::is_copy), indices(crate::order::Operation::is_launch));
            assert_eq!(
                (copies.len(), launches.len()),
                (2 * slabs, 2 * (slabs + resident)),
                "{case}: {log:#?}"
            );
            let before = |a: usize, b: usize| operations[b].before.contains(&a);

            for call in 0..2 {
                let copies = &copies[call * slabs..][..slabs];
                let all = &launches[call * (slabs + resident)..][..slabs + resident];
                let launches = &all[resident..];
                // Every byte of the host part once, in order, from the address that the device has for it.
                let mut bytes = 0;
                let first = operations[copies[0]].number("from");
                for copy in copies {
                    assert_eq!(operations[*copy].number("from"), first + bytes, "{case}");
                    bytes += operations[*copy].number("bytes");
                }
                assert_eq!(bytes, bench.plan.placement().host_bytes(), "{case}: 1.00 × W");
                for slab in 0..slabs {
                    let (copy, launch) = (copies[slab], launches[slab]);
                    assert!(before(copy, launch), "{case}: launch {slab} may read before its copy is done");
                    assert_eq!(
                        operations[launch].parameter(2),
                        operations[copy].number("to"),
                        "{case}: launch {slab} reads another slot"
                    );
                    if let (Some(next), Some(ahead)) = (copies.get(slab + slots), copies.get(slab + 1)) {
                        assert_eq!(operations[*next].number("to"), operations[copy].number("to"), "{case}");
                        assert!(
                            before(launch, *next),
                            "{case}: the slot of slab {slab} is overwritten while it is read"
                        );
                        assert!(
                            !before(launch, *ahead),
                            "{case}: the copy behind slab {slab} waits for nothing"
                        );
                    }
                }
                // Columns in HBM are multiplied while the first slabs are on their way.
                assert!(all[..resident].iter().all(|launch| !before(copies[0], *launch)), "{case}");
                if call == 1 {
                    let earlier = &operations[copies[0]].before;
                    assert!(
                        (0..slabs + resident)
                            .all(|launch| earlier
                                .contains(&indices(crate::order::Operation::is_launch)[launch])),
                        "{case}: the second call overwrites what the first still reads"
                    );
                }
            }
            // The main stream has all copies behind it.
            let last = *launches.last().expect("launches");
            assert!(copies.iter().all(|copy| before(*copy, last)), "{case}: a copy is left behind");
        }
    });
}

#[test]
fn a_staged_product_is_captured_with_its_copies() {
    with_driver("staged::a_staged_product_is_captured_with_its_copies", ORDERED, |fake| {
        let mut bench = Bench::new(fake, Residency::HbmFraction(0.25));
        let (gpu, main) = (bench.gpu.clone(), bench.main.clone());
        let graph = Graph::capture(&gpu, &main, |_| bench.run()).expect("both streams are joined");
        assert_eq!(graph.nodes().unwrap(), 6 + 7, "six slabs, and the columns in HBM");
        let captured = fake.log();
        assert!(
            !captured.iter().any(|line| line.starts_with("cuLaunchKernelEx")),
            "nothing ran: {captured:#?}"
        );
        // SAFETY: the buffers are alive.
        unsafe { graph.replay(&main) }.unwrap();
        assert_eq!(fake.log().iter().filter(|line| line.starts_with("replayed cuMemcpyAsync")).count(), 6);
        // The stand-in would have noticed: copies that nobody waits for.
        let left = Graph::capture(&gpu, &main, |stream| {
            bench.side.after(stream)?;
            let slab = View::device(&bench.x, stream).cast::<u8>();
            let mut slot = ViewMut::device(&mut bench.out, stream).cast::<u8>();
            // SAFETY: nothing runs.
            unsafe { bench.side.copy(0, &slab, &mut slot) }
        });
        assert_eq!(left.unwrap_err(), cuda::Error::Driver { call: "cuStreamEndCapture", code: 904 });
    });
}

#[test]
fn a_call_that_fails_leaves_no_copy_behind() {
    with_driver("staged::a_call_that_fails_leaves_no_copy_behind", ORDERED, |fake| {
        let mut bench = Bench::new(fake, Residency::Host);
        fake.fail("cuLaunchKernelEx", 1);
        assert!(bench.run().is_err());
        fake.fail("cuLaunchKernelEx", 0);
        fake.log();
        // What comes next on the main stream waits for the copies; the order is kept by the marks of the failed call.
        let (gpu, main) = (bench.gpu.clone(), bench.main.clone());
        fake.fail("cuMemcpyAsync", 2);
        assert!(matches!(
            bench.run(),
            Err(Error::Cuda(cuda::Error::Driver { call: "cuMemcpyAsync", code: 2 }))
        ));
        fake.fail("cuMemcpyAsync", 0);
        fake.fail("cuLaunchKernelEx", 1);
        let captured = Graph::capture(&gpu, &main, |_| {
            assert!(bench.run().is_err());
            Ok::<(), Error>(())
        });
        assert_eq!(captured.expect("joined all the same").nodes().unwrap(), bench.plan.slots());
        // The first copy fails, when the side stream has nothing of its own yet: it is part of the capture all the same.
        fake.fail("cuLaunchKernelEx", 0);
        fake.fail("cuMemcpyAsync", 2);
        let captured = Graph::capture(&gpu, &main, |_| {
            let error = bench.run().expect_err("no copy");
            assert!(
                error.to_string().contains("cuMemcpyAsync"),
                "the first error, not what followed: {error}"
            );
            Ok::<(), Error>(())
        });
        assert_eq!(captured.expect("joined before the first copy").nodes().unwrap(), 0);
    });
}

/// The stand-in would have noticed a side stream that waits for the main one and is left alone; `join` is what brings it back.
#[test]
fn a_fork_without_copies_is_joined_too() {
    with_driver("staged::a_fork_without_copies_is_joined_too", ORDERED, |fake| {
        let mut bench = Bench::new(fake, Residency::Host);
        let (gpu, main) = (bench.gpu.clone(), bench.main.clone());
        let forked = Graph::capture(&gpu, &main, |stream| bench.side.after(stream));
        assert_eq!(forked.unwrap_err(), cuda::Error::Driver { call: "cuStreamEndCapture", code: 904 });
        let joined = Graph::capture(&gpu, &main, |stream| {
            bench.side.after(stream)?;
            bench.side.join(stream)
        });
        assert_eq!(joined.expect("joined").nodes().unwrap(), 0);
        let elsewhere = fake.context(1).new_stream().unwrap();
        assert!(bench.side.join(&elsewhere).is_err(), "a stream of another context");
    });
}

/// `run` enqueues: nothing is allocated, freed, waited for or read, of a direct product and of a staged one.
#[test]
fn calls_enqueue_and_nothing_else() {
    with_driver("staged::calls_enqueue_and_nothing_else", ORDERED, |fake| {
        for (path, launches, copies) in
            [(Path::Direct { alpha: 1.0 }, 1, 0), (Path::Staged { slab_columns: 1 }, 1 + 6, 6)]
        {
            let mut bench = Bench::on_path(fake, Residency::HbmFraction(0.25), path);
            for call in 0..2 {
                bench.run().unwrap();
                let log = fake.log();
                let count = |call: &str| log.iter().filter(|line| line.starts_with(call)).count();
                let enqueued = [count("cuLaunchKernelEx"), count("cuMemcpyAsync")];
                assert_eq!(enqueued, [launches, copies], "{path}, call {call}: {log:#?}");
                let marks = count("cuEventRecord ") + count("cuStreamWaitEvent ");
                assert_eq!(marks > 0, copies > 0, "{path}, call {call}: {log:#?}");
                assert_eq!(log.len(), launches + copies + marks, "{path}, call {call}: {log:#?}");
            }
        }
    });
}

#[test]
fn arguments_of_staging_are_checked() {
    with_driver("staged::arguments_of_staging_are_checked", ORDERED, |fake| {
        let mut bench = Bench::new(fake, Residency::Host);
        let (gpu, main) = (bench.gpu.clone(), bench.main.clone());
        // One mark too few, and the main stream as its own side.
        bench.side =
            SideStream::new(&gpu, gpu.context().new_stream().unwrap(), bench.plan.slots() - 1).unwrap();
        let error = bench.run().unwrap_err().to_string();
        assert!(error.contains("side") && error.contains("marks for 3 slots"), "{error}");
        bench.side = SideStream::new(&gpu, main.clone(), bench.plan.slots()).unwrap();
        let error = bench.run().unwrap_err().to_string();
        assert!(error.contains("another stream than the copies'"), "{error}");
        let elsewhere = fake.context(1).new_stream().unwrap();
        assert!(SideStream::new(&gpu, elsewhere, 2).is_err());

        {
            let mut side = SideStream::new(&gpu, gpu.context().new_stream().unwrap(), 2).unwrap();
            let slab = View::device(&bench.x, &main).cast::<u8>();
            let on_host = View::host(&[0u8; 4]);
            // SAFETY: nothing runs, and nobody follows the address.
            let mut short = unsafe { ViewMut::<u8>::from_raw(256, 4, Space::Device(0)) };
            for (case, slot, from, named) in [
                ("no such slot", 2, &slab, "slot"),
                ("too short", 0, &slab, "to"),
                ("host memory", 0, &on_host, "from"),
            ] {
                // SAFETY: nothing runs.
                let error = unsafe { side.copy(slot, from, &mut short) }.expect_err(case);
                assert!(
                    matches!(&error, cuda::Error::Argument { argument, .. } if *argument == named),
                    "{case}: {error}"
                );
            }
            assert!(side.before(&main, 2).is_err());
            assert!(fake.log().iter().all(|line| !line.starts_with("cuMemcpyAsync")));
        }

        // `run` does not take a staged plan, and says what does.
        let Bench { plan, weights, gemm, schedule, workspace, x, out, status, .. } = &mut bench;
        let refused = weights.with(&main, |weights| {
            let args = GemmArgs {
                x: &View::device(x, &main),
                weights,
                bias: None,
                residual: None,
                out: ViewMut::device(out, &main),
                strides: None,
                schedule: &schedule.view(&main),
                traffic: None,
                status: status.view_mut(&main),
            };
            gemm.run(&main, args, workspace.view_mut(&main))
        });
        assert!(refused.unwrap_err().to_string().contains("run_staged"));
        let one = plan.schedules(TOKENS).unwrap()[..1].to_vec();
        assert!(schedule.write(&main, &one).unwrap_err().to_string().contains("schedules"));
    });
}

/// Everything goes while kernels and copies may still run: memory is given back, and code unloaded, behind them.
#[test]
fn a_plan_is_dropped_behind_what_it_enqueued() {
    with_driver("staged::a_plan_is_dropped_behind_what_it_enqueued", ORDERED, |fake| {
        let mut bench = Bench::new(fake, Residency::HbmFraction(0.5));
        bench.run().unwrap();
        fake.log();
        drop(bench);
        let log = fake.log();
        for freed in ["cuMemFreeHost", "cuModuleUnload"] {
            let at =
                log.iter().position(|line| line == freed).unwrap_or_else(|| panic!("no {freed}: {log:?}"));
            assert_eq!(log[at - 1], "cuCtxSynchronize", "{freed} waits: {log:?}");
        }
        // Weights in HBM alone: no event of the slice says when the kernels are done, nor does anything else of the bench wait for
        // them before they are freed.
        let mut bench = Bench::on_path(fake, Residency::Hbm, Path::Direct { alpha: 1.0 });
        bench.run().unwrap();
        let hbm = operations(&fake.log())[0].parameter(2);
        drop(bench);
        let log = fake.log();
        let freed = format!("cuMemFreeAsync {hbm} ");
        let at = log.iter().position(|line| line.starts_with(&freed)).expect("the weights are freed");
        assert!(log[..at].iter().any(|line| line == "cuCtxSynchronize"), "the weights wait: {log:#?}");
        assert!(!log[..at].iter().any(|line| line == "cuModuleUnload"), "the wait is their own: {log:#?}");
    });
}

/// A product that has its weights keeps them until it goes itself, and takes those of its plan alone.
#[test]
fn a_product_keeps_its_weights() {
    with_driver("staged::a_product_keeps_its_weights", ORDERED, |fake| {
        let Bench {
            gpu,
            plan,
            weights,
            main,
            mut side,
            schedule,
            mut workspace,
            x,
            mut out,
            mut status,
            gemm,
        } = Bench::new(fake, Residency::HbmFraction(0.5));
        drop(gemm);
        let other = Bench::new(fake, Residency::HbmFraction(0.25)).plan;
        let weights = Arc::new(weights);
        let error = ResidentGemm::<bf16>::prepare(&gpu, &other, weights.clone()).unwrap_err().to_string();
        assert!(error.contains("`weights`") && error.contains("4 of 8 columns in host memory"), "{error}");
        let gemm = ResidentGemm::<bf16>::prepare(&gpu, &plan, weights).unwrap();
        let mut run = |side: Option<&mut SideStream>| {
            let args = GemmArgs {
                x: &View::device(&x, &main),
                weights: (),
                bias: None,
                residual: None,
                out: ViewMut::device(&mut out, &main),
                strides: None,
                schedule: &schedule.view(&main),
                traffic: None,
                status: status.view_mut(&main),
            };
            gemm.run(&main, side, args, workspace.view_mut(&main))
        };
        assert!(run(None).unwrap_err().to_string().contains("run_staged"));
        fake.log();
        run(Some(&mut side)).unwrap();
        let log = fake.log();
        assert_eq!(log.iter().filter(|line| line.starts_with("cuMemcpyAsync")).count(), 4, "{log:#?}");
        assert!(!log.iter().any(|line| line.starts_with("cuMemFree")), "the weights are there: {log:#?}");
        drop(gemm);
        let log = fake.log();
        let waited = log.iter().position(|line| line == "cuCtxSynchronize").expect("a wait");
        let freed =
            log.iter().position(|line| line.starts_with("cuMemFree")).expect("the last owner is gone");
        assert!(waited < freed, "{log:#?}");
    });
}
