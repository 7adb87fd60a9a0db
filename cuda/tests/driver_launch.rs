//! The driver back end against a stand-in driver that writes down what it is asked: launching.
#![cfg(feature = "driver")]

mod support;

use half::{bf16, f16};
use longkv_cuda::Error;
use longkv_cuda::cudarc::driver::{CudaSlice, CudaStream};
use longkv_cuda::driver::{Gpu, GpuFunction, LAUNCH_LOG_VARIABLE, launches};
use longkv_cuda::kernels::attention::{MergeStates, MergeStatesArgs};
use longkv_cuda::launch::{Arg, Device, Function, LaunchConfig};
use longkv_cuda::memory::{Space, View, ViewMut};
use longkv_cuda::status::StatusWord;
use longkv_cuda::tensor_map::{Planes, TensorShape};
use longkv_cuda::workspace::{Carver, Layout, Workspace};
use support::bench::{Bench, CONFIG, HOPPER, LARGE, SMALL, instance};
use support::fake_driver::{Setup, with_driver};

/// 8 rows of 32 floats.
const MAPPED: TensorShape = TensorShape {
    columns: 32,
    rows: 8,
    row_bytes: 128,
    box_columns: 32,
    box_rows: 4,
    swizzle_128: true,
    planes: None,
};

#[test]
fn a_launch_is_encoded() {
    with_driver("a_launch_is_encoded", Setup::default(), |fake| {
        let mut bench = Bench::new(fake, &HOPPER);
        let address = |slice: &CudaSlice<f32>| {
            let address = View::device(slice, &bench.stream).address();
            address.to_le_bytes().iter().map(|byte| format!("{byte:02x}")).collect::<String>()
        };
        let parameters = format!("[{} {} 02010000]", address(&bench.input), address(&bench.output));
        let plain = CONFIG;
        let cases = [
            ("plain", plain, "shared=0 attributes=[]"),
            ("shared memory", plain.shared(1000), "shared=1000 attributes=[]"),
            ("most shared memory", plain.shared(227 * 1024 - 256), "shared=232192 attributes=[]"),
            ("cluster", plain.clusters((2, 1, 1)), "shared=0 attributes=[4:2,1,1]"),
            ("programmatic", plain.programmatic(), "shared=0 attributes=[6:1]"),
            ("both", plain.clusters((3, 2, 1)).programmatic(), "shared=0 attributes=[4:3,2,1 6:1]"),
        ];
        for (name, config, expected) in cases {
            bench.launch(&config).unwrap_or_else(|error| panic!("{name}: {error}"));
            let expected = format!(
                "cuLaunchKernelEx hopper grid=6,2,1 block=32,4,1 {expected} parameters={parameters} stream=caller's"
            );
            assert_eq!(fake.log(), [expected], "{name}");
        }
    });
}

#[test]
fn launches_are_noted() {
    with_driver("launches_are_noted", Setup::default(), |fake| {
        let file = std::env::var_os(LAUNCH_LOG_VARIABLE).expect("the parent names a file");
        let logged = || {
            let text = std::fs::read_to_string(&file).unwrap_or_default();
            text.lines().map(str::to_string).collect::<Vec<_>>()
        };
        let mut small = Bench::new(fake, &SMALL);
        let mut large = Bench::new(fake, &LARGE);
        assert!(logged().is_empty(), "loading is not launching");

        fake.fail("cuLaunchKernelEx", 700);
        let ((), noted) = launches(|| assert!(small.launch(&CONFIG).is_err()));
        fake.fail("cuLaunchKernelEx", 0);
        assert!(noted.is_empty() && logged().is_empty(), "a launch that failed is none");

        let empty = LaunchConfig { grid: 0.into(), ..CONFIG };
        let ((), noted) = launches(|| small.launch(&empty).unwrap());
        assert!(noted.is_empty() && logged().is_empty(), "nothing ran: {noted:?}");

        let ((), noted) = launches(|| {
            for _ in 0..3 {
                small.launch(&CONFIG).unwrap();
            }
            large.launch(&CONFIG).unwrap();
        });
        let lines: Vec<_> = noted.iter().map(ToString::to_string).collect();
        assert_eq!(logged(), lines);
        assert!(lines.len() == 2 && lines[0].starts_with("small sm_90a "), "{lines:?}");
        assert!(lines[1].starts_with("large sm_90a "), "{lines:?}");
        assert_ne!(noted[0].cubin, noted[1].cubin, "the digest is of the image");

        let ((), noted) = launches(|| large.launch(&CONFIG).unwrap());
        assert_eq!(noted.len(), 1, "every recording starts empty");
        assert_eq!(logged(), lines, "the file has each kernel once");
    });
}

