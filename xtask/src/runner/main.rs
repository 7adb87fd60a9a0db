//! Runs a bundle: every GPU test in its own process, sanitizers, ceilings, benches and peers.
//!
//! Leaves `results.json`, which `cargo xtask gpu-record` reads, and `log.txt`. The results are written after every test and program, also
//! to a folder beside the bundle, where `--rest` finds them; what a bench measures is there line by line until it has ended.

mod background;
mod log;
mod machine;
mod parts;
mod process;
mod programs;
mod queue;
mod store;
mod task;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use background::Background;
use log::Log;
use parts::{Kind, PARTS, Run};
use queue::Watch;
use store::{Earlier, Store};
use xtask::results::{self, MANIFEST, Manifest, Outcome, Part, RESULTS, Source};

#[derive(Default)]
struct Arguments {
    bundle: Option<PathBuf>,
    out: Option<PathBuf>,
    only: Vec<String>,
    within: Option<Duration>,
    spent: Duration,
    rest: Option<Rest>,
    filter: String,
    jobs: Option<usize>,
    help: bool,
}

/// Which results are gone on with.
#[derive(Debug, PartialEq)]
enum Rest {
    /// Those that were kept beside the bundle.
    Kept,
    File(PathBuf),
}

fn parse(arguments: impl Iterator<Item = String>) -> Result<Arguments, String> {
    let mut parsed = Arguments::default();
    let mut rest = arguments.peekable();
    while let Some(argument) = rest.next() {
        if argument == "--rest" {
            let file = rest.next_if(|next| !next.starts_with("--"));
            parsed.rest = Some(file.map_or(Rest::Kept, |file| Rest::File(file.into())));
            continue;
        }
        let mut value = || rest.next().ok_or_else(|| format!("{argument} needs a value"));
        match argument.as_str() {
            "--bundle" => parsed.bundle = Some(value()?.into()),
            "--out" => parsed.out = Some(value()?.into()),
            "--only" => parsed.only.extend(value()?.split(',').map(str::to_string)),
            "--within" => parsed.within = Some(Duration::from_secs(number(&argument, &value()?)?)),
            "--spent" => parsed.spent = Duration::from_secs(number(&argument, &value()?)?),
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
run.sh [--only PART[,PART…]] [--out DIR] [--within SECONDS] [--rest [FILE]] [--filter TEXT] [--jobs N]

  --only PART     only these parts
  --out DIR       where results.json and log.txt go; else $OUT, else gpu-results beside the bundle, where results.json is always kept too
  --within N      all parts together end within N seconds and share them; else each has its own limit
  --rest [FILE]   goes on where an earlier run of this bundle stopped: what passed there is kept and not run again, what was measured is
                  not measured again; FILE is its results.json, else the one that was kept beside the bundle
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
    let kept = bundle.with_file_name("gpu-results");
    let out = arguments.out.or_else(|| std::env::var_os("OUT").map(PathBuf::from));
    let out = out.unwrap_or_else(|| kept.clone());
    let scratch = std::env::temp_dir().join(format!("longkv-gpu-{}", std::process::id()));
    std::fs::create_dir_all(&scratch).map_err(|error| format!("{}: {error}", scratch.display()))?;
    // A bundle may lie where nothing can be written; then nothing is kept.
    let keeps = std::fs::create_dir_all(&kept).is_ok();
    let folders = folders([Some(&out), keeps.then_some(&kept)])?;

    let log = Log::open(&folders[0].join("log.txt"))?;
    let machine = machine::describe();
    log.line(&match (&machine.device, &machine.no_device) {
        (Some(device), _) => format!("{device}, commit {}", manifest.commit),
        (None, reason) => format!("no GPU: {}", reason.as_deref().unwrap_or("unknown reason")),
    });
    let kept_file = kept.join(RESULTS);
    let earlier = match &arguments.rest {
        None => Earlier::Keep,
        Some(Rest::Kept) => Earlier::GoOn(&kept_file),
        Some(Rest::File(file)) => Earlier::GoOn(file),
    };
    let (store, words) = Store::open(folders.clone(), &earlier, &manifest, &machine)?;
    words.iter().for_each(|words| log.line(words));

    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let mut run = Run {
        bundle,
        source: Source::new(&machine, &manifest.commit, results::now()),
        manifest,
        scratch: scratch.clone(),
        out: folders[0].clone(),
        kept: if keeps { kept.join("cache") } else { scratch.join("cache") },
        filter: arguments.filter,
        jobs: arguments.jobs.unwrap_or((cores / 2).clamp(1, 6)),
        durations: BTreeMap::new(),
    };
    let wanted = |kind: &&Kind| match &arguments.only[..] {
        [] => kind.unasked,
        names => names.iter().any(|name| name == kind.name),
    };
    let kinds: Vec<_> = PARTS.iter().filter(wanted).collect();
    let mut background = begin(&run, &kinds);
    let mut prepared = Vec::new();
    for (index, kind) in kinds.iter().enumerate() {
        if let Some(background) = background.take_if(|_| kind.serial()) {
            for (item, output) in background.end() {
                log.item(&item, &output);
                prepared.push(item);
            }
        }
        run.durations = store.with(|results| durations(results.parts.get("tests")));
        log.line(&format!("== {}: {}", kind.name, kind.what));
        let clocks = |when: &str| {
            let clocks = machine::clocks().map(|clocks| format!("{when} {}: {clocks}", kind.name));
            store.with(|results| results.machine.clocks.extend(clocks));
        };
        clocks("before");
        let spent = started.elapsed() + arguments.spent;
        let left = arguments.within.map(|within| within.saturating_sub(spent));
        let limit = parts::limit(&kinds[index..], left);
        let mut before = store.with(|results| results.parts.get(kind.name).cloned());
        before = before.filter(|_| arguments.rest.is_some());
        if kind.name == "peers" {
            prepared.drain(..).for_each(|item| before.get_or_insert_default().put(item));
        }
        // A disk that is full is said when the part ends.
        let watch = Watch {
            item: &|item, output| log.item(item, output),
            part: &|part| _ = store.put(kind.name, part),
        };
        let part = run.part(kind, limit, before, &watch);
        clocks("after");
        store.put(kind.name, &part)?;
        store.forget_lines(kind.name);
    }
    let _ = std::fs::remove_dir_all(&scratch);

    log.line("== summary");
    let mut good = true;
    for kind in kinds {
        let part = store.with(|results| results.parts[kind.name].clone());
        good &= part.skipped.is_none() && part.items.iter().all(|item| item.outcome == Outcome::Passed);
        log.line(&summary(kind.name, &part));
    }
    Ok(good)
}

/// The folders of the results, made if they are missing, each once.
fn folders(wanted: [Option<&PathBuf>; 2]) -> Result<Vec<PathBuf>, String> {
    let mut folders = Vec::new();
    for folder in wanted.into_iter().flatten() {
        let made = std::fs::create_dir_all(folder).and_then(|()| folder.canonicalize());
        folders.push(made.map_err(|error| format!("{}: {error}", folder.display()))?);
    }
    folders.dedup();
    Ok(folders)
}

/// Seconds that tests took that passed.
fn durations(tests: Option<&Part>) -> BTreeMap<String, f64> {
    let items = tests.iter().flat_map(|part| &part.items);
    let passed = items.filter(|item| item.outcome == Outcome::Passed);
    passed.map(|item| (item.name.clone(), item.seconds)).collect()
}

/// Makes ready what peers need, if something else runs before them that leaves the GPU's rates alone.
fn begin(run: &Run, kinds: &[&Kind]) -> Option<Background> {
    let peers = kinds.iter().position(|kind| kind.name == "peers")?;
    let first = kinds.iter().position(|kind| kind.serial())?;
    if first == 0 || peers < first {
        return None;
    }
    let steps = run
        .preparations()
        .into_iter()
        .map(|task| (task.name.clone(), run.command("peers", &task), task.limit));
    let steps: Vec<_> = steps.collect();
    (!steps.is_empty()).then(|| Background::start(steps, run.scratch.clone()))
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

#[cfg(test)]
mod tests {
    use xtask::results::Item;

    use super::*;

    #[test]
    fn arguments_are_read() {
        let words = |text: &str| parse(text.split_whitespace().map(str::to_string));
        let parsed = words(
            "--bundle b --only tests,peers --only jit --out o --filter decode --jobs 3 --within 90 --rest r",
        )
        .unwrap();
        assert_eq!(parsed.only, ["tests", "peers", "jit"]);
        assert_eq!(
            (parsed.within, parsed.rest),
            (Some(Duration::from_secs(90)), Some(Rest::File("r".into())))
        );
        assert_eq!((parsed.filter.as_str(), parsed.jobs), ("decode", Some(3)));
        let parsed = words("--rest --within 90").unwrap();
        assert_eq!((parsed.within, parsed.rest), (Some(Duration::from_secs(90)), Some(Rest::Kept)));
        assert_eq!(words("--only jit --rest").unwrap().rest, Some(Rest::Kept));
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
