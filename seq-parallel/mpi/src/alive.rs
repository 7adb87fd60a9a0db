//! Whether a process of this host still lives, by the process table (Linux).
//!
//! Nothing in MPI says that a process on the same host is gone: its messages just do not come. Processes tell each other who they are at
//! the start, and a rank that waits for another looks whether that one is still there.

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
        let (Ok(boot), Ok(namespace), Some(started)) = (boot, namespace, started(pid)) else {
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

    /// Whether it has ended, as far as `here`, this process, can see.
    pub(crate) fn is_gone(self, here: Identity) -> bool {
        here.place != 0 && here.place == self.place && started(self.pid) != Some(self.started)
    }
}

/// When a process started; `None` if it is not there, or dead and not buried.
fn started(pid: u64) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may have spaces and parentheses itself. State is field 3, the start is field 22.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X" | "x") {
        return None;
    }
    fields.nth(18)?.parse().ok()
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
        let other = Identity { pid, started: started(pid).unwrap(), ..here };
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
}