#[test]
fn a_launch_makes_its_context_current() {
    with_driver("a_launch_makes_its_context_current", Setup::default(), |fake| {
        fake.parameters(&[8, 128, 4]);
        let bench = Bench::new(fake, &HOPPER);
        // SAFETY: the stand-in runs nothing, so nobody follows the addresses.
        let views = || unsafe { [0x1000, 0x2000].map(|at| View::<f32>::from_raw(at, 256, Space::Device(0))) };
        let launch = |function: &GpuFunction, stream: &CudaStream| {
            let ([input, map], n) = (views(), 1u32);
            let args = [Arg::read("input", &input), Arg::tensor("map", &map, MAPPED), Arg::value("n", &n)];
            // SAFETY: the stand-in runs nothing.
            unsafe { function.launch(stream, &CONFIG, &args) }
        };
        fake.context(1).bind_to_thread().map_err(|error| error.0).unwrap();
        launch(&bench.function, &bench.stream).expect("after work in another context");
        let log = fake.log();
        assert!(log[0].starts_with("cuTensorMapEncodeTiled"), "{log:?}");
        assert!(log[1].starts_with("cuLaunchKernelEx hopper"), "{log:?}");
        std::thread::scope(|scope| {
            let launched = scope.spawn(|| launch(&bench.function, &bench.stream));
            launched.join().unwrap().expect("on a thread that has no context");
        });
        assert_eq!(fake.log(), log);
    });
}

#[test]
fn a_grid_without_blocks_launches_nothing() {
    with_driver("a_grid_without_blocks_launches_nothing", Setup::default(), |fake| {
        let mut bench = Bench::new(fake, &SMALL);
        for grid in [(0, 1, 1), (4, 0, 1), (4, 1, 0)] {
            bench.launch(&LaunchConfig { grid: grid.into(), ..CONFIG }).unwrap();
            assert_eq!(fake.log(), [""; 0], "{grid:?}");
        }
        // It is checked all the same.
        let wrong = LaunchConfig { grid: 0.into(), block: 64.into(), ..CONFIG };
        assert!(matches!(bench.launch(&wrong), Err(Error::Argument { argument: "block", .. })));
    });
}

#[test]
fn memory_and_streams_of_elsewhere_are_refused_by_name() {
    with_driver("memory_and_streams_of_elsewhere_are_refused_by_name", Setup::default(), |fake| {
        let bench = Bench::new(fake, &SMALL);
        let elsewhere = fake.context(1).default_stream();
        let other: CudaSlice<f32> = elsewhere.alloc_zeros(16).unwrap();
        fake.log();
        let mut host = [0f32; 16];
        let own = View::device(&bench.input, &bench.stream);
        let mut on_host = ViewMut::host(&mut host);
        let on_other = View::device(&other, &bench.stream);
        let n = 1u32;
        let n = Arg::value("n", &n);
        let read = Arg::read("input", &own);

        let cases = [
            (
                "host memory",
                Arg::write("output", &mut on_host),
                Some("memory of device 0, found host memory"),
            ),
            (
                "another device",
                Arg::read("output", &on_other),
                Some("memory of device 0, found memory of device 1"),
            ),
            ("null", Arg::write_optional::<f32>("output", None), None),
        ];
        for (name, output, expected) in cases {
            match (bench.launch_args(&bench.stream, &[read, output, n]), expected) {
                (Ok(()), None) => assert_eq!(fake.log().len(), 1, "{name}"),
                (Err(error @ Error::Argument { argument: "output", .. }), Some(words)) => {
                    assert!(error.to_string().contains(words), "{name}: {error}");
                    assert_eq!(fake.log(), [""; 0], "{name}");
                }
                (answer, _) => panic!("{name}: {answer:?}"),
            }
        }
        let error = bench.launch_args(&elsewhere, &[read, read, n]).unwrap_err();
        assert!(matches!(error, Error::Argument { argument: "stream", .. }), "{error}");
        assert_eq!(fake.log(), [""; 0]);
    });
}

