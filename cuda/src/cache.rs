//! Where cubins come from: a prebuilt folder, the disk cache, or NVRTC.
//!
//! The disk cache holds one file per cubin, named by a digest of everything that decides its contents: source, headers,
//! constants, NVRTC's version, architecture. Files are written under a temporary name and renamed, so that processes may
//! share a folder; a damaged file is compiled anew. Any file may be deleted at any time. The folder has to be as
//! trustworthy as the program, because what lies in it runs on the GPU.

use std::collections::HashMap;
use std::fmt;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use crate::Error;
use crate::compile::{compile, source_digest};
use crate::digest::Digest;
use crate::nvrtc::Nvrtc;
use crate::prebuilt::Prebuilt;
use crate::probe::Version;
use crate::table::{Arch, Instance};

/// Environment variable that names the cache folder. Set to nothing, it turns the cache off.
pub const CACHE_VARIABLE: &str = "LONGKV_CACHE_DIR";
/// Environment variable that names a folder of prebuilt cubins.
pub const PREBUILT_VARIABLE: &str = "LONGKV_CUBIN_DIR";

type Notice = Box<dyn Fn(&str) + Send + Sync>;
static NOTICE: RwLock<Option<Notice>> = RwLock::new(None);

/// Sets who is told, in one sentence, that the cache cannot be used. Without this, a line goes to stderr.
pub fn set_notice(hook: impl Fn(&str) + Send + Sync + 'static) {
    *NOTICE.write().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(hook));
}

fn notify(sentence: &str) {
    match &*NOTICE.read().unwrap_or_else(PoisonError::into_inner) {
        Some(hook) => hook(sentence),
        None => eprintln!("longkv-cuda: {sentence}"),
    }
}

/// A folder of compiled cubins, or none.
#[derive(Debug)]
pub struct Cache {
    folder: Option<PathBuf>,
    told: AtomicBool,
}

/// Start of a cache file: what it is, then the version of the layout.
///
/// The key's and the cubin's digest follow, 32 bytes each, then the cubin's length as a little-endian u64 and the cubin.
const MAGIC: &[u8; 12] = b"LONGKVCU\x01\0\0\0";
const HEAD: usize = MAGIC.len() + 32 + 32 + 8;

impl Cache {
    /// A cache in this folder, which is created when the first file is written.
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Cache { folder: Some(folder.into()), told: AtomicBool::new(false) }
    }

    /// No cache: every process compiles what it needs.
    pub fn none() -> Self {
        Cache { folder: None, told: AtomicBool::new(false) }
    }

    /// The folder of `LONGKV_CACHE_DIR`, else `longkv` in `XDG_CACHE_HOME` or in `.cache` of the home folder.
    pub fn from_environment() -> Self {
        Self::from_variables(|name| std::env::var_os(name).map(PathBuf::from))
    }

    fn from_variables(variable: impl Fn(&str) -> Option<PathBuf>) -> Self {
        // The XDG specification: a relative path counts as unset.
        let absolute = |name: &str| variable(name).filter(|path| path.is_absolute());
        match variable(CACHE_VARIABLE) {
            Some(folder) if folder.as_os_str().is_empty() => Cache::none(),
            Some(folder) => Cache::at(folder),
            None => match absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache"))) {
                Some(parent) => Cache::at(parent.join("longkv")),
                None => {
                    let cache = Cache::none();
                    cache.tell(|| {
                        format!(
                            "no folder to cache kernels in: neither {CACHE_VARIABLE} nor XDG_CACHE_HOME nor HOME is set"
                        )
                    });
                    cache
                }
            },
        }
    }

    /// The folder, if there is one.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// What is stored under a key, if it is whole.
    pub fn load(&self, name: &str, key: Digest) -> Option<Vec<u8>> {
        let mut bytes = std::fs::read(self.file(name, key)?).ok()?;
        if bytes.len() < HEAD {
            return None;
        }
        let cubin = bytes.split_off(HEAD);
        let head = [MAGIC, &key.0[..], &Digest::of(&cubin).0[..], &(cubin.len() as u64).to_le_bytes()[..]];
        (bytes == head.concat()).then_some(cubin)
    }

    /// Stores a cubin. A cache that cannot be written is no error: it is told once, and the process goes on without.
    pub fn store(&self, name: &str, key: Digest, cubin: &[u8]) {
        let Some(file) = self.file(name, key) else { return };
        if let Err(error) = write_whole(&file, key, cubin) {
            let folder = file.parent().unwrap_or(&file).display();
            self.tell(|| {
                format!("kernels are not cached in {folder} ({error}), so every process compiles them anew")
            });
        }
    }

    fn file(&self, name: &str, key: Digest) -> Option<PathBuf> {
        Some(self.folder.as_ref()?.join(format!("{name}-{key}.cubin")))
    }

    fn tell(&self, sentence: impl FnOnce() -> String) {
        if !self.told.swap(true, Ordering::Relaxed) {
            notify(&sentence());
        }
    }
}

