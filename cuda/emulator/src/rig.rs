//! One test body for the emulator and for a GPU.
//!
//! A device test is written once against [`Rig`]; [`device_test!`](crate::device_test) makes two `#[test]`s of it:
//! `emulator`, which runs the body in every [`Order`] of warps and lanes, and `gpu`, which runs it on the first GPU. Where
//! there is no GPU the latter prints `SKIPPED` with the reason; with `REQUIRE_GPU=1` that is a failure.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytemuck::Pod;
use cuda::cudarc::driver::{CudaSlice, CudaStream};
use cuda::driver::{Gpu, Graph, Mapped, MappedKind, SideStream};
use cuda::launch::{Device, Function};
use cuda::memory::{Space, View, ViewMut};
use cuda::side_queue::SideQueue;
use cuda::workspace::{HostWorkspace, Layout};

use crate::{CopyTime, Emulator, Order, Queue, SideCopies};

/// Where a device test runs: a device, a queue on it, and buffers that both the test and the kernels can reach.
pub trait Rig {
    /// What loads the kernels.
    type Device: Device<Function = Self::Function>;
    /// A loaded kernel.
    type Function: Function;
    /// Memory of the device.
    type Buffer<T: Pod>;
    /// A plan's workspace on the device.
    type Workspace;
    /// A queue of copies beside the queue of launches.
    type Side: SideQueue<Main = <Self::Function as Function>::Queue>;

    /// The device.
    fn device(&self) -> &Self::Device;
    /// The queue that launches go to.
    fn queue(&self) -> &<Self::Function as Function>::Queue;
    /// A queue beside it, for work that runs along between a fork and its join; where there is no other, the same one.
    fn side_queue(&self) -> &<Self::Function as Function>::Queue {
        self.queue()
    }
    /// A queue of copies beside it, with marks for `slots` slots. The emulator's copies run as early as they can with
    /// [`Order::Forward`], else as late as they may.
    fn side(&self, slots: usize) -> Self::Side;
    /// Copies `host` to the device.
    fn upload<T: Pod>(&self, host: &[T]) -> Self::Buffer<T>;
    /// Copies `host` to memory of the host that the device reads in place, for arguments that are to cross the link.
    fn pin<T: Pod>(&self, host: &[T]) -> Self::Buffer<T>;
    /// Memory of `len` zeros like that of [`pin`](Self::pin), or why there is none. In the emulator it takes memory only where it is
    /// written.
    fn try_pinned<T: Pod>(&self, len: usize) -> Result<Self::Buffer<T>, String>;
    /// Overwrites part of a buffer from element `at` on, in the order of the queue.
    fn write<T: Pod>(&self, buffer: &mut Self::Buffer<T>, at: usize, host: &[T]);
    /// Waits for the queue and copies a buffer back.
    fn download<T: Pod>(&self, buffer: &Self::Buffer<T>) -> Vec<T>;
    /// The same for `len` elements from element `at` on.
    fn read<T: Pod>(&self, buffer: &Self::Buffer<T>, at: usize, len: usize) -> Vec<T>;
    /// A buffer as a kernel argument that is read.
    fn view<'a, T: Pod>(&self, buffer: &'a Self::Buffer<T>) -> View<'a, T>;
    /// A buffer as a kernel argument that is written.
    fn view_mut<'a, T: Pod>(&self, buffer: &'a mut Self::Buffer<T>) -> ViewMut<'a, T>;
    /// A workspace whose counters are zero and whose other bytes are poisoned.
    fn workspace(&self, layout: &Layout) -> Self::Workspace;
    /// A workspace as an argument of `run`.
    fn workspace_view<'a>(&self, workspace: &'a mut Self::Workspace) -> ViewMut<'a, u8>;
    /// Waits for the queue; whether it left all counters of a workspace zero, as every run must.
    fn counters_are_zero(&self, workspace: &mut Self::Workspace, layout: &Layout) -> bool;
    /// Repetitions for a stress test: many on a GPU, few in the emulator. See [`within_time`].
    fn stress_launches(&self) -> usize;
    /// Where the test runs, for messages.
    fn name(&self) -> String;

    /// A buffer of `len` elements whose bytes are all 0xFF: NaN as floating point, and never a plausible result.
    fn poisoned<T: Pod>(&self, len: usize) -> Self::Buffer<T> {
        let mut host = vec![T::zeroed(); len];
        bytemuck::cast_slice_mut::<T, u8>(&mut host).fill(0xff);
        self.upload(&host)
    }

    /// A buffer of `len` elements whose bytes are all zero. In the emulator it takes memory only where it is written.
    fn zeroed<T: Pod>(&self, len: usize) -> Self::Buffer<T> {
        self.try_zeroed(len).expect("allocate")
    }

    /// The same, or why there is no memory for it.
    fn try_zeroed<T: Pod>(&self, len: usize) -> Result<Self::Buffer<T>, String>;

    /// What enqueues the same launches as `enqueue` whenever it is called: a CUDA graph where there is one; the emulator
    /// calls `enqueue` itself. Whatever `enqueue` borrows it borrows for each launch anew; what it owns lives as long as what is given.
    fn record<'a>(&'a self, enqueue: Box<dyn Fn() + 'a>) -> Box<dyn Fn() + 'a>;
}

