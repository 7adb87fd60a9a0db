//! Runs a bundle: every GPU test in its own process, sanitizers, ceilings, benches and peers.
//!
//! Leaves `results.json`, which `cargo xtask gpu-record` reads, and `log.txt`. The results are written after every part, and
//! parts that an earlier call left in the same folder are kept.

mod machine;
mod parts;
mod process;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;

use parts::{Kind, PARTS, Run};
use xtask::results::{self, Item, MANIFEST, Machine, Manifest, Outcome, Part, RESULTS, Results};

#[derive(Default)]
struct Arguments {
    bundle: Option<PathBuf>,
    out: Option<PathBuf>,
    only: Vec<String>,
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
            "--filter" => parsed.filter = value()?,
            "--jobs" => {
                let text = value()?;
                parsed.jobs = Some(text.parse().map_err(|_| format!("--jobs {text} is no number"))?);
            }
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

/// Whether everything that ran passed.
fn command() -> Result<bool, String> {
    let arguments = parse(std::env::args().skip(1))?;
    if arguments.help {
        println!("run.sh [--only PART[,PART…]] [--out DIR] [--filter TEXT] [--jobs N]\n\nParts, in order:");
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
    let mut results = earlier(&out.join(RESULTS), &manifest, &machine).unwrap_or(Results {
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
    let mut ran = Vec::new();
    for kind in PARTS.iter().filter(wanted) {
        if let Some(tests) = results.parts.get("tests") {
            run.durations = tests.items.iter().map(|item| (item.name.clone(), item.seconds)).collect();
        }
        log.line(&format!("== {}: {}", kind.name, kind.what));
        results
            .machine
            .clocks
            .extend(machine::clocks().map(|clocks| format!("before {}: {clocks}", kind.name)));
        let part = run.part(kind, &|item, output| log.item(item, output));
        results
            .machine
            .clocks
            .extend(machine::clocks().map(|clocks| format!("after {}: {clocks}", kind.name)));
        results.parts.insert(kind.name.to_string(), part);
        results::write(&out.join(RESULTS), &results)?;
        ran.push(kind.name);
    }
    let _ = std::fs::remove_dir_all(&scratch);

    log.line("== summary");
    let mut good = true;
    for name in ran {
        let part = &results.parts[name];
        good &= part.skipped.is_none() && part.items.iter().all(|item| item.outcome == Outcome::Passed);
        log.line(&summary(name, part));
    }
    Ok(good)
}

/// Results that an earlier call left for the same bundle on the same kind of machine.
fn earlier(path: &Path, manifest: &Manifest, machine: &Machine) -> Option<Results> {
    let results: Results = results::read(path).ok()?;
    let same = results.machine.device == machine.device && results.machine.driver == machine.driver;
    (results.bundle == *manifest && same).then_some(results)
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
        let parsed =
            words("--bundle b --only tests,peers --only jit --out o --filter decode --jobs 3").unwrap();
        assert_eq!(parsed.only, ["tests", "peers", "jit"]);
        assert_eq!((parsed.filter.as_str(), parsed.jobs), ("decode", Some(3)));
        for (text, expected) in [
            ("--only nothing", "there is no part nothing"),
            ("--jobs many", "is no number"),
            ("--fast", "there is no option --fast"),
            ("--out", "--out needs a value"),
        ] {
            let error = words(text).err().expect(text);
            assert!(error.contains(expected), "{error}");
        }
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
