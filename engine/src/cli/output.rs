//! Where results go: standard output, and a JSON file that appears whole or not at all.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use super::Failure;

/// Whether this process writes at all: of several that run the same command, one does.
static SPEAKS: AtomicBool = AtomicBool::new(true);

/// Says whether this process writes.
pub(super) fn speak(speaks: bool) {
    SPEAKS.store(speaks, Ordering::Relaxed);
}

/// Whether this process writes.
pub(super) fn speaks() -> bool {
    SPEAKS.load(Ordering::Relaxed)
}

/// Writes to standard output, at once.
pub(super) fn print(text: &str) -> Result<(), Failure> {
    print_bytes(text.as_bytes())
}

/// As [`print`], for text whose characters may come in parts.
pub(super) fn print_bytes(bytes: &[u8]) -> Result<(), Failure> {
    if !speaks() {
        return Ok(());
    }
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(bytes)?;
    Ok(stdout.flush()?)
}

/// A file to be, JSON or other. Opening it, before any work, proves that it can be written. Nothing new stands on the disk until
/// it is written, not even when the work is broken off.
pub(super) struct OutFile {
    path: PathBuf,
    target: Target,
}

enum Target {
    /// Written beside the path, in this folder, then renamed.
    Rename(PathBuf),
    /// A link, pipe or device (`/dev/stdout` is one), which a rename would replace: written where it is.
    InPlace(File),
}

impl OutFile {
    /// Checks that the path can be written; `None` stays `None`.
    pub(super) fn open(path: Option<PathBuf>) -> Result<Option<Self>, Failure> {
        let Some(path) = path.filter(|_| speaks()) else { return Ok(None) };
        let target = open(&path).map_err(|source| failure(&path, source))?;
        Ok(Some(OutFile { path, target }))
    }

    /// Writes the value as JSON.
    pub(super) fn write(self, value: &impl Serialize) -> Result<(), Failure> {
        let mut text = serde_json::to_string(value).map_err(|error| failure(&self.path, error.into()))?;
        text.push('\n');
        self.write_bytes(text.as_bytes())
    }

    /// Writes bytes.
    pub(super) fn write_bytes(self, bytes: &[u8]) -> Result<(), Failure> {
        let OutFile { path, target } = self;
        let written = match target {
            Target::InPlace(mut file) => truncate(&file).and_then(|()| file.write_all(bytes)),
            Target::Rename(folder) => temporary(&folder).and_then(|mut file| {
                file.write_all(bytes)?;
                file.persist(&path).map(drop).map_err(|error| error.error)
            }),
        };
        written.map_err(|source| failure(&path, source))
    }
}

fn failure(path: &Path, source: std::io::Error) -> Failure {
    Failure::Write { path: path.display().to_string(), source }
}

/// Empties what can be emptied: a regular file behind a link, not a pipe.
fn truncate(file: &File) -> std::io::Result<()> {
    match file.metadata()?.is_file() {
        true => file.set_len(0),
        false => Ok(()),
    }
}

fn open(path: &Path) -> std::io::Result<Target> {
    match path.symlink_metadata() {
        Ok(metadata) => {
            let file = OpenOptions::new().write(true).open(path)?;
            if !metadata.is_file() {
                return Ok(Target::InPlace(file));
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    if path.file_name().is_none() {
        return Err(std::io::ErrorKind::IsADirectory.into());
    }
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    // Gone at once: only that it can be made matters yet.
    drop(temporary(folder)?);
    Ok(Target::Rename(folder.to_path_buf()))
}

fn temporary(folder: &Path) -> std::io::Result<tempfile::NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    // The permissions of any new file, not those of a secret one.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.prefix(".engine-").tempfile_in(folder)
}