/// The emulator with one order of warps and lanes.
#[derive(Debug)]
pub struct EmulatorRig {
    emulator: Emulator,
    queue: Queue,
}

impl EmulatorRig {
    /// A rig that runs in `order`.
    pub fn new(order: Order) -> Self {
        Self { emulator: Emulator::new(), queue: Queue::new(order) }
    }
}

impl Rig for EmulatorRig {
    type Device = Emulator;
    type Function = <Emulator as Device>::Function;
    type Buffer<T: Pod> = Vec<T>;
    type Workspace = HostWorkspace;
    type Side = SideCopies;

    fn device(&self) -> &Emulator {
        &self.emulator
    }

    fn queue(&self) -> &Queue {
        &self.queue
    }

    fn side(&self, slots: usize) -> SideCopies {
        let time = if self.queue.order() == Order::Forward { CopyTime::Early } else { CopyTime::Late };
        SideCopies::new(time, slots)
    }

    fn upload<T: Pod>(&self, host: &[T]) -> Vec<T> {
        host.to_vec()
    }

    fn pin<T: Pod>(&self, host: &[T]) -> Vec<T> {
        host.to_vec()
    }

    fn try_pinned<T: Pod>(&self, len: usize) -> Result<Vec<T>, String> {
        self.try_zeroed(len)
    }

    fn write<T: Pod>(&self, buffer: &mut Vec<T>, at: usize, host: &[T]) {
        buffer[at..at + host.len()].copy_from_slice(host);
    }

    fn download<T: Pod>(&self, buffer: &Vec<T>) -> Vec<T> {
        buffer.clone()
    }

    fn read<T: Pod>(&self, buffer: &Vec<T>, at: usize, len: usize) -> Vec<T> {
        buffer[at..at + len].to_vec()
    }

    fn try_zeroed<T: Pod>(&self, len: usize) -> Result<Vec<T>, String> {
        bytemuck::try_zeroed_vec(len).map_err(|()| format!("no memory for {len} elements"))
    }

    fn record<'a>(&'a self, enqueue: Box<dyn Fn() + 'a>) -> Box<dyn Fn() + 'a> {
        enqueue
    }

    fn view<'a, T: Pod>(&self, buffer: &'a Vec<T>) -> View<'a, T> {
        View::host(buffer)
    }

    fn view_mut<'a, T: Pod>(&self, buffer: &'a mut Vec<T>) -> ViewMut<'a, T> {
        ViewMut::host(buffer)
    }

    fn workspace(&self, layout: &Layout) -> HostWorkspace {
        let mut workspace = HostWorkspace::zeroed(layout.bytes());
        workspace.poison(layout);
        workspace
    }

    fn workspace_view<'a>(&self, workspace: &'a mut HostWorkspace) -> ViewMut<'a, u8> {
        workspace.view_mut()
    }

    fn counters_are_zero(&self, workspace: &mut HostWorkspace, layout: &Layout) -> bool {
        workspace.counters_are_zero(layout)
    }

    fn stress_launches(&self) -> usize {
        20
    }

    fn name(&self) -> String {
        format!("emulator, {:?}", self.queue.order())
    }
}

