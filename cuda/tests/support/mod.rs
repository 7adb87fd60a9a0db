//! What the integration tests of this crate share: finding NVRTC, and building stand-ins for NVIDIA's libraries.
#![allow(dead_code, reason = "each test binary uses a part")]

#[cfg(feature = "driver")]
pub(crate) mod bench;
#[cfg(feature = "driver")]
pub(crate) mod fake_driver;

use std::path::{Path, PathBuf};
use std::process::Command;

use longkv_cuda::digest::Digest;
use longkv_cuda::nvrtc::{NVRTC_VARIABLE, Nvrtc};

/// Prints why a test does not run; fails it if the environment says that it must.
pub(crate) fn skip(reason: &str, required_by: &str) {
    let required = std::env::var_os(required_by).is_some_and(|value| value == "1");
    assert!(!required, "{reason}, and {required_by}=1");
    eprintln!("skipped: {reason}");
}

/// A real NVRTC: the one `LONGKV_NVRTC` names, else the one that `cargo xtask toolkit` installed.
pub(crate) fn nvrtc() -> Option<&'static Nvrtc> {
    let installed = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/toolkit/nvrtc-13.0/nvidia/cu13/lib");
    let place = std::env::var_os(NVRTC_VARIABLE).map_or_else(|| PathBuf::from(installed), PathBuf::from);
    match Nvrtc::open(&place) {
        Ok(nvrtc) => Some(nvrtc),
        Err(error) => {
            skip(&format!("{error} (`cargo xtask toolkit` installs one)"), "REQUIRE_NVRTC");
            None
        }
    }
}

/// Builds a shared library from one C++ source of `cuda/tests/fake`, for tests of other packages too, once per source and options, and gives its path.
///
/// None, with the reason printed, where there is no compiler.
pub(crate) fn library(source: &str, file_name: &str, options: &[&str]) -> Option<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cuda/tests/fake").join(source);
    let text = std::fs::read(&source).expect("the source is part of the crate");
    let parts = std::iter::once(text.as_slice()).chain(options.iter().map(|option| option.as_bytes()));
    let folder =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{file_name}-{:#}", Digest::of_parts(parts)));
    let library = folder.join(file_name);
    if library.exists() {
        return Some(library);
    }
    std::fs::create_dir_all(&folder).expect("the target folder is writable");
    // Under a name of its own first: tests run side by side and may build the same library.
    let draft =
        tempfile::NamedTempFile::new_in(&folder).expect("the target folder is writable").into_temp_path();
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".to_string());
    let output = Command::new(&compiler)
        .args(["-x", "c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"])
        .args(options)
        .arg(&source)
        .arg("-o")
        .arg(&draft)
        .output();
    match output {
        Err(error) => {
            skip(&format!("{compiler} does not start ({error})"), "REQUIRE_EMULATOR");
            return None;
        }
        Ok(output) => {
            let words = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{} does not compile:\n{words}", source.display());
        }
    }
    draft.persist(&library).expect("a rename within a folder");
    Some(library)
}

/// The stand-in for NVRTC of `tests/fake/nvrtc.cpp`, with its counter.
pub(crate) struct FakeNvrtc {
    pub(crate) nvrtc: &'static Nvrtc,
    library: libloading::Library,
}

impl FakeNvrtc {
    pub(crate) fn open() -> Option<Self> {
        let path = library("nvrtc.cpp", "libnvrtc.so.13", &[])?;
        let nvrtc = Nvrtc::open(&path).expect("the stand-in has every symbol");
        // SAFETY: the library is loaded already; this counts one more user of it.
        let library = unsafe { libloading::Library::new(&path) }.expect("it was just loaded");
        Some(FakeNvrtc { nvrtc, library })
    }

    /// Programs compiled in this process so far.
    pub(crate) fn compiles(&self) -> u32 {
        // SAFETY: the source declares `unsigned fake_nvrtc_compiles()`.
        let count = unsafe { self.library.get::<extern "C" fn() -> u32>("fake_nvrtc_compiles") };
        count.expect("the stand-in has this symbol")()
    }
}
