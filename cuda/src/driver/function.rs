//! A kernel loaded into a context, and its launch.

use std::ffi::{CString, c_int, c_uint, c_void};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::{CudaContext, CudaStream, sys};

use super::call::{check, failed, quiesce};
use super::gpu::Gpu;
use super::launch_log::{self, Launched};
use super::tensor_map::TensorMap;
use crate::Error;
use crate::cache::Found;
use crate::digest::Digest;
use crate::launch::{Arg, Device as _, Function, LaunchConfig, check_config};
use crate::memory::Space;
use crate::table::Instance;

/// Dynamic shared memory that every kernel may use; more has to be asked for when it is loaded.
const PLAIN_SHARED: u32 = 48 * 1024;

/// More parameters than any kernel has, so that a launch needs no allocation.
const MAX_ARGS: usize = 48;

/// More tensor maps than any kernel takes, likewise.
const MAX_MAPS: usize = 4;

/// A module with its one function.
pub(super) struct Loaded {
    instance: Instance,
    context: Arc<CudaContext>,
    module: sys::CUmodule,
    function: sys::CUfunction,
    /// Largest dynamic shared memory that the function was prepared for, in bytes.
    dynamic_shared: u32,
    /// Size of each parameter in bytes, where the driver tells (from CUDA 12.4 on).
    parameters: Option<Vec<usize>>,
    /// How launches are noted.
    name: Launched,
    /// Whether it has been launched.
    launched: AtomicBool,
}

// SAFETY: modules and functions belong to a context, not to a thread; the driver's functions may be called from any thread
// that has made the context current, and only an atomic changes after loading.
unsafe impl Send for Loaded {}
// SAFETY: as above; of a shared `Loaded` only the atomic is written.
unsafe impl Sync for Loaded {}

impl Loaded {
    pub(super) fn load(gpu: &Gpu, instance: &Instance, found: &Found) -> Result<Self, Error> {
        let refused = |call: &'static str, result: sys::CUresult| {
            check(call, result).map_err(|error| match error {
                Error::Driver { call, code } => Error::Load {
                    call,
                    code,
                    kernel: instance.label(),
                    arch: gpu.arch().to_string(),
                    origin: found.origin.to_string(),
                    driver: gpu.driver().version(),
                },
                other => other,
            })
        };
        gpu.bind()?;
        let mut module = std::ptr::null_mut();
        // SAFETY: a cubin carries its own length, and it is whole: NVRTC just made it or its checksum was verified.
        let result = unsafe { sys::cuModuleLoadData(&mut module, found.cubin.as_ptr().cast()) };
        refused("cuModuleLoadData", result)?;
        let mut loaded = Loaded {
            instance: instance.clone(),
            context: gpu.context().clone(),
            module,
            function: std::ptr::null_mut(),
            dynamic_shared: PLAIN_SHARED.min(instance.kernel.arch.shared_limit()),
            parameters: None,
            name: Launched { label: instance.label(), arch: gpu.arch(), cubin: Digest::of(&found.cubin) },
            launched: AtomicBool::new(false),
        };
        let name = CString::new(instance.kernel.name).expect("kernel names are identifiers");
        // SAFETY: the module was just loaded and the name ends in NUL.
        let result = unsafe { sys::cuModuleGetFunction(&mut loaded.function, module, name.as_ptr()) };
        refused("cuModuleGetFunction", result)?;
        // Else the driver, which is lazy since CUDA 12.2, may load the code at the first launch: perhaps in the middle of a capture.
        type FuncLoad = unsafe extern "C" fn(sys::CUfunction) -> sys::CUresult;
        // SAFETY: `CUresult cuFuncLoad(CUfunction function)`, of drivers from CUDA 12.4 on.
        if let Some(load) = unsafe { gpu.driver().symbol::<FuncLoad>(c"cuFuncLoad") } {
            // SAFETY: the function belongs to the context that is current.
            refused("cuFuncLoad", unsafe { load(loaded.function) })?;
        }
        loaded.raise_shared_limit(gpu)?;
        loaded.parameters = loaded.query_parameters(gpu)?;
        Ok(loaded)
    }

    /// Asks for all the shared memory that the kernel table allows, if the kernel may need more than every kernel gets.
    /// Only launches that use it pay for it.
    fn raise_shared_limit(&mut self, gpu: &Gpu) -> Result<(), Error> {
        // A shipped row says what its largest launch needs; other instances are not measured.
        let needed = self.instance.row().map_or(u32::MAX, |row| row.shared);
        if needed <= PLAIN_SHARED {
            return Ok(());
        }
        let fixed = self.attribute(sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
        let limit = self.instance.kernel.arch.shared_limit().min(gpu.device().shared_limit);
        let limit = limit.saturating_sub(fixed);
        if limit > PLAIN_SHARED {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function belongs to the context that is current.
            let result = unsafe { sys::cuFuncSetAttribute(self.function, attribute, limit as c_int) };
            check("cuFuncSetAttribute", result)?;
            self.dynamic_shared = limit;
        }
        Ok(())
    }

    fn attribute(&self, attribute: sys::CUfunction_attribute) -> Result<u32, Error> {
        let mut value = 0;
        // SAFETY: the pointer is valid for one int, and the function belongs to the context that is current.
        let result = unsafe { sys::cuFuncGetAttribute(&mut value, attribute, self.function) };
        check("cuFuncGetAttribute", result)?;
        Ok(value as u32)
    }

    /// Sizes of the parameters, so that a launch with other arguments is refused instead of reading past them.
    fn query_parameters(&self, gpu: &Gpu) -> Result<Option<Vec<usize>>, Error> {
        type GetParamInfo = unsafe extern "C" fn(sys::CUfunction, usize, *mut usize, *mut usize) -> u32;
        const INVALID_VALUE: u32 = 1;
        // SAFETY: `CUresult cuFuncGetParamInfo(CUfunction func, size_t paramIndex, size_t *paramOffset,
        // size_t *paramSize)`.
        let Some(info) = (unsafe { gpu.driver().symbol::<GetParamInfo>(c"cuFuncGetParamInfo") }) else {
            return Ok(None);
        };
        let mut sizes = Vec::new();
        loop {
            let (mut offset, mut size) = (0, 0);
            // SAFETY: both pointers are valid for one size_t, and the function belongs to the context that is current.
            match unsafe { info(self.function, sizes.len(), &mut offset, &mut size) } {
                0 => sizes.push(size),
                INVALID_VALUE => return Ok(Some(sizes)), // past the last parameter
                code => return Err(Error::Driver { call: "cuFuncGetParamInfo", code }),
            }
        }
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        // A kernel that still runs needs its code. Errors go where cudarc keeps those of its own destructors.
        if !quiesce(&self.context) {
            return;
        }
        // SAFETY: the module was loaded into this context, is unloaded once, and nothing runs its code any more.
        let result = unsafe { sys::cuModuleUnload(self.module) };
        self.context.record_err(result.result());
    }
}

