//! Kernels of the stand-in driver, and what a launch of one takes.

use std::sync::Arc;

use longkv_cuda::Error;
use longkv_cuda::cudarc::driver::{CudaSlice, CudaStream};
use longkv_cuda::driver::{Gpu, GpuFunction};
use longkv_cuda::launch::{Arg, Device as _, Dim3, Function as _, LaunchConfig};
use longkv_cuda::memory::{View, ViewMut};
use longkv_cuda::table::{ArchClass, Instance, Kernel, Row};

use super::fake_driver::FakeDriver;

const fn kernel(name: &'static str, arch: ArchClass, rows: &'static [Row]) -> Kernel {
    Kernel { name, group: "test", source: "", constants: &[], arch, threads: 128, rows }
}

const fn row(shared: u32) -> Row {
    Row { values: &[], registers: 255, shared, emulated: false }
}

pub(crate) static SMALL: Kernel = kernel("small", ArchClass::Portable, &[row(48 * 1024)]);
pub(crate) static LARGE: Kernel = kernel("large", ArchClass::Portable, &[row(64 * 1024)]);
pub(crate) static HOPPER: Kernel = kernel("hopper", ArchClass::Hopper, &[row(200 * 1024)]);
pub(crate) static UNSHIPPED: Kernel = kernel("unshipped", ArchClass::Portable, &[]);

pub(crate) fn instance(kernel: &'static Kernel) -> Instance {
    Instance { kernel, values: Vec::new() }
}

/// A context, a function in it, and the two buffers and the scalar that the stand-in's kernels take.
pub(crate) struct Bench {
    pub(crate) gpu: Gpu,
    pub(crate) function: GpuFunction,
    pub(crate) stream: Arc<CudaStream>,
    pub(crate) input: CudaSlice<f32>,
    pub(crate) output: CudaSlice<f32>,
}

pub(crate) const CONFIG: LaunchConfig = LaunchConfig {
    grid: Dim3 { x: 6, y: 2, z: 1 },
    block: Dim3 { x: 32, y: 4, z: 1 },
    dynamic_shared: 0,
    cluster: None,
    programmatic: false,
};

impl Bench {
    pub(crate) fn new(fake: &FakeDriver, kernel: &'static Kernel) -> Self {
        let context = fake.context(0);
        let gpu = Gpu::new(&context).unwrap();
        let function = gpu.load(&instance(kernel)).unwrap();
        let stream = context.new_stream().unwrap();
        let (input, output) = (stream.alloc_zeros(16).unwrap(), stream.alloc_zeros(16).unwrap());
        fake.log();
        Bench { gpu, function, stream, input, output }
    }

    pub(crate) fn launch(&mut self, config: &LaunchConfig) -> Result<(), Error> {
        let input = View::device(&self.input, &self.stream);
        let mut output = ViewMut::device(&mut self.output, &self.stream);
        let args =
            [Arg::read("input", &input), Arg::write("output", &mut output), Arg::value("n", &0x0102u32)];
        // SAFETY: the stand-in runs nothing.
        unsafe { self.function.launch(&self.stream, config, &args) }
    }

    pub(crate) fn launch_args(&self, stream: &CudaStream, args: &[Arg<'_>]) -> Result<(), Error> {
        // SAFETY: the stand-in runs nothing.
        unsafe { self.function.launch(stream, &CONFIG, args) }
    }
}
