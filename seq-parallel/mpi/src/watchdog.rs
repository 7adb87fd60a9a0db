//! Ends the process when MPI does not come back.
//!
//! Nobody can break off a call of MPI, least of all from another thread, and a process that hangs in one keeps its job from ending. So a
//! thread watches over the calls that may hang, and ends the process when one does.

use std::fmt;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use seq_parallel::transport::Tag;

/// Between looks. Time is counted in looks, so that a process that was stopped is not ended for it when it goes on.
const LOOK: Duration = Duration::from_millis(20);

/// A call, or several, that may hang.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    /// MPI_Init, and the first meeting of all processes.
    Start,
    /// Tests of a request that a rank has to bring about.
    Wait { rank: usize, peer: usize, at: Tag },
    /// MPI_Finalize.
    Finalize { rank: usize },
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Call::Start => {
                write!(f, "process {}: MPI_Init and the meeting of all processes", std::process::id())
            }
            Call::Wait { rank, peer, at } => write!(f, "rank {rank}: MPI, waiting for rank {peer} at {at},"),
            Call::Finalize { rank } => write!(f, "rank {rank}: MPI_Finalize"),
        }
    }
}

#[derive(Debug, Default)]
struct Watched {
    call: Option<(Call, Duration)>,
    for_looks: u32,
}

/// The thread that watches, which ends with this.
#[derive(Debug)]
pub(crate) struct Watchdog {
    watched: Arc<Mutex<Watched>>,
}

/// While it lives, a call is watched.
#[must_use = "the call is watched as long as this lives"]
pub(crate) struct Watch {
    watched: Arc<Mutex<Watched>>,
}

impl Watchdog {
    /// Starts the thread, which ends the process by `give_up`.
    pub(crate) fn new(give_up: impl Fn(Call, Duration) + Send + 'static) -> Self {
        let watched = Arc::new(Mutex::new(Watched::default()));
        let seen = Arc::downgrade(&watched);
        std::thread::spawn(move || watch(&seen, give_up));
        Watchdog { watched }
    }

    /// Watches a call until what is returned is dropped: it may take `limit`.
    pub(crate) fn watch(&self, call: Call, limit: Duration) -> Watch {
        set(&self.watched, Some((call, limit)));
        Watch { watched: self.watched.clone() }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        set(&self.watched, None);
    }
}

fn set(watched: &Mutex<Watched>, call: Option<(Call, Duration)>) {
    *watched.lock().unwrap_or_else(PoisonError::into_inner) = Watched { call, for_looks: 0 };
}

fn watch(watched: &Weak<Mutex<Watched>>, give_up: impl Fn(Call, Duration)) {
    while let Some(watched) = watched.upgrade() {
        let mut state = watched.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((call, limit)) = state.call {
            if LOOK * state.for_looks >= limit {
                state.call = None;
                give_up(call, limit);
            }
            state.for_looks += 1;
        }
        drop(state);
        drop(watched);
        std::thread::sleep(LOOK);
    }
}

/// Says what hangs, and ends the process.
pub(crate) fn exit(call: Call, limit: Duration) {
    // Whether anybody can read it or not, the process ends.
    let _ = writeln!(std::io::stderr(), "{call} did not come back within {} ms", limit.as_millis());
    // SAFETY: the C library's `_exit` takes a status, has no other preconditions and does not return.
    unsafe { _exit(1) }
}

unsafe extern "C" {
    /// Ends the process without its exit handlers, among which MPI's may wait for the call that hangs.
    fn _exit(status: i32) -> !;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};
    use std::sync::mpsc;

    /// In a process of its own: nobody reads what it says, and its exit handler never returns.
    #[test]
    fn a_process_that_cannot_say_so_is_ended_too() {
        const CHILD: &str = "LONGKV_TEST_WATCHDOG_CHILD";
        extern "C" fn hang() {
            std::thread::sleep(Duration::from_secs(600));
        }
        unsafe extern "C" {
            fn atexit(handler: extern "C" fn()) -> i32;
        }
        if std::env::var_os(CHILD).is_some() {
            // SAFETY: the handler is a function of this program that does not unwind.
            assert_eq!(unsafe { atexit(hang) }, 0);
            let watchdog = Watchdog::new(exit);
            let _watch = watchdog.watch(Call::Start, 2 * LOOK);
            std::thread::sleep(Duration::from_secs(600));
        }
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "watchdog::tests::a_process_that_cannot_say_so_is_ended_too", "--nocapture"])
            .env(CHILD, "1")
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stderr.take());
        let begin = std::time::Instant::now();
        let status = loop {
            match child.try_wait().unwrap() {
                Some(status) => break status.code(),
                None if begin.elapsed() > Duration::from_secs(120) => {
                    child.kill().unwrap();
                    break child.wait().unwrap().code();
                }
                None => std::thread::sleep(LOOK),
            }
        };
        assert_eq!(status, Some(1), "ended by the watchdog");
    }

    #[test]
    fn what_hangs_is_given_up_and_what_ends_is_not() {
        let (give_up, given_up) = mpsc::channel();
        let watchdog = Watchdog::new(move |call, _| give_up.send(call).unwrap());
        for rank in 0..3 {
            let ends = watchdog.watch(Call::Finalize { rank }, Duration::from_secs(600));
            assert!(watchdog.watched.lock().unwrap().call.is_some());
            drop(ends);
            assert!(watchdog.watched.lock().unwrap().call.is_none(), "nobody looks after what has ended");
        }
        let hangs = watchdog.watch(Call::Start, 2 * LOOK);
        // The first that it gives up; the three above would have come before.
        let patience = Duration::from_secs(120);
        assert_eq!(given_up.recv_timeout(patience), Ok(Call::Start));
        drop(hangs);
        drop(watchdog);
        assert_eq!(given_up.recv_timeout(patience), Err(mpsc::RecvTimeoutError::Disconnected), "it ends");
    }
}