/// What a loaded function uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FunctionUse {
    /// Registers per thread.
    pub registers: u32,
    /// Local memory per thread, in bytes: stack and spilled registers.
    pub local: u32,
    /// Static shared memory per block, in bytes.
    pub shared: u32,
    /// Threads that a block may have with this many registers.
    pub max_threads: u32,
}

/// A kernel loaded into a context. Cheap to clone.
#[derive(Clone)]
pub struct GpuFunction {
    gpu: Gpu,
    loaded: Arc<Loaded>,
}

impl GpuFunction {
    pub(super) fn new(gpu: Gpu, loaded: Arc<Loaded>) -> Self {
        GpuFunction { gpu, loaded }
    }

    /// The GPU that the kernel was loaded into.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// What the driver says the function uses.
    pub fn usage(&self) -> Result<FunctionUse, Error> {
        use sys::CUfunction_attribute as A;
        self.gpu.bind()?;
        Ok(FunctionUse {
            registers: self.loaded.attribute(A::CU_FUNC_ATTRIBUTE_NUM_REGS)?,
            local: self.loaded.attribute(A::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
            shared: self.loaded.attribute(A::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?,
            max_threads: self.loaded.attribute(A::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
        })
    }

    /// Blocks of `threads` threads and `dynamic_shared` bytes that fit one multiprocessor.
    pub fn blocks_per_sm(&self, threads: u32, dynamic_shared: u32) -> Result<u32, Error> {
        self.gpu.bind()?;
        let mut blocks = 0;
        // SAFETY: the pointer is valid for one int, and the function belongs to the context that is current.
        let result = unsafe {
            sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(
                &mut blocks,
                self.loaded.function,
                threads as c_int,
                dynamic_shared as usize,
            )
        };
        check("cuOccupancyMaxActiveBlocksPerMultiprocessor", result)?;
        Ok(blocks as u32)
    }

    /// Refuses arguments that the device cannot reach, that another stream was to use, that no map can hold, or that are not the
    /// kernel's parameters.
    fn check_args(&self, stream: &CudaStream, args: &[Arg<'_>]) -> Result<(), Error> {
        let kernel = || self.loaded.instance.label();
        let wrong_count = |expected: usize| {
            Error::argument(kernel(), "args", format_args!("{expected} arguments"), args.len())
        };
        if args.len() > MAX_ARGS {
            return Err(wrong_count(MAX_ARGS));
        }
        let own = Space::Device(self.gpu.device().ordinal);
        let mut maps = 0;
        for arg in args {
            let (Arg::Buffer { name, address, space, stream: made_for, .. }
            | Arg::Tensor { name, address, space, stream: made_for, .. }) = arg
            else {
                continue;
            };
            if *space != own && *address != 0 {
                return Err(Error::argument(kernel(), name, own, space));
            }
            if made_for.is_some_and(|made_for| made_for != stream.cu_stream() as usize) {
                let expected = "a view made for the stream of the launch";
                return Err(Error::argument(kernel(), name, expected, "one made for another stream"));
            }
            if let Arg::Tensor { bytes, tensor, .. } = arg {
                maps += 1;
                if maps > MAX_MAPS {
                    let expected = format!("one of at most {MAX_MAPS} tensor maps");
                    return Err(Error::argument(kernel(), name, expected, "one more"));
                }
                tensor.check(&self.loaded.name.label, name, *address, *bytes)?;
            }
        }
        if let Some(parameters) = &self.loaded.parameters {
            if parameters.len() != args.len() {
                return Err(wrong_count(parameters.len()));
            }
            for (arg, &expected) in args.iter().zip(parameters) {
                let found = match arg {
                    Arg::Buffer { .. } => size_of::<u64>(),
                    Arg::Value { bytes, .. } => bytes.len(),
                    Arg::Tensor { .. } => size_of::<TensorMap>(),
                };
                if found != expected {
                    return Err(Error::argument(
                        kernel(),
                        arg.name(),
                        format_args!("a parameter of {expected} bytes"),
                        format_args!("{found} bytes"),
                    ));
                }
            }
        }
        Ok(())
    }

    fn check_shared(&self, config: &LaunchConfig) -> Result<(), Error> {
        if config.dynamic_shared <= self.loaded.dynamic_shared {
            return Ok(());
        }
        Err(Error::argument(
            self.loaded.instance.label(),
            "dynamic_shared",
            format_args!("at most {} bytes, which the kernel was prepared for", self.loaded.dynamic_shared),
            format_args!("{} bytes", config.dynamic_shared),
        ))
    }

    fn check_hopper_features(&self, config: &LaunchConfig) -> Result<(), Error> {
        if config.cluster.is_some() && self.gpu.arch().major < 9 {
            return Err(Error::UnsupportedArch {
                kernel: format!("{} in clusters", self.loaded.instance.label()),
                expected: "sm_90 or later".to_string(),
                found: self.gpu.arch().to_string(),
            });
        }
        Ok(())
    }
}

impl Function for GpuFunction {
    type Queue = CudaStream;

    fn instance(&self) -> &Instance {
        &self.loaded.instance
    }

    /// A programmatic launch is an ordinary one before sm_90: it may start early, it need not.
    unsafe fn launch(
        &self,
        stream: &CudaStream,
        config: &LaunchConfig,
        args: &[Arg<'_>],
    ) -> Result<(), Error> {
        check_config(&self.loaded.instance, config)?;
        self.check_shared(config)?;
        self.check_hopper_features(config)?;
        self.gpu.check_stream(self.loaded.instance.kernel.name, stream)?;
        self.check_args(stream, args)?;
        if config.grid.count() == 0 {
            return Ok(());
        }

        // Before the maps: the driver encodes none without a context.
        self.gpu.bind()?;
        let mut maps = [TensorMap::EMPTY; MAX_MAPS];
        let mut free_maps = maps.iter_mut();
        let mut parameters = [std::ptr::null_mut::<c_void>(); MAX_ARGS];
        for (parameter, arg) in parameters.iter_mut().zip(args) {
            *parameter = match arg {
                Arg::Buffer { address, .. } => std::ptr::from_ref(address).cast_mut().cast(),
                Arg::Value { bytes, .. } => bytes.as_ptr().cast_mut().cast(),
                Arg::Tensor { address, tensor, .. } => {
                    let map = free_maps.next().expect("`check_args` has counted the maps");
                    *map = TensorMap::encode(*address, tensor)?;
                    std::ptr::from_mut(map).cast()
                }
            };
        }
        let mut attributes = [ignored(); 2];
        let mut count = 0;
        if let Some(cluster) = config.cluster {
            attributes[count].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            attributes[count].value.clusterDim.x = cluster.x;
            attributes[count].value.clusterDim.y = cluster.y;
            attributes[count].value.clusterDim.z = cluster.z;
            count += 1;
        }
        if config.programmatic && self.gpu.arch().major >= 9 {
            attributes[count].id =
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes[count].value.programmaticStreamSerializationAllowed = 1;
            count += 1;
        }
        let raw = sys::CUlaunchConfig {
            gridDimX: config.grid.x,
            gridDimY: config.grid.y,
            gridDimZ: config.grid.z,
            blockDimX: config.block.x,
            blockDimY: config.block.y,
            blockDimZ: config.block.z,
            sharedMemBytes: config.dynamic_shared,
            hStream: stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: count as c_uint,
        };
        // SAFETY: the function belongs to the current context, and so does the stream. `parameters` has a pointer to each
        // argument's bytes, `maps` among them, which live until the driver has copied them; that they are the kernel's
        // parameters and that the kernel stays within its buffers is this function's contract with its caller.
        let result = unsafe {
            sys::cuLaunchKernelEx(&raw, self.loaded.function, parameters.as_mut_ptr(), std::ptr::null_mut())
        };
        result.result().map_err(failed("cuLaunchKernelEx"))?;
        launch_log::note(&self.loaded.name, !self.loaded.launched.swap(true, Ordering::Relaxed));
        Ok(())
    }
}

/// A launch attribute that says nothing, with every byte defined.
fn ignored() -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_IGNORE,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { pad: [0; 64] },
    }
}

impl fmt::Debug for GpuFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GpuFunction({} on device {})", self.loaded.instance.label(), self.gpu.device().ordinal)
    }
}
