//! The parts of a run. Each has a time limit of its own; none stops the others.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use xtask::results::{self, Item, Manifest, Outcome, Part, Source};

use crate::programs::WHEELS;
use crate::queue::Watch;
use crate::task::Task;

/// A part: its name, its limit in seconds, and what it is.
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    pub(crate) limit_s: u64,
    pub(crate) what: &'static str,
    /// Its weight where the parts share a time.
    pub(crate) share: u32,
    /// Most processes at a time, where it is not for the caller to say.
    pub(crate) jobs: Option<usize>,
    /// Whether a task that was stopped goes on where it was: it leaves out what it has measured.
    pub(crate) resumes: bool,
    /// Whether it runs without being named.
    pub(crate) unasked: bool,
}

/// All parts in the order in which they run: first whether kernels are right, then how fast.
pub(crate) const PARTS: &[Kind] = &[
    kind("tests", 480, 10, "every GPU test but those of `stress`, with the bundle's cubins"),
    kind("sanitizer-memcheck", 400, 3, "compute-sanitizer on the quickest GPU tests"),
    Kind {
        jobs: Some(1),
        ..kind("ceilings", 240, 3, "bandwidths, matrix rates, host link, launch overhead")
    },
    Kind { jobs: Some(1), resumes: true, ..kind("benches", 500, 14, "criterion benches") },
    Kind {
        jobs: Some(1),
        resumes: true,
        ..kind("peers", 500, 10, "other people's kernels on the same problems, from Python")
    },
    // Blocks of one launch contend only while their process has the GPU.
    Kind { jobs: Some(2), ..kind("stress", 500, 3, "merge stress and graph replays") },
    kind("jit", 240, 1, "the quickest GPU tests, with kernels compiled by this machine's NVRTC"),
    kind("sanitizer-racecheck", 400, 1, "compute-sanitizer again, for races in shared memory"),
    Kind {
        jobs: Some(1),
        unasked: false,
        ..kind("model", 530, 10, "trains a larger model for the engine; only where it is named")
    },
];

const fn kind(name: &'static str, limit_s: u64, share: u32, what: &'static str) -> Kind {
    Kind { name, limit_s, what, share, jobs: None, resumes: false, unasked: true }
}

impl Kind {
    /// Whether it measures, so that nothing may run beside it.
    pub(crate) fn serial(&self) -> bool {
        self.jobs == Some(1)
    }
}

/// The limit of the first of `kinds` where all of them have `left` together: what a part leaves over goes to those behind it.
pub(crate) fn limit(kinds: &[&Kind], left: Option<Duration>) -> Duration {
    let own = Duration::from_secs(kinds[0].limit_s);
    let Some(left) = left else { return own };
    let shares: u32 = kinds.iter().map(|kind| kind.share).sum();
    own.min(left * kinds[0].share / shares)
}

/// What every part needs.
pub(crate) struct Run {
    pub(crate) bundle: PathBuf,
    pub(crate) manifest: Manifest,
    /// For files of children; not kept.
    pub(crate) scratch: PathBuf,
    /// For files that are kept.
    pub(crate) out: PathBuf,
    /// For what a later call on this machine uses again.
    pub(crate) kept: PathBuf,
    /// Only tests and programs whose name contains this.
    pub(crate) filter: String,
    /// Tests at a time.
    pub(crate) jobs: usize,
    /// Where and of what; its date is that of the start.
    pub(crate) source: Source,
    /// Seconds that each test took that passed in the part `tests`, in this run or an earlier one.
    pub(crate) durations: BTreeMap<String, f64>,
}

