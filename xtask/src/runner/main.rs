//! Runs a bundle: every GPU test in its own process, sanitizers, ceilings, benches and peers.
//!
//! Leaves `results.json`, which `cargo xtask gpu-record` reads, and `log.txt`. The results are written after every part, and
//! parts that an earlier call left in the same folder are kept.

mod machine;
mod parts;
mod process;
mod task;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use parts::{Kind, PARTS, Run};
use xtask::results::{self, Item, MANIFEST, Machine, Manifest, Outcome, Part, RESULTS, Results};

#[derive(Default)]
struct Arguments {
    bundle: Option<PathBuf>,
    out: Option<PathBuf>,
    only: Vec<String>,
    within: Option<Duration>,
    spent: Duration,
    rest: Option<PathBuf>,
    filter: String,
    jobs: Option<usize>,
    help: bool,
}

fn parse(arguments: impl Iterator<Item = String>) -> Result<Arguments, String> {
    let mut parsed = Arguments::default();
    let mut rest = arguments;
    while let Some(argument) = rest.next() {
        let mut value = || rest.next().ok_or_else(|| format!("{argument} needs a value"));
        match argument.as_str() {
            "--bundle" => parsed.bundle = Some(value()?.into()),
            "--out" => parsed.out = Some(value()?.into()),
            "--only" => parsed.only.extend(value()?.split(',').map(str::to_string)),
            "--within" => parsed.within = Some(Duration::from_secs(number(&argument, &value()?)?)),
            "--spent" => parsed.spent = Duration::from_secs(number(&argument, &value()?)?),
            "--rest" => parsed.rest = Some(value()?.into()),
            "--filter" => parsed.filter = value()?,
            "--jobs" => parsed.jobs = Some(number(&argument, &value()?)?),
            "--help" | "-h" => parsed.help = true,
            other => return Err(format!("there is no option {other}")),
        }
    }
    if let Some(name) = parsed.only.iter().find(|name| PARTS.iter().all(|kind| kind.name != **name)) {
        let known: Vec<_> = PARTS.iter().map(|kind| kind.name).collect();
        return Err(format!("there is no part {name}; the parts are {}", known.join(", ")));
    }
    Ok(parsed)
}

fn number<T: std::str::FromStr>(option: &str, text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{option} {text} is no number"))
}

fn main() -> ExitCode {
    match command() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::from(2)
        }
    }
}

const HELP: &str = "\
run.sh [--only PART[,PART…]] [--out DIR] [--within SECONDS] [--rest FILE] [--filter TEXT] [--jobs N]

  --only PART     only these parts
  --out DIR       where results.json and log.txt go; else $OUT, else ./gpu-results
  --within N      all parts together end within N seconds and share them; else each has its own limit
  --rest FILE     results.json of an earlier run of this bundle: what passed there is kept and not run again
  --filter TEXT   only tests and programs whose names contain it
  --jobs N        tests at a time

Parts, in order, with their limits:";

