//! The driver back end against a stand-in driver that writes down what it is asked: memory, time and graphs.
#![cfg(feature = "driver")]

mod support;

use std::sync::atomic::{AtomicBool, Ordering};

use longkv_cuda::Error;
use longkv_cuda::driver::{Gpu, Graph, Mapped, MappedKind, Registered, Timer};
use longkv_cuda::launch::{Arg, Device, Function, LaunchConfig};
use longkv_cuda::memory::{Space, View, ViewMut};
use longkv_cuda::status::{Fault, StatusWord};
use longkv_cuda::table::{ArchClass, Instance, Kernel};
use longkv_cuda::tensor_map::TensorShape;
use longkv_cuda::workspace::{ALIGNMENT, Carver, Layout, Workspace};
use support::fake_driver::{Setup, with_driver};

/// The stand-in's device sees pinned memory this far up.
const SHIFT: u64 = 1 << 40;

#[test]
fn the_status_word_is_read_only_when_asked() {
    with_driver("the_status_word_is_read_only_when_asked", Setup::default(), |fake| {
        let gpu = Gpu::new(&fake.context(0)).unwrap();
        let stream = gpu.default_stream();
        let mut status = StatusWord::new(&stream).unwrap();
        // cudarc gives every slice two events; apart from those:
        let log: Vec<_> = fake.log().into_iter().filter(|line| !line.starts_with("cuEventCreate")).collect();
        assert_eq!(log, ["cuMemsetD8Async 8"], "zeroed, and nobody waits");
        assert_eq!(status.read(&stream).unwrap(), None);
        assert_eq!(fake.log(), ["cuMemcpyDtoHAsync 8", "cuStreamSynchronize"]);
        let fault = Fault { code: 3, index: 41 };
        let view = status.view_mut(&stream);
        assert_eq!((view.len(), view.space()), (1, Space::Device(0)));
        let word = view.address() as *mut u64;
        drop(view);
        // SAFETY: device memory of the stand-in is host memory, and nothing runs.
        unsafe { word.write(fault.encode()) };
        assert_eq!(status.read(&stream).unwrap(), Some(fault));
        status.clear(&stream).unwrap();
        assert_eq!(status.read(&stream).unwrap(), None);
        fake.fail("cuStreamSynchronize", 719);
        let error = status.read(&stream).unwrap_err();
        assert_eq!(error, Error::Driver { call: "cuStreamSynchronize", code: 719 });
        assert!(error.is_fatal());
    });
}

#[test]
fn workspaces_are_zero_and_aligned() {
    with_driver("workspaces_are_zero_and_aligned", Setup::default(), |fake| {
        let gpu = Gpu::new(&fake.context(0)).unwrap();
        let stream = gpu.default_stream();
        let mut layout = Layout::new();
        let scratch = layout.scratch::<u16>(3).unwrap();
        let counters = layout.counters::<u32>(5).unwrap();
        // An empty layout has a workspace too: the driver would refuse to allocate nothing.
        for layout in [&Layout::new(), &layout] {
            let mut workspace = Workspace::zeroed(&stream, layout.bytes()).unwrap();
            let view = workspace.view_mut(&stream);
            assert!(view.len() >= layout.bytes() && view.address().is_multiple_of(ALIGNMENT as u64));
            // SAFETY: device memory of the stand-in is host memory, and nothing runs.
            let bytes = unsafe { std::slice::from_raw_parts(view.address() as *const u8, view.len()) };
            assert!(bytes.iter().all(|byte| *byte == 0));
        }
        let mut workspace = Workspace::zeroed(&stream, layout.bytes()).unwrap();
        let carver = Carver::new("test", workspace.view_mut(&stream), &layout).unwrap();
        let scratch = carver.take(scratch).unwrap();
        let counters = carver.take(counters).unwrap();
        assert_eq!(counters.address() - scratch.address(), 256);
        assert_eq!(counters.space(), Space::Device(0));
    });
}

