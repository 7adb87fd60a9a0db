//! What the driver and the emulator share: how a kernel is loaded and launched.
//!
//! [`Device`] turns an [`Instance`] of the kernel table into a [`Function`]; a function launches on a queue. The typed
//! kernels in [`kernels`](crate::kernels) are written against these two traits only, so grid, shared memory and argument
//! order are the same on a GPU and in the emulator.

use bytemuck::Pod;

use crate::Error;
use crate::memory::{Space, StreamHandle, View, ViewMut};
use crate::storage::Storage;
use crate::table::{Arch, Instance};
use crate::tensor_map::{Tensor, TensorShape};

/// Extent of a grid, block or cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Dim3 {
    /// Fastest-running dimension.
    pub x: u32,
    /// Second dimension.
    pub y: u32,
    /// Slowest-running dimension.
    pub z: u32,
}

impl Dim3 {
    /// Product of the three extents.
    pub fn count(&self) -> u64 {
        u64::from(self.x) * u64::from(self.y) * u64::from(self.z)
    }
}

impl From<u32> for Dim3 {
    fn from(x: u32) -> Self {
        Dim3 { x, y: 1, z: 1 }
    }
}

impl From<(u32, u32)> for Dim3 {
    fn from((x, y): (u32, u32)) -> Self {
        Dim3 { x, y, z: 1 }
    }
}

impl From<(u32, u32, u32)> for Dim3 {
    fn from((x, y, z): (u32, u32, u32)) -> Self {
        Dim3 { x, y, z }
    }
}

/// Shape of one launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaunchConfig {
    /// Blocks in the grid.
    pub grid: Dim3,
    /// Threads in a block.
    pub block: Dim3,
    /// Dynamic shared memory per block, in bytes.
    pub dynamic_shared: u32,
    /// Blocks in a cluster (sm_90 and later).
    pub cluster: Option<Dim3>,
    /// Programmatic dependent launch: the kernel may start while the previous one of the stream still runs, and waits for
    /// it with `griddepcontrol.wait` before it touches that kernel's output (sm_90 and later).
    pub programmatic: bool,
}

impl LaunchConfig {
    /// A launch without dynamic shared memory, cluster or programmatic start.
    pub fn new(grid: impl Into<Dim3>, block: impl Into<Dim3>) -> Self {
        Self { grid: grid.into(), block: block.into(), dynamic_shared: 0, cluster: None, programmatic: false }
    }

    /// The same launch with `bytes` of dynamic shared memory per block.
    pub fn shared(self, bytes: u32) -> Self {
        Self { dynamic_shared: bytes, ..self }
    }

    /// The same launch in clusters.
    pub fn clusters(self, extent: impl Into<Dim3>) -> Self {
        Self { cluster: Some(extent.into()), ..self }
    }

    /// The same launch with programmatic dependent launch.
    pub fn programmatic(self) -> Self {
        Self { programmatic: true, ..self }
    }
}

/// Whether a kernel may write a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// The kernel only reads.
    Read,
    /// The kernel only reads, and no kernel before it on the stream writes: it may read before those have ended.
    Constant,
    /// The kernel reads and writes.
    Write,
}

/// One kernel argument, in the order of the kernel's parameters.
#[derive(Debug, Clone, Copy)]
pub enum Arg<'a> {
    /// A pointer parameter. A null pointer has address 0 and no bytes.
    Buffer {
        /// Parameter name, for errors.
        name: &'static str,
        /// Address of the first byte.
        address: u64,
        /// Size in bytes.
        bytes: usize,
        /// Where the memory lies.
        space: Space,
        /// Which stream may use it.
        stream: StreamHandle,
        /// What the kernel may do with it.
        access: Access,
    },
    /// A parameter passed by value: a scalar or a `*_params.h` struct.
    Value {
        /// Parameter name, for errors.
        name: &'static str,
        /// The value's bytes.
        bytes: &'a [u8],
    },
    /// A tensor map passed by value, of memory that the kernel reads through it.
    Tensor {
        /// Parameter name, for errors.
        name: &'static str,
        /// Address of the first element.
        address: u64,
        /// Size of the memory in bytes.
        bytes: usize,
        /// Where the memory lies.
        space: Space,
        /// Which stream may use it.
        stream: StreamHandle,
        /// How the tensor lies in it.
        tensor: Tensor,
    },
}

impl<'a> Arg<'a> {
    /// A pointer to memory that the kernel reads.
    pub fn read<T: Pod>(name: &'static str, view: &'a View<'_, T>) -> Self {
        Arg::Buffer {
            name,
            address: view.address(),
            bytes: view.bytes(),
            space: view.space(),
            stream: view.stream(),
            access: Access::Read,
        }
    }

    /// A pointer to memory that the kernel only reads and that no kernel of its stream writes, or null: weights, which a
    /// [programmatic](LaunchConfig::programmatic) launch may read before the kernels before it have ended.
    pub fn constant<T: Pod>(name: &'static str, view: Option<&'a View<'_, T>>) -> Self {
        match Arg::read_optional(name, view) {
            Arg::Buffer { name, address, bytes, space, stream, .. } => {
                Arg::Buffer { name, address, bytes, space, stream, access: Access::Constant }
            }
            other => other,
        }
    }