/// Whether everything that ran passed.
fn command() -> Result<bool, String> {
    let started = Instant::now();
    let arguments = parse(std::env::args().skip(1))?;
    if arguments.help {
        println!("{HELP}");
        for kind in PARTS {
            println!("  {:20} {:3} s  {}", kind.name, kind.limit_s, kind.what);
        }
        return Ok(true);
    }
    let bundle = arguments.bundle.ok_or("--bundle DIR is missing: start run.sh")?;
    let bundle = bundle.canonicalize().map_err(|error| format!("{}: {error}", bundle.display()))?;
    let manifest: Manifest = results::read(&bundle.join(MANIFEST))?;
    let out = arguments.out.or_else(|| std::env::var_os("OUT").map(PathBuf::from));
    let out = out.unwrap_or_else(|| PathBuf::from("gpu-results"));
    std::fs::create_dir_all(&out).map_err(|error| format!("{}: {error}", out.display()))?;
    let scratch = std::env::temp_dir().join(format!("longkv-gpu-{}", std::process::id()));
    std::fs::create_dir_all(&scratch).map_err(|error| format!("{}: {error}", scratch.display()))?;

    let log = Log::open(&out.join("log.txt"))?;
    let machine = machine::describe();
    let earlier = match &arguments.rest {
        Some(file) => Some(rest(results::read(file)?, &manifest, &machine)?),
        None => earlier(&out.join(RESULTS), &manifest, &machine),
    };
    let mut results = earlier.unwrap_or(Results {
        schema: results::SCHEMA,
        bundle: manifest.clone(),
        machine: machine.clone(),
        parts: BTreeMap::new(),
    });
    log.line(&match (&results.machine.device, &results.machine.no_device) {
        (Some(device), _) => format!("{device}, commit {}", manifest.commit),
        (None, reason) => format!("no GPU: {}", reason.as_deref().unwrap_or("unknown reason")),
    });

    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let mut run = Run {
        bundle,
        manifest,
        scratch: scratch.clone(),
        out: out.canonicalize().map_err(|error| format!("{}: {error}", out.display()))?,
        filter: arguments.filter,
        jobs: arguments.jobs.unwrap_or((cores / 2).clamp(1, 6)),
        durations: BTreeMap::new(),
    };
    let wanted = |kind: &&Kind| match &arguments.only[..] {
        [] => kind.unasked,
        names => names.iter().any(|name| name == kind.name),
    };
    let kinds: Vec<_> = PARTS.iter().filter(wanted).collect();
    for (index, kind) in kinds.iter().enumerate() {
        if let Some(tests) = results.parts.get("tests") {
            run.durations = tests.items.iter().map(|item| (item.name.clone(), item.seconds)).collect();
        }
        log.line(&format!("== {}: {}", kind.name, kind.what));
        results
            .machine
            .clocks
            .extend(machine::clocks().map(|clocks| format!("before {}: {clocks}", kind.name)));
        let spent = started.elapsed() + arguments.spent;
        let left = arguments.within.map(|within| within.saturating_sub(spent));
        let limit = parts::limit(&kinds[index..], left);
        let before = arguments.rest.as_ref().and_then(|_| results.parts.remove(kind.name));
        let part = run.part(kind, limit, before, &|item, output| log.item(item, output));
        results
            .machine
            .clocks
            .extend(machine::clocks().map(|clocks| format!("after {}: {clocks}", kind.name)));
        results.parts.insert(kind.name.to_string(), part);
        results::write(&out.join(RESULTS), &results)?;
    }
    let _ = std::fs::remove_dir_all(&scratch);

    log.line("== summary");
    let mut good = true;
    for kind in kinds {
        let part = &results.parts[kind.name];
        good &= part.skipped.is_none() && part.items.iter().all(|item| item.outcome == Outcome::Passed);
        log.line(&summary(kind.name, part));
    }
    Ok(good)
}

/// Results that an earlier call left in its folder for the same bundle on the same kind of machine.
fn earlier(path: &Path, manifest: &Manifest, machine: &Machine) -> Option<Results> {
    rest(results::read(path).ok()?, manifest, machine).ok()
}

/// Results that can be gone on with: of the same bundle on the same kind of machine.
fn rest(results: Results, manifest: &Manifest, machine: &Machine) -> Result<Results, String> {
    let of = |machine: &Machine| format!("{:?} with driver {:?}", machine.device, machine.driver);
    let built = |bundle: &Manifest| format!("a bundle of {}, built {}", bundle.commit, bundle.built);
    if results.bundle != *manifest {
        return Err(format!("--rest: expected {}, found {}", built(manifest), built(&results.bundle)));
    }
    if of(&results.machine) != of(machine) {
        return Err(format!("--rest: expected {}, found {}", of(machine), of(&results.machine)));
    }
    Ok(results)
}

fn summary(name: &str, part: &Part) -> String {
    let count = |outcome| part.items.iter().filter(|item| item.outcome == outcome).count();
    let mut words = vec![format!("{} passed", count(Outcome::Passed))];
    let others = [
        ("failed", Outcome::Failed),
        ("timed out", Outcome::TimedOut),
        ("skipped", Outcome::Skipped),
        ("not run", Outcome::NotRun),
    ];
    for (word, outcome) in others {
        if count(outcome) > 0 {
            words.push(format!("{} {word}", count(outcome)));
        }
    }
    words.extend((!part.figures.is_empty()).then(|| format!("{} figures", part.figures.len())));
    words.extend((!part.ceilings.is_empty()).then(|| format!("{} ceilings", part.ceilings.len())));
    words.extend(part.skipped.as_ref().map(|reason| format!("did not run: {reason}")));
    format!("{name:20} {:6.1} s  {}", part.seconds, words.join(", "))
}

