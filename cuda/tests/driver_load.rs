//! The driver back end against a stand-in driver that writes down what it is asked: devices, and loading code.
#![cfg(feature = "driver")]

mod support;

use longkv_cuda::Error;
use longkv_cuda::driver::{FunctionUse, Gpu};
use longkv_cuda::launch::{Device as _, Function as _};
use longkv_cuda::probe::{Unavailable, Version};
use longkv_cuda::table::Arch;
use support::bench::{Bench, CONFIG, HOPPER, LARGE, SMALL, UNSHIPPED, instance};
use support::fake_driver::{Setup, with_driver};

#[test]
fn shared_memory_past_48_kb_is_asked_for_when_loading() {
    with_driver("shared_memory_past_48_kb_is_asked_for_when_loading", Setup::default(), |fake| {
        let gpu = Gpu::new(&fake.context(0)).unwrap();
        // The limit of the kernel's class less the 256 bytes of static shared memory that the stand-in reports.
        let cases = [
            (&SMALL, None),
            (&LARGE, Some("cuFuncSetAttribute large 8=101120")),
            (&HOPPER, Some("cuFuncSetAttribute hopper 8=232192")),
            (&UNSHIPPED, Some("cuFuncSetAttribute unshipped 8=101120")),
        ];
        for (kernel, expected) in cases {
            gpu.load(&instance(kernel)).unwrap();
            let set: Vec<_> =
                fake.log().into_iter().filter(|line| line.starts_with("cuFuncSetAttribute")).collect();
            assert_eq!(set, expected.into_iter().collect::<Vec<_>>(), "{}", kernel.name);
        }
        let mut bench = Bench::new(fake, &LARGE);
        bench.launch(&CONFIG.shared(64 * 1024)).unwrap();
        assert_eq!(fake.log().len(), 1, "a launch sets nothing");
        let error = bench.launch(&CONFIG.shared(99 * 1024)).unwrap_err();
        assert!(
            error.to_string().contains("at most 101120 bytes, which the kernel was prepared for"),
            "{error}"
        );
        let mut bench = Bench::new(fake, &SMALL);
        bench.launch(&CONFIG.shared(48 * 1024)).unwrap();
        let error = bench.launch(&CONFIG.shared(48 * 1024 + 1)).unwrap_err();
        assert!(matches!(error, Error::Argument { argument: "dynamic_shared", .. }), "{error}");
    });
}

#[test]
fn racing_loads_compile_once_and_load_once_per_context() {
    // Both devices are sm_80, so both contexts take the same cubin.
    let setup = Setup { variables: &[("FAKE_CUDA_MAJOR", "8")], ..Setup::default() };
    with_driver("racing_loads_compile_once_and_load_once_per_context", setup, |fake| {
        let contexts = [fake.context(0), fake.context(1)];
        // Held, so that the modules are not unloaded when the last function goes.
        let gpus = contexts.each_ref().map(|context| Gpu::new(context).unwrap());
        std::thread::scope(|scope| {
            for thread in 0..16 {
                let context = &contexts[thread % 2];
                scope.spawn(move || {
                    let gpu = Gpu::new(context).unwrap();
                    gpu.load(&instance(if thread % 4 < 2 { &SMALL } else { &LARGE })).unwrap();
                });
            }
        });
        assert_eq!(fake.compiles(), 2, "two instances");
        let mut loads: Vec<_> =
            fake.log().into_iter().filter(|line| line.starts_with("cuModuleLoadData")).collect();
        loads.sort();
        let expected = [0, 1].map(|device| {
            ["large", "small"].map(|name| {
                format!(
                    "cuModuleLoadData device={device} test/{name}.cu --std=c++17 --gpu-architecture=sm_80"
                )
            })
        });
        assert_eq!(loads, expected.concat());
        drop(gpus);
    });
}

#[test]
fn a_context_has_one_gpu() {
    with_driver("a_context_has_one_gpu", Setup::default(), |fake| {
        let context = fake.context(0);
        let gpu = Gpu::new(&context).unwrap();
        gpu.load(&instance(&SMALL)).unwrap();
        // cudarc gives a second object for the same primary context.
        let again = Gpu::new(&fake.context(0)).unwrap();
        again.load(&instance(&SMALL)).unwrap();
        assert_eq!(gpu, again);
        assert_ne!(gpu, Gpu::new(&fake.context(1)).unwrap());
        assert_eq!(fake.log().iter().filter(|line| line.starts_with("cuModuleLoadData")).count(), 1);
        assert_eq!((gpu.sm_count(), gpu.arch(), gpu.device().ordinal), (132, Arch::new(9, 0), 0));
        assert_eq!(gpu.driver().version(), Version::new(13, 0));
    });
}

