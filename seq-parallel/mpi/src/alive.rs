//! Whether a process of this host still lives, by the process table (Linux).
//!
//! Nothing in MPI says that a process on the same host is gone: its messages just do not come. Processes tell each other who they are at
//! the start, and a rank that waits for another looks whether that one is still there.

use std::io;

/// No such process.
const ESRCH: i32 = 3;

/// Words of an identity.
pub(crate) const WORDS: usize = 3;

/// A process, in all hosts and for all time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    /// Digest of the host's boot and the process namespace: pids mean the same where it is equal. 0 where there is no process table.
    place: u64,
    pid: u64,
    /// In clock ticks after boot: a pid comes again.
    started: u64,
}

impl Identity {
    /// This process.
    pub(crate) fn own() -> Self {
        let boot = std::fs::read("/proc/sys/kernel/random/boot_id");
        let namespace = std::fs::read_link("/proc/self/ns/pid");
        let pid = u64::from(std::process::id());
        let (Ok(boot), Ok(namespace), Ok(Some(started))) = (boot, namespace, started(pid)) else {
            return Identity { place: 0, pid, started: 0 };
        };
        let bytes = boot.iter().chain(namespace.as_os_str().as_encoded_bytes());
        let place = seq_parallel::fingerprint::digest(bytes.map(|byte| u64::from(*byte))).max(1);
        Identity { place, pid, started }
    }

    /// As words.
    pub(crate) fn words(self) -> [u64; WORDS] {
        [self.place, self.pid, self.started]
    }

    /// What [`words`](Self::words) were made of.
    pub(crate) fn of_words([place, pid, started]: [u64; WORDS]) -> Self {
        Identity { place, pid, started }
    }

    /// Whether it is known to have ended, as far as `here`, this process, can see: one that cannot look (no file descriptor is left)
    /// knows nothing.
    pub(crate) fn is_gone(self, here: Identity) -> bool {
        let found = || started(self.pid).is_ok_and(|started| started != Some(self.started));
        here.place != 0 && here.place == self.place && found()
    }
}

/// When a process started; `None` if it is not there, or dead and not buried. An error if the process table cannot be read.
fn started(pid: u64) -> io::Result<Option<u64>> {
    let stat = match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat,
        // The second one is of a process that ends while it is looked at.
        Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(ESRCH) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    // The name, in parentheses, may have spaces and parentheses itself. State is field 3, the start is field 22.
    let mut fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_ascii_whitespace();
    match fields.next() {
        Some("Z" | "X" | "x") => Ok(None),
        Some(_) => {
            let start = fields.nth(18).and_then(|field| field.parse().ok());
            start.map(Some).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
        }
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dead_are_gone() {
        let here = Identity::own();
        assert_ne!(here.place, 0, "this host has a process table");
        assert!(!here.is_gone(here));
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = u64::from(child.id());
        let other = Identity { pid, started: started(pid).unwrap().unwrap(), ..here };
        assert!(!other.is_gone(here));
        child.kill().unwrap();
        while !other.is_gone(here) {
            std::thread::yield_now();
        }
        assert!(other.is_gone(here), "dead and not buried");
        child.wait().unwrap();
        assert!(other.is_gone(here), "buried");
        let again = Identity { started: here.started + 1, ..here };
        assert!(again.is_gone(here), "another process has the pid");
        assert!(!Identity { place: here.place ^ 1, ..again }.is_gone(here), "nobody knows of other hosts");
    }

    /// In a process of its own that may open few files.
    #[test]
    fn who_cannot_look_knows_nothing() {
        const VARIABLE: &str = "SEQ_PARALLEL_MPI_TEST_FEW_FILES";
        if std::env::var_os(VARIABLE).is_some() {
            let here = Identity::own();
            let mut files = Vec::new();
            while let Ok(file) = std::fs::File::open("/dev/null") {
                files.push(file);
            }
            assert!(started(here.pid).is_err(), "no file can be opened");
            assert!(!here.is_gone(here), "this process lives");
            drop(files);
            assert!(Identity { started: here.started + 1, ..here }.is_gone(here), "now it can look");
            return;
        }
        let output = std::process::Command::new("sh")
            .args([
                "-c",
                "ulimit -n 64 && exec \"$0\" --exact alive::tests::who_cannot_look_knows_nothing --nocapture",
            ])
            .arg(std::env::current_exe().unwrap())
            .env(VARIABLE, "1")
            .output()
            .unwrap();
        let words = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && words.contains("1 passed"),
            "{words}{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
