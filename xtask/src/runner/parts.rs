//! The parts of a run. Each has a time limit of its own; none stops the others.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use xtask::results::{self, Executable, Figure, Item, Manifest, Outcome, Part};

use crate::machine;
use crate::process;
use crate::task::Task;

/// A part: its name, its limit in seconds, and what it is.
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    pub(crate) limit_s: u64,
    pub(crate) what: &'static str,
    /// Its weight where the parts share a time.
    pub(crate) share: u32,
    /// Whether it runs without being named.
    pub(crate) unasked: bool,
}

/// All parts in the order in which they run: first whether kernels are right, then how fast.
pub(crate) const PARTS: &[Kind] = &[
    kind("tests", 480, 10, "every GPU test but those of `stress`, with the bundle's cubins"),
    kind("sanitizer-memcheck", 400, 4, "compute-sanitizer on the quickest GPU tests"),
    kind("ceilings", 240, 5, "bandwidths, matrix rates, host link, launch overhead"),
    kind("benches", 500, 10, "criterion benches"),
    kind("peers", 500, 6, "other people's kernels on the same problems, from Python"),
    kind("stress", 500, 4, "merge stress and graph replays"),
    kind("jit", 240, 1, "the quickest GPU tests, with kernels compiled by this machine's NVRTC"),
    kind("sanitizer-racecheck", 400, 2, "compute-sanitizer again, for races in shared memory"),
    Kind {
        unasked: false,
        ..kind("model", 530, 10, "trains a larger model for the engine; only where it is named")
    },
];

const fn kind(name: &'static str, limit_s: u64, share: u32, what: &'static str) -> Kind {
    Kind { name, limit_s, what, share, unasked: true }
}

/// The limit of the first of `kinds` where all of them have `left` together: what a part leaves over goes to those behind it.
pub(crate) fn limit(kinds: &[&Kind], left: Option<Duration>) -> Duration {
    let own = Duration::from_secs(kinds[0].limit_s);
    let Some(left) = left else { return own };
    let shares: u32 = kinds.iter().map(|kind| kind.share).sum();
    own.min(left * kinds[0].share / shares)
}

/// Most of a part's time that one of its tasks gets.
fn share_of_one(part: &str) -> f64 {
    match part {
        "ceilings" | "benches" | "model" => 1.0,
        _ => 1.0 / 3.0,
    }
}

/// Tests with one of these words in their names are many launches: they run in `stress`, and never under a sanitizer.
const STRESS: &[&str] = &["many_", "stress", "replay", "graph"];

/// What every part needs.
pub(crate) struct Run {
    pub(crate) bundle: PathBuf,
    pub(crate) manifest: Manifest,
    /// For files of children; not kept.
    pub(crate) scratch: PathBuf,
    /// For files that are kept.
    pub(crate) out: PathBuf,
    /// Only tests and programs whose name contains this.
    pub(crate) filter: String,
    /// Tests at a time.
    pub(crate) jobs: usize,
    /// Seconds that each test took in the part `tests`, from this run or an earlier one.
    pub(crate) durations: BTreeMap<String, f64>,
}

impl Run {
    /// Runs a part for at most `limit` and hands each item to `log` with what it printed. What passed in `earlier` is kept and not run
    /// again; so is what was measured there, unless it is measured anew.
    pub(crate) fn part(
        &self,
        kind: &Kind,
        limit: Duration,
        earlier: Option<Part>,
        log: &(dyn Fn(&Item, &str) + Sync),
    ) -> Part {
        let started = Instant::now();
        let mut part = Part { started: results::now(), limit_s: limit.as_secs(), ..Part::default() };
        let mut before = Vec::new();
        if let Some(earlier) = earlier {
            before = earlier.items;
            (part.figures, part.ceilings, part.seconds) =
                (earlier.figures, earlier.ceilings, earlier.seconds);
        }
        let passed =
            |name: &str| before.iter().any(|item| item.name == name && item.outcome == Outcome::Passed);
        match self.tasks(kind.name, limit) {
            Err(reason) => part.skipped = Some(reason),
            Ok(mut tasks) => {
                tasks.retain(|task| !passed(&task.name));
                let serial = matches!(kind.name, "ceilings" | "benches" | "peers");
                let jobs = if serial { 1 } else { self.jobs };
                self.run_all(kind.name, &tasks, jobs, started + limit, &mut part, log);
            }
        }
        // An earlier outcome stands unless the same test has a new one: what failed and did not run again has still failed.
        part.items.retain(|new| {
            new.outcome != Outcome::NotRun
                || before.iter().all(|old| old.name != new.name || old.outcome == Outcome::NotRun)
        });
        before.retain(|old| part.items.iter().all(|new| new.name != old.name));
        part.items.splice(0..0, before);
        part.seconds += started.elapsed().as_secs_f64();
        part
    }

