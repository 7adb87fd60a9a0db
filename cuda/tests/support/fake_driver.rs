//! Runs a test in a process of its own whose CUDA driver and NVRTC are stand-ins.
//!
//! A process: the driver library is opened once, by name, and NVRTC's place and the caches come from the environment.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::ffi::{CStr, CString, c_char};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use libloading::Library;
use longkv_cuda::cudarc::driver::CudaContext;
use longkv_cuda::driver::LAUNCH_LOG_VARIABLE;

use super::{FakeNvrtc, library, skip};

/// Set in the child: path of the stand-in driver.
const VARIABLE: &str = "LONGKV_TEST_FAKE_DRIVER";

/// How the child is set up.
#[derive(Default)]
pub(crate) struct Setup {
    /// Options of the stand-in driver's compile.
    pub(crate) options: &'static [&'static str],
    /// More environment variables.
    pub(crate) variables: &'static [(&'static str, &'static str)],
}

/// The stand-ins, in the child.
pub(crate) struct FakeDriver {
    library: Library,
    nvrtc: FakeNvrtc,
}

/// Runs `body` in a child process with the stand-in driver. `test` is the name of the calling test.
pub(crate) fn with_driver(test: &str, setup: Setup, body: impl FnOnce(&FakeDriver)) {
    if let Some(path) = std::env::var_os(VARIABLE) {
        // SAFETY: the library was built from `cuda.cpp`, whose initialisers have no preconditions.
        let library = unsafe { Library::new(path) }.expect("the parent built it");
        let nvrtc = FakeNvrtc::open().expect("the parent built it");
        return body(&FakeDriver { library, nvrtc });
    }
    if !cfg!(target_os = "linux") {
        return skip("the stand-in driver is found by LD_LIBRARY_PATH, which is Linux's", "REQUIRE_EMULATOR");
    }
    let Some(driver) = library("cuda.cpp", "libcuda.so.1", setup.options) else { return };
    let Some(nvrtc) = library("nvrtc.cpp", "libnvrtc.so.13", &[]) else { return };
    let folder = driver.parent().expect("a file has a folder");
    // cudarc asks for `libcuda.so` first, and must not find the machine's own.
    link(&driver, &folder.join("libcuda.so"));
    // Each test has a log of its own, which its `body` may read.
    let launches = folder.join(format!("{test}.launches"));
    let _ = std::fs::remove_file(&launches);
    let inherited = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let paths = std::iter::once(folder.to_path_buf()).chain(std::env::split_paths(&inherited));
    let output = Command::new(std::env::current_exe().expect("this program has a path"))
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env("LD_LIBRARY_PATH", std::env::join_paths(paths).expect("paths without colons"))
        .env(VARIABLE, &driver)
        .env("LONGKV_NVRTC", &nvrtc)
        .env("LONGKV_CACHE_DIR", "")
        .env(LAUNCH_LOG_VARIABLE, &launches)
        .env_remove("LONGKV_CUBIN_DIR")
        .envs(setup.variables.iter().copied())
        .output()
        .expect("this program starts");
    let words = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(output.status.success(), "{test} failed with the stand-in driver:\n{}{}", words[0], words[1]);
    assert!(words[0].contains("1 passed"), "{test} is not the name of one test:\n{}", words[0]);
}

#[cfg(unix)]
fn link(target: &Path, path: &Path) {
    match std::os::unix::fs::symlink(target, path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            panic!("{}: {error}", path.display())
        }
        _ => {}
    }
}

#[cfg(not(unix))]
fn link(_target: &Path, _path: &Path) {}

impl FakeDriver {
    /// What was called since the last time.
    pub(crate) fn log(&self) -> Vec<String> {
        // SAFETY: the source declares `const char* fake_take_log()`.
        let take = unsafe { self.library.get::<extern "C" fn() -> *const c_char>("fake_take_log") };
        let text = take.expect("the stand-in has this symbol")();
        // SAFETY: it returns text that ends in NUL and stays valid until the next call, on this thread alone.
        let text = unsafe { CStr::from_ptr(text) };
        text.to_str().expect("the log is text").lines().map(str::to_string).collect()
    }

    /// Lets a call fail with a code from now on; 0 lets it succeed again.
    pub(crate) fn fail(&self, call: &str, code: u32) {
        let call = CString::new(call).expect("a name without NUL");
        // SAFETY: the source declares `void fake_fail(const char*, unsigned)`.
        let fail = unsafe { self.library.get::<extern "C" fn(*const c_char, u32)>("fake_fail") };
        fail.expect("the stand-in has this symbol")(call.as_ptr(), code);
    }

    /// Sets the sizes of every kernel's parameters, in bytes.
    pub(crate) fn parameters(&self, sizes: &[usize]) {
        // SAFETY: the source declares `void fake_parameters(const size_t*, size_t)`.
        let set = unsafe { self.library.get::<extern "C" fn(*const usize, usize)>("fake_parameters") };
        set.expect("the stand-in has this symbol")(sizes.as_ptr(), sizes.len());
    }

    /// What events measure from now on, in milliseconds, round and round.
    pub(crate) fn elapsed(&self, milliseconds: &[f32]) {
        // SAFETY: the source declares `void fake_elapsed(const float*, size_t)`.
        let set = unsafe { self.library.get::<extern "C" fn(*const f32, usize)>("fake_elapsed") };
        set.expect("the stand-in has this symbol")(milliseconds.as_ptr(), milliseconds.len());
    }

    /// Programs compiled by the stand-in for NVRTC.
    pub(crate) fn compiles(&self) -> u32 {
        self.nvrtc.compiles()
    }

    /// A context on one of the two devices.
    pub(crate) fn context(&self, ordinal: usize) -> Arc<CudaContext> {
        longkv_cuda::probe::driver().expect("the stand-in starts");
        CudaContext::new(ordinal).map_err(|error| error.0).expect("the stand-in has two devices")
    }
}
