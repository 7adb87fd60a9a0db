//! What each part runs: the programs of the bundle, with their arguments, limits and order.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use xtask::results::{self, Executable};

use crate::machine;
use crate::parts::Run;
use crate::process;
use crate::task::Task;

/// Tests with one of these words in their names are many launches: they run in `stress`, and never under a sanitizer.
const STRESS: &[&str] = &["many_", "stress", "replay", "graph"];

/// What a task takes at least where nothing is known of it.
pub(crate) const TEST: Duration = Duration::from_secs(2);
/// A module of benches: its ceilings and a case.
const MODULE: Duration = Duration::from_secs(4);
/// A peer: PyTorch, compilers, a case.
const PEER: Duration = Duration::from_secs(25);

/// The task that installs wheels.
pub(crate) const WHEELS: &str = "wheels";

/// The peer that compiles for minutes: it can be told to do so beforehand.
const COMPILES: &str = "peers/with_flashinfer";

impl Run {
    /// What a part runs, in order.
    ///
    /// # Errors
    /// Why there is nothing to run.
    pub(crate) fn tasks(&self, part: &str) -> Result<Vec<Task>, String> {
        let seconds = Duration::from_secs;
        let mut tasks = match part {
            "tests" => self.tests(|stress, _| !stress, seconds(120))?,
            "stress" => self.tests(|stress, _| stress, seconds(300))?,
            // Compiling takes about as long as a test.
            "jit" => self.quickest(seconds(60), 2.0)?,
            "ceilings" => match &self.manifest.ceilings {
                Some(program) => vec![self.program(program, &[], seconds(230), TEST)],
                None => return Err("the bundle has no ceilings program".to_string()),
            },
            "benches" => self.modules()?,
            "peers" => self.peers()?,
            "model" => {
                let python = machine::find("python3").ok_or("there is no python3")?;
                let trainer = self.manifest.trainer.as_ref().ok_or("the bundle has no trainer")?;
                let mut task = self.python(&python, trainer, seconds(525), TEST);
                let options =
                    ["--minutes".into(), "6.5".into(), "--out".into(), self.out.join("model").into()];
                task.arguments.extend::<[OsString; 4]>(options);
                vec![task]
            }
            _ => {
                let tool =
                    part.strip_prefix("sanitizer-").ok_or_else(|| format!("there is no part {part}"))?;
                let sanitizer = machine::find("compute-sanitizer").ok_or("there is no compute-sanitizer")?;
                let mut tasks = self.quickest(seconds(90), if tool == "memcheck" { 3.0 } else { 6.0 })?;
                let mut options = vec!["--tool", tool, "--error-exitcode", "77", "--print-limit", "10"];
                if tool == "memcheck" {
                    // Every result of the driver is checked by its caller; asking for more parameters than a kernel has is how they
                    // are counted.
                    options.extend(["--report-api-errors", "no"]);
                }
                for task in &mut tasks {
                    let program = std::mem::replace(&mut task.program, sanitizer.clone());
                    let arguments = options.iter().map(OsString::from).chain([program.into()]);
                    task.arguments = arguments.chain(std::mem::take(&mut task.arguments)).collect();
                }
                tasks
            }
        };
        tasks.retain(|task| task.name.contains(&self.filter));
        if tasks.is_empty() { Err("nothing to run".to_string()) } else { Ok(tasks) }
    }

    /// A process for each module of the benches: what a module measured is kept when a later one fails or time is up.
    fn modules(&self) -> Result<Vec<Task>, String> {
        // The filter leaves the CPU references out; how long a case takes is the benches' own choice.
        const OPTIONS: [&str; 3] = ["--bench", "--noplot", "/sm_"];
        let mut tasks = Vec::new();
        for bench in &self.manifest.benches {
            for module in self.lines(bench, &["--modules"])? {
                let mut task = self.program(bench, &OPTIONS, Duration::from_secs(490), MODULE);
                task.name = format!("{} {module}", bench.name);
                task.variables.push(("LONGKV_BENCH", module));
                tasks.push(task);
            }
        }
        Ok(tasks)
    }

    /// Peers in the order of the bundle, behind the packages that travelled as wheels: one that finds none says so itself.
    fn peers(&self) -> Result<Vec<Task>, String> {
        let python = machine::find("python3").ok_or("there is no python3")?;
        let peers = self.manifest.peers.iter();
        let peers = peers.map(|peer| self.python(&python, peer, Duration::from_secs(300), PEER));
        Ok(self.install(&python).into_iter().chain(peers).collect())
    }

    /// What can be made ready while the CPU alone would be busy: wheels, and what a peer compiles.
    pub(crate) fn preparations(&self) -> Vec<Task> {
        let Some(python) = machine::find("python3") else { return Vec::new() };
        let peer = self.manifest.peers.iter().find(|peer| peer.name == COMPILES);
        let (Some(peer), Some(_)) = (peer, self.wheels()) else { return Vec::new() };
        let mut compile = self.python(&python, peer, Duration::from_secs(300), PEER);
        compile.name += " --build";
        compile.arguments.push("--build".into());
        self.install(&python).into_iter().chain([compile]).collect()
    }