    fn tasks(&self, part: &str, limit: Duration) -> Result<Vec<Task>, String> {
        // No more than a third of a short part for one task: what hangs is stopped and named before the part's time is up.
        let seconds = |seconds| Duration::from_secs(seconds).min(limit.mul_f64(share_of_one(part)));
        let mut tasks = match part {
            "tests" => self.tests(|stress, _| !stress, seconds(120))?,
            "stress" => self.tests(|stress, _| stress, seconds(300))?,
            "jit" => self.quickest(seconds(60))?,
            "ceilings" => match &self.manifest.ceilings {
                Some(program) => vec![self.program(program, &[], seconds(230))],
                None => return Err("the bundle has no ceilings program".to_string()),
            },
            "benches" => {
                // Short, because cold medians settle fast; the filter leaves the CPU references out.
                let options =
                    ["--bench", "--noplot", "--warm-up-time", "0.3", "--measurement-time", "1", "/sm_"];
                let mut tasks = Vec::new();
                for bench in &self.manifest.benches {
                    // A process for each module: what a module measured is kept when a later one fails or time is up.
                    for module in self.lines(bench, &["--modules"])? {
                        let mut task = self.program(bench, &options, seconds(490));
                        task.name = format!("{} {module}", bench.name);
                        task.variables.push(("LONGKV_BENCH", module));
                        tasks.push(task);
                    }
                }
                tasks
            }
            "peers" => {
                let python = machine::find("python3").ok_or("there is no python3")?;
                let peers = self.manifest.peers.iter();
                // Packages that travelled as wheels first: a peer that finds none says so itself.
                let install = self.wheels().into_iter().map(|wheels| {
                    let options =
                        ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-cache-dir"];
                    let arguments = options.map(OsString::from).into_iter();
                    let to = ["--target".into(), self.site().into_os_string()];
                    Task {
                        name: "wheels".to_string(),
                        program: python.clone(),
                        arguments: arguments
                            .chain(to)
                            .chain(wheels.into_iter().map(OsString::from))
                            .collect(),
                        limit: seconds(120),
                        test: false,
                        variables: Vec::new(),
                    }
                });
                let peers = peers.map(|peer| Task {
                    name: peer.name.clone(),
                    program: python.clone(),
                    arguments: vec![self.bundle.join(&peer.file).into()],
                    limit: seconds(300),
                    test: false,
                    variables: Vec::new(),
                });
                install.chain(peers).collect()
            }
            "model" => {
                let python = machine::find("python3").ok_or("there is no python3")?;
                let trainer = self.manifest.trainer.as_ref().ok_or("the bundle has no trainer")?;
                let program = self.bundle.join(&trainer.file).into_os_string();
                let options = [program, "--minutes".into(), "6.5".into(), "--out".into()];
                vec![Task {
                    name: trainer.name.clone(),
                    program: python,
                    arguments: options.into_iter().chain([self.out.join("model").into()]).collect(),
                    limit: seconds(525),
                    test: false,
                    variables: Vec::new(),
                }]
            }
            _ => {
                let tool =
                    part.strip_prefix("sanitizer-").ok_or_else(|| format!("there is no part {part}"))?;
                let sanitizer = machine::find("compute-sanitizer").ok_or("there is no compute-sanitizer")?;
                let mut tasks = self.quickest(seconds(90))?;
                for task in &mut tasks {
                    let options = ["--tool", tool, "--error-exitcode", "77", "--print-limit", "10"];
                    let program = std::mem::replace(&mut task.program, sanitizer.clone());
                    let arguments = options.map(OsString::from).into_iter().chain([program.into()]);
                    task.arguments = arguments.chain(std::mem::take(&mut task.arguments)).collect();
                }
                tasks
            }
        };
        tasks.retain(|task| task.name.contains(&self.filter));
        if tasks.is_empty() { Err("nothing to run".to_string()) } else { Ok(tasks) }
    }

    /// Where Python finds packages that travelled as wheels.
    pub(crate) fn site(&self) -> PathBuf {
        self.scratch.join("site")
    }