#[test]
fn timers_keep_time() {
    with_driver("timers_keep_time", Setup::default(), |fake| {
        let gpu = Gpu::new(&fake.context(0)).unwrap();
        let stream = gpu.default_stream();
        let timer = Timer::new(&gpu).unwrap();
        assert_eq!(fake.log(), ["cuEventCreate flags=0"; 2], "flag 2 would turn timing off");
        timer.start(&stream).unwrap();
        let error = timer.elapsed().unwrap_err();
        assert_eq!(error, Error::Driver { call: "cuEventElapsedTime", code: 400 });
        timer.stop(&stream).unwrap();
        assert_eq!(timer.elapsed().unwrap(), std::time::Duration::from_micros(1500));
        let elsewhere = fake.context(1).default_stream();
        assert!(matches!(timer.start(&elsewhere), Err(Error::Argument { argument: "stream", .. })));
        fake.fail("cuEventSynchronize", 700);
        assert_eq!(timer.elapsed().unwrap_err(), Error::Driver { call: "cuEventSynchronize", code: 700 });
    });
}

#[test]
fn mapped_memory_is_zeroed_and_waits_before_the_host_touches_it() {
    with_driver("mapped_memory_is_zeroed_and_waits_before_the_host_touches_it", Setup::default(), |fake| {
        let gpu = Gpu::new(&fake.context(0)).unwrap();
        let mut mapped = Mapped::<u32>::zeroed(&gpu, 6, MappedKind::Cached).unwrap();
        // PORTABLE 1, DEVICEMAP 2, WRITECOMBINED 4.
        assert_eq!(fake.log(), ["cuMemHostAlloc 24 flags=3"]);
        assert_eq!(mapped.read().unwrap(), [0; 6]);
        assert_eq!(fake.log(), ["cuCtxSynchronize"]);
        mapped.write().unwrap()[2] = 7;
        assert_eq!(fake.log(), ["cuCtxSynchronize"]);
        // SAFETY: nothing runs.
        let host = unsafe { mapped.as_slice() };
        assert_eq!(host, [0, 0, 7, 0, 0, 0]);
        let device = host.as_ptr() as u64 + SHIFT;
        assert_eq!((mapped.view().address(), mapped.view().len()), (device, 6));
        assert_eq!(mapped.view().space(), Space::Device(0));
        let stream = gpu.default_stream();
        fake.log();
        let view = mapped.view_mut(&stream);
        assert_eq!((view.address(), view.stream()), (device, Some(stream.cu_stream() as usize)));
        drop(view);
        assert_eq!(fake.log(), [""; 0]);
        drop(mapped);
        assert_eq!(fake.log(), ["cuCtxSynchronize", "cuMemFreeHost"], "not under a running kernel");

        drop(Mapped::<u8>::zeroed(&gpu, 0, MappedKind::WriteCombined).unwrap());
        assert_eq!(fake.log()[0], "cuMemHostAlloc 1 flags=7");
        let error = Mapped::<u64>::zeroed(&gpu, usize::MAX / 4, MappedKind::Cached).unwrap_err();
        assert!(matches!(error, Error::Argument { argument: "len", .. }), "{error}");
        fake.fail("cuMemHostGetDevicePointer", 1);
        assert!(Mapped::<u8>::zeroed(&gpu, 9, MappedKind::Cached).is_err());
        let log = fake.log();
        assert_eq!(log.last().map(String::as_str), Some("cuMemFreeHost"), "nothing leaks: {log:?}");
        fake.fail("cuCtxSynchronize", 700);
        fake.fail("cuMemHostGetDevicePointer", 0);
        let mapped = Mapped::<u8>::zeroed(&gpu, 9, MappedKind::Cached).unwrap();
        assert_eq!(mapped.read().unwrap_err(), Error::Driver { call: "cuCtxSynchronize", code: 700 });
    });
}

static OWNER_GONE: AtomicBool = AtomicBool::new(false);

/// Memory whose end is noticed.
struct Owner(Vec<u16>);

impl AsRef<[u16]> for Owner {
    fn as_ref(&self) -> &[u16] {
        &self.0
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        OWNER_GONE.store(true, Ordering::Relaxed);
    }
}