impl Run {
    /// Runs a part for at most `limit`. What passed in `earlier` is kept and not run again; so is what was measured there.
    pub(crate) fn part(
        &self,
        kind: &Kind,
        limit: Duration,
        earlier: Option<Part>,
        watch: &Watch<'_>,
    ) -> Part {
        let started = Instant::now();
        let part = Part {
            started: results::now(),
            limit_s: limit.as_secs(),
            skipped: None,
            ..earlier.unwrap_or_default()
        };
        let tasks = self.tasks(kind.name);
        let mut part = match tasks {
            Err(reason) => Part { skipped: Some(reason), ..part },
            Ok(tasks) => {
                let tasks = left_of(tasks, &part.items);
                self.run_all(kind, tasks, started + limit, part, watch)
            }
        };
        part.seconds += started.elapsed().as_secs_f64();
        part
    }
}

/// What is left to do: what has not passed, and behind that which was never begun what was cut off, which takes longer than it had.
fn left_of(tasks: Vec<Task>, items: &[Item]) -> Vec<Task> {
    let (mut fresh, mut begun) = (Vec::new(), Vec::new());
    for mut task in tasks {
        match items.iter().find(|item| item.name == task.name) {
            // Whether wheels are needed is seen where they would lie.
            Some(item) if item.outcome == Outcome::Passed && task.name != WHEELS => {}
            Some(item) if item.seconds > 0.0 && task.name != WHEELS => {
                if item.outcome == Outcome::NotRun && task.test {
                    let longer = Duration::from_secs_f64(item.seconds * 1.25);
                    task.expected = task.expected.max(longer).min(task.limit);
                }
                begun.push(task);
            }
            _ => fresh.push(task),
        }
    }
    fresh.extend(begun);
    fresh
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use xtask::results::{Executable, Figure, Machine};

    use super::*;
    use crate::programs::TEST;

    const NOBODY: Watch<'static> = Watch { item: &|_, _| {}, part: &|_| {} };

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
            kept: folder.path().to_path_buf(),
            filter: String::new(),
            jobs: 2,
            source: Source::new(&Machine::default(), "c0ffee", String::new()),
            durations: BTreeMap::new(),
        };
        (folder, run)
    }

    fn part(run: &Run, name: &str) -> Part {
        let kind = PARTS.iter().find(|kind| kind.name == name).expect("a part");
        run.part(kind, Duration::from_secs(kind.limit_s), None, &NOBODY)
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
        let part = run.part(&PARTS[0], Duration::ZERO, None, &NOBODY);
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
        let part = run.part(kind, Duration::from_secs(60), Some(earlier), &NOBODY);
        let items: Vec<_> = part.items.iter().map(|item| (item.name.as_str(), item.outcome)).collect();
        assert_eq!(items, [("p/t one", Outcome::Passed), ("p/t two", Outcome::Passed)]);
        let figures: Vec<_> = part.figures.iter().map(|f| (f.bench.as_str(), f.median_us)).collect();
        assert_eq!(figures, [("one", 7.0), ("two", 2.5), ("more", 7.0)]);
        assert!(part.seconds > 100.0 && part.seconds < 160.0);
        // Nothing is left to do.
        let again = run.part(kind, Duration::from_secs(60), Some(part.clone()), &NOBODY);
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
            let part = run.part(&PARTS[0], Duration::from_secs(limit), Some(earlier.clone()), &NOBODY);
            part.items.iter().map(|item| item.outcome).collect::<Vec<_>>()
        };
        assert_eq!(outcomes(&run, 60), [Outcome::Passed]);
        assert_eq!(outcomes(&run, 0), [Outcome::Failed]);
        run.filter = "nothing of this name".to_string();
        assert_eq!(outcomes(&run, 60), [Outcome::Failed]);
    }

    #[test]
    fn only_its_own_limit_makes_a_hang() {
        let (_folder, run) = run_script(&format!("{LIST}sleep 30"));
        let outcome = |limit, seconds| {
            let mut tasks = run.tests(|stress, _| !stress, Duration::from_secs(limit)).expect("a list");
            let part = Part { limit_s: seconds, ..Part::default() };
            let deadline = Instant::now() + Duration::from_secs(seconds);
            tasks[0].expected = Duration::ZERO;
            let [item] = &run.run_all(&PARTS[0], tasks, deadline, part, &NOBODY).items[..] else {
                panic!("one test")
            };
            (item.outcome, item.reason.clone().unwrap_or_default())
        };
        let (ended, reason) = outcome(1, 60);
        assert_eq!((ended, reason.as_str()), (Outcome::TimedOut, "stopped after 1 s"));
        let (ended, reason) = outcome(120, 3);
        assert_eq!((ended, reason.as_str()), (Outcome::NotRun, "stopped after 1 s of 120, for others"));
    }

    #[test]
    fn what_takes_longer_than_is_left_is_not_begun() {
        let (_folder, mut run) = run_script(&format!("{LIST}echo ' 1 passed;'"));
        run.durations.insert("p/t a::gpu".to_string(), 40.0);
        let item = |limit| {
            let part = run.part(&PARTS[0], Duration::from_secs(limit), None, &NOBODY);
            let [item] = &part.items[..] else { panic!("one test") };
            item.clone()
        };
        assert_eq!(item(50).outcome, Outcome::Passed);
        let short = item(30);
        assert_eq!((short.outcome, short.seconds), (Outcome::NotRun, 0.0));
        let reason = short.reason.expect("a reason");
        assert!(reason.contains("s of the part were left, and it takes 40 or more"), "{reason}");
    }

    #[test]
    fn what_was_cut_off_comes_last_and_takes_longer_than_it_had() {
        let task = |name: &str| Task {
            name: name.to_string(),
            program: PathBuf::new(),
            arguments: Vec::new(),
            limit: Duration::from_secs(120),
            expected: TEST,
            test: true,
            variables: Vec::new(),
            failed: None,
        };
        let item = |name: &str, outcome, seconds| Item {
            name: name.to_string(),
            outcome,
            seconds,
            reason: None,
            launched: Vec::new(),
        };
        let tasks = ["cut", "failed", "passed", "waiting", "new", WHEELS].map(task).into_iter().collect();
        let items = [
            item("cut", Outcome::NotRun, 40.0),
            item("failed", Outcome::Failed, 1.0),
            item("passed", Outcome::Passed, 1.0),
            item("waiting", Outcome::NotRun, 0.0),
            item(WHEELS, Outcome::Passed, 3.0),
        ];
        let left = left_of(tasks, &items);
        let found: Vec<_> = left.iter().map(|task| (task.name.as_str(), task.expected.as_secs())).collect();
        assert_eq!(found, [("waiting", 2), ("new", 2), (WHEELS, 2), ("cut", 50), ("failed", 2)]);
    }

    #[test]
    fn every_executable_has_its_turn() {
        let (_folder, mut run) = run_script(
            "if [ \"$1\" = --list ]; then for n in 1 2 3; do echo \"t$n::gpu: test\"; done; exit; fi; echo ' 1 passed;'",
        );
        let other = Executable { name: "q/t".to_string(), ..run.manifest.tests[0].clone() };
        run.manifest.tests.push(other);
        let names: Vec<_> =
            run.tests(|_, _| true, TEST).expect("a list").into_iter().map(|task| task.name).collect();
        let expected =
            ["p/t t1::gpu", "q/t t1::gpu", "p/t t2::gpu", "q/t t2::gpu", "p/t t3::gpu", "q/t t3::gpu"];
        assert_eq!(names, expected);
    }

    #[test]
    fn wheels_are_installed_once() {
        let (folder, mut run) = run_script("exit 0");
        run.bundle = folder.path().join("gpu-bundle");
        let wheels = folder.path().join("gpu-wheels");
        std::fs::create_dir(&wheels).expect("writable");
        std::fs::write(wheels.join("some_package-1.2-py3-none-any.whl"), "").expect("writable");
        let python = PathBuf::from("python3");
        let task = run.install(&python).expect("a wheel that is not installed");
        assert!(task.arguments.iter().any(|argument| argument.to_string_lossy().ends_with("none-any.whl")));
        std::fs::create_dir_all(run.site().join("some_package-1.2.dist-info")).expect("writable");
        assert!(run.install(&python).is_none());
    }

    #[test]
    fn what_a_bench_measured_before_its_end_is_kept() {
        let (folder, run) = run_script(&format!(
            "{LIST}echo \"{{\\\"bench\\\":\\\"$LONGKV_BENCH\\\",\\\"median_us\\\":2.5}}\" >> \"$LONGKV_FIGURES\"\nsleep 30"
        ));
        let kind = PARTS.iter().find(|kind| kind.name == "benches").expect("a part");
        let part = run.part(kind, Duration::from_secs(9), None, &NOBODY);
        assert!(part.items.iter().all(|item| item.outcome == Outcome::NotRun), "{:?}", part.items);
        // Every module had a turn, and its line is where results go.
        let benches: Vec<_> = part.figures.iter().map(|figure| figure.bench.as_str()).collect();
        assert_eq!(benches, ["one", "two"]);
        assert_eq!(part.figures[0].source.as_ref().map(|source| source.commit.as_str()), Some("c0ffee"));
        let lines = std::fs::read_to_string(results::figures_file(folder.path(), "benches"));
        assert!(lines.expect("a file").lines().count() >= 2);
    }

    /// A case that takes its process along costs itself alone: the module goes on behind the others.
    #[test]
    fn a_module_that_dies_goes_on_behind_the_others() {
        let (_folder, run) = run_script(&format!(
            "{LIST}for c in 1 2 3; do\n\
             grep -q \"$LONGKV_BENCH-$c\" \"$LONGKV_FIGURES_HAD\" && continue\n\
             if [ $LONGKV_BENCH-$c = one-2 ]; then\n\
             echo \"{{\\\"bench\\\":\\\"one-2\\\",\\\"failed\\\":\\\"a bad address\\\"}}\" >> \"$LONGKV_FIGURES\"\n\
             echo context lost; exit 3; fi\n\
             echo \"{{\\\"bench\\\":\\\"$LONGKV_BENCH-$c\\\",\\\"median_us\\\":2.5}}\" >> \"$LONGKV_FIGURES\"\n\
             done"
        ));
        let benches = part(&run, "benches");
        let figures: Vec<_> = benches.figures.iter().map(|f| (f.bench.as_str(), f.measured())).collect();
        let expected = [
            ("one-1", true),
            ("one-2", false),
            ("two-1", true),
            ("two-2", true),
            ("two-3", true),
            ("one-3", true),
        ];
        assert_eq!(figures, expected);
        let items: Vec<_> = benches.items.iter().map(|item| (item.name.as_str(), item.outcome)).collect();
        assert_eq!(items, [("p/t one", Outcome::Failed), ("p/t two", Outcome::Passed)]);
        let reason = benches.items[0].reason.as_deref().expect("a reason");
        assert!(reason.starts_with("context lost"), "{reason}");
        // The next run tries again what failed, and nothing else.
        let kind = PARTS.iter().find(|kind| kind.name == "benches").expect("a part");
        let again = run.part(kind, Duration::from_secs(60), Some(benches.clone()), &NOBODY);
        assert_eq!(again.items[0].outcome, Outcome::Failed);
        assert_eq!(again.figures.len(), benches.figures.len());
    }

    #[test]
    fn a_machine_that_refuses_the_sanitizer_ends_its_part() {
        let (_folder, run) = run_script(&format!("{LIST}echo '========= Device not supported'; exit 1"));
        let tasks = run.quickest(TEST, 1.0).expect("a list");
        let kind = PARTS.iter().find(|kind| kind.name == "sanitizer-memcheck").expect("a part");
        let deadline = Instant::now() + Duration::from_secs(60);
        let part = run.run_all(kind, tasks, deadline, Part::default(), &NOBODY);
        assert_eq!(part.skipped.as_deref(), Some("compute-sanitizer: Device not supported"));
        assert!(part.items.is_empty());
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
