//! The C interface of the runtime. Keep in step with `runtime/launch.h` and `Entry` of `runtime/emulator_api.h`.

use std::ffi::{c_char, c_void};

/// `emulator::Parameter`.
#[repr(C)]
pub(crate) struct Parameter {
    pub(crate) bytes: u32,
    pub(crate) is_pointer: u32,
}

/// `emulator::Entry`: a kernel as the runtime sees it.
#[repr(C)]
pub(crate) struct Entry {
    run: unsafe extern "C" fn(*const *mut c_void),
    pub(crate) parameters: *const Parameter,
    pub(crate) count: u32,
}

/// `EmulatorBuffer`.
#[repr(C)]
pub(crate) struct Buffer {
    pub(crate) name: *const c_char,
    pub(crate) address: u64,
    pub(crate) bytes: u64,
    pub(crate) writable: u32,
    pub(crate) constant: u32,
    pub(crate) read: u64,
    pub(crate) written: u64,
}

/// `EmulatorLaunch`.
#[repr(C)]
pub(crate) struct Launch {
    pub(crate) entry: *const Entry,
    pub(crate) kernel: *const c_char,
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) dynamic_shared: u32,
    pub(crate) order: u32,
    pub(crate) seed: u32,
    pub(crate) os_threads: u32,
    pub(crate) values: *const *const c_void,
    pub(crate) buffers: *mut Buffer,
    pub(crate) buffer_count: u64,
    pub(crate) programmatic: u32,
    pub(crate) padding: u32,
    pub(crate) switches: u64,
    pub(crate) barriers: u64,
    pub(crate) collectives: u64,
    pub(crate) mma: u64,
    pub(crate) async_copies: u64,
    pub(crate) spins: u64,
}

/// Called with the text of a report.
pub(crate) type Report = unsafe extern "C" fn(context: *mut c_void, text: *const c_char, length: usize);

unsafe extern "C" {
    /// Runs a launch to its end; 0 if no block was at fault.
    pub(crate) fn emulator_launch(launch: *mut Launch, report: Report, context: *mut c_void) -> i32;
}

include!(concat!(env!("OUT_DIR"), "/registry.rs"));
