//! Runs a test in a process of its own whose CUDA driver and NCCL are stand-ins: both libraries are opened once in a process, by name.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::ffi::{CStr, CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Barrier};

use cuda::cudarc::driver::{CudaContext, CudaStream};
use libloading::Library;
use seq_parallel::Error;
use seq_parallel::gpu::transport::{
    DeviceTransport, Incoming, NCCL_VARIABLE, Nccl, NcclLibrary, OneGpu, Outgoing,
};
use seq_parallel::transport::local::{self, Local, World};
use seq_parallel::transport::{Operation, Tag, Ticket, Transport};

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
    start(test, false, body);
}

/// As [`with_fakes`], with a driver that writes down the order between streams too.
pub(crate) fn with_ordered_fakes(test: &str, body: impl FnOnce(&Fakes)) {
    start(test, true, body);
}

fn start(test: &str, ordered: bool, body: impl FnOnce(&Fakes)) {
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
        .env("FAKE_CUDA_ORDER", if ordered { "1" } else { "0" })
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

    /// The same of one stream, and of what waits for it, from now on.
    pub(crate) fn stick(&self, stream: &CudaStream) {
        // SAFETY: the source declares `void fake_stick(Stream*)`; the stream is one of the stand-in's.
        let stick = unsafe { self.cuda.get::<extern "C" fn(*mut c_void)>(b"fake_stick") }.unwrap();
        stick(stream.cu_stream().cast());
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

    /// Lets what a call of NCCL starts hang, or go on.
    pub(crate) fn nccl_hang(&self, call: &str, value: bool) {
        let call = CString::new(call).unwrap();
        // SAFETY: the source declares `void fake_nccl_hang(const char*, int)`.
        let hang = unsafe { self.nccl.get::<extern "C" fn(*const c_char, i32)>(b"fake_nccl_hang") }.unwrap();
        hang(call.as_ptr(), i32::from(value));
    }

    /// Gives NCCL another version.
    pub(crate) fn nccl_version(&self, version: i32) {
        // SAFETY: the source declares `void fake_nccl_version(int)`.
        let set = unsafe { self.nccl.get::<extern "C" fn(i32)>(b"fake_nccl_version") }.unwrap();
        set(version);
    }

    /// How often a rank was told how its communicators fare.
    pub(crate) fn nccl_asked(&self, rank: i32) -> i32 {
        // SAFETY: the source declares `int fake_nccl_asked(int)`.
        let asked = unsafe { self.nccl.get::<extern "C" fn(i32) -> i32>(b"fake_nccl_asked") }.unwrap();
        asked(rank)
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

/// The ends of a group of threads.
pub(crate) fn ends(ranks: usize) -> Vec<Local> {
    World::new(ranks).unwrap().1
}

/// Ranks on one GPU, each with a stream of the caller.
pub(crate) fn one_gpu(context: &Arc<CudaContext>, ends: Vec<Local>) -> Vec<OneGpu<Local>> {
    OneGpu::group(ends.into_iter().map(|end| (end, context.new_stream().unwrap())))
}

/// Ranks of an NCCL communicator: connecting is collective, so each connects on its thread.
pub(crate) fn on_nccl<R: Send>(
    context: &Arc<CudaContext>,
    ends: Vec<Local>,
    body: impl Fn(usize, Nccl<Local>) -> R + Sync,
) -> Vec<R> {
    let library = NcclLibrary::open().unwrap();
    // A rank that is connected first must not fail before the others are: they would hear of it while they connect.
    let connected = Barrier::new(ends.len());
    local::run_on(ends, |end| {
        let rank = end.rank();
        let nccl = Nccl::connect(library.clone(), end, context.new_stream().unwrap());
        connected.wait();
        body(rank, nccl.unwrap())
    })
}

/// The tag of a step round a ring.
pub(crate) fn ring_tag(step: usize) -> Tag {
    Tag::new(Operation::PassKv, step)
}

/// Starts sending 64 bytes, all `value`, to the right, and receiving as many from the left, after what is on `compute`. A value that is not
/// 0 is copied there, which no stream that is stuck comes back from.
pub(crate) fn post<D: DeviceTransport + ?Sized>(
    end: &mut D,
    step: usize,
    value: u8,
    compute: &Arc<CudaStream>,
) -> Result<Ticket, Error> {
    let (rank, ranks) = (end.control().rank(), end.control().ranks());
    let (mut block, space) = (compute.alloc_zeros(64).unwrap(), compute.alloc_zeros(64).unwrap());
    if value != 0 {
        compute.memcpy_htod(&[value; 64], &mut block).unwrap();
    }
    let send = Outgoing { to: (rank + 1) % ranks, block: Arc::new(block), len: 64 };
    let recv = Incoming { from: (rank + ranks - 1) % ranks, space, len: 64 };
    end.exchange(ring_tag(step), send, recv, compute)
}
