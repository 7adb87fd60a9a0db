//! Is there a usable driver, and which devices does it have?
//!
//! The probe never panics and never prints. It opens the driver library itself and asks it a few questions before anything
//! calls into `cudarc`, whose functions panic where the library or one of its symbols is missing. NVRTC has a probe of its
//! own, [`Nvrtc::find`](crate::nvrtc::Nvrtc::find).

use std::ffi::{CStr, c_char, c_int, c_uint};
use std::sync::OnceLock;

use libloading::Library;

use crate::table::Arch;

/// Why CUDA cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unavailable {
    /// There is no driver library.
    #[error("no CUDA driver library: {}", .tried.join("; "))]
    NoDriverLibrary {
        /// What was tried, and the loader's answer to each.
        tried: Vec<String>,
    },

    /// The library is a stub to link against, or something else that is no driver.
    #[error("{library} is not a CUDA driver: {reason}")]
    StubDriver {
        /// Name or path of the library.
        library: String,
        /// The missing symbol, or the driver's own admission.
        reason: String,
    },

    /// The driver does not start: no device (100), driver and kernel module differ (803), …
    #[error("the CUDA driver does not start: {call} returned {code}{}", hint(*.code))]
    Init {
        /// Name of the driver function.
        call: &'static str,
        /// The raw `CUresult`.
        code: u32,
    },

    /// The driver works but has no device.
    #[error("the CUDA driver has no device")]
    NoDevice,

    /// The driver has fewer devices.
    #[error("there is no CUDA device {ordinal}: the driver has {devices}")]
    NoSuchDevice {
        /// The ordinal asked for.
        ordinal: usize,
        /// Number of devices.
        devices: usize,
    },

    /// The driver lacks functions that this crate calls.
    #[error("the driver supports CUDA {have}, this crate needs CUDA {need} or later")]
    DriverTooOld {
        /// CUDA version of the driver.
        have: Version,
        /// CUDA version needed.
        need: Version,
    },

    /// The device cannot run any kernel of this crate.
    #[error("device {ordinal} is {have}, the kernels need {need} or later")]
    UnsupportedArch {
        /// The device.
        ordinal: usize,
        /// Its architecture.
        have: Arch,
        /// The oldest architecture that has kernels.
        need: Arch,
    },

    /// There is no NVRTC to compile kernels with.
    #[error("NVRTC was not found: {}. Set LONGKV_NVRTC to the library or its folder, or ship prebuilt cubins", .tried.join("; "))]
    NvrtcNotFound {
        /// Where it was looked for, and the answer of each place.
        tried: Vec<String>,
    },

    /// A library was found but is not a working NVRTC.
    #[error("{library} is not a usable NVRTC: {reason}")]
    NvrtcUnusable {
        /// Path of the library.
        library: String,
        /// The missing symbol or the failed call.
        reason: String,
    },
}

/// What the most frequent start-up failures mean.
fn hint(code: u32) -> &'static str {
    match code {
        100 => " (no device)",
        803 => " (the driver library and the kernel module differ)",
        804 => " (forward compatibility is not supported on this device)",
        _ => "",
    }
}

/// A CUDA version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// Major version.
    pub major: u32,
    /// Minor version.
    pub minor: u32,
}

impl Version {
    /// Version `major.minor`.
    pub const fn new(major: u32, minor: u32) -> Self {
        Version { major, minor }
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The oldest driver that has every function this crate calls.
pub const OLDEST_DRIVER: Version = Version::new(12, 0);

/// The oldest architecture that has kernels.
pub const OLDEST_ARCH: Arch = Arch::new(8, 0);

/// A device of the driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its number.
    pub ordinal: usize,
    /// Its product name.
    pub name: String,
    /// Its architecture.
    pub arch: Arch,
    /// Streaming multiprocessors.
    pub sm_count: u32,
    /// Shared memory that one block may ask for, in bytes.
    pub shared_limit: u32,
}

/// A driver that has started and has at least one device.
#[derive(Debug)]
pub struct Driver {
    library: &'static Library,
    version: Version,
    devices: Vec<Device>,
}

impl Driver {
    /// The CUDA version that the driver supports.
    pub fn version(&self) -> Version {
        self.version
    }

