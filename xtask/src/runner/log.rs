//! The log file; what matters goes to stdout too.

use std::io::Write as _;
use std::path::Path;
use std::sync::Mutex;

use xtask::results::{Item, Outcome};

/// Most that the log may take.
const LOG_BYTES: usize = 12 << 20;

/// The log file; lines go to stdout too.
pub(crate) struct Log {
    file: Mutex<(std::fs::File, usize)>,
}

impl Log {
    pub(crate) fn open(path: &Path) -> Result<Self, String> {
        let file = std::fs::File::create(path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Log { file: Mutex::new((file, 0)) })
    }

    pub(crate) fn line(&self, line: &str) {
        println!("{line}");
        self.write(line);
    }

    fn write(&self, text: &str) {
        let mut file = self.file.lock().expect("no thread panicked");
        if file.1 + text.len() < LOG_BYTES {
            file.1 += text.len() + 1;
            // The results matter more than a full disk.
            let _ = writeln!(file.0, "{text}");
        }
    }

    pub(crate) fn item(&self, item: &Item, output: &str) {
        let outcome = match item.outcome {
            Outcome::Passed => "passed",
            Outcome::Failed => "FAILED",
            Outcome::TimedOut => "TIMED OUT",
            Outcome::Skipped => "skipped",
            Outcome::NotRun => "not run",
        };
        let reason = item.reason.as_deref().map(|reason| format!(": {reason}")).unwrap_or_default();
        self.line(&format!("{:6.1} s  {} {outcome}{reason}", item.seconds, item.name));
        self.write(output.trim_end());
    }
}