    /// A pointer to memory that the kernel reads and writes.
    pub fn write<T: Pod>(name: &'static str, view: &'a mut ViewMut<'_, T>) -> Self {
        Arg::Buffer {
            name,
            address: view.address(),
            bytes: view.bytes(),
            space: view.space(),
            stream: view.stream(),
            access: Access::Write,
        }
    }

    fn null(name: &'static str, access: Access) -> Self {
        Arg::Buffer { name, address: 0, bytes: 0, space: Space::Host, stream: None, access }
    }

    /// A pointer that may be null.
    pub fn read_optional<T: Pod>(name: &'static str, view: Option<&'a View<'_, T>>) -> Self {
        match view {
            Some(view) => Arg::read(name, view),
            None => Arg::null(name, Access::Read),
        }
    }

    /// A pointer that the kernel writes and that may be null.
    pub fn write_optional<T: Pod>(name: &'static str, view: Option<&'a mut ViewMut<'_, T>>) -> Self {
        match view {
            Some(view) => Arg::write(name, view),
            None => Arg::null(name, Access::Write),
        }
    }

    /// A scalar or parameter struct.
    pub fn value<T: Pod>(name: &'static str, value: &'a T) -> Self {
        Arg::Value { name, bytes: bytemuck::bytes_of(value) }
    }

    /// A tensor map over memory that the kernel reads, of the shape's extent from the view's first element on.
    pub fn tensor<T: Storage>(name: &'static str, view: &'a View<'_, T>, shape: TensorShape) -> Self {
        Arg::Tensor {
            name,
            address: view.address(),
            bytes: view.bytes(),
            space: view.space(),
            stream: view.stream(),
            tensor: Tensor { shape, dtype: T::DTYPE },
        }
    }

    /// The parameter's name.
    pub fn name(&self) -> &'static str {
        match self {
            Arg::Buffer { name, .. } | Arg::Value { name, .. } | Arg::Tensor { name, .. } => name,
        }
    }
}

/// Something that can load kernels: a CUDA context or the emulator.
pub trait Device {
    /// A loaded kernel.
    type Function: Function;

    /// Compiles and loads an instance, or finds it in a cache. May block.
    fn load(&self, instance: &Instance) -> Result<Self::Function, Error>;

    /// The architecture that kernels are compiled for here.
    fn arch(&self) -> Arch;

    /// Streaming multiprocessors, or `None` where any grid runs as well as any other.
    fn sm_count(&self) -> Option<u32> {
        None
    }
}

/// A loaded kernel.
pub trait Function: Clone {
    /// What a launch is enqueued on: a CUDA stream, or the emulator's queue.
    type Queue: crate::fork::Queue + ?Sized;

    /// The instance this was loaded from.
    fn instance(&self) -> &Instance;

    /// Enqueues one launch. Checks the configuration against the kernel table and each buffer's space against the device;
    /// a grid without blocks is a success that launches nothing.
    ///
    /// # Safety
    /// `args` must match the kernel's parameters in number, order and type, and the kernel, launched in this shape, must
    /// stay within the buffers. The typed kernels in [`kernels`](crate::kernels) meet this by construction.
    unsafe fn launch(
        &self,
        queue: &Self::Queue,
        config: &LaunchConfig,
        args: &[Arg<'_>],
    ) -> Result<(), Error>;
}

/// Checks a launch against the kernel table: block size, shared memory and the hardware's grid limits.
///
/// Both back ends call this before they launch.
pub fn check_config(instance: &Instance, config: &LaunchConfig) -> Result<(), Error> {
    let kernel = || instance.label();
    let threads = config.block.count();
    if threads != u64::from(instance.kernel.threads) {
        return Err(Error::argument(
            kernel(),
            "block",
            format_args!("{} threads", instance.kernel.threads),
            format_args!("{threads} threads"),
        ));
    }
    let limit = instance.kernel.arch.shared_limit();
    if config.dynamic_shared > limit {
        return Err(Error::argument(
            kernel(),
            "dynamic_shared",
            format_args!("at most {limit} bytes"),
            format_args!("{} bytes", config.dynamic_shared),
        ));
    }
    let grid = config.grid;
    if grid.x > i32::MAX as u32 || grid.y > 65535 || grid.z > 65535 {
        return Err(Error::argument(
            kernel(),
            "grid",
            "at most 2147483647 × 65535 × 65535 blocks",
            format_args!("{} × {} × {}", grid.x, grid.y, grid.z),
        ));
    }
    if let Some(cluster) = config.cluster {
        let fits = cluster.count() > 0
            && cluster.count() <= 8
            && grid.x.is_multiple_of(cluster.x)
            && grid.y.is_multiple_of(cluster.y)
            && grid.z.is_multiple_of(cluster.z);
        if !fits {
            return Err(Error::argument(
                kernel(),
                "cluster",
                "1 to 8 blocks that divide the grid",
                format_args!("{} × {} × {}", cluster.x, cluster.y, cluster.z),
            ));
        }
    }
    Ok(())
}