    /// All devices, whether this crate supports them or not.
    pub fn devices(&self) -> &[Device] {
        &self.devices
    }

    /// The device of this ordinal, if the kernels can run on it.
    pub fn device(&self, ordinal: usize) -> Result<&Device, Unavailable> {
        let device = self
            .devices
            .get(ordinal)
            .ok_or(Unavailable::NoSuchDevice { ordinal, devices: self.devices.len() })?;
        if device.arch < OLDEST_ARCH {
            return Err(Unavailable::UnsupportedArch { ordinal, have: device.arch, need: OLDEST_ARCH });
        }
        Ok(device)
    }

    /// A function that not every supported driver has.
    ///
    /// # Safety
    /// `F` must be the function pointer type of the symbol in `cuda.h`.
    pub unsafe fn symbol<F: Copy>(&self, name: &CStr) -> Option<F> {
        // SAFETY: the caller names the symbol's type; the library is never unloaded, so the pointer stays valid.
        unsafe { self.library.get::<F>(name) }.ok().map(|symbol| *symbol)
    }
}

/// The machine's driver. The first call opens and starts it, later calls return the same answer.
pub fn driver() -> Result<&'static Driver, Unavailable> {
    static DRIVER: OnceLock<Result<Driver, Unavailable>> = OnceLock::new();
    // `libcuda.so` before `libcuda.so.1` is cudarc's order. Where both exist and one is a stub, the probe has to judge the
    // library that cudarc is going to open.
    DRIVER.get_or_init(|| open(&["libcuda.so", "libcuda.so.1"])).as_ref().map_err(Clone::clone)
}

/// The device of this ordinal on this machine, if the kernels can run on it.
pub fn device(ordinal: usize) -> Result<&'static Device, Unavailable> {
    driver()?.device(ordinal)
}

/// Opens and starts the first of these libraries that exists. Nothing is cached.
///
/// The library stays loaded, because a started driver has threads of its own and `cudarc` opens it again.
pub fn open(libraries: &[&str]) -> Result<Driver, Unavailable> {
    let mut tried = Vec::new();
    for &name in libraries {
        // SAFETY: loading a CUDA driver runs its initialisers only, which have no preconditions.
        match unsafe { Library::new(name) } {
            Ok(library) => return start(name, Box::leak(Box::new(library))),
            Err(error) => tried.push(reason(name, &error)),
        }
    }
    Err(Unavailable::NoDriverLibrary { tried })
}

/// The loader's words, with the name in front unless they already start with it.
pub(crate) fn reason(name: &str, error: &libloading::Error) -> String {
    let text = std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string);
    if text.starts_with(name) { text } else { format!("{name}: {text}") }
}

/// `CUdevice_attribute` values of `cuda.h`.
mod attribute {
    pub(super) const MULTIPROCESSOR_COUNT: i32 = 16;
    pub(super) const COMPUTE_CAPABILITY_MAJOR: i32 = 75;
    pub(super) const COMPUTE_CAPABILITY_MINOR: i32 = 76;
    pub(super) const MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: i32 = 97;
}

/// What a stub library answers to every call.
const STUB_LIBRARY: u32 = 34;

/// Resolves one symbol of the driver.
///
/// # Safety
/// `F` must be the function pointer type of the symbol in `cuda.h`.
unsafe fn symbol<F: Copy>(name: &str, library: &'static Library, symbol: &str) -> Result<F, Unavailable> {
    // SAFETY: the caller names the symbol's type; the library is never unloaded, so the pointer stays valid.
    match unsafe { library.get::<F>(symbol) } {
        Ok(found) => Ok(*found),
        Err(_) => Err(Unavailable::StubDriver {
            library: name.to_string(),
            reason: format!("it has no symbol {symbol}"),
        }),
    }
}