/// The first GPU and its default stream.
#[derive(Debug)]
pub struct GpuRig {
    gpu: Gpu,
    stream: Arc<CudaStream>,
    side: Arc<CudaStream>,
}

/// Memory of a [`GpuRig`], kept as bytes so that any plain type fits.
#[derive(Debug)]
pub struct GpuBuffer<T> {
    /// On the device; a byte for what is pinned.
    bytes: CudaSlice<u8>,
    pinned: Option<Mapped<u8>>,
    address: u64,
    len: usize,
    _element: PhantomData<T>,
}

impl GpuRig {
    /// The first GPU.
    ///
    /// # Errors
    /// The reason why there is none.
    pub fn new() -> Result<Self, String> {
        let gpu = Gpu::open(0).map_err(|error| error.to_string())?;
        let stream = gpu.default_stream();
        Ok(Self { gpu, side: stream.clone(), stream })
    }

    /// The same GPU on a stream of its own, which can be captured into a graph, and another beside it.
    ///
    /// # Errors
    /// The reason why there is no stream.
    pub fn on_own_stream(self) -> Result<Self, String> {
        let context = self.gpu.context();
        // SAFETY: this rig's views carry no events, and all its work is ordered by its one stream, on the side by forks and joins.
        unsafe { context.disable_event_tracking() };
        let stream = || context.new_stream().map_err(|error| format!("cuStreamCreate: {}", error.0 as u32));
        let (stream, side) = (stream()?, stream()?);
        Ok(Self { stream, side, ..self })
    }
}

impl Rig for GpuRig {
    type Device = Gpu;
    type Function = <Gpu as Device>::Function;
    type Buffer<T: Pod> = GpuBuffer<T>;
    type Workspace = GpuBuffer<u8>;
    type Side = SideStream;

    fn device(&self) -> &Gpu {
        &self.gpu
    }

    fn queue(&self) -> &<Self::Function as Function>::Queue {
        &self.stream
    }

    fn side_queue(&self) -> &<Self::Function as Function>::Queue {
        &self.side
    }

    fn side(&self, slots: usize) -> SideStream {
        let context = self.gpu.context();
        // SAFETY: this rig's views carry no events; its stream and the side stream are ordered by the latter's marks.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().expect("a second stream");
        SideStream::new(&self.gpu, stream, slots).expect("events")
    }

    fn upload<T: Pod>(&self, host: &[T]) -> GpuBuffer<T> {
        use cuda::cudarc::driver::DevicePtr;
        let bytes: &[u8] = bytemuck::cast_slice(host);
        // A buffer without elements still needs an address.
        let bytes = if bytes.is_empty() { &[0u8] } else { bytes };
        let bytes = self.stream.clone_htod(bytes).expect("copy to the device");
        let address = bytes.device_ptr(&self.stream).0;
        GpuBuffer { bytes, pinned: None, address, len: host.len(), _element: PhantomData }
    }

    fn pin<T: Pod>(&self, host: &[T]) -> GpuBuffer<T> {
        let mut buffer = self.try_pinned(host.len()).expect("pinned memory");
        self.write(&mut buffer, 0, host);
        buffer
    }

    fn try_pinned<T: Pod>(&self, len: usize) -> Result<GpuBuffer<T>, String> {
        let pinned = Mapped::<u8>::zeroed(&self.gpu, len * size_of::<T>(), MappedKind::Cached)
            .map_err(|error| format!("no pinned memory for {len} elements: {error}"))?;
        let address = pinned.view().address();
        Ok(GpuBuffer { pinned: Some(pinned), address, len, ..self.zeroed(0) })
    }