/// Most that the log may take.
const LOG_BYTES: usize = 12 << 20;

/// The log file; lines go to stdout too.
struct Log {
    file: Mutex<(std::fs::File, usize)>,
}

impl Log {
    fn open(path: &Path) -> Result<Self, String> {
        let file = std::fs::File::create(path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Log { file: Mutex::new((file, 0)) })
    }

    fn line(&self, line: &str) {
        println!("{line}");
        self.write(line);
    }

    fn write(&self, text: &str) {
        let mut file = self.file.lock().expect("no thread panicked");
        if file.1 + text.len() < LOG_BYTES {
            file.1 += text.len() + 1;
            // The results matter more than a full disk.
            let _ = writeln!(file.0, "{text}");
        }
    }

    fn item(&self, item: &Item, output: &str) {
        let outcome = match item.outcome {
            Outcome::Passed => "passed",
            Outcome::Failed => "FAILED",
            Outcome::TimedOut => "TIMED OUT",
            Outcome::Skipped => "skipped",
            Outcome::NotRun => "not run",
        };
        let reason = item.reason.as_deref().map(|reason| format!(": {reason}")).unwrap_or_default();
        self.line(&format!("{:6.1} s  {} {outcome}{reason}", item.seconds, item.name));
        self.write(output.trim_end());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_read() {
        let words = |text: &str| parse(text.split_whitespace().map(str::to_string));
        let parsed = words(
            "--bundle b --only tests,peers --only jit --out o --filter decode --jobs 3 --within 90 --rest r",
        )
        .unwrap();
        assert_eq!(parsed.only, ["tests", "peers", "jit"]);
        assert_eq!((parsed.within, parsed.rest), (Some(Duration::from_secs(90)), Some("r".into())));
        assert_eq!((parsed.filter.as_str(), parsed.jobs), ("decode", Some(3)));
        for (text, expected) in [
            ("--only nothing", "there is no part nothing"),
            ("--jobs many", "--jobs many is no number"),
            ("--within -1", "--within -1 is no number"),
            ("--fast", "there is no option --fast"),
            ("--out", "--out needs a value"),
        ] {
            let error = words(text).err().expect(text);
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn only_the_same_bundle_on_the_same_machine_is_gone_on_with() {
        let manifest = Manifest {
            schema: results::SCHEMA,
            commit: "c".to_string(),
            built: "today".to_string(),
            glibc: String::new(),
            nvrtc: String::new(),
            rows: Vec::new(),
            tests: Vec::new(),
            benches: Vec::new(),
            ceilings: None,
            peers: Vec::new(),
            trainer: None,
        };
        let machine = Machine { device: Some("A".to_string()), ..Machine::default() };
        let results = Results {
            schema: results::SCHEMA,
            bundle: manifest.clone(),
            machine: machine.clone(),
            parts: BTreeMap::new(),
        };
        assert!(rest(results.clone(), &manifest, &machine).is_ok());
        let other = Manifest { built: "later".to_string(), ..manifest.clone() };
        let error = rest(results.clone(), &other, &machine).expect_err("another bundle");
        assert!(error.contains("built later, found a bundle of c, built today"), "{error}");
        let other = Machine { device: Some("B".to_string()), ..Machine::default() };
        let error = rest(results, &manifest, &other).expect_err("another machine");
        assert!(error.contains("found Some(\"A\")"), "{error}");
    }

    #[test]
    fn summaries_hide_nothing() {
        let item =
            |outcome| Item { name: String::new(), outcome, seconds: 0.0, reason: None, launched: Vec::new() };
        let items = [Outcome::Passed, Outcome::Failed, Outcome::Failed, Outcome::NotRun].map(item).to_vec();
        let part = Part { items, ..Part::default() };
        assert!(summary("tests", &part).contains("1 passed, 2 failed, 1 not run"));
        let part = Part { skipped: Some("no python3".to_string()), ..Part::default() };
        assert!(summary("peers", &part).contains("did not run: no python3"));
    }
}