fn write_whole(file: &Path, key: Digest, cubin: &[u8]) -> std::io::Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let folder = file.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    // Unique among threads, processes and, through the clock, the hosts that share a folder.
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let draft = folder.join(format!(".{}-{}-{count}.draft", std::process::id(), clock.as_nanos()));
    let written = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&draft)
        .and_then(|mut draft| {
            draft.write_all(MAGIC)?;
            draft.write_all(&key.0)?;
            draft.write_all(&Digest::of(cubin).0)?;
            draft.write_all(&(cubin.len() as u64).to_le_bytes())?;
            draft.write_all(cubin)
        })
        .and_then(|()| std::fs::rename(&draft, file));
    if written.is_err() {
        // It may never have been created.
        let _ = std::fs::remove_file(&draft);
    }
    written
}

/// Where a cubin came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A prebuilt folder.
    Prebuilt {
        /// The folder.
        folder: PathBuf,
        /// Version of the NVRTC that made the folder.
        nvrtc: String,
    },
    /// The disk cache.
    Cache {
        /// Version of the NVRTC that this process would have compiled with.
        nvrtc: Version,
    },
    /// This process compiled it.
    Compiled {
        /// Version of NVRTC.
        nvrtc: Version,
    },
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Prebuilt { folder, nvrtc } => {
                write!(f, "prebuilt in {} by NVRTC {nvrtc}", folder.display())
            }
            Origin::Cache { nvrtc } => write!(f, "cached, of NVRTC {nvrtc}"),
            Origin::Compiled { nvrtc } => write!(f, "compiled by NVRTC {nvrtc}"),
        }
    }
}

/// A cubin and where it came from.
#[derive(Debug)]
pub struct Found {
    /// The image that the driver loads.
    pub cubin: Vec<u8>,
    /// Where it came from.
    pub origin: Origin,
}

type Slot = Arc<Mutex<Option<Arc<Found>>>>;

/// The source of all cubins of a process: prebuilt folder first, then disk cache, then NVRTC.
///
/// Each cubin is made once, however many threads and contexts ask for it.
pub struct Cubins {
    prebuilt: Result<Option<Prebuilt>, Error>,
    cache: Cache,
    nvrtc: Option<&'static Nvrtc>,
    slots: Mutex<HashMap<(Instance, Arch), Slot>>,
}

impl Cubins {
    /// Cubins by these means. Without an explicit NVRTC, [`Nvrtc::find`] is asked when one is needed.
    pub fn new(prebuilt: Option<Prebuilt>, cache: Cache, nvrtc: Option<&'static Nvrtc>) -> Self {
        Cubins { prebuilt: Ok(prebuilt), cache, nvrtc, slots: Mutex::default() }
    }

