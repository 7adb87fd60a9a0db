//! A folder of prebuilt cubins, so that production needs no NVRTC.
//!
//! `cargo xtask kernels --prebuilt DIR` writes one. Its manifest holds, for each cubin, the digest of the sources it was
//! made from. A cubin of other sources than this crate's is an error, never a kernel that is silently out of date.
//!
//! ```text
//! longkv-cubins 1
//! nvrtc 13.0
//! <file> <source digest> <cubin digest>
//! …
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::Error;
use crate::compile::{Cubin, source_digest};
use crate::digest::Digest;
use crate::probe::Version;
use crate::table::{Arch, Instance};

/// Name of the manifest in its folder.
pub const MANIFEST: &str = "manifest.txt";
/// First line of the manifest: its format and the format's version.
const HEADING: &str = "longkv-cubins 1";

/// File name of the cubin of an instance: its label and architecture.
pub fn file_name(instance: &Instance, arch: Arch) -> String {
    format!("{}.{arch}.cubin", instance.label())
}

struct Entry {
    source: Digest,
    cubin: Digest,
}

/// A folder of prebuilt cubins.
pub struct Prebuilt {
    folder: PathBuf,
    nvrtc: String,
    entries: BTreeMap<String, Entry>,
}

impl Prebuilt {
    /// Reads the manifest of a folder.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        let fault = |reason: String| Error::Prebuilt { folder: folder.display().to_string(), reason };
        let text = std::fs::read_to_string(folder.join(MANIFEST))
            .map_err(|error| fault(format!("{MANIFEST}: {error}")))?;
        let mut lines = text.lines();
        let heading = lines.next().unwrap_or_default();
        if heading != HEADING {
            return Err(fault(format!("{MANIFEST} starts with {heading:?}, not {HEADING:?}")));
        }
        let nvrtc = lines
            .next()
            .and_then(|line| line.strip_prefix("nvrtc "))
            .ok_or_else(|| fault(format!("{MANIFEST} does not say which NVRTC made it")))?
            .to_string();
        let mut entries = BTreeMap::new();
        for line in lines {
            let parts: Vec<_> = line.split(' ').collect();
            let entry = match parts[..] {
                [file, source, cubin] => Digest::parse(source)
                    .zip(Digest::parse(cubin))
                    .map(|(source, cubin)| (file.to_string(), Entry { source, cubin })),
                _ => None,
            };
            let (file, entry) =
                entry.ok_or_else(|| fault(format!("{MANIFEST} has the damaged line {line:?}")))?;
            entries.insert(file, entry);
        }
        Ok(Prebuilt { folder: folder.to_path_buf(), nvrtc, entries })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Version of the NVRTC that made the cubins.
    pub fn nvrtc(&self) -> &str {
        &self.nvrtc
    }

    /// The cubin of an instance, or `None` if the folder does not list it.
    ///
    /// An entry made from other sources is [`Error::Stale`]; a file that is missing or differs from the manifest is
    /// [`Error::Prebuilt`].
    pub fn get(&self, instance: &Instance, arch: Arch) -> Result<Option<Vec<u8>>, Error> {
        let file = file_name(instance, arch);
        let Some(entry) = self.entries.get(&file) else {
            return Ok(None);
        };
        let folder = self.folder.display().to_string();
        let expected = source_digest(instance);
        if entry.source != expected {
            return Err(Error::Stale {
                kernel: instance.label(),
                arch: arch.to_string(),
                folder,
                expected: format!("{expected:#}"),
                found: format!("{:#}", entry.source),
            });
        }
        match std::fs::read(self.folder.join(&file)) {
            Ok(bytes) if Digest::of(&bytes) == entry.cubin => Ok(Some(bytes)),
            Ok(_) => Err(Error::Prebuilt { folder, reason: format!("{file} is not the file of {MANIFEST}") }),
            Err(error) => Err(Error::Prebuilt { folder, reason: format!("{file}: {error}") }),
        }
    }
}

/// Writes a folder of prebuilt cubins: the files one by one, the manifest at the end.
pub struct PrebuiltWriter {
    folder: PathBuf,
    lines: BTreeMap<String, String>,
}

impl PrebuiltWriter {
    /// Starts a folder, or starts an existing one anew: files already in it are dead until the new manifest lists them.
    pub fn create(folder: &Path) -> Result<Self, Error> {
        let writer = PrebuiltWriter { folder: folder.to_path_buf(), lines: BTreeMap::new() };
        std::fs::create_dir_all(folder).map_err(|error| writer.fault("folder", &error))?;
        match std::fs::remove_file(folder.join(MANIFEST)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(writer.fault(MANIFEST, &error)),
            _ => Ok(writer),
        }
    }

    /// Adds one cubin.
    pub fn add(&mut self, instance: &Instance, arch: Arch, cubin: &Cubin) -> Result<(), Error> {
        let file = file_name(instance, arch);
        std::fs::write(self.folder.join(&file), &cubin.bytes).map_err(|error| self.fault(&file, &error))?;
        let line = format!("{file} {} {}\n", source_digest(instance), Digest::of(&cubin.bytes));
        self.lines.insert(file, line);
        Ok(())
    }

    /// Writes the manifest and returns its path.
    pub fn finish(self, nvrtc: Version) -> Result<PathBuf, Error> {
        let mut text = format!("{HEADING}\nnvrtc {nvrtc}\n");
        text.extend(self.lines.values().map(String::as_str));
        let path = self.folder.join(MANIFEST);
        let draft = self.folder.join(format!(".{MANIFEST}.draft"));
        std::fs::write(&draft, text).map_err(|error| self.fault(MANIFEST, &error))?;
        std::fs::rename(&draft, &path).map_err(|error| self.fault(MANIFEST, &error))?;
        Ok(path)
    }

    fn fault(&self, what: &str, error: &std::io::Error) -> Error {
        Error::Prebuilt { folder: self.folder.display().to_string(), reason: format!("{what}: {error}") }
    }
}
