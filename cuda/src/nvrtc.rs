//! A binding of NVRTC, NVIDIA's run-time compiler: find the library, compile one program, get a cubin and the log.
//!
//! `cudarc` has a binding too, but it panics where the library is missing, makes PTX only and takes no headers from
//! memory. This one needs neither a driver nor a device.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use libloading::Library;

use crate::probe::{Unavailable, Version, reason};
use crate::table::Arch;

/// Environment variable that names the NVRTC library or its folder.
pub const NVRTC_VARIABLE: &str = "LONGKV_NVRTC";

type Program = *mut std::ffi::c_void;
type Create = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;
type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;
type GetSize = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type GetBytes = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
type GetVersion = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;
type GetArchCount = unsafe extern "C" fn(*mut c_int) -> c_int;
type GetArchs = unsafe extern "C" fn(*mut c_int) -> c_int;

/// A loaded NVRTC. Calls from several threads run side by side (from NVRTC 12.3 on; older ones take turns).
#[derive(Debug)]
pub struct Nvrtc {
    path: String,
    version: Version,
    archs: Vec<u32>,
    create: Create,
    compile: Compile,
    destroy: Destroy,
    log_size: GetSize,
    log: GetBytes,
    cubin_size: GetSize,
    cubin: GetBytes,
    ptx_size: GetSize,
    ptx: GetBytes,
}

/// What to compile.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// File name for messages.
    pub name: &'a str,
    /// Text of the file.
    pub source: &'a str,
    /// Headers as `(name in #include "…", text)`.
    pub headers: &'a [(&'a str, &'a str)],
    /// Options as on a command line.
    pub options: &'a [String],
}

/// What a compile gives.
#[derive(Debug, Clone)]
pub struct Output {
    /// The image, for the real architecture of the options.
    pub cubin: Vec<u8>,
    /// Warnings, and what ptxas printed.
    pub log: String,
}

/// Why a compile failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// The source or an option is wrong: the whole log.
    Rejected(String),
    /// A call failed for another reason.
    Call {
        /// Name of the NVRTC function.
        call: &'static str,
        /// The raw `nvrtcResult`.
        code: i32,
        /// The log, where there is one.
        log: String,
    },
}

/// `nvrtcResult` values of `nvrtc.h` that are the source's fault.
const COMPILATION: c_int = 6;
const INVALID_OPTION: c_int = 5;