#[test]
fn registered_memory_keeps_its_owner() {
    with_driver("registered_memory_keeps_its_owner", Setup::default(), |fake| {
        let gpu = Gpu::new(&fake.context(0)).unwrap();
        let owner = Owner(vec![1, 2, 3]);
        let address = owner.0.as_ptr() as u64;
        let registered = Registered::read_only(&gpu, owner).unwrap();
        // PORTABLE 1, DEVICEMAP 2, READ_ONLY 8.
        assert_eq!(fake.log(), ["cuMemHostRegister 6 flags=11"]);
        assert_eq!((registered.view().address(), registered.view().len()), (address + SHIFT, 3));
        assert!(!OWNER_GONE.load(Ordering::Relaxed));
        drop(registered);
        assert_eq!(fake.log(), ["cuCtxSynchronize", "cuMemHostUnregister"]);
        assert!(OWNER_GONE.load(Ordering::Relaxed));
        // Elements inside the owner stay where they were registered, however the owner is moved.
        let inline = Registered::<u32, _>::read_only(&gpu, [5u32; 4]).unwrap();
        let address = inline.view().address();
        let moved = Box::new(inline);
        let host = (moved.view().address() - SHIFT + 12) as *const u32;
        // SAFETY: the stand-in's device addresses are host addresses less the shift, and the owner is alive.
        assert_eq!((moved.view().address(), unsafe { host.read() }), (address, 5));
        assert!(Registered::<u16, _>::read_only(&gpu, Vec::new()).is_err(), "nothing to register");
        fake.fail("cuMemHostRegister", 712);
        let error = Registered::<u16, _>::read_only(&gpu, vec![1]).unwrap_err();
        assert_eq!(error, Error::Driver { call: "cuMemHostRegister", code: 712 });
        fake.log();
        drop(moved);
    });
}

/// An error that cudarc has parked must not keep a drop from waiting, and what may still be in use is not freed.
#[test]
fn memory_is_freed_only_after_a_wait() {
    with_driver("memory_is_freed_only_after_a_wait", Setup::default(), |fake| {
        let gpu = Gpu::new(&fake.context(0)).unwrap();
        let mapped = || Mapped::<u8>::zeroed(&gpu, 9, MappedKind::Cached).unwrap();
        let (first, second) = (mapped(), mapped());
        let registered = Registered::read_only(&gpu, Owner(vec![1, 2, 3])).unwrap();
        fake.log();
        gpu.context().record_err(Err::<(), _>(cudarc::driver::DriverError(
            cudarc::driver::sys::CUresult::CUDA_ERROR_UNKNOWN,
        )));
        drop(first);
        assert_eq!(fake.log(), ["cuCtxSynchronize", "cuMemFreeHost"]);
        fake.fail("cuCtxSynchronize", 906);
        drop((second, registered));
        assert_eq!(fake.log(), [""; 0], "nothing is freed during a capture");
        assert!(!OWNER_GONE.load(Ordering::Relaxed));
        assert!(gpu.context().check_err().is_err(), "the next call hears of it");
    });
}

#[test]
fn devices_without_read_only_registration_get_the_plain_one() {
    let setup = Setup { variables: &[("FAKE_CUDA_READ_ONLY", "0")], ..Setup::default() };
    with_driver("devices_without_read_only_registration_get_the_plain_one", setup, |fake| {
        let gpu = Gpu::new(&fake.context(0)).unwrap();
        let _registered = Registered::<u8, _>::read_only(&gpu, vec![1]).unwrap();
        assert_eq!(fake.log(), ["cuMemHostRegister 1 flags=3"]);
    });
}

static KERNEL: Kernel = Kernel {
    name: "step",
    group: "test",
    source: "",
    constants: &[],
    arch: ArchClass::Portable,
    threads: 128,
    rows: &[],
};

static HOPPER: Kernel = Kernel { name: "boxes", arch: ArchClass::Hopper, ..KERNEL };