    fn write<T: Pod>(&self, buffer: &mut GpuBuffer<T>, at: usize, host: &[T]) {
        assert!(at + host.len() <= buffer.len, "{} elements at {at} of {}", host.len(), buffer.len);
        let place = at * size_of::<T>()..(at + host.len()) * size_of::<T>();
        if let Some(pinned) = &mut buffer.pinned {
            // Waits for everything, so it is in order.
            let bytes = pinned.write().expect("the queue ran without a fault");
            return bytes[place].copy_from_slice(bytemuck::cast_slice(host));
        }
        let mut place = buffer.bytes.slice_mut(place);
        self.stream.memcpy_htod(bytemuck::cast_slice::<T, u8>(host), &mut place).expect("copy to the device");
    }

    fn try_zeroed<T: Pod>(&self, len: usize) -> Result<GpuBuffer<T>, String> {
        use cuda::cudarc::driver::DevicePtr;
        // A buffer without elements still needs an address.
        let bytes = self.stream.alloc_zeros::<u8>((len * size_of::<T>()).max(1));
        let bytes = bytes.map_err(|error| format!("no memory for {len} elements: {error}"))?;
        let address = bytes.device_ptr(&self.stream).0;
        Ok(GpuBuffer { bytes, pinned: None, address, len, _element: PhantomData })
    }

    fn record<'a>(&'a self, enqueue: Box<dyn Fn() + 'a>) -> Box<dyn Fn() + 'a> {
        let captured: Result<Graph, cuda::Error> = Graph::capture(&self.gpu, &self.stream, |_| {
            enqueue();
            Ok(())
        });
        let graph = captured.unwrap_or_else(|error| panic!("capture on {}: {error}", self.name()));
        Box::new(move || {
            // What `enqueue` owns the graph works on.
            let _kept = &enqueue;
            // SAFETY: the buffers that the launches use are borrowed, or owned by `enqueue`, as long as this closure lives, and all
            // work of this rig is ordered by its one stream, on the side by forks and joins.
            unsafe { graph.replay(&self.stream) }
                .unwrap_or_else(|error| panic!("replay on {}: {error}", self.name()));
        })
    }

    fn download<T: Pod>(&self, buffer: &GpuBuffer<T>) -> Vec<T> {
        self.read(buffer, 0, buffer.len)
    }

    fn read<T: Pod>(&self, buffer: &GpuBuffer<T>, at: usize, len: usize) -> Vec<T> {
        assert!(at + len <= buffer.len, "{len} elements at {at} of {}", buffer.len);
        let place = at * size_of::<T>()..(at + len) * size_of::<T>();
        let mut host = vec![T::zeroed(); len];
        let to = bytemuck::cast_slice_mut::<T, u8>(&mut host);
        if let Some(pinned) = &buffer.pinned {
            // Waits for everything, so it is in order.
            to.copy_from_slice(&pinned.read().expect("the queue ran without a fault")[place]);
        } else if len > 0 {
            self.stream.memcpy_dtoh(&buffer.bytes.slice(place), to).expect("copy from the device");
        }
        self.stream.synchronize().expect("the queue ran without a fault");
        host
    }

    fn view<'a, T: Pod>(&self, buffer: &'a GpuBuffer<T>) -> View<'a, T> {
        if let Some(pinned) = &buffer.pinned {
            return pinned.view().cast();
        }
        let space = Space::Device(self.stream.context().ordinal());
        // SAFETY: the borrow keeps the allocation alive, and all work of this rig is ordered by its one stream, on the side by forks and joins.
        unsafe { View::from_raw(buffer.address, buffer.len, space) }
    }

    fn view_mut<'a, T: Pod>(&self, buffer: &'a mut GpuBuffer<T>) -> ViewMut<'a, T> {
        if let Some(pinned) = &mut buffer.pinned {
            return pinned.view_mut(&self.stream).cast();
        }
        let space = Space::Device(self.stream.context().ordinal());
        // SAFETY: the borrow keeps the allocation alive and exclusive, and all work of this rig is ordered by its one stream, on the side by forks and joins.
        unsafe { ViewMut::from_raw(buffer.address, buffer.len, space) }
    }

    fn workspace(&self, layout: &Layout) -> GpuBuffer<u8> {
        let mut bytes = vec![0xffu8; layout.bytes()];
        for range in layout.counter_ranges() {
            bytes[range.clone()].fill(0);
        }
        self.upload(&bytes)
    }

    fn workspace_view<'a>(&self, workspace: &'a mut GpuBuffer<u8>) -> ViewMut<'a, u8> {
        self.view_mut(workspace)
    }

    fn counters_are_zero(&self, workspace: &mut GpuBuffer<u8>, layout: &Layout) -> bool {
        // Workspaces may be hundreds of megabytes; counters are a few of their bytes.
        let zero = |range: &Range<usize>| {
            self.read(workspace, range.start, range.len()).iter().all(|byte| *byte == 0)
        };
        let zeros = layout.counter_ranges().iter().all(zero);
        self.stream.synchronize().expect("the queue ran without a fault");
        zeros
    }

    fn stress_launches(&self) -> usize {
        100_000
    }

    fn name(&self) -> String {
        format!("device {}", self.stream.context().ordinal())
    }
}