impl Nvrtc {
    /// The NVRTC of this process. The first call searches, later calls return the same answer.
    ///
    /// `LONGKV_NVRTC` (the library or its folder), if it is set, is the only place. Otherwise, in this order: `lib64` and
    /// `lib` of `CUDA_HOME` and `CUDA_PATH`; the loader's `libnvrtc.so`, `libnvrtc.so.13`, `libnvrtc.so.12`;
    /// `/usr/local/cuda/lib64`.
    pub fn find() -> Result<&'static Nvrtc, Unavailable> {
        static FOUND: OnceLock<Result<&'static Nvrtc, Unavailable>> = OnceLock::new();
        FOUND.get_or_init(|| Self::first(&places(|name| std::env::var_os(name).map(PathBuf::from)))).clone()
    }

    /// The first of these places that has a working NVRTC. A place is a file, a folder or a name for the loader.
    pub fn first(places: &[PathBuf]) -> Result<&'static Nvrtc, Unavailable> {
        let mut tried = Vec::new();
        for place in places {
            match Self::open(place) {
                Ok(nvrtc) => return Ok(nvrtc),
                // Only one place to look at: its own error says more than a list of one.
                Err(error @ Unavailable::NvrtcUnusable { .. }) if places.len() == 1 => return Err(error),
                Err(Unavailable::NvrtcNotFound { tried: more }) => tried.extend(more),
                Err(other) => tried.push(other.to_string()),
            }
        }
        Err(Unavailable::NvrtcNotFound { tried })
    }

    /// Opens one NVRTC: a library file, a folder that holds one, or a bare name for the loader.
    ///
    /// Libraries stay loaded until the process ends: NVRTC registers exit handlers and thread-local state, and unloading it
    /// while another thread compiles would be fatal. Opening a place again returns the same instance.
    pub fn open(place: &Path) -> Result<&'static Nvrtc, Unavailable> {
        static OPEN: Mutex<BTreeMap<PathBuf, &'static Nvrtc>> = Mutex::new(BTreeMap::new());
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(nvrtc) = open.get(place) {
            return Ok(nvrtc);
        }
        let nvrtc: &'static Nvrtc = Box::leak(Box::new(Self::load(place)?));
        open.insert(place.to_path_buf(), nvrtc);
        Ok(nvrtc)
    }

    fn load(place: &Path) -> Result<Nvrtc, Unavailable> {
        let not_found = |reason: String| Unavailable::NvrtcNotFound { tried: vec![reason] };
        let is_name = place.components().count() == 1 && !place.exists();
        let file = if is_name {
            place.to_path_buf()
        } else if place.is_dir() {
            newest(place, "libnvrtc.so")
                .ok_or_else(|| not_found(format!("{}: no libnvrtc.so in this folder", place.display())))?
        } else {
            place.to_path_buf()
        };
        // The compiler opens its built-in functions by bare name in the middle of a compile and does not look beside
        // itself, so they have to be in the process already.
        if let Some(builtins) = file.parent().and_then(|folder| newest(folder, "libnvrtc-builtins.so"))
            && !is_name
        {
            // SAFETY: loading the table of built-in functions runs no code that has preconditions.
            if let Ok(builtins) = unsafe { Library::new(&builtins) } {
                std::mem::forget(builtins);
            }
        }
        // SAFETY: loading NVRTC runs its initialisers only, which have no preconditions.
        let library = unsafe { Library::new(&file) }
            .map_err(|error| not_found(reason(&file.display().to_string(), &error)))?;
        let library: &'static Library = Box::leak(Box::new(library));
        Self::bind(file.display().to_string(), library)
    }

    fn bind(path: String, library: &'static Library) -> Result<Nvrtc, Unavailable> {
        /// # Safety
        /// `F` must be the function pointer type of the symbol in `nvrtc.h`.
        unsafe fn symbol<F: Copy>(
            path: &str,
            library: &'static Library,
            name: &str,
        ) -> Result<F, Unavailable> {
            // SAFETY: the caller names the symbol's type; the library is never unloaded, so the pointer stays valid.
            unsafe { library.get::<F>(name) }.map(|symbol| *symbol).map_err(|_| Unavailable::NvrtcUnusable {
                library: path.to_string(),
                reason: format!("it has no symbol {name}"),
            })
        }
        let unusable = |call: &str, code: c_int| Unavailable::NvrtcUnusable {
            library: path.clone(),
            reason: format!("{call} returned {code}"),
        };

        // SAFETY: `nvrtcResult nvrtcVersion(int *major, int *minor)`.
        let get_version = unsafe { symbol::<GetVersion>(&path, library, "nvrtcVersion") }?;
        // SAFETY: `nvrtcResult nvrtcGetNumSupportedArchs(int *numArchs)`.
        let arch_count = unsafe { symbol::<GetArchCount>(&path, library, "nvrtcGetNumSupportedArchs") }?;
        // SAFETY: `nvrtcResult nvrtcGetSupportedArchs(int *supportedArchs)`.
        let get_archs = unsafe { symbol::<GetArchs>(&path, library, "nvrtcGetSupportedArchs") }?;

        let (mut major, mut minor) = (0, 0);
        // SAFETY: both pointers are valid for one int.
        match unsafe { get_version(&mut major, &mut minor) } {
            0 => {}
            code => return Err(unusable("nvrtcVersion", code)),
        }
        let mut count = 0;
        // SAFETY: the pointer is valid for one int.
        match unsafe { arch_count(&mut count) } {
            0 => {}
            code => return Err(unusable("nvrtcGetNumSupportedArchs", code)),
        }
        let mut archs = vec![0; count.max(0) as usize];
        // SAFETY: the buffer has as many elements as the library said it would write.
        match unsafe { get_archs(archs.as_mut_ptr()) } {
            0 => {}
            code => return Err(unusable("nvrtcGetSupportedArchs", code)),
        }

        Ok(Nvrtc {
            version: Version::new(major as u32, minor as u32),
            archs: archs.into_iter().map(|arch| arch as u32).collect(),
            // SAFETY: `nvrtcCreateProgram(nvrtcProgram*, const char *src, const char *name, int numHeaders,
            // const char *const *headers, const char *const *includeNames)`.
            create: unsafe { symbol(&path, library, "nvrtcCreateProgram") }?,
            // SAFETY: `nvrtcCompileProgram(nvrtcProgram, int numOptions, const char *const *options)`.
            compile: unsafe { symbol(&path, library, "nvrtcCompileProgram") }?,
            // SAFETY: `nvrtcDestroyProgram(nvrtcProgram*)`.
            destroy: unsafe { symbol(&path, library, "nvrtcDestroyProgram") }?,
            // SAFETY: `nvrtcGetProgramLogSize(nvrtcProgram, size_t*)`.
            log_size: unsafe { symbol(&path, library, "nvrtcGetProgramLogSize") }?,
            // SAFETY: `nvrtcGetProgramLog(nvrtcProgram, char*)`.
            log: unsafe { symbol(&path, library, "nvrtcGetProgramLog") }?,
            // SAFETY: `nvrtcGetCUBINSize(nvrtcProgram, size_t*)`.
            cubin_size: unsafe { symbol(&path, library, "nvrtcGetCUBINSize") }?,
            // SAFETY: `nvrtcGetCUBIN(nvrtcProgram, char*)`.
            cubin: unsafe { symbol(&path, library, "nvrtcGetCUBIN") }?,
            // SAFETY: `nvrtcGetPTXSize(nvrtcProgram, size_t*)`.
            ptx_size: unsafe { symbol(&path, library, "nvrtcGetPTXSize") }?,
            // SAFETY: `nvrtcGetPTX(nvrtcProgram, char*)`.
            ptx: unsafe { symbol(&path, library, "nvrtcGetPTX") }?,
            path,
        })
    }

    /// Path or name of the library.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Version of the compiler.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Architectures that this compiler knows, as `major * 10 + minor`.
    pub fn archs(&self) -> &[u32] {
        &self.archs
    }

    /// Whether this compiler knows the architecture.
    pub fn supports(&self, arch: Arch) -> bool {
        self.archs.contains(&(arch.major * 10 + arch.minor))
    }

    /// Compiles for the real architecture that the options name.
    pub fn cubin(&self, input: &Input<'_>) -> Result<Output, Failure> {
        let program = self.run(input)?;
        let log = program.log();
        let cubin = program
            .bytes("nvrtcGetCUBINSize", self.cubin_size, "nvrtcGetCUBIN", self.cubin)
            .map_err(|(call, code)| Failure::Call { call, code, log: log.clone() })?;
        Ok(Output { cubin, log })
    }

    /// Compiles to PTX text, for looking at.
    pub fn ptx(&self, input: &Input<'_>) -> Result<String, Failure> {
        let program = self.run(input)?;
        let bytes = program
            .bytes("nvrtcGetPTXSize", self.ptx_size, "nvrtcGetPTX", self.ptx)
            .map_err(|(call, code)| Failure::Call { call, code, log: program.log() })?;
        Ok(text(&bytes))
    }

    fn run(&self, input: &Input<'_>) -> Result<OwnedProgram<'_>, Failure> {
        let nul = |what: &str| Failure::Rejected(format!("{what} contains a NUL byte"));
        let c = |what: &str, text: &str| CString::new(text).map_err(|_| nul(what));
        let source = c("the source", input.source)?;
        let name = c("the name", input.name)?;
        let texts: Vec<CString> = input.headers.iter().map(|h| c(h.0, h.1)).collect::<Result<_, _>>()?;
        let names: Vec<CString> =
            input.headers.iter().map(|h| c("a header name", h.0)).collect::<Result<_, _>>()?;
        let options: Vec<CString> =
            input.options.iter().map(|o| c("an option", o)).collect::<Result<_, _>>()?;
        let pointers = |list: &[CString]| list.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
        let (text_pointers, name_pointers) = (pointers(&texts), pointers(&names));
        let option_pointers = pointers(&options);

        let mut program = std::ptr::null_mut();
        // SAFETY: all strings end in NUL and outlive the call, both arrays have the length given, and NVRTC copies them.
        let code = unsafe {
            (self.create)(
                &mut program,
                source.as_ptr(),
                name.as_ptr(),
                texts.len() as c_int,
                text_pointers.as_ptr(),
                name_pointers.as_ptr(),
            )
        };
        if code != 0 {
            return Err(Failure::Call { call: "nvrtcCreateProgram", code, log: String::new() });
        }
        let program = OwnedProgram { nvrtc: self, program };
        // SAFETY: the program is alive and used by this thread alone; the options end in NUL and have the count given.
        let code =
            unsafe { (self.compile)(program.program, options.len() as c_int, option_pointers.as_ptr()) };
        match code {
            0 => Ok(program),
            COMPILATION | INVALID_OPTION => Err(Failure::Rejected(program.log())),
            code => Err(Failure::Call { call: "nvrtcCompileProgram", code, log: program.log() }),
        }
    }
}

