//! One process of a part: what it is started with, and how its end is judged.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde::de::DeserializeOwned;
use xtask::results::{self, Ceiling, Figure, Item, Launch, Outcome};

use crate::parts::{Kind, Run};
use crate::process::{self, End, Ended};

/// One child to run.
pub(super) struct Task {
    pub(super) name: String,
    pub(super) program: PathBuf,
    pub(super) arguments: Vec<OsString>,
    /// What it may take at most: what is still running then hangs.
    pub(super) limit: Duration,
    /// What it takes at least, as far as is known: it is not begun where less is left.
    pub(super) expected: Duration,
    /// Whether it is a test of libtest's, which must say that one test passed.
    pub(super) test: bool,
    /// Variables that it has beside those of all.
    pub(super) variables: Vec<(&'static str, String)>,
    /// Why an earlier attempt of this run failed, where another goes on behind it.
    pub(super) failed: Option<String>,
}

/// Environment variable that names the file of figures that need no measuring again, as JSON lines.
const FIGURES_HAD: &str = "LONGKV_FIGURES_HAD";

impl Run {
    /// Runs one for at most `allowed`. Benches and peers leave out the figures of `had`.
    pub(super) fn run_one(
        &self,
        kind: &Kind,
        index: usize,
        task: &Task,
        allowed: Duration,
        had: &[Figure],
    ) -> Finished {
        let file = |what: &str| self.scratch.join(format!("{}-{index}.{what}", kind.name));
        let launches = file("launches");
        let mut command = self.command(kind.name, task);
        command.env("LONGKV_LAUNCH_LOG", &launches);
        // Figures go straight to where results go, line by line: what stops the runner leaves them there.
        let lines = kind.serial().then(|| {
            (results::figures_file(&self.out, kind.name), results::ceilings_file(&self.out, kind.name))
        });
        let begun = lines.as_ref().map(|(figures, ceilings)| (end_line(figures), end_line(ceilings)));
        if let Some((figures, ceilings)) = &lines {
            command.env("LONGKV_FIGURES", figures).env("LONGKV_CEILINGS", ceilings);
            let known: Vec<String> = had.iter().filter_map(|f| serde_json::to_string(f).ok()).collect();
            let path = file("had");
            if std::fs::write(&path, known.join("\n") + "\n").is_ok() {
                command.env(FIGURES_HAD, path);
            }
        }
        let ended = process::run(command, task.limit.min(allowed), &file("output"));
        let (mut figures, mut ceilings) = (Vec::new(), Vec::new());
        if let (Some(files), Some(begun)) = (&lines, begun) {
            (figures, ceilings) = (lines_from::<Figure>(&files.0, begun.0), lines_from(&files.1, begun.1));
        }
        let (outcome, reason) = judge(task, &ended, allowed, &figures);
        let launched = read_lines(&launches).iter().filter_map(|line| Launch::parse(line)).collect();
        let item = Item { name: task.name.clone(), outcome, seconds: ended.seconds, reason, launched };
        Finished { item, figures, ceilings, output: ended.output, whole: ended.end.success() }
    }

