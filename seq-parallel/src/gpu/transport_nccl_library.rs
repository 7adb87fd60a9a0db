//! `libnccl.so.2`, loaded at run time: the dozen functions that the transport needs.
//!
//! cudarc's bindings look for `libnccl.so` only, which NVIDIA's wheels and packages without headers do not have, and panic where there is
//! none; its communicator cannot be configured or aborted while others use it.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::Arc;

use crate::Error;

/// Environment variable with the path of the library, where it is not found by its name.
pub const VARIABLE: &str = "LONGKV_NCCL";

/// `ncclComm_t`.
pub(super) type Handle = *mut c_void;

/// `ncclUniqueId`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct UniqueId(pub(super) [u8; 128]);

/// `ncclConfig_t` as of 2.18: the library takes older, shorter ones by their size and version. The last field came with 2.26, in what
/// was padding before, and is read by its size alone.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
    traffic_class: c_int,
}

// As in nccl.h, and no byte of it is left unwritten.
const _: () = assert!(size_of::<Config>() == 48 && std::mem::offset_of!(Config, traffic_class) == 44);

/// Before 2.18 the thread that sets a nonblocking communicator up writes to the caller's handle after the call has returned.
const OLDEST: c_int = 21800;

/// `NCCL_CONFIG_UNDEF_INT`.
const UNDEFINED: c_int = c_int::MIN;

pub(super) const SUCCESS: c_int = 0;
pub(super) const IN_PROGRESS: c_int = 7;
/// `ncclUint8`.
const UINT8: c_int = 1;

/// The library, loaded. It is never unloaded: threads of its own outlive the communicators.
pub struct Library {
    get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    init: unsafe extern "C" fn(*mut Handle, c_int, UniqueId, c_int, *mut Config) -> c_int,
    async_error: unsafe extern "C" fn(Handle, *mut c_int) -> c_int,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
    send: unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Handle, *mut c_void) -> c_int,
    recv: unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> c_int,
    finalize: unsafe extern "C" fn(Handle) -> c_int,
    destroy: unsafe extern "C" fn(Handle) -> c_int,
    abort: unsafe extern "C" fn(Handle) -> c_int,
}

impl std::fmt::Debug for Library {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("NCCL")
    }
}