    /// The wheels of `gpu-wheels` beside the bundle, if there are any.
    fn wheels(&self) -> Option<Vec<PathBuf>> {
        let folder = self.bundle.with_file_name("gpu-wheels");
        let files = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
        let wheels: Vec<PathBuf> =
            files.filter(|path| path.extension().is_some_and(|e| e == "whl")).collect();
        (!wheels.is_empty()).then_some(wheels)
    }

    fn program(&self, program: &Executable, options: &[&str], limit: Duration) -> Task {
        Task {
            name: program.name.clone(),
            program: self.bundle.join(&program.file),
            arguments: options.iter().map(OsString::from).collect(),
            limit,
            test: false,
            variables: Vec::new(),
        }
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

    /// GPU tests that `wanted` picks by whether they stress and by name.
    fn tests(&self, wanted: impl Fn(bool, &str) -> bool, limit: Duration) -> Result<Vec<Task>, String> {
        let mut tasks = Vec::new();
        let several = machine::gpus() > 1;
        for executable in &self.manifest.tests {
            let program = self.bundle.join(&executable.file);
            let list = self.lines(executable, &["--list", "--format", "terse"])?;
            for test in results::gpu_tests(&list, several) {
                let stress = STRESS.iter().any(|word| test.contains(word));
                let name = format!("{} {test}", executable.name);
                if wanted(stress, &name) {
                    let arguments = ["--exact", &test, "--nocapture", "--test-threads=1"].map(OsString::from);
                    tasks.push(Task {
                        name,
                        program: program.clone(),
                        arguments: arguments.into(),
                        limit,
                        test: true,
                        variables: Vec::new(),
                    });
                }
            }
        }
        Ok(tasks)
    }

    /// Tests without stress, those first that took least time in `tests`.
    fn quickest(&self, limit: Duration) -> Result<Vec<Task>, String> {
        let mut tasks = self.tests(|stress, _| !stress, limit)?;
        let seconds = |task: &Task| self.durations.get(&task.name).copied().unwrap_or(f64::MAX);
        tasks.sort_by(|a, b| seconds(a).total_cmp(&seconds(b)));
        Ok(tasks)
    }

    fn run_all(
        &self,
        part_name: &str,
        tasks: &[Task],
        jobs: usize,
        deadline: Instant,
        part: &mut Part,
        log: &(dyn Fn(&Item, &str) + Sync),
    ) {
        let next = AtomicUsize::new(0);
        let done = Mutex::new(BTreeMap::new());
        std::thread::scope(|scope| {
            for _ in 0..jobs.max(1).min(tasks.len()) {
                scope.spawn(|| {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        let Some(task) = tasks.get(index) else { return };
                        let finished = self.run_one(part_name, index, task, deadline);
                        log(&finished.item, &finished.output);
                        done.lock().expect("no thread panicked").insert(index, finished);
                    }
                });
            }
        });
        for finished in done.into_inner().expect("no thread panicked").into_values() {
            part.items.push(finished.item);
            for figure in finished.figures {
                let same = |old: &Figure| {
                    (&old.bench, &old.implementation) == (&figure.bench, &figure.implementation)
                };
                part.figures.retain(|old| !same(old));
                part.figures.push(figure);
            }
            for ceiling in finished.ceilings {
                part.ceilings
                    .retain(|old| (&old.name, &old.parameters) != (&ceiling.name, &ceiling.parameters));
                part.ceilings.push(ceiling);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// A bundle whose one "test executable" is a shell script.
    fn run_script(script: &str) -> (tempfile::TempDir, Run) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let program = folder.path().join("program");
        std::fs::write(&program, format!("#!/bin/sh\n{script}")).expect("writable");
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("a mode");
        let executable = Executable { name: "p/t".to_string(), file: "program".to_string() };
        let manifest = Manifest {
            schema: results::SCHEMA,
            commit: String::new(),
            built: String::new(),
            glibc: String::new(),
            nvrtc: String::new(),
            rows: Vec::new(),
            tests: vec![executable.clone()],
            benches: vec![executable.clone()],
            ceilings: Some(executable),
            peers: Vec::new(),
            trainer: None,
        };
        let run = Run {
            bundle: folder.path().to_path_buf(),
            manifest,
            scratch: folder.path().to_path_buf(),
            out: folder.path().to_path_buf(),
            filter: String::new(),
            jobs: 2,
            durations: BTreeMap::new(),
        };
        (folder, run)
    }

    fn part(run: &Run, name: &str) -> Part {
        let kind = PARTS.iter().find(|kind| kind.name == name).expect("a part");
        run.part(kind, Duration::from_secs(kind.limit_s), None, &|_, _| {})
    }

    const LIST: &str = "if [ \"$1\" = --list ]; then echo 'a::gpu: test'; echo 'a::emulator: test';\
        echo 'many_launches::gpu: test'; exit; fi\n\
        if [ \"$1\" = --modules ]; then echo 'one'; echo 'two'; exit; fi\n";

    #[test]
    fn outcomes_are_told_apart() {
        let digest = "ab".repeat(32);
        let cases = [
            ("echo 'test result: ok. 1 passed; 0 failed'", Outcome::Passed, None),
            ("echo 'test result: ok. 0 passed; 0 failed'", Outcome::Failed, Some("no test")),
            ("echo 'SKIPPED a: no GPU'; echo ' 1 passed;'", Outcome::Skipped, Some("no GPU")),
            (
                "echo \"thread 'a' panicked at x.rs:1:\"; echo worst 3; exit 101",
                Outcome::Failed,
                Some("worst 3"),
            ),
            ("kill -SEGV $$", Outcome::Failed, Some("signal")),
        ];
        for (script, outcome, reason) in cases {
            let log = format!("{LIST}echo 'k sm_90a {digest}' >> \"$LONGKV_LAUNCH_LOG\"\n");
            let (_folder, run) = run_script(&(log + script));
            let part = part(&run, "tests");
            let [item] = &part.items[..] else { panic!("{script}: {:?}", part.items) };
            assert_eq!((item.name.as_str(), item.outcome), ("p/t a::gpu", outcome), "{script}");
            match (reason, &item.reason) {
                (None, None) => {}
                (Some(words), Some(found)) => assert!(found.contains(words), "{script}: {found}"),
                other => panic!("{script}: {other:?}"),
            }
            assert_eq!(item.launched.len(), 1, "{script}");
        }
    }

    #[test]
    fn stress_runs_in_a_part_of_its_own() {
        let (_folder, run) = run_script(&format!("{LIST}echo ' 1 passed;'"));
        let names = |name: &str| part(&run, name).items.into_iter().map(|item| item.name).collect::<Vec<_>>();
        assert_eq!(names("tests"), ["p/t a::gpu"]);
        assert_eq!(names("stress"), ["p/t many_launches::gpu"]);
    }

    #[test]
    fn figures_and_ceilings_are_collected() {
        let (_folder, run) = run_script(&format!(
            "{LIST}echo \"{{\\\"bench\\\":\\\"$LONGKV_BENCH\\\",\\\"median_us\\\":2.5}}\" >> \"$LONGKV_FIGURES\"\n\
             echo '{{\"bench\":\"cut' >> \"$LONGKV_FIGURES\"\n\
             echo '{{\"name\":\"read\",\"median\":4000}}' >> \"$LONGKV_CEILINGS\"\n",
        ));
        let benches = part(&run, "benches");
        assert_eq!(benches.items.iter().map(|i| i.name.as_str()).collect::<Vec<_>>(), ["p/t one", "p/t two"]);
        let figures: Vec<_> = benches.figures.iter().map(|f| (f.bench.as_str(), f.median_us)).collect();
        assert_eq!(figures, [("one", 2.5), ("two", 2.5)]);
        let ceilings = part(&run, "ceilings");
        assert_eq!(ceilings.ceilings.iter().map(|c| c.median).collect::<Vec<_>>(), [4000.0]);
    }

    #[test]
    fn what_is_not_started_is_not_run() {
        let (_folder, run) = run_script(LIST);
        let part = run.part(&PARTS[0], Duration::ZERO, None, &|_, _| {});
        assert_eq!(part.items.iter().map(|item| item.outcome).collect::<Vec<_>>(), [Outcome::NotRun]);
    }

    /// The rest of a run: one bench passed before and one had a figure when time was up.
    #[test]
    fn what_passed_earlier_is_kept_and_not_run() {
        let (_folder, run) = run_script(&format!(
            "{LIST}echo \"{{\\\"bench\\\":\\\"$LONGKV_BENCH\\\",\\\"median_us\\\":2.5}}\" >> \"$LONGKV_FIGURES\"\n"
        ));
        let item = |name: &str, outcome| Item {
            name: name.to_string(),
            outcome,
            seconds: 1.0,
            reason: None,
            launched: Vec::new(),
        };
        let figure = |bench: &str| Figure { bench: bench.to_string(), median_us: 7.0, ..Figure::default() };
        let earlier = Part {
            items: vec![item("p/t one", Outcome::Passed), item("p/t two", Outcome::NotRun)],
            figures: ["one", "two", "more"].map(figure).to_vec(),
            seconds: 100.0,
            ..Part::default()
        };
        let kind = PARTS.iter().find(|kind| kind.name == "benches").expect("a part");
        let part = run.part(kind, Duration::from_secs(60), Some(earlier), &|_, _| {});
        let items: Vec<_> = part.items.iter().map(|item| (item.name.as_str(), item.outcome)).collect();
        assert_eq!(items, [("p/t one", Outcome::Passed), ("p/t two", Outcome::Passed)]);
        let figures: Vec<_> = part.figures.iter().map(|f| (f.bench.as_str(), f.median_us)).collect();
        assert_eq!(figures, [("one", 7.0), ("more", 7.0), ("two", 2.5)]);
        assert!(part.seconds > 100.0 && part.seconds < 160.0);
        // Nothing is left to do.
        let again = run.part(kind, Duration::from_secs(60), Some(part.clone()), &|_, _| {});
        assert_eq!((again.items, again.figures, again.skipped), (part.items, part.figures, None));
    }

    #[test]
    fn what_failed_earlier_has_failed_until_it_runs_again() {
        let (_folder, mut run) = run_script(&format!("{LIST}echo ' 1 passed;'"));
        let failed = |name: &str| Item {
            name: name.to_string(),
            outcome: Outcome::Failed,
            seconds: 1.0,
            reason: None,
            launched: Vec::new(),
        };
        let earlier = Part { items: vec![failed("p/t a::gpu")], ..Part::default() };
        let outcomes = |run: &Run, limit| {
            let part = run.part(&PARTS[0], Duration::from_secs(limit), Some(earlier.clone()), &|_, _| {});
            part.items.iter().map(|item| item.outcome).collect::<Vec<_>>()
        };
        assert_eq!(outcomes(&run, 60), [Outcome::Passed]);
        assert_eq!(outcomes(&run, 0), [Outcome::Failed]);
        run.filter = "nothing of this name".to_string();
        assert_eq!(outcomes(&run, 60), [Outcome::Failed]);
    }

    #[test]
    fn what_hangs_in_a_short_part_has_timed_out() {
        let (_folder, run) = run_script(&format!("{LIST}sleep 30"));
        let part = run.part(&PARTS[0], Duration::from_secs(9), None, &|_, _| {});
        assert_eq!(part.items.iter().map(|item| item.outcome).collect::<Vec<_>>(), [Outcome::TimedOut]);
    }

    #[test]
    fn what_a_bench_measured_before_its_end_is_kept() {
        let (_folder, run) = run_script(&format!(
            "{LIST}echo '{{\"bench\":\"b\",\"median_us\":2.5}}' >> \"$LONGKV_FIGURES\"\nsleep 30"
        ));
        let kind = PARTS.iter().find(|kind| kind.name == "benches").expect("a part");
        let part = run.part(kind, Duration::from_secs(4), None, &|_, _| {});
        assert!(part.items.iter().all(|item| item.outcome == Outcome::NotRun), "{:?}", part.items);
        assert_eq!(part.figures.len(), 1);
    }

    #[test]
    fn parts_share_a_time_by_weight() {
        let kinds: Vec<_> = PARTS.iter().filter(|kind| kind.unasked).collect();
        let seconds = |value| Some(Duration::from_secs(value));
        assert_eq!(limit(&kinds, None).as_secs(), kinds[0].limit_s);
        assert_eq!(limit(&kinds, seconds(100_000)).as_secs(), kinds[0].limit_s);
        let shares: u32 = kinds.iter().map(|kind| kind.share).sum();
        let of_shares = limit(&kinds, seconds(420)).as_secs();
        assert_eq!(of_shares, 420 * u64::from(kinds[0].share) / u64::from(shares));
        // The last one has all that is left.
        assert_eq!(limit(&kinds[kinds.len() - 1..], seconds(33)).as_secs(), 33);
        assert_eq!(limit(&kinds, seconds(0)), Duration::ZERO);
    }

    #[test]
    fn every_part_ends_within_nine_minutes() {
        assert!(PARTS.iter().all(|kind| kind.limit_s < 540));
    }
}