#[test]
fn a_step_is_captured_once_and_replayed() {
    with_driver("a_step_is_captured_once_and_replayed", Setup::default(), |fake| {
        let gpu = Gpu::new(&fake.context(0)).unwrap();
        let stream = gpu.context().new_stream().unwrap();
        let function = gpu.load(&Instance { kernel: &KERNEL, values: Vec::new() }).unwrap();
        let input = stream.alloc_zeros::<f32>(4).unwrap();
        let mut output = stream.alloc_zeros::<f32>(4).unwrap();
        fake.log();
        let graph = Graph::capture(&gpu, &stream, |stream| {
            let view = View::device(&input, stream);
            let mut out = ViewMut::device(&mut output, stream);
            let args = [Arg::read("input", &view), Arg::write("output", &mut out), Arg::value("n", &9u32)];
            for blocks in [3, 0, 5] {
                // SAFETY: the stand-in runs nothing.
                unsafe { function.launch(stream, &LaunchConfig::new(blocks, 128), &args) }?;
            }
            Ok::<(), Error>(())
        })
        .unwrap();
        let short = |log: Vec<String>| -> Vec<String> {
            log.iter().map(|line| line.split(" block").next().unwrap_or(line).to_string()).collect()
        };
        let expected = [
            "cuStreamBeginCapture mode=1",
            "captured cuLaunchKernelEx step grid=3,1,1",
            "captured cuLaunchKernelEx step grid=5,1,1",
            "cuStreamEndCapture",
        ];
        assert_eq!(short(fake.log()), expected, "the empty grid leaves no node");
        assert_eq!(graph.nodes().unwrap(), 2);
        let other = gpu.context().new_stream().unwrap();
        for stream in [&stream, &other, &stream] {
            // SAFETY: the buffers are alive.
            unsafe { graph.replay(stream) }.unwrap();
        }
        let replay =
            ["replayed cuLaunchKernelEx step grid=3,1,1", "replayed cuLaunchKernelEx step grid=5,1,1"];
        assert_eq!(short(fake.log()), [replay, replay, replay].concat());
        // SAFETY: the buffers are alive.
        let error = unsafe { graph.replay(&fake.context(1).default_stream()) }.unwrap_err();
        assert!(matches!(error, Error::Argument { argument: "stream", .. }), "{error}");
        fake.fail("cuGraphLaunch", 700);
        // SAFETY: the buffers are alive.
        let error = unsafe { graph.replay(&stream) }.unwrap_err();
        assert_eq!(error, Error::Driver { call: "cuGraphLaunch", code: 700 });

        // The graph keeps the code that it launches.
        drop((function, gpu));
        assert_eq!(fake.log(), [""; 0]);
        drop(graph);
        let log = fake.log();
        assert_eq!(log, ["cuGraphExecDestroy", "cuGraphDestroy", "cuCtxSynchronize", "cuModuleUnload"]);
    });
}

