//! Which kernels ran: what a test proves, and what a bench timed, is what it launched.
//!
//! Two ways to know: [`launches`] names what a piece of code launched on this thread, and the file that
//! [`LAUNCH_LOG_VARIABLE`] names gets a line for each kernel that the process launched.

use std::cell::RefCell;
use std::fmt;
use std::fs::File;
use std::io::Write as _;
use std::sync::OnceLock;

use crate::digest::Digest;
use crate::table::Arch;

/// Environment variable that names a file to append a line to for each kernel that this process launches:
/// `LABEL ARCH CUBIN`, the last one as a SHA-256 digest. Each loaded kernel is written once, at its first launch.
pub const LAUNCH_LOG_VARIABLE: &str = "LONGKV_LAUNCH_LOG";

/// A kernel that was launched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launched {
    /// [`Instance::label`](crate::table::Instance::label).
    pub label: String,
    /// What it was compiled for.
    pub arch: Arch,
    /// The image that the driver loaded.
    pub cubin: Digest,
}

impl fmt::Display for Launched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.label, self.arch, self.cubin)
    }
}

thread_local! {
    static RECORDING: RefCell<Option<Vec<Launched>>> = const { RefCell::new(None) };
}

/// Runs `body` and names the kernels that it launched on this thread, each once. Calls inside one another are not supported:
/// the inner one takes what it sees.
pub fn launches<T>(body: impl FnOnce() -> T) -> (T, Vec<Launched>) {
    RECORDING.set(Some(Vec::new()));
    let result = body();
    (result, RECORDING.take().unwrap_or_default())
}

/// Notes a launch; `first` if it is the loaded kernel's first.
pub(super) fn note(launched: &Launched, first: bool) {
    RECORDING.with_borrow_mut(|recording| {
        if let Some(list) = recording
            && !list.contains(launched)
        {
            list.push(launched.clone());
        }
    });
    if first && let Some(mut file) = file() {
        // One write, so that the lines of several threads do not mix. What is not written is not proven; nothing else is lost.
        let _ = file.write_all(format!("{launched}\n").as_bytes());
    }
}

fn file() -> Option<&'static File> {
    static FILE: OnceLock<Option<File>> = OnceLock::new();
    FILE.get_or_init(|| {
        let path = std::env::var_os(LAUNCH_LOG_VARIABLE).filter(|path| !path.is_empty())?;
        File::options()
            .append(true)
            .create(true)
            .open(&path)
            .inspect_err(|error| eprintln!("longkv-cuda: {}: {error}", path.display()))
            .ok()
    })
    .as_ref()
}