impl Library {
    /// Loads the library: what the environment variable [`VARIABLE`] names, else `libnccl.so.2`.
    ///
    /// # Errors
    /// [`Error::Library`] where there is none, it lacks a function, or it is older than 2.18.
    pub fn open() -> Result<Arc<Self>, Error> {
        let name = std::env::var_os(VARIABLE).unwrap_or_else(|| "libnccl.so.2".into());
        let missing = |call: &'static str| {
            let name = name.to_string_lossy().into_owned();
            move |error: libloading::Error| {
                let message = format!("{name}: {error}");
                Error::Library { library: "NCCL", call, code: 0, message }
            }
        };
        // SAFETY: NCCL's initialisers have no preconditions.
        let library = unsafe { libloading::Library::new(&name) }.map_err(missing("dlopen"))?;
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the type is that of this function in nccl.h, since 2.14, and the library stays loaded.
                *unsafe { library.get($name) }.map_err(missing("dlsym"))?
            };
        }
        let loaded = Library {
            get_version: function!("ncclGetVersion"),
            get_unique_id: function!("ncclGetUniqueId"),
            init: function!("ncclCommInitRankConfig"),
            async_error: function!("ncclCommGetAsyncError"),
            error_string: function!("ncclGetErrorString"),
            group_start: function!("ncclGroupStart"),
            group_end: function!("ncclGroupEnd"),
            send: function!("ncclSend"),
            recv: function!("ncclRecv"),
            finalize: function!("ncclCommFinalize"),
            destroy: function!("ncclCommDestroy"),
            abort: function!("ncclCommAbort"),
        };
        std::mem::forget(library);
        let version = loaded.version()?;
        if version < OLDEST {
            let message = format!("version {version}; {OLDEST} or newer is needed");
            let code = version.into();
            return Err(Error::Library { library: "NCCL", call: "ncclGetVersion", code, message });
        }
        Ok(Arc::new(loaded))
    }

    /// The version, as in 22809 for 2.28.9.
    ///
    /// # Errors
    /// [`Error::Library`].
    pub fn version(&self) -> Result<i32, Error> {
        let mut version = 0;
        // SAFETY: it writes to this frame.
        self.check("ncclGetVersion", unsafe { (self.get_version)(&mut version) })?;
        Ok(version)
    }

    /// What the library calls an error.
    pub(super) fn message(&self, code: c_int) -> String {
        // SAFETY: it takes any number.
        let text = unsafe { (self.error_string)(code) };
        if text.is_null() {
            return String::new();
        }
        // SAFETY: it gives static text that ends in NUL.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }

    /// Success, or work that goes on, or an error.
    pub(super) fn check(&self, call: &'static str, code: c_int) -> Result<(), Error> {
        match code {
            SUCCESS | IN_PROGRESS => Ok(()),
            _ => {
                Err(Error::Library { library: "NCCL", call, code: code.into(), message: self.message(code) })
            }
        }
    }

    pub(super) fn unique_id(&self) -> Result<UniqueId, Error> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: it writes to this frame.
        self.check("ncclGetUniqueId", unsafe { (self.get_unique_id)(&mut id) })?;
        Ok(id)
    }

    /// Starts making a nonblocking communicator on the current device.
    pub(super) fn init(&self, ranks: usize, id: UniqueId, rank: usize) -> Result<Communicator, Error> {
        let mut config = Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: OLDEST as u32,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
            traffic_class: UNDEFINED,
        };
        let mut handle = std::ptr::null_mut();
        // SAFETY: handle and configuration are of this frame, which the call is done with when it returns.
        let code = unsafe { (self.init)(&mut handle, ranks as c_int, id, rank as c_int, &mut config) };
        self.check("ncclCommInitRankConfig", code)?;
        Ok(Communicator(handle))
    }

    /// How the communicator fares: success, work that goes on, or an error, as a code.
    pub(super) fn state(&self, comm: &Communicator) -> c_int {
        let mut state = SUCCESS;
        // SAFETY: the communicator is alive, as it can neither be copied nor used after its end.
        let code = unsafe { (self.async_error)(comm.0, &mut state) };
        if code == SUCCESS { state } else { code }
    }

    /// Enqueues a send and a receive as one group, so that neither waits for the other.
    ///
    /// # Safety
    /// Both blocks are device memory of that many bytes which stays, is ordered on `stream`, and is neither written (the first) nor
    /// reached (the second) until work enqueued here is done.
    pub(super) unsafe fn exchange(
        &self,
        comm: &Communicator,
        (to, send, send_len): (usize, u64, usize),
        (from, recv, recv_len): (usize, u64, usize),
        stream: *mut c_void,
    ) -> Result<(), Error> {
        // SAFETY: it has no preconditions; this thread is the only one that issues calls for this communicator.
        self.check("ncclGroupStart", unsafe { (self.group_start)() })?;
        // SAFETY: the caller answers for the block; the communicator is alive.
        let sent =
            unsafe { (self.send)(send as *const c_void, send_len, UINT8, to as c_int, comm.0, stream) };
        // SAFETY: likewise.
        let asked =
            unsafe { (self.recv)(recv as *mut c_void, recv_len, UINT8, from as c_int, comm.0, stream) };
        // SAFETY: the group was started; it is ended whatever became of the calls in it.
        let ended = unsafe { (self.group_end)() };
        self.check("ncclSend", sent)?;
        self.check("ncclRecv", asked)?;
        self.check("ncclGroupEnd", ended)
    }

    /// Starts ending a communicator on which nothing is under way.
    pub(super) fn finalize(&self, comm: &Communicator) -> Result<(), Error> {
        // SAFETY: the communicator is alive.
        self.check("ncclCommFinalize", unsafe { (self.finalize)(comm.0) })
    }

    /// Frees a communicator that was finalized.
    pub(super) fn destroy(&self, comm: Communicator) -> Result<(), Error> {
        // SAFETY: the communicator was alive and is not used again.
        self.check("ncclCommDestroy", unsafe { (self.destroy)(comm.0) })
    }

    /// Ends a communicator whatever is under way. May not return.
    pub(super) fn abort(&self, comm: Communicator) -> Result<(), Error> {
        // SAFETY: the communicator was alive and is not used again; no other call of it is running, as it was moved here.
        self.check("ncclCommAbort", unsafe { (self.abort)(comm.0) })
    }
}

/// A communicator, ended by being handed to [`Library::destroy`] or [`Library::abort`].
#[derive(Debug)]
pub(super) struct Communicator(Handle);

// SAFETY: NCCL's calls are not bound to a thread; one at a time is used by whoever owns this.
unsafe impl Send for Communicator {}
