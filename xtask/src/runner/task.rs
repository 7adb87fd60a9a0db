//! One process of a part: what it is started with, and how its end is judged.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use xtask::results::{self, Item, Launch, Outcome};

use crate::parts::Run;
use crate::process::{self, End, Ended};

/// One child to run.
pub(super) struct Task {
    pub(super) name: String,
    pub(super) program: PathBuf,
    pub(super) arguments: Vec<OsString>,
    pub(super) limit: Duration,
    /// Whether it is a test of libtest's, which must say that one test passed.
    pub(super) test: bool,
    /// Variables that it has beside those of all.
    pub(super) variables: Vec<(&'static str, String)>,
}

impl Run {
    /// Runs one, if there is time before `deadline`.
    pub(super) fn run_one(&self, part: &str, index: usize, task: &Task, deadline: Instant) -> Finished {
        let left = deadline.saturating_duration_since(Instant::now());
        // A test that the part's end cuts off has shown nothing, so it counts as not run, but what it measured is kept; one that cannot
        // get far is not started.
        if left < Duration::from_secs(2) {
            return Finished::not_started(task);
        }
        let file = |what: &str| self.scratch.join(format!("{part}-{index}.{what}"));
        let (launches, figures, ceilings) = (file("launches"), file("figures"), file("ceilings"));
        let mut command = Command::new(&task.program);
        command
            .args(&task.arguments)
            .current_dir(&self.scratch)
            .env("REQUIRE_GPU", "1")
            .env("LONGKV_LAUNCH_LOG", &launches)
            .env("LONGKV_FIGURES", &figures)
            .env("LONGKV_CEILINGS", &ceilings)
            .env("CRITERION_HOME", self.scratch.join("criterion"))
            .env("PYTHONUNBUFFERED", "1")
            .envs(task.variables.iter().map(|(name, value)| (name, value)));
        if part == "peers" {
            command.env("PYTHONPATH", self.site());
        }
        if part == "jit" {
            // No cache either: every process compiles what it needs.
            command.env_remove("LONGKV_CUBIN_DIR").env("LONGKV_CACHE_DIR", "");
        } else {
            command
                .env("LONGKV_CUBIN_DIR", self.bundle.join("cubins"))
                .env("LONGKV_CACHE_DIR", self.scratch.join("cache"));
        }
        let ended = process::run(command, task.limit.min(left), &file("output"));
        let cut_off = ended.end == End::TimedOut && left < task.limit;
        let (outcome, reason) = if cut_off { not_run() } else { judge(task, &ended) };
        let launched = read_lines(&launches).iter().filter_map(|line| Launch::parse(line)).collect();
        let item = Item { name: task.name.clone(), outcome, seconds: ended.seconds, reason, launched };
        Finished { item, figures: read_json(&figures), ceilings: read_json(&ceilings), output: ended.output }
    }
}

/// What a child left.
pub(super) struct Finished {
    pub(super) item: Item,
    pub(super) figures: Vec<results::Figure>,
    pub(super) ceilings: Vec<results::Ceiling>,
    pub(super) output: String,
}

impl Finished {
    fn not_started(task: &Task) -> Self {
        let (outcome, reason) = not_run();
        let item = Item { name: task.name.clone(), outcome, seconds: 0.0, reason, launched: Vec::new() };
        Finished { item, figures: Vec::new(), ceilings: Vec::new(), output: String::new() }
    }
}

fn not_run() -> (Outcome, Option<String>) {
    (Outcome::NotRun, Some("the part's time was up".to_string()))
}

/// Success needs more than an exit status: a test must have run, and must not have skipped anything.
fn judge(task: &Task, ended: &Ended) -> (Outcome, Option<String>) {
    match ended.end {
        End::TimedOut => (Outcome::TimedOut, Some(format!("stopped after {:.0} s", ended.seconds))),
        end if !end.success() => (Outcome::Failed, Some(reason(ended))),
        _ => match ended.output.lines().find(|line| line.contains("SKIPPED")) {
            Some(line) if task.test => (Outcome::Skipped, Some(line.trim().to_string())),
            _ if task.test && !ended.output.contains(" 1 passed;") => {
                (Outcome::Failed, Some("no test of this name ran".to_string()))
            }
            _ => (Outcome::Passed, None),
        },
    }
}

/// The sentence that explains a failure: a sanitizer's first finding, what was said in a panic, or the last line.
fn reason(ended: &Ended) -> String {
    let lines: Vec<&str> = ended.output.lines().map(str::trim).collect();
    let sanitizer = lines.iter().find_map(|line| {
        let words = line.strip_prefix("========= ")?;
        (["Invalid ", "Error: ", "Race ", "ERROR"].iter().any(|start| words.starts_with(start)))
            .then_some(words)
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

fn read_lines(path: &std::path::Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().filter(|line| !line.is_empty()).map(str::to_string).collect()
}

/// One value per line; a line that was cut off when its writer was killed is left out.
fn read_json<T: DeserializeOwned>(path: &std::path::Path) -> Vec<T> {
    read_lines(path).iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
}