/// A program that is destroyed when dropped.
struct OwnedProgram<'a> {
    nvrtc: &'a Nvrtc,
    program: Program,
}

impl OwnedProgram<'_> {
    /// Everything the compiler said. Empty where it will not tell.
    fn log(&self) -> String {
        let bytes =
            self.bytes("nvrtcGetProgramLogSize", self.nvrtc.log_size, "nvrtcGetProgramLog", self.nvrtc.log);
        text(&bytes.unwrap_or_default()).trim_end().to_string()
    }

    fn bytes(
        &self,
        size_call: &'static str,
        get_size: GetSize,
        call: &'static str,
        get: GetBytes,
    ) -> Result<Vec<u8>, (&'static str, i32)> {
        let mut size = 0;
        // SAFETY: the program is alive and the pointer is valid for one size_t.
        match unsafe { get_size(self.program, &mut size) } {
            0 => {}
            code => return Err((size_call, code)),
        }
        let mut bytes = vec![0u8; size];
        // SAFETY: the buffer has the size that the library asked for.
        match unsafe { get(self.program, bytes.as_mut_ptr().cast()) } {
            0 => Ok(bytes),
            code => Err((call, code)),
        }
    }
}

impl Drop for OwnedProgram<'_> {
    fn drop(&mut self) {
        // SAFETY: the program came from nvrtcCreateProgram and is destroyed once. A failure could only be reported.
        unsafe { (self.nvrtc.destroy)(&mut self.program) };
    }
}