/// A map is a parameter like others: its bytes are copied into the node, and replays encode none.
#[test]
fn a_captured_launch_keeps_its_tensor_map() {
    with_driver("a_captured_launch_keeps_its_tensor_map", Setup::default(), |fake| {
        fake.parameters(&[128]);
        let gpu = Gpu::new(&fake.context(0)).unwrap();
        let stream = gpu.context().new_stream().unwrap();
        let function = gpu.load(&Instance { kernel: &HOPPER, values: Vec::new() }).unwrap();
        let tensors = [0, 1].map(|_| stream.alloc_zeros::<f32>(8 * 32).unwrap());
        let shape = TensorShape {
            columns: 32,
            rows: 8,
            row_bytes: 128,
            box_columns: 32,
            box_rows: 4,
            swizzle_128: true,
            planes: None,
        };
        let launch = |index: usize| {
            let view = View::device(&tensors[index], &stream);
            let args = [Arg::tensor("k", &view, shape)];
            // SAFETY: the stand-in runs nothing.
            unsafe { function.launch(&stream, &LaunchConfig::new(1, 128), &args) }
        };
        let map = |index: usize| {
            let bytes = View::device(&tensors[index], &stream).address().to_le_bytes();
            let bytes = bytes.into_iter().chain(std::iter::repeat_n(0x5a, 120));
            format!("parameters=[{}]", bytes.map(|byte| format!("{byte:02x}")).collect::<String>())
        };
        fake.log();
        let graph = Graph::capture(&gpu, &stream, |_| launch(0)).unwrap();
        let log = fake.log();
        assert!(log[1].starts_with("cuTensorMapEncodeTiled"), "{log:?}");
        assert!(log[2].starts_with("captured cuLaunchKernelEx") && log[2].contains(&map(0)), "{log:?}");
        assert_eq!(log.len(), 4, "and the capture's beginning and end: {log:?}");
        // The same function with another map in between.
        launch(1).unwrap();
        assert!(fake.log()[1].contains(&map(1)));
        // SAFETY: the buffers are alive.
        unsafe { graph.replay(&stream) }.unwrap();
        let log = fake.log();
        assert!(log[0].starts_with("replayed cuLaunchKernelEx") && log[0].contains(&map(0)), "{log:?}");
        assert_eq!(log.len(), 1, "nothing is encoded again: {log:?}");
    });
}

#[test]
fn a_capture_that_fails_leaves_the_stream_usable() {
    with_driver("a_capture_that_fails_leaves_the_stream_usable", Setup::default(), |fake| {
        let gpu = Gpu::new(&fake.context(0)).unwrap();
        let stream = gpu.context().new_stream().unwrap();
        let refused = Error::argument("step", "n", "1", "2");
        type Body<'a> = Box<
            dyn FnOnce(&std::sync::Arc<longkv_cuda::cudarc::driver::CudaStream>) -> Result<(), Error> + 'a,
        >;
        let invalidated = Error::Driver { call: "cuStreamEndCapture", code: 901 };
        let cases: Vec<(&str, Body<'_>, Error)> = vec![
            ("the step is refused", Box::new(|_| Err(refused.clone())), refused.clone()),
            (
                "the step allocates",
                Box::new(|stream| {
                    let _memory =
                        stream.alloc_zeros::<u8>(1).map_err(longkv_cuda::driver::failed("alloc"))?;
                    Ok(())
                }),
                invalidated.clone(),
            ),
        ];
        for (name, body, expected) in cases {
            fake.log();
            assert_eq!(Graph::capture(&gpu, &stream, body).unwrap_err(), expected, "{name}");
            let log = fake.log();
            assert_eq!(log.iter().filter(|line| *line == "cuStreamEndCapture").count(), 1, "{name}: {log:?}");
        }
        // The graph of a step that was refused is not kept.
        let _ = Graph::capture(&gpu, &stream, |_| Err::<(), _>(refused.clone()));
        assert_eq!(fake.log(), ["cuStreamBeginCapture mode=1", "cuStreamEndCapture", "cuGraphDestroy"]);

        let panics = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            Graph::capture(&gpu, &stream, |_| -> Result<(), Error> { panic!("in the middle of a step") })
        }));
        assert!(panics.is_err());
        assert_eq!(fake.log(), ["cuStreamBeginCapture mode=1", "cuStreamEndCapture", "cuGraphDestroy"]);

        fake.fail("cuGraphInstantiate", 2);
        let error = Graph::capture(&gpu, &stream, |_| Ok::<(), Error>(())).unwrap_err();
        assert_eq!(error, Error::Driver { call: "cuGraphInstantiate", code: 2 });
        assert_eq!(fake.log().last().map(String::as_str), Some("cuGraphDestroy"));
        fake.fail("cuGraphInstantiate", 0);

        let error = Graph::capture(&gpu, &gpu.default_stream(), |_| Ok::<(), Error>(())).unwrap_err();
        assert_eq!(error, Error::Driver { call: "cuStreamBeginCapture", code: 900 });
        let empty = Graph::capture(&gpu, &stream, |_| Ok::<(), Error>(())).unwrap();
        assert_eq!(empty.nodes().unwrap(), 0);
    });
}