#[test]
fn views_made_for_another_stream_are_refused() {
    with_driver("views_made_for_another_stream_are_refused", Setup::default(), |fake| {
        let mut bench = Bench::new(fake, &SMALL);
        let [own, other] = [bench.stream.clone(), bench.gpu.context().new_stream().unwrap()];
        let n = 1u32;
        let raw_address = View::device(&bench.input, &own).address();
        // SAFETY: the stand-in runs nothing.
        let raw = unsafe { View::<f32>::from_raw(raw_address, 16, Space::Device(0)) };
        for (launched_on, made_for, fits) in
            [(&own, &own, true), (&own, &other, false), (&other, &own, false), (&other, &other, true)]
        {
            let mut output = ViewMut::device(&mut bench.output, made_for);
            let part = output.part_mut(0..4).unwrap();
            let mut again = part;
            let args = [Arg::read("input", &raw), Arg::write("output", &mut again), Arg::value("n", &n)];
            fake.log();
            // SAFETY: the stand-in runs nothing.
            let answer = unsafe { bench.function.launch(launched_on, &CONFIG, &args) };
            match answer {
                Ok(()) => assert!(fits, "launched with a view of another stream"),
                Err(error) => {
                    assert!(!fits, "{error}");
                    let words = "`output`: expected a view made for the stream of the launch, found one made for another";
                    assert!(error.to_string().contains(words), "{error}");
                    assert!(!fake.log().iter().any(|line| line.starts_with("cuLaunch")));
                }
            }
        }
    });
}

#[test]
fn a_workspace_keeps_its_stream() {
    with_driver("a_workspace_keeps_its_stream", Setup::default(), |fake| {
        let gpu = Gpu::new(&fake.context(0)).unwrap();
        let stream = gpu.context().new_stream().unwrap();
        let mut layout = Layout::new();
        let words = layout.scratch::<u32>(3).unwrap();
        let mut workspace = Workspace::zeroed(&stream, layout.bytes()).unwrap();
        let made_for = Some(stream.cu_stream() as usize);
        let view = workspace.view_mut(&stream);
        assert_eq!((view.stream(), layout.view(words, &view).unwrap().stream()), (made_for, made_for));
        let carver = Carver::new("test", view, &layout).unwrap();
        assert_eq!(carver.take(words).unwrap().stream(), made_for);
        assert_eq!(carver.into_workspace().stream(), made_for);
    });
}