/// `0..launches` of a stress test, cut short after 20 seconds, for a device that other processes use too; the first hundred come in
/// any case. A run that was cut short says so.
pub fn within_time(launches: usize) -> impl Iterator<Item = usize> {
    const LIMIT: Duration = Duration::from_secs(20);
    const LEAST: usize = 100;
    let started = Instant::now();
    (0..launches).take_while(move |&launch| {
        let go_on = launch < LEAST || started.elapsed() < LIMIT;
        if !go_on {
            println!("{launch} of {launches} launches in {} s", LIMIT.as_secs());
        }
        go_on
    })
}

/// The GPU of a `gpu` test, or `None` after printing why the test is skipped.
///
/// # Panics
/// If there is no usable GPU although `REQUIRE_GPU=1` demands one.
pub fn gpu_or_skip(test: &str) -> Option<GpuRig> {
    match GpuRig::new() {
        Ok(rig) => Some(rig),
        Err(reason) if std::env::var_os("REQUIRE_GPU").is_some_and(|v| v == "1") => {
            panic!("{test}: REQUIRE_GPU=1, but {reason}")
        }
        Err(reason) => {
            println!("SKIPPED {test}: {reason}");
            None
        }
    }
}

/// A buffer of zeros; without the memory for it, the test's name and the reason are printed.
///
/// # Panics
/// If memory is short although `REQUIRE_GPU=1` demands that every test runs.
pub fn zeroed_or_skip<R: Rig, T: Pod>(rig: &R, len: usize, test: &str) -> Option<R::Buffer<T>> {
    or_skip(rig, rig.try_zeroed(len), test)
}

/// The same in memory of the host that the device reads in place.
///
/// # Panics
/// As [`zeroed_or_skip`].
pub fn pinned_or_skip<R: Rig, T: Pod>(rig: &R, len: usize, test: &str) -> Option<R::Buffer<T>> {
    or_skip(rig, rig.try_pinned(len), test)
}

fn or_skip<R: Rig, B>(rig: &R, buffer: Result<B, String>, test: &str) -> Option<B> {
    match buffer {
        Ok(buffer) => Some(buffer),
        Err(reason) if std::env::var_os("REQUIRE_GPU").is_some_and(|v| v == "1") => {
            panic!("{test} on {}: REQUIRE_GPU=1, but {reason}", rig.name())
        }
        Err(reason) => {
            println!("SKIPPED {test} on {}: {reason}", rig.name());
            None
        }
    }
}

/// Makes an `emulator` and a `gpu` test of one generic body `fn name<R: Rig>(rig: &R)`; with orders in front, `ORDERS; name, …`, the
/// emulator goes through those instead of all.
#[macro_export]
macro_rules! device_test {
    ($($name:ident),+ $(,)?) => {
        $crate::device_test!($crate::Order::ALL; $($name),+);
    };
    ($orders:expr; $($name:ident),+ $(,)?) => {$(
        mod $name {
            #[test]
            fn emulator() {
                $crate::emulator_or_skip!();
                for order in $orders {
                    super::$name(&$crate::rig::EmulatorRig::new(order));
                }
            }

            #[test]
            fn gpu() {
                if let Some(rig) = $crate::rig::gpu_or_skip(stringify!($name)) {
                    super::$name(&rig);
                }
            }
        }
    )+};
}
