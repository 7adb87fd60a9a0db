//! What is made ready in the background while tests run, which leave the CPU time: wheels, and what peers compile.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use xtask::results::{Item, Outcome};

use crate::process::{self, End};

/// Commands that run one after the other, until they are told to stop.
pub(crate) struct Background {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<(Item, String)>>,
}

/// One command: its name, itself, and its limit.
pub(crate) type Step = (String, Command, Duration);

impl Background {
    /// Begins; output goes through a file in `scratch`. What fails or is stopped ends the row.
    pub(crate) fn start(steps: Vec<Step>, scratch: PathBuf) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let run = move || {
            let mut items = Vec::new();
            for (name, command, limit) in steps {
                let ended = process::run_until(command, limit, &stopped, &scratch.join("background"));
                let last = ended.output.lines().rev().find(|line| !line.trim().is_empty());
                let (outcome, reason) = match ended.end {
                    end if end.success() => (Outcome::Passed, None),
                    End::TimedOut if stopped.load(Ordering::Relaxed) => {
                        (Outcome::NotRun, Some("stopped: what measures needs the machine alone".to_string()))
                    }
                    End::TimedOut => {
                        (Outcome::TimedOut, Some(format!("stopped after {:.0} s", ended.seconds)))
                    }
                    _ => (Outcome::Failed, Some(last.unwrap_or("no output").trim().to_string())),
                };
                let seconds = ended.seconds;
                items.push((Item { name, outcome, seconds, reason, launched: Vec::new() }, ended.output));
                if outcome != Outcome::Passed {
                    break;
                }
            }
            items
        };
        Background { stop, thread: std::thread::spawn(run) }
    }

    /// Stops it and tells what ran, with its output.
    pub(crate) fn end(self) -> Vec<(Item, String)> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn steps_follow_each_other_until_one_is_stopped() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let step = |name: &str, script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            (name.to_string(), command, Duration::from_secs(50))
        };
        let done = folder.path().join("done");
        let touch = format!("touch {}; exec sleep 60", done.display());
        let steps = vec![step("one", "true"), step("two", &touch), step("three", "true")];
        let started = Instant::now();
        let background = Background::start(steps, folder.path().to_path_buf());
        while !done.exists() && started.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let items: Vec<_> = background.end().into_iter().map(|(item, _)| (item.name, item.outcome)).collect();
        assert_eq!(items, [("one".to_string(), Outcome::Passed), ("two".to_string(), Outcome::NotRun)]);
        assert!(started.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_step_that_fails_ends_the_row_and_says_why() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut command = Command::new("sh");
        command.args(["-c", "echo no such wheel >&2; exit 1"]);
        let later = ("later".to_string(), Command::new("true"), Duration::from_secs(50));
        let steps = vec![("wheels".to_string(), command, Duration::from_secs(50)), later];
        let background = Background::start(steps, folder.path().to_path_buf());
        while !background.thread.is_finished() {
            std::thread::sleep(Duration::from_millis(5));
        }
        let items = background.end();
        let found: Vec<_> = items.iter().map(|(item, _)| (item.outcome, item.reason.as_deref())).collect();
        assert_eq!(found, [(Outcome::Failed, Some("no such wheel"))]);
    }
}