    /// The command of a task with all that it finds in its environment.
    pub(super) fn command(&self, part: &str, task: &Task) -> Command {
        let mut command = Command::new(&task.program);
        command
            .args(&task.arguments)
            .current_dir(&self.scratch)
            .env("REQUIRE_GPU", "1")
            .env("CRITERION_HOME", self.scratch.join("criterion"))
            .env("PYTHONUNBUFFERED", "1")
            .envs(task.variables.iter().map(|(name, value)| (name, value)));
        if part == "peers" {
            // What compilers of peers make is found by the next call on this machine.
            command
                .env("PYTHONPATH", self.site())
                .env("TRITON_CACHE_DIR", self.kept.join("triton"))
                .env("FLASHINFER_WORKSPACE_BASE", &self.kept)
                .env("MAX_JOBS", "8");
            if self.source.device.contains("H100") || self.source.device.contains("H200") {
                command.env("FLASHINFER_CUDA_ARCH_LIST", "9.0a");
            }
        }
        if part == "jit" {
            // No cache either: every process compiles what it needs.
            command.env_remove("LONGKV_CUBIN_DIR").env("LONGKV_CACHE_DIR", "");
        } else {
            command
                .env("LONGKV_CUBIN_DIR", self.bundle.join("cubins"))
                .env("LONGKV_CACHE_DIR", self.scratch.join("cache"));
        }
        command
    }
}

/// What a child left.
pub(super) struct Finished {
    pub(super) item: Item,
    pub(super) figures: Vec<Figure>,
    pub(super) ceilings: Vec<Ceiling>,
    pub(super) output: String,
    /// Whether it ended by itself and well: it has nothing left to do, whatever its cases say.
    pub(super) whole: bool,
}

impl Finished {
    pub(super) fn not_started(task: &Task, left: Duration) -> Self {
        let reason = format!(
            "{:.0} s of the part were left, and it takes {:.0} or more",
            left.as_secs_f64(),
            task.expected.as_secs_f64()
        );
        let item = Item {
            name: task.name.clone(),
            outcome: Outcome::NotRun,
            seconds: 0.0,
            reason: Some(reason),
            launched: Vec::new(),
        };
        Finished { item, figures: Vec::new(), ceilings: Vec::new(), output: String::new(), whole: false }
    }
}

/// Success needs more than an exit status: a test must have run, and must not have skipped anything; a bench may have failed in a case.
fn judge(task: &Task, ended: &Ended, allowed: Duration, figures: &[Figure]) -> (Outcome, Option<String>) {
    let seconds = ended.seconds;
    match ended.end {
        // Only its own limit shows that it hangs: what a short part cut off has shown nothing.
        End::TimedOut if allowed < task.limit => {
            let reason =
                format!("stopped after {seconds:.0} s of {:.0}, for others", task.limit.as_secs_f64());
            (Outcome::NotRun, Some(reason))
        }
        End::TimedOut => (Outcome::TimedOut, Some(format!("stopped after {seconds:.0} s"))),
        end if !end.success() => (Outcome::Failed, Some(reason(ended))),
        _ if task.test => match ended.output.lines().find(|line| line.contains("SKIPPED")) {
            Some(line) => (Outcome::Skipped, Some(line.trim().to_string())),
            None if !ended.output.contains(" 1 passed;") => {
                (Outcome::Failed, Some("no test of this name ran".to_string()))
            }
            None => (Outcome::Passed, None),
        },
        _ => of_figures(figures),
    }
}

/// What the lines of a program that ended well say of it.
fn of_figures(figures: &[Figure]) -> (Outcome, Option<String>) {
    let said = |list: Vec<(&Figure, &String)>| {
        let (figure, reason) = list.first()?;
        Some(format!("{} of {}: {reason} ({} in all)", figure.implementation, figure.bench, list.len()))
    };
    let failed = figures.iter().filter_map(|figure| Some((figure, figure.failed.as_ref()?))).collect();
    if let Some(reason) = said(failed) {
        return (Outcome::Failed, Some(reason));
    }
    let skipped = figures.iter().filter_map(|figure| Some((figure, figure.skipped.as_ref()?))).collect();
    match said(skipped) {
        // One that measured nothing has to be asked again.
        Some(reason) if !figures.iter().any(Figure::measured) => (Outcome::Skipped, Some(reason)),
        _ => (Outcome::Passed, None),
    }
}

/// The sentence that explains a failure: a sanitizer's first finding, what was said in a panic, or the last line.
fn reason(ended: &Ended) -> String {
    const FINDINGS: [&str; 5] = ["Invalid ", "Program hit ", "Error: ", "Race ", "ERROR"];
    let lines: Vec<&str> = ended.output.lines().map(str::trim).collect();
    let sanitizer = lines.iter().find_map(|line| {
        let words = line.strip_prefix("========= ")?;
        FINDINGS.iter().any(|start| words.starts_with(start)).then_some(words)
    });
    let panicked = lines.iter().position(|line| line.contains("panicked at"));
    let panic = panicked.and_then(|at| lines[at + 1..].iter().find(|line| !line.is_empty()).copied());
    let last = lines.iter().rev().find(|line| !line.is_empty()).copied();
    let status = match ended.end {
        End::Exited(status) => status.to_string(),
        _ => "not started".to_string(),
    };
    let said = sanitizer.or(panic).or(last).unwrap_or("no output");
    let said: String = said.chars().take(400).collect();
    format!("{said} ({status})")
}

fn read_lines(path: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().filter(|line| !line.is_empty()).map(str::to_string).collect()
}

/// Ends the line that a killed child left open, so that the next one begins its own; how long the file is then.
fn end_line(path: &Path) -> u64 {
    let end = || -> std::io::Result<u64> {
        let mut file = File::options().read(true).append(true).open(path)?;
        let length = file.metadata()?.len();
        if length == 0 {
            return Ok(0);
        }
        file.seek(SeekFrom::End(-1))?;
        let mut last = [0];
        file.read_exact(&mut last)?;
        if last == *b"\n" {
            return Ok(length);
        }
        file.write_all(b"\n")?;
        Ok(length + 1)
    };
    // None is there before the first child.
    end().unwrap_or(0)
}

/// The values of the lines behind the first `begun` bytes; one that is cut off is left out.
fn lines_from<T: DeserializeOwned>(path: &Path, begun: u64) -> Vec<T> {
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(text.get(begun as usize..).unwrap_or_default()).into_owned();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::ExitStatus;

    use super::*;

    fn exited(status: i32, output: &str) -> Ended {
        let end = End::Exited(ExitStatus::from_raw(status << 8));
        Ended { end, seconds: 1.0, output: output.to_string() }
    }

    #[test]
    fn the_first_sentence_that_explains_is_taken() {
        let cases = [
            (
                "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4\n========= ERROR SUMMARY: 1 error",
                "Invalid __global__ read of size 4",
            ),
            (
                "========= Program hit CUDA_ERROR_INVALID_VALUE (error 1)\n========= ERROR SUMMARY: 1 error",
                "Program hit CUDA_ERROR_INVALID_VALUE (error 1)",
            ),
            ("========= ERROR SUMMARY: 3 errors", "ERROR SUMMARY: 3 errors"),
            ("thread 'a' panicked at x.rs:1:2:\nworst element 3\nnote: more", "worst element 3"),
            ("one\ntwo\n\n", "two"),
            ("", "no output"),
        ];
        for (output, expected) in cases {
            let found = reason(&exited(77, output));
            assert!(
                found.starts_with(expected) && found.ends_with("(exit status: 77)"),
                "{output:?}: {found}"
            );
        }
    }

    #[test]
    fn cases_judge_a_program_that_ended_well() {
        let figure = |median_us, skipped: Option<&str>, failed: Option<&str>| Figure {
            bench: "b".to_string(),
            implementation: "longkv".to_string(),
            median_us,
            skipped: skipped.map(str::to_string),
            failed: failed.map(str::to_string),
            ..Figure::default()
        };
        let measured = figure(2.0, None, None);
        let skipped = figure(0.0, Some("no room"), None);
        let failed = figure(0.0, None, Some("row 3 is wrong"));
        let cases = [
            (vec![], Outcome::Passed, None),
            (vec![measured.clone()], Outcome::Passed, None),
            (vec![measured.clone(), skipped.clone()], Outcome::Passed, None),
            (
                vec![skipped.clone(), skipped.clone()],
                Outcome::Skipped,
                Some("longkv of b: no room (2 in all)"),
            ),
            (
                vec![measured, failed.clone(), failed],
                Outcome::Failed,
                Some("longkv of b: row 3 is wrong (2 in all)"),
            ),
        ];
        for (figures, outcome, reason) in cases {
            assert_eq!(of_figures(&figures), (outcome, reason.map(str::to_string)), "{figures:?}");
        }
    }

    #[test]
    fn a_line_that_was_cut_off_spoils_no_other() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("figures");
        assert_eq!(end_line(&path), 0);
        std::fs::write(&path, "{\"bench\":\"a\"}\n{\"bench\":\"cut").expect("writable");
        let begun = end_line(&path);
        assert_eq!((begun, end_line(&path)), (28, 28));
        let mut file = File::options().append(true).open(&path).expect("it is there");
        file.write_all(b"{\"bench\":\"b\"}\n{\"ben").expect("writable");
        let benches =
            |from| lines_from::<Figure>(&path, from).into_iter().map(|f| f.bench).collect::<Vec<_>>();
        assert_eq!(
            (benches(begun), benches(0)),
            (vec!["b".to_string()], vec!["a".to_string(), "b".to_string()])
        );
    }
}