    /// Installs wheels for the peers alone, unless an earlier call has.
    pub(crate) fn install(&self, python: &Path) -> Option<Task> {
        let wheels = self.wheels()?;
        let site = self.site();
        let installed = |wheel: &PathBuf| {
            let name = wheel.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let words: Vec<&str> = name.split('-').take(2).collect();
            site.join(format!("{}.dist-info", words.join("-"))).is_dir()
        };
        if wheels.iter().all(installed) {
            return None;
        }
        let options =
            ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-cache-dir", "--upgrade"];
        let arguments = options.map(OsString::from).into_iter();
        let to = ["--target".into(), site.into_os_string()];
        Some(Task {
            name: WHEELS.to_string(),
            program: python.to_path_buf(),
            arguments: arguments.chain(to).chain(wheels.into_iter().map(OsString::from)).collect(),
            limit: Duration::from_secs(120),
            // Enough for a turn to install them all: peers wait for it.
            expected: Duration::from_secs(15),
            test: false,
            variables: Vec::new(),
            failed: None,
        })
    }

    /// Where Python finds packages that travelled as wheels.
    pub(crate) fn site(&self) -> PathBuf {
        self.kept.join("site")
    }

    /// The wheels of `gpu-wheels` beside the bundle, if there are any.
    fn wheels(&self) -> Option<Vec<PathBuf>> {
        let folder = self.bundle.with_file_name("gpu-wheels");
        let files = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
        let mut wheels: Vec<PathBuf> =
            files.filter(|path| path.extension().is_some_and(|e| e == "whl")).collect();
        wheels.sort();
        (!wheels.is_empty()).then_some(wheels)
    }

    fn program(&self, program: &Executable, options: &[&str], limit: Duration, expected: Duration) -> Task {
        Task {
            name: program.name.clone(),
            program: self.bundle.join(&program.file),
            arguments: options.iter().map(OsString::from).collect(),
            limit,
            expected,
            test: false,
            variables: Vec::new(),
            failed: None,
        }
    }

    fn python(&self, python: &Path, program: &Executable, limit: Duration, expected: Duration) -> Task {
        let task = self.program(program, &[], limit, expected);
        Task { arguments: vec![task.program.into()], program: python.to_path_buf(), ..task }
    }

    /// What a program of the bundle prints when it is asked for a list.
    fn lines(&self, program: &Executable, options: &[&str]) -> Result<Vec<String>, String> {
        let mut command = Command::new(self.bundle.join(&program.file));
        command.args(options);
        let list = process::run(command, Duration::from_secs(20), &self.scratch.join("list"));
        if !list.end.success() {
            return Err(format!("{} does not list what it has: {}", program.name, list.output.trim()));
        }
        Ok(list.output.lines().map(str::to_string).collect())
    }

    /// GPU tests that `wanted` picks by whether they stress and by name: the first of every executable, then the second of each, so that
    /// little time proves something of everything.
    pub(crate) fn tests(
        &self,
        wanted: impl Fn(bool, &str) -> bool,
        limit: Duration,
    ) -> Result<Vec<Task>, String> {
        let mut ranked = Vec::new();
        let several = machine::gpus() > 1;
        for executable in &self.manifest.tests {
            let program = self.bundle.join(&executable.file);
            let list = self.lines(executable, &["--list", "--format", "terse"])?;
            let mut rank = 0;
            for test in results::gpu_tests(&list, several) {
                let stress = STRESS.iter().any(|word| test.contains(word));
                let name = format!("{} {test}", executable.name);
                if wanted(stress, &name) {
                    let arguments = ["--exact", &test, "--nocapture", "--test-threads=1"].map(OsString::from);
                    let known = self.durations.get(&name).map(|known| Duration::from_secs_f64(*known));
                    let task = Task {
                        name,
                        program: program.clone(),
                        arguments: arguments.into(),
                        limit,
                        expected: known.unwrap_or(TEST),
                        test: true,
                        variables: Vec::new(),
                        failed: None,
                    };
                    ranked.push((rank, task));
                    rank += 1;
                }
            }
        }
        ranked.sort_by_key(|(rank, _)| *rank);
        Ok(ranked.into_iter().map(|(_, task)| task).collect())
    }

    /// Tests without stress, those first that took least time in `tests`; here they take `slower` times that.
    pub(crate) fn quickest(&self, limit: Duration, slower: f64) -> Result<Vec<Task>, String> {
        let mut tasks = self.tests(|stress, _| !stress, limit)?;
        let seconds = |task: &Task| self.durations.get(&task.name).copied().unwrap_or(f64::MAX);
        tasks.sort_by(|a, b| seconds(a).total_cmp(&seconds(b)));
        for task in &mut tasks {
            task.expected = (TEST + task.expected.mul_f64(slower)).min(limit);
        }
        Ok(tasks)
    }
}