/// Text up to its NUL.
fn text(bytes: &[u8]) -> String {
    match CStr::from_bytes_until_nul(bytes) {
        Ok(text) => text.to_string_lossy().into_owned(),
        Err(_) => String::from_utf8_lossy(bytes).into_owned(),
    }
}

/// The file `stem` or `stem.<version>` of a folder with the highest version.
fn newest(folder: &Path, stem: &str) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder).ok()?;
    let version = |path: &PathBuf| {
        let suffix = path.file_name()?.to_str()?.strip_prefix(stem)?;
        if !suffix.is_empty() && !suffix.starts_with('.') {
            return None;
        }
        suffix.split('.').skip(1).map(|part| part.parse().ok()).collect::<Option<Vec<u32>>>()
    };
    let versions =
        entries.flatten().map(|entry| entry.path()).filter_map(|path| Some((version(&path)?, path)));
    versions.max().map(|(_, path)| path)
}

/// Where to look, in order, given the environment.
fn places(variable: impl Fn(&str) -> Option<PathBuf>) -> Vec<PathBuf> {
    if let Some(place) = variable(NVRTC_VARIABLE) {
        return vec![place];
    }
    let mut places = Vec::new();
    for name in ["CUDA_HOME", "CUDA_PATH"] {
        if let Some(home) = variable(name) {
            places.extend([home.join("lib64"), home.join("lib")]);
        }
    }
    places.extend(
        ["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12", "/usr/local/cuda/lib64"].map(PathBuf::from),
    );
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_is_the_only_place_when_set() {
        let set = |name: &str| match name {
            NVRTC_VARIABLE => Some(PathBuf::from("/somewhere")),
            _ => Some(PathBuf::from("/cuda")),
        };
        assert_eq!(places(set), [PathBuf::from("/somewhere")]);
    }

    #[test]
    fn toolkit_homes_come_before_the_loader() {
        let set = |name: &str| (name == "CUDA_HOME").then(|| PathBuf::from("/cuda"));
        let shown: Vec<_> = places(set).iter().map(|place| place.display().to_string()).collect();
        let expected = [
            "/cuda/lib64",
            "/cuda/lib",
            "libnvrtc.so",
            "libnvrtc.so.13",
            "libnvrtc.so.12",
            "/usr/local/cuda/lib64",
        ];
        assert_eq!(shown, expected);
    }

    #[test]
    fn the_newest_library_of_a_folder_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(newest(folder.path(), "libnvrtc.so"), None);
        for name in
            ["libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so.2", "libnvrtc.alt.so.99", "libnvrtc.sox.99"]
        {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        assert_eq!(newest(folder.path(), "libnvrtc.so"), Some(folder.path().join("libnvrtc.so.13")));
        assert_eq!(newest(&folder.path().join("missing"), "libnvrtc.so"), None);
    }
}