    /// The process's cubins, by the environment: `LONGKV_CUBIN_DIR`, `LONGKV_CACHE_DIR`, `LONGKV_NVRTC`.
    pub fn from_environment() -> &'static Arc<Self> {
        static CUBINS: OnceLock<Arc<Cubins>> = OnceLock::new();
        CUBINS.get_or_init(|| {
            let folder = std::env::var_os(PREBUILT_VARIABLE).filter(|folder| !folder.is_empty());
            // A folder that cannot be used is reported by every `get`: whoever ships cubins must not end up compiling.
            let prebuilt = folder.map(|folder| Prebuilt::open(Path::new(&folder))).transpose();
            Arc::new(Cubins { prebuilt, ..Cubins::new(None, Cache::from_environment(), None) })
        })
    }

    /// The cubin of an instance for one architecture. Blocks while it compiles.
    pub fn get(&self, instance: &Instance, arch: Arch) -> Result<Arc<Found>, Error> {
        let slot = {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            slots.entry((instance.clone(), arch)).or_default().clone()
        };
        // Held while compiling, so that others who want the same cubin wait for it; those who want another do not.
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = &*slot {
            return Ok(found.clone());
        }
        let found = Arc::new(self.make(instance, arch)?);
        *slot = Some(found.clone());
        Ok(found)
    }

    fn make(&self, instance: &Instance, arch: Arch) -> Result<Found, Error> {
        if let Some(prebuilt) = self.prebuilt.as_ref().map_err(Clone::clone)?
            && let Some(cubin) = prebuilt.get(instance, arch)?
        {
            let folder = prebuilt.folder().to_path_buf();
            return Ok(Found {
                cubin,
                origin: Origin::Prebuilt { folder, nvrtc: prebuilt.nvrtc().to_string() },
            });
        }
        let nvrtc = match self.nvrtc {
            Some(nvrtc) => nvrtc,
            None => Nvrtc::find()?,
        };
        let version = nvrtc.version();
        let key = key(instance, arch, version);
        if let Some(cubin) = self.cache.load(instance.kernel.name, key) {
            return Ok(Found { cubin, origin: Origin::Cache { nvrtc: version } });
        }
        let cubin = compile(nvrtc, instance, arch)?.bytes;
        self.cache.store(instance.kernel.name, key, &cubin);
        Ok(Found { cubin, origin: Origin::Compiled { nvrtc: version } })
    }
}

/// What a cubin is cached under.
pub fn key(instance: &Instance, arch: Arch, nvrtc: Version) -> Digest {
    let (arch, nvrtc) = (arch.to_string(), nvrtc.to_string());
    Digest::of_parts([&source_digest(instance).0[..], arch.as_bytes(), nvrtc.as_bytes()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_follows_the_environment() {
        type Case = (&'static str, &'static [(&'static str, &'static str)], Option<&'static str>);
        let cases: &[Case] = &[
            ("explicit", &[(CACHE_VARIABLE, "/c"), ("XDG_CACHE_HOME", "/x"), ("HOME", "/h")], Some("/c")),
            ("turned off", &[(CACHE_VARIABLE, ""), ("XDG_CACHE_HOME", "/x"), ("HOME", "/h")], None),
            ("XDG", &[("XDG_CACHE_HOME", "/x"), ("HOME", "/h")], Some("/x/longkv")),
            (
                "relative XDG counts as unset",
                &[("XDG_CACHE_HOME", "x"), ("HOME", "/h")],
                Some("/h/.cache/longkv"),
            ),
            ("home", &[("HOME", "/h")], Some("/h/.cache/longkv")),
        ];
        for (name, variables, expected) in cases {
            let cache = Cache::from_variables(|wanted| {
                variables.iter().find(|(name, _)| *name == wanted).map(|(_, value)| PathBuf::from(value))
            });
            assert_eq!(cache.folder(), expected.map(Path::new), "{name}");
        }
    }
}