#[test]
fn arguments_are_held_to_the_kernels_parameters() {
    with_driver("arguments_are_held_to_the_kernels_parameters", Setup::default(), |fake| {
        let bench = Bench::new(fake, &SMALL);
        let view = View::device(&bench.input, &bench.stream);
        let (short, long) = (1u16, 1u64);
        let buffer = Arg::read("input", &view);
        let cases: &[(&str, &[Arg<'_>], &str)] = &[
            ("too few", &[buffer, buffer], "`args`: expected 3 arguments, found 2"),
            ("too many", &[buffer; 4], "`args`: expected 3 arguments, found 4"),
            ("far too many", &[buffer; 49], "`args`: expected 48 arguments, found 49"),
            (
                "too small",
                &[buffer, buffer, Arg::value("n", &short)],
                "`n`: expected a parameter of 4 bytes, found 2",
            ),
            (
                "too large",
                &[buffer, buffer, Arg::value("n", &long)],
                "`n`: expected a parameter of 4 bytes, found 8",
            ),
            ("a buffer for a scalar", &[buffer, buffer, buffer], "`input`: expected a parameter of 4 bytes"),
        ];
        for (name, args, expected) in cases {
            let error = bench.launch_args(&bench.stream, args).expect_err(name).to_string();
            assert!(error.contains(expected), "{name}: {error}");
        }
        assert_eq!(fake.log(), [""; 0]);
    });
}

#[test]
fn tensor_maps_are_encoded_and_passed() {
    with_driver("tensor_maps_are_encoded_and_passed", Setup::default(), |fake| {
        fake.parameters(&[128, 128]);
        let bench = Bench::new(fake, &HOPPER);
        let tensor = bench.stream.alloc_zeros::<f32>(8 * 32).unwrap();
        let view = || View::device(&tensor, &bench.stream);
        let (floats, halves, brains) = (view(), view().cast::<f16>(), view().cast::<bf16>());
        let shape = MAPPED;
        let wide = TensorShape { columns: 60, box_columns: 8, swizzle_128: false, ..shape };
        let pages = TensorShape { planes: Some(Planes { count: 3, bytes: 256 }), rows: 2, ..shape };
        let empty = TensorShape { rows: 0, ..shape };
        fake.log();
        let launched = |args: &[Arg<'_>]| {
            bench.launch_args(&bench.stream, args)?;
            let log = fake.log();
            let (launch, encoded) = log.split_last().expect("a launch");
            let parameters = launch.split('[').next_back().expect("parameters").split(']').next();
            let maps: Vec<String> = parameters.expect("their end").split(' ').map(str::to_string).collect();
            Ok::<_, Error>((encoded.to_vec(), maps))
        };
        let map = |address: u64| {
            let bytes = address.to_le_bytes().into_iter().chain(std::iter::repeat_n(0x5a, 120));
            bytes.map(|byte| format!("{byte:02x}")).collect::<String>()
        };
        let line = |kind: &str, swizzle: u32| {
            format!(
                "cuTensorMapEncodeTiled {kind} steps=1,1 interleave=0 swizzle={swizzle} promotion=2 fill=0"
            )
        };
        let args = [Arg::tensor("k", &floats, shape), Arg::tensor("v", &brains, wide)];
        let (encoded, maps) = launched(&args).unwrap();
        let expected = [
            line("type=7 extents=32,8 stride=128 box=32,4", 3),
            line("type=9 extents=60,8 stride=128 box=8,4", 0),
        ];
        assert_eq!(encoded, expected);
        assert_eq!(maps, [map(floats.address()), map(brains.address())]);
        let (encoded, maps) =
            launched(&[Arg::tensor("k", &brains, pages), Arg::tensor("v", &brains, pages)]).unwrap();
        let expected = "cuTensorMapEncodeTiled type=9 extents=32,2,3 stride=128,256 box=32,4,1 steps=1,1,1 \
                        interleave=0 swizzle=3 promotion=2 fill=0";
        assert_eq!(encoded, [expected; 2]);
        assert_eq!(maps, [map(brains.address()), map(brains.address())]);
        // What has no rows has no map.
        let args = [Arg::tensor("k", &halves, shape), Arg::tensor("v", &brains, empty)];
        let (encoded, maps) = launched(&args).unwrap();
        assert_eq!(encoded, [line("type=6 extents=32,8 stride=128 box=32,4", 3)]);
        assert_eq!(maps, [map(halves.address()), "00".repeat(128)]);

        let host = [0f32; 256];
        let elsewhere = View::host(&host);
        let odd = View::device(&tensor, &bench.stream);
        let odd = odd.part(1..200).unwrap();
        let good = Arg::tensor("k", &floats, shape);
        let refused: [(&str, Arg<'_>, &str); 4] = [
            ("host memory", Arg::tensor("v", &elsewhere, shape), "`v`: expected memory of device 0"),
            ("too short", Arg::tensor("v", &floats, TensorShape { rows: 9, ..shape }), "at least 1152 bytes"),
            ("unaligned", Arg::tensor("v", &odd, one_row(shape)), "an address divisible by 16"),
            ("a buffer", Arg::read("v", &floats), "a parameter of 128 bytes"),
        ];
        let no_blocks = LaunchConfig { grid: 0.into(), ..CONFIG };
        for (name, arg, expected) in refused {
            for config in [&CONFIG, &no_blocks] {
                // SAFETY: the stand-in runs nothing.
                let launched = unsafe { bench.function.launch(&bench.stream, config, &[good, arg]) };
                let error = launched.expect_err(name).to_string();
                assert!(error.contains(expected), "{name}: {error}");
                assert_eq!(fake.log(), [""; 0], "{name}: nothing was encoded");
            }
        }
        fake.fail("cuTensorMapEncodeTiled", 801);
        match launched(&[good, good]) {
            Err(Error::Driver { call: "cuTensorMapEncodeTiled", code: 801 }) => {}
            other => panic!("{other:?}"),
        }
        assert_eq!(fake.log(), [""; 0], "nothing was launched");
    });
}

/// One row of a tensor.
fn one_row(shape: TensorShape) -> TensorShape {
    TensorShape { rows: 1, ..shape }
}

#[test]
fn drivers_that_neither_load_nor_tell_the_parameters_still_launch() {
    let setup = Setup { options: &["-DNO_PARAM_INFO"], ..Setup::default() };
    with_driver("drivers_that_neither_load_nor_tell_the_parameters_still_launch", setup, |fake| {
        Bench::new(fake, &SMALL).launch(&CONFIG).unwrap();
        assert!(fake.log()[0].starts_with("cuLaunchKernelEx small"));
    });
}

#[test]
fn failures_keep_the_call_and_the_code() {
    with_driver("failures_keep_the_call_and_the_code", Setup::default(), |fake| {
        let mut bench = Bench::new(fake, &SMALL);
        for (code, fatal) in [(1, false), (2, false), (700, true), (701, false), (716, true), (719, true)] {
            fake.fail("cuLaunchKernelEx", code);
            let error = bench.launch(&CONFIG).unwrap_err();
            assert_eq!(error, Error::Driver { call: "cuLaunchKernelEx", code });
            assert_eq!(error.is_fatal(), fatal, "{error}");
        }
        fake.fail("cuLaunchKernelEx", 0);
        bench.launch(&CONFIG).unwrap();
        for call in ["cuFuncGetAttribute", "cuFuncSetAttribute", "cuFuncGetParamInfo"] {
            fake.fail(call, 999);
            let error = bench.gpu.load(&instance(&LARGE)).unwrap_err();
            assert_eq!(error, Error::Driver { call, code: 999 });
            fake.fail(call, 0);
        }
        fake.fail("cuMemAllocAsync", 2);
        let error = StatusWord::new(&bench.stream).unwrap_err();
        assert_eq!(error.to_string(), "cuMemAllocAsync failed with CUDA error 2");
    });
}

#[test]
fn a_typed_kernel_launches() {
    with_driver("a_typed_kernel_launches", Setup::default(), |fake| {
        // Six pointers and MergeStatesParams.
        fake.parameters(&[8, 8, 8, 8, 8, 8, 16]);
        let gpu = Gpu::open(0).unwrap();
        let stream = gpu.context().new_stream().unwrap();
        let kernel = MergeStates::<_, f32>::prepare(&gpu, 128).unwrap();
        let (rows, max_splits) = (5, 3);
        let partial_out = stream.alloc_zeros::<f32>(rows * max_splits * 128).unwrap();
        let partial_lse = stream.alloc_zeros::<f32>(rows * max_splits).unwrap();
        let mut out = stream.alloc_zeros::<f32>(rows * 128).unwrap();
        let mut lse = stream.alloc_zeros::<f32>(rows).unwrap();
        let mut status = StatusWord::new(&stream).unwrap();
        fake.log();
        kernel
            .launch(
                &stream,
                MergeStatesArgs {
                    rows,
                    max_splits,
                    partial_out: &View::device(&partial_out, &stream),
                    partial_lse: &View::device(&partial_lse, &stream),
                    num_splits: None,
                    out: ViewMut::device(&mut out, &stream),
                    lse: ViewMut::device(&mut lse, &stream),
                    status: status.view_mut(&stream),
                    programmatic: false,
                },
            )
            .unwrap();
        let log = fake.log();
        assert_eq!(log.len(), 1, "{log:?}");
        assert!(log[0].contains("merge_states grid=2,1,1 block=128,1,1 shared=0"), "{log:?}");
        let parameters: Vec<_> = log[0].split(['[', ']']).nth(3).unwrap().split(' ').collect();
        assert_eq!(parameters[2], "0000000000000000", "no num_splits is a null pointer");
        assert_eq!(parameters[6], "05000000030000000100000000000000");
    });
}

#[test]
fn views_know_whose_memory_they_are() {
    with_driver("views_know_whose_memory_they_are", Setup::default(), |fake| {
        let streams = [0, 1].map(|ordinal| fake.context(ordinal).default_stream());
        let slice = streams[1].alloc_zeros::<u8>(1).unwrap();
        assert_eq!(View::device(&slice, &streams[0]).space(), Space::Device(1));
    });
}
