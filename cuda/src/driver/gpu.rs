//! One CUDA context and the kernels loaded into it.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use cudarc::driver::{CudaContext, CudaStream};

use super::call::failed;
use super::function::{GpuFunction, Loaded};
use crate::Error;
use crate::cache::Cubins;
use crate::launch;
use crate::probe::{self, Device, Driver};
use crate::table::{Arch, Instance};

/// A CUDA context that kernels can be loaded into. Cheap to clone.
///
/// Each instance of the kernel table is loaded once per context and compiled once per process, however many threads ask.
/// Kernels stay loaded as long as a `Gpu`, a [`GpuFunction`] or a [`Graph`](super::Graph) of the context lives.
#[derive(Clone)]
pub struct Gpu {
    shared: Arc<Shared>,
}

struct Shared {
    context: Arc<CudaContext>,
    driver: &'static Driver,
    device: &'static Device,
    cubins: Arc<Cubins>,
    functions: Mutex<HashMap<Instance, Slot>>,
}

type Slot = Arc<Mutex<Option<Arc<Loaded>>>>;

impl Gpu {
    /// The GPU of a context. Every call for the same context gives the same GPU while one of them lives.
    ///
    /// Cubins come from the places that the environment names, see [`Cubins::from_environment`].
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the device is older than sm_80.
    pub fn new(context: &Arc<CudaContext>) -> Result<Self, Error> {
        static KNOWN: Mutex<Vec<Weak<Shared>>> = Mutex::new(Vec::new());
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|shared| shared.strong_count() > 0);
        // The handle alone would not do: it may be used again once its context is gone. A live entry holds its context.
        if let Some(shared) = known.iter().filter_map(Weak::upgrade).find(|shared| shared.context == *context)
        {
            return Ok(Gpu { shared });
        }
        let gpu = Self::with_cubins(context, Cubins::from_environment().clone())?;
        known.push(Arc::downgrade(&gpu.shared));
        Ok(gpu)
    }

    /// A GPU of its own that takes cubins from elsewhere than the environment says.
    pub fn with_cubins(context: &Arc<CudaContext>, cubins: Arc<Cubins>) -> Result<Self, Error> {
        let driver = probe::driver()?;
        let device = driver.device(context.ordinal())?;
        let context = context.clone();
        Ok(Gpu { shared: Arc::new(Shared { context, driver, device, cubins, functions: Mutex::default() }) })
    }

    /// Probes the machine, then retains the primary context of a device. For programs that have no context yet:
    /// `CudaContext::new` panics where there is no driver.
    pub fn open(ordinal: usize) -> Result<Self, Error> {
        probe::device(ordinal)?;
        Self::new(&CudaContext::new(ordinal).map_err(failed("cuDevicePrimaryCtxRetain"))?)
    }

    /// The context.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.shared.context
    }

    /// The context's default stream. It already exists in every context; it cannot be captured into a graph.
    pub fn default_stream(&self) -> Arc<CudaStream> {
        self.shared.context.default_stream()
    }

    /// The driver.
    pub fn driver(&self) -> &'static Driver {
        self.shared.driver
    }

    /// The device.
    pub fn device(&self) -> &'static Device {
        self.shared.device
    }

    /// Number of streaming multiprocessors, which plans size their grids by.
    pub fn sm_count(&self) -> u32 {
        self.shared.device.sm_count
    }

    /// Makes the context current on this thread. Also reports an error that `cudarc` parked when something was dropped.
    pub(super) fn bind(&self) -> Result<(), Error> {
        self.shared.context.bind_to_thread().map_err(failed("cuCtxSetCurrent"))
    }

    /// Waits for everything that was enqueued in the context.
    pub(super) fn synchronize(&self) -> Result<(), Error> {
        self.shared.context.synchronize().map_err(failed("cuCtxSynchronize"))
    }

    /// Refuses a stream of another context.
    pub(super) fn check_stream(&self, kernel: &str, stream: &CudaStream) -> Result<(), Error> {
        if *stream.context() == self.shared.context {
            return Ok(());
        }
        let other = stream.context().ordinal();
        Err(Error::argument(
            kernel,
            "stream",
            format_args!(
                "a stream of the context on device {} that the kernel was loaded into",
                self.device().ordinal
            ),
            format_args!("a stream of another context, on device {other}"),
        ))
    }
}

impl launch::Device for Gpu {
    type Function = GpuFunction;

    fn load(&self, instance: &Instance) -> Result<GpuFunction, Error> {
        let slot = {
            let mut functions = self.shared.functions.lock().unwrap_or_else(PoisonError::into_inner);
            functions.entry(instance.clone()).or_default().clone()
        };
        // Held while loading, so that a second thread waits for the first instead of loading the same module again.
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = match &*slot {
            Some(loaded) => loaded.clone(),
            None => {
                let found = self.shared.cubins.get(instance, self.arch())?;
                slot.insert(Arc::new(Loaded::load(self, instance, &found)?)).clone()
            }
        };
        Ok(GpuFunction::new(self.clone(), loaded))
    }

    fn sm_count(&self) -> Option<u32> {
        Some(Gpu::sm_count(self))
    }

    fn arch(&self) -> Arch {
        self.shared.device.arch
    }
}

impl PartialEq for Gpu {
    /// Whether both stand for the same context.
    fn eq(&self, other: &Self) -> bool {
        self.shared.context == other.shared.context
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gpu").field("device", self.shared.device).finish_non_exhaustive()
    }
}
