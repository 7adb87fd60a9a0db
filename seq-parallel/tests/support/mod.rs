//! Runs a test in a process of its own whose CUDA driver and NCCL are stand-ins: both libraries are opened once in a process, by name.

use std::ffi::{CStr, CString, c_char};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use cuda::cudarc::driver::CudaContext;
use libloading::Library;
use seq_parallel::gpu::transport::NCCL_VARIABLE;

/// Set in the child: path of the stand-in driver.
const VARIABLE: &str = "SEQ_PARALLEL_TEST_FAKE_DRIVER";

/// The stand-ins, in the child.
pub(crate) struct Fakes {
    cuda: Library,
    nccl: Library,
}

fn skip(reason: &str) {
    assert!(std::env::var_os("REQUIRE_EMULATOR").is_none_or(|value| value != "1"), "{reason}");
    eprintln!("skipped: {reason}");
}

/// Builds a stand-in from its source, under a name of its own first: tests run side by side.
fn build(source: &Path, folder: &Path, name: &str) -> Option<PathBuf> {
    let library = folder.join(name);
    let newer = |path: &Path| path.metadata().and_then(|metadata| metadata.modified()).ok();
    if newer(&library) > newer(source) {
        return Some(library);
    }
    std::fs::create_dir_all(folder).unwrap();
    let draft = tempfile::NamedTempFile::new_in(folder).unwrap().into_temp_path();
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".to_string());
    let output = Command::new(&compiler)
        .args(["-x", "c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"])
        .arg(source)
        .arg("-o")
        .arg(&draft)
        .output();
    let output = match output {
        Ok(output) => output,
        Err(error) => {
            skip(&format!("{compiler} does not start ({error})"));
            return None;
        }
    };
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} does not compile:\n{words}", source.display());
    draft.persist(&library).unwrap();
    Some(library)
}

/// Runs `body` in a child process with the stand-ins. `test` is the name of the calling test.
pub(crate) fn with_fakes(test: &str, body: impl FnOnce(&Fakes)) {
    if let Some(cuda) = std::env::var_os(VARIABLE) {
        let nccl = std::env::var_os(NCCL_VARIABLE).expect("the parent names it");
        // SAFETY: both libraries were built from sources whose initialisers have no preconditions.
        let [cuda, nccl] =
            [cuda, nccl].map(|path| unsafe { Library::new(path) }.expect("the parent built it"));
        return body(&Fakes { cuda, nccl });
    }
    if !cfg!(target_os = "linux") {
        return skip("the stand-in driver is found by LD_LIBRARY_PATH, which is Linux's");
    }
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fakes");
    // cudarc asks for `libcuda.so` first, and must not find the machine's own.
    let Some(cuda) = build(&package.join("../cuda/tests/fake/cuda.cpp"), &folder, "libcuda.so") else {
        return;
    };
    let Some(nccl) = build(&package.join("tests/fake/nccl.cpp"), &folder, "libnccl.so.2") else { return };
    let inherited = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let paths = std::iter::once(folder.clone()).chain(std::env::split_paths(&inherited));
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env("LD_LIBRARY_PATH", std::env::join_paths(paths).unwrap())
        .env(VARIABLE, &cuda)
        .env(NCCL_VARIABLE, &nccl)
        .output()
        .unwrap();
    let words = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(output.status.success(), "{test} failed with the stand-ins:\n{}{}", words[0], words[1]);
    assert!(words[0].contains("1 passed"), "{test} is not the name of one test:\n{}", words[0]);
}

impl Fakes {
    /// The context of the stand-in's first device.
    pub(crate) fn context(&self) -> Arc<CudaContext> {
        CudaContext::new(0).map_err(|error| error.0).expect("the stand-in has a device")
    }

    /// What the driver was asked since the last time.
    pub(crate) fn cuda_log(&self) -> Vec<String> {
        Self::log(&self.cuda, b"fake_take_log")
    }

    /// What NCCL was asked since the last time.
    pub(crate) fn nccl_log(&self) -> Vec<String> {
        Self::log(&self.nccl, b"fake_nccl_take_log")
    }

    fn log(library: &Library, symbol: &[u8]) -> Vec<String> {
        // SAFETY: the sources declare these as `const char* ()`.
        let take = unsafe { library.get::<extern "C" fn() -> *const c_char>(symbol) }.unwrap();
        // SAFETY: it returns text that ends in NUL and stays until the next call, which is this thread's.
        let text = unsafe { CStr::from_ptr(take()) };
        text.to_str().unwrap().lines().map(str::to_string).collect()
    }

    /// While set, nothing that was enqueued becomes complete.
    pub(crate) fn stuck(&self, value: bool) {
        // SAFETY: the source declares `void fake_stuck(unsigned)`.
        let set = unsafe { self.cuda.get::<extern "C" fn(u32)>(b"fake_stuck") }.unwrap();
        set(u32::from(value));
    }

    /// Lets a call of the driver fail from now on; 0 lets it succeed again.
    pub(crate) fn cuda_fail(&self, call: &str, code: u32) {
        let call = CString::new(call).unwrap();
        // SAFETY: the source declares `void fake_fail(const char*, unsigned)`.
        let fail = unsafe { self.cuda.get::<extern "C" fn(*const c_char, u32)>(b"fake_fail") }.unwrap();
        fail(call.as_ptr(), code);
    }

    /// Lets a call of NCCL fail from now on; 0 lets it succeed again.
    pub(crate) fn nccl_fail(&self, call: &str, code: i32) {
        let call = CString::new(call).unwrap();
        // SAFETY: the source declares `void fake_nccl_fail(const char*, int)`.
        let fail = unsafe { self.nccl.get::<extern "C" fn(*const c_char, i32)>(b"fake_nccl_fail") }.unwrap();
        fail(call.as_ptr(), code);
    }

    /// Lets a call of NCCL hang for ever.
    pub(crate) fn nccl_hang(&self, call: &str) {
        let call = CString::new(call).unwrap();
        // SAFETY: the source declares `void fake_nccl_hang(const char*)`.
        let hang = unsafe { self.nccl.get::<extern "C" fn(*const c_char)>(b"fake_nccl_hang") }.unwrap();
        hang(call.as_ptr());
    }

    /// Gives NCCL another version.
    pub(crate) fn nccl_version(&self, version: i32) {
        // SAFETY: the source declares `void fake_nccl_version(int)`.
        let set = unsafe { self.nccl.get::<extern "C" fn(i32)>(b"fake_nccl_version") }.unwrap();
        set(version);
    }

    /// Breaks the communicators of a rank.
    pub(crate) fn nccl_break(&self, rank: i32, code: i32) {
        // SAFETY: the source declares `void fake_nccl_break(int, int)`.
        let set = unsafe { self.nccl.get::<extern "C" fn(i32, i32)>(b"fake_nccl_break") }.unwrap();
        set(rank, code);
    }

    /// Communicators that were neither destroyed nor aborted.
    pub(crate) fn nccl_alive(&self) -> i32 {
        // SAFETY: the source declares `int fake_nccl_alive()`.
        let count = unsafe { self.nccl.get::<extern "C" fn() -> i32>(b"fake_nccl_alive") }.unwrap();
        count()
    }
}