#[test]
fn code_is_unloaded_with_its_last_user_and_not_under_a_running_kernel() {
    with_driver(
        "code_is_unloaded_with_its_last_user_and_not_under_a_running_kernel",
        Setup::default(),
        |fake| {
            let context = fake.context(0);
            let function = Gpu::new(&context).unwrap().load(&instance(&SMALL)).unwrap();
            fake.log();
            let copy = function.clone();
            drop(function);
            assert_eq!(fake.log(), [""; 0]);
            drop(copy);
            assert_eq!(fake.log(), ["cuCtxSynchronize", "cuModuleUnload"]);
        },
    );
}

/// A driver that is left to be lazy loads code at the first launch, which may synchronize where nothing may.
#[test]
fn code_is_loaded_before_the_first_launch() {
    with_driver("code_is_loaded_before_the_first_launch", Setup::default(), |fake| {
        let gpu = Gpu::new(&fake.context(0)).unwrap();
        fake.log();
        gpu.load(&instance(&SMALL)).unwrap();
        let log = fake.log();
        let place = |call: &str| log.iter().position(|line| line.starts_with(call));
        let (module, function) = (place("cuModuleLoadData"), place("cuFuncLoad small"));
        assert!(module.is_some() && module < function, "{log:?}");
        gpu.load(&instance(&SMALL)).unwrap();
        assert_eq!(fake.log(), [""; 0], "once");
    });
}

#[test]
fn a_refused_cubin_is_explained_and_not_remembered() {
    with_driver("a_refused_cubin_is_explained_and_not_remembered", Setup::default(), |fake| {
        let gpu = Gpu::new(&fake.context(0)).unwrap();
        for call in ["cuModuleLoadData", "cuModuleGetFunction", "cuFuncLoad"] {
            fake.fail(call, 218);
            let error = gpu.load(&instance(&SMALL)).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!(
                    "{call} refuses small for sm_90a (compiled by NVRTC 13.0) with CUDA error 218; the driver supports \
                     CUDA 13.0"
                )
            );
            assert!(!error.is_fatal());
            fake.fail(call, 0);
        }
        gpu.load(&instance(&SMALL)).unwrap();
        assert_eq!(fake.compiles(), 1, "the cubin itself was kept");
    });
}

#[test]
fn a_device_that_is_too_old_is_refused() {
    let setup = Setup { variables: &[("FAKE_CUDA_MAJOR", "7")], ..Setup::default() };
    with_driver("a_device_that_is_too_old_is_refused", setup, |fake| {
        let expected = Error::Unavailable(Unavailable::UnsupportedArch {
            ordinal: 0,
            have: Arch::new(7, 0),
            need: Arch::new(8, 0),
        });
        assert_eq!(Gpu::open(0).unwrap_err(), expected);
        assert_eq!(Gpu::new(&fake.context(0)).unwrap_err(), expected);
        assert_eq!(
            Gpu::open(5).unwrap_err(),
            Error::Unavailable(Unavailable::NoSuchDevice { ordinal: 5, devices: 2 })
        );
        Gpu::open(1).unwrap();
    });
}

#[test]
fn hopper_features_stay_on_hopper() {
    let setup = Setup { variables: &[("FAKE_CUDA_MAJOR", "8")], ..Setup::default() };
    with_driver("hopper_features_stay_on_hopper", setup, |fake| {
        let mut bench = Bench::new(fake, &SMALL);
        bench.launch(&CONFIG.programmatic()).unwrap();
        assert!(
            fake.log()[0].contains("attributes=[]"),
            "a programmatic launch is an ordinary one before sm_90"
        );
        let error = bench.launch(&CONFIG.clusters(2)).unwrap_err();
        assert_eq!(error.to_string(), "small in clusters needs sm_90 or later, the device is sm_80");
        let error = bench.gpu.load(&instance(&HOPPER)).unwrap_err();
        assert_eq!(error.to_string(), "hopper needs sm_90a, the device is sm_80");
    });
}

#[test]
fn a_function_tells_what_it_uses() {
    with_driver("a_function_tells_what_it_uses", Setup::default(), |fake| {
        let bench = Bench::new(fake, &SMALL);
        let expected = FunctionUse { registers: 40, local: 24, shared: 256, max_threads: 1024 };
        assert_eq!(bench.function.usage().unwrap(), expected);
        assert_eq!(bench.function.blocks_per_sm(128, 65536).unwrap(), 15);
        assert_eq!(bench.function.instance(), &instance(&SMALL));
    });
}

#[test]
fn a_prebuilt_folder_that_cannot_be_used_stops_the_load() {
    let setup = Setup { variables: &[("LONGKV_CUBIN_DIR", "/no/such/folder")], ..Setup::default() };
    with_driver("a_prebuilt_folder_that_cannot_be_used_stops_the_load", setup, |fake| {
        let gpu = Gpu::new(&fake.context(0)).unwrap();
        let error = gpu.load(&instance(&SMALL)).unwrap_err();
        assert!(matches!(&error, Error::Prebuilt { folder, .. } if folder == "/no/such/folder"), "{error}");
        assert_eq!(fake.compiles(), 0, "whoever ships cubins does not end up compiling");
    });
}
