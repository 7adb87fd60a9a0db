//! One child process with a time limit, its output in one string.

use std::fs::File;
use std::io::{ErrorKind, Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How a child ended.
pub(crate) struct Ended {
    pub(crate) end: End,
    pub(crate) seconds: f64,
    /// Start and end of stdout and stderr together, at most [`OUTPUT_BYTES`].
    pub(crate) output: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// It ended by itself.
    Exited(ExitStatus),
    /// It was killed, with all its children.
    TimedOut,
    /// It did not start, or could not be waited for; the output says why.
    Lost,
}

impl End {
    pub(crate) fn success(self) -> bool {
        matches!(self, End::Exited(status) if status.success())
    }
}

/// Most of a child's output that is kept.
const OUTPUT_BYTES: u64 = 64 << 10;

/// How long a program that is open for writing is waited for.
const BUSY: Duration = Duration::from_secs(5);

/// How long a child that was killed is waited for: one that hangs in a driver may outlive its SIGKILL, and is left behind.
const DYING: Duration = Duration::from_secs(5);

/// Runs a command for at most `limit`; what it writes goes through the file `scratch`.
pub(crate) fn run(command: Command, limit: Duration, scratch: &Path) -> Ended {
    run_until(command, limit, &AtomicBool::new(false), scratch)
}

/// [`run`], but no longer than until `stop` is set.
pub(crate) fn run_until(mut command: Command, limit: Duration, stop: &AtomicBool, scratch: &Path) -> Ended {
    let started = Instant::now();
    let ended = |end, output| Ended { end, seconds: started.elapsed().as_secs_f64(), output };
    let files = File::create(scratch).and_then(|file| Ok((file.try_clone()?, file)));
    let (out, err) = match files {
        Ok(files) => files,
        Err(error) => return ended(End::Lost, format!("{}: {error}", scratch.display())),
    };
    command.stdin(Stdio::null()).stdout(out).stderr(err);
    // A group of its own, so that what it started dies with it.
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let mut child = loop {
        match command.spawn() {
            Ok(child) => break child,
            // A fork of another thread holds a file just written open until its own exec.
            Err(error) if error.kind() == ErrorKind::ExecutableFileBusy && started.elapsed() < BUSY => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => {
                return ended(End::Lost, format!("{}: {error}", command.get_program().display()));
            }
        }
    };
    let end = match wait(&mut child, || started.elapsed() >= limit || stop.load(Ordering::Relaxed)) {
        Ok(Some(status)) => End::Exited(status),
        Ok(None) => {
            kill_group(child.id());
            let _ = child.kill();
            let killed = Instant::now();
            match wait(&mut child, || killed.elapsed() >= DYING) {
                Ok(Some(_)) => End::TimedOut,
                _ => {
                    let output = read_ends(scratch);
                    let left =
                        format!("process {} was killed and did not end; it is left behind", child.id());
                    return ended(End::TimedOut, format!("{output}\n{left}"));
                }
            }
        }
        Err(error) => {
            kill_group(child.id());
            return ended(End::Lost, format!("{}\nwaiting for it: {error}", read_ends(scratch)));
        }
    };
    ended(end, read_ends(scratch))
}

/// Waits until a child ends, or until `enough`.
fn wait(child: &mut Child, enough: impl Fn() -> bool) -> std::io::Result<Option<ExitStatus>> {
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if enough() {
            return Ok(None);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

fn kill_group(leader: u32) {
    let group = format!("-{leader}");
    let _ = Command::new("kill").args(["-KILL", "--", &group]).stderr(Stdio::null()).status();
}

/// The whole file, or its first and last parts.
fn read_ends(path: &Path) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        let mut bytes = Vec::new();
        if length <= OUTPUT_BYTES {
            file.read_to_end(&mut bytes)?;
            return Ok(bytes);
        }
        file.by_ref().take(OUTPUT_BYTES / 4).read_to_end(&mut bytes)?;
        bytes.extend_from_slice(b"\n[...]\n");
        file.seek(SeekFrom::Start(length - OUTPUT_BYTES / 4 * 3))?;
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let output = read().map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let _ = std::fs::remove_file(path);
    output.unwrap_or_else(|error| format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, limit: Duration) -> Ended {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        run(command, limit, &folder.path().join("output"))
    }

    #[test]
    fn children_end_and_say_why() {
        const LONG: Duration = Duration::from_secs(30);
        let ended = shell("echo out; echo err >&2", LONG);
        assert!(ended.end.success());
        assert!(ended.output.contains("out") && ended.output.contains("err"), "{}", ended.output);
        assert!(!shell("exit 3", LONG).end.success());
        let folder = tempfile::tempdir().expect("a temporary folder");
        let missing = run(Command::new("/no/such/program"), LONG, &folder.path().join("output"));
        assert_eq!(missing.end, End::Lost);
        assert!(missing.output.contains("/no/such/program"), "{}", missing.output);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_program_that_is_being_written_is_waited_for() {
        use std::os::unix::fs::OpenOptionsExt as _;
        let folder = tempfile::tempdir().expect("a temporary folder");
        let program = folder.path().join("program");
        let mut options = std::fs::OpenOptions::new();
        let file = options.write(true).create_new(true).mode(0o755).open(&program).expect("a file");
        std::io::Write::write_all(&mut &file, b"#!/bin/sh\necho ran\n").expect("writable");
        let writer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(file);
        });
        let ended = run(Command::new(&program), Duration::from_secs(30), &folder.path().join("output"));
        writer.join().expect("no panic");
        assert!(ended.end.success(), "{}", ended.output);
        assert_eq!(ended.output, "ran\n");
    }

    #[test]
    fn a_child_that_hangs_is_killed_with_its_children() {
        let started = Instant::now();
        let ended = shell("echo begun; sleep 60 & wait", Duration::from_secs(2));
        assert_eq!(ended.end, End::TimedOut);
        assert!(ended.output.contains("begun"), "{}", ended.output);
        assert!(started.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_child_ends_when_it_is_told_to() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut command = Command::new("sh");
        command.args(["-c", "echo begun; sleep 60"]);
        let (started, stop) = (Instant::now(), AtomicBool::new(false));
        let ended = std::thread::scope(|scope| {
            let output = folder.path().join("output");
            let running = scope.spawn(|| {
                let output = output;
                run_until(command, Duration::from_secs(50), &stop, &output)
            });
            std::thread::sleep(Duration::from_millis(300));
            stop.store(true, Ordering::Relaxed);
            running.join().expect("no panic")
        });
        assert_eq!(ended.end, End::TimedOut);
        assert!(started.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_child_that_nobody_can_wait_for_is_no_success() {
        let mut child = Command::new("true").spawn().expect("a child");
        assert!(wait(&mut child, || false).expect("a child of ours").expect("it ended").success());
        let mut endless = Command::new("sleep").arg("60").spawn().expect("a child");
        let started = Instant::now();
        let waited = wait(&mut endless, || started.elapsed() > Duration::from_millis(100));
        assert_eq!(waited.expect("a child of ours"), None);
        endless.kill().expect("a child of ours");
        assert!(!wait(&mut endless, || false).expect("a child of ours").expect("it ended").success());
        assert!(!End::Lost.success());
    }

    #[test]
    fn long_output_keeps_its_ends() {
        let ended = shell("echo first; yes | head -c 300000; echo last", Duration::from_secs(30));
        assert!(ended.output.starts_with("first") && ended.output.trim_end().ends_with("last"));
        assert!(ended.output.len() < OUTPUT_BYTES as usize + 100, "{}", ended.output.len());
    }
}