fn start(name: &str, library: &'static Library) -> Result<Driver, Unavailable> {
    type Init = unsafe extern "C" fn(c_uint) -> c_uint;
    type GetInt = unsafe extern "C" fn(*mut c_int) -> c_uint;
    type DeviceGet = unsafe extern "C" fn(*mut c_int, c_int) -> c_uint;
    type DeviceGetName = unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_uint;
    type DeviceGetAttribute = unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_uint;

    // SAFETY: `CUresult cuInit(unsigned int Flags)`.
    let init = unsafe { symbol::<Init>(name, library, "cuInit") }?;
    // SAFETY: `CUresult cuDriverGetVersion(int *driverVersion)`.
    let driver_get_version = unsafe { symbol::<GetInt>(name, library, "cuDriverGetVersion") }?;
    // SAFETY: `CUresult cuDeviceGetCount(int *count)`.
    let device_get_count = unsafe { symbol::<GetInt>(name, library, "cuDeviceGetCount") }?;
    // SAFETY: `CUresult cuDeviceGet(CUdevice *device, int ordinal)`, and CUdevice is int.
    let device_get = unsafe { symbol::<DeviceGet>(name, library, "cuDeviceGet") }?;
    // SAFETY: `CUresult cuDeviceGetName(char *name, int len, CUdevice dev)`.
    let device_get_name = unsafe { symbol::<DeviceGetName>(name, library, "cuDeviceGetName") }?;
    // SAFETY: `CUresult cuDeviceGetAttribute(int *pi, CUdevice_attribute attrib, CUdevice dev)`, and the enum is int.
    let device_get_attribute =
        unsafe { symbol::<DeviceGetAttribute>(name, library, "cuDeviceGetAttribute") }?;

    let check = |call: &'static str, code: u32| match code {
        0 => Ok(()),
        STUB_LIBRARY => Err(Unavailable::StubDriver {
            library: name.to_string(),
            reason: format!("{call} returned {code}, which stub libraries do"),
        }),
        100 if call == "cuDeviceGetCount" => Err(Unavailable::NoDevice),
        code => Err(Unavailable::Init { call, code }),
    };

    // Before cuInit: the version needs no device, and an old driver is best told so whatever else is wrong with it.
    let mut version = 0;
    // SAFETY: the pointer is valid for one int; cuDriverGetVersion may be called before cuInit.
    check("cuDriverGetVersion", unsafe { driver_get_version(&mut version) })?;
    let version = Version::new(version as u32 / 1000, version as u32 % 1000 / 10);
    if version < OLDEST_DRIVER {
        return Err(Unavailable::DriverTooOld { have: version, need: OLDEST_DRIVER });
    }
    // SAFETY: cuInit takes 0 and may be called any number of times from any thread.
    check("cuInit", unsafe { init(0) })?;
    let mut count = 0;
    // SAFETY: the pointer is valid for one int and the driver has started.
    check("cuDeviceGetCount", unsafe { device_get_count(&mut count) })?;
    if count <= 0 {
        return Err(Unavailable::NoDevice);
    }

    let device = |ordinal: usize| {
        let mut handle = 0;
        // SAFETY: the pointer is valid for one CUdevice and the ordinal is below the count.
        check("cuDeviceGet", unsafe { device_get(&mut handle, ordinal as c_int) })?;
        let attribute = |attribute| {
            let mut value = 0;
            // SAFETY: the pointer is valid for one int and the handle came from cuDeviceGet.
            check("cuDeviceGetAttribute", unsafe { device_get_attribute(&mut value, attribute, handle) })?;
            Ok(value as u32)
        };
        let mut text = [0 as c_char; 256];
        // SAFETY: the buffer has the length given, and the handle came from cuDeviceGet.
        check("cuDeviceGetName", unsafe { device_get_name(text.as_mut_ptr(), 255, handle) })?;
        let text: Vec<u8> = text.iter().take_while(|c| **c != 0).map(|c| *c as u8).collect();
        Ok(Device {
            ordinal,
            name: String::from_utf8_lossy(&text).into_owned(),
            arch: Arch::new(
                attribute(attribute::COMPUTE_CAPABILITY_MAJOR)?,
                attribute(attribute::COMPUTE_CAPABILITY_MINOR)?,
            ),
            sm_count: attribute(attribute::MULTIPROCESSOR_COUNT)?,
            shared_limit: attribute(attribute::MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        })
    };
    let devices = (0..count as usize).map(device).collect::<Result<_, _>>()?;
    Ok(Driver { library, version, devices })
}
