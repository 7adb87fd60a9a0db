//! `cargo xtask kernels`: the compile gate.
//!
//! Every row is compiled with the function that the run time calls, then once more for ptxas's report. The machine code of kernels
//! that demand instructions is read for them: a slow path that nobody asked for compiles as well as the fast one.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use cuda::Error;
use cuda::compile::{self, Cubin, Resources};
use cuda::nvrtc::Nvrtc;
use cuda::prebuilt::PrebuiltWriter;
use cuda::table::{self, Arch, Instance, Row};

use crate::{Result, sass, toolkit};

/// The NVRTC that cubins ship from.
const SHIPPED_NVRTC: &str = "13.0";

#[derive(Default)]
struct Arguments {
    filters: Vec<String>,
    arch: Option<String>,
    all: bool,
    nvrtc: Option<String>,
    sass: bool,
    loops: bool,
    prebuilt: Option<PathBuf>,
}

fn parse(arguments: &[String]) -> Result<Arguments> {
    let mut parsed = Arguments::default();
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let mut value = || rest.next().cloned().ok_or_else(|| format!("{argument} needs a value"));
        match argument.as_str() {
            "--arch" => parsed.arch = Some(value()?),
            "--all" => parsed.all = true,
            "--nvrtc" => parsed.nvrtc = Some(value()?),
            "--sass" => parsed.sass = true,
            "--loops" => parsed.loops = true,
            "--prebuilt" => parsed.prebuilt = Some(value()?.into()),
            option if option.starts_with('-') => return Err(format!("there is no option {option}")),
            filter => parsed.filters.push(filter.to_string()),
        }
    }
    Ok(parsed)
}

pub(crate) fn command(arguments: &[String]) -> Result {
    let arguments = parse(arguments)?;
    let folder = toolkit::nvrtc(arguments.nvrtc.as_deref().unwrap_or(SHIPPED_NVRTC))?.install()?;
    let nvrtc = Nvrtc::open(&folder).map_err(|error| error.to_string())?;
    let (jobs, skipped) = jobs(&arguments, nvrtc);
    if jobs.is_empty() {
        return Err("no row matches".to_string());
    }
    let mut prebuilt = match &arguments.prebuilt {
        Some(folder) => Some(PrebuiltWriter::create(folder).map_err(|error| error.to_string())?),
        None => None,
    };

    let width = jobs.iter().map(|job| job.instance.label().len()).max().unwrap_or(0).max("kernel".len());
    println!("NVRTC {}", nvrtc.version());
    println!(
        "{:width$}  {:7}  {:>9}  {:>6}  {:>6}  {:>5}  {:>7}  {:>5}",
        "kernel", "arch", "registers", "shared", "spills", "stack", "cubin", "ms"
    );
    // Budgets are for the compiler that ships; another one only has to compile every row.
    let judged = arguments.nvrtc.as_deref().is_none_or(|version| version == SHIPPED_NVRTC);
    let started = Instant::now();
    let mut faults = 0;
    let mut shown = Ok(());
    run(&jobs, nvrtc, |job, outcome| {
        let label = job.instance.label();
        let arch = job.arch.to_string();
        match &outcome {
            Ok(built) => {
                let r = &built.resources;
                println!(
                    "{label:width$}  {arch:7}  {:>9}  {:>6}  {:>6}  {:>5}  {:>7}  {:>5}",
                    r.registers,
                    r.shared,
                    r.spill_stores + r.spill_loads,
                    r.stack,
                    built.cubin.bytes.len(),
                    built.time.as_millis(),
                );
                for line in built.cubin.log.lines() {
                    println!("    {line}");
                }
                for fault in over_budget(job, r).iter().chain(&built.wrong_instructions) {
                    if judged {
                        faults += 1;
                    }
                    println!("    {}: {fault}", if judged { "FAILED" } else { "note" });
                }
                if shown.is_ok() && (arguments.sass || arguments.loops) {
                    shown = print_code(&built.cubin, &arguments);
                }
                if shown.is_ok()
                    && let Some(prebuilt) = &mut prebuilt
                {
                    shown = prebuilt
                        .add(&job.instance, job.arch, &built.cubin)
                        .map_err(|error| error.to_string());
                }
            }
            Err(error) => {
                faults += 1;
                println!("{label:width$}  {arch:7}  FAILED: {error}");
            }
        }
    });
    shown?;
    for (arch, rows) in &skipped {
        println!("skipped {rows} rows for {arch}: NVRTC {} does not know it", nvrtc.version());
    }
    println!("{} compiles in {:.1} s, {faults} faults", jobs.len(), started.elapsed().as_secs_f32());
    if faults > 0 {
        return Err(format!("{faults} faults"));
    }
    if let Some(prebuilt) = prebuilt {
        let path = prebuilt.finish(nvrtc.version()).map_err(|error| error.to_string())?;
        println!("wrote {}", path.display());
    }
    Ok(())
}

struct Job {
    instance: Instance,
    /// None for instances that are allowed but not shipped: they have no budget.
    row: Option<&'static Row>,
    arch: Arch,
}

/// What is to be compiled, and how many rows are left out per architecture that NVRTC does not know.
fn jobs(arguments: &Arguments, nvrtc: &Nvrtc) -> (Vec<Job>, BTreeMap<Arch, usize>) {
    let instances: Vec<_> = if arguments.all {
        table::kernels().flat_map(allowed).map(|instance| (instance.row(), instance)).collect()
    } else {
        table::shipped().map(|(instance, row)| (Some(row), instance)).collect()
    };
    let mut skipped = BTreeMap::new();
    let mut jobs = Vec::new();
    for (row, instance) in instances {
        let label = instance.label();
        if !arguments.filters.is_empty() && !arguments.filters.iter().any(|filter| label.contains(filter)) {
            continue;
        }
        for &arch in instance.kernel.arch.gate() {
            if arguments.arch.as_ref().is_some_and(|wanted| *wanted != arch.to_string()) {
                continue;
            }
            if nvrtc.supports(arch) {
                jobs.push(Job { instance: instance.clone(), row, arch });
            } else {
                *skipped.entry(arch).or_insert(0) += 1;
            }
        }
    }
    (jobs, skipped)
}

/// Every combination of a kernel's allowed constants.
fn allowed(kernel: &'static table::Kernel) -> impl Iterator<Item = Instance> {
    let combinations: usize = kernel.constants.iter().map(|constant| constant.allowed.len()).product();
    (0..combinations).map(move |mut combination| {
        let values = kernel.constants.iter().map(|constant| {
            let value = constant.allowed[combination % constant.allowed.len()];
            combination /= constant.allowed.len();
            value
        });
        Instance { kernel, values: values.collect() }
    })
}

struct Built {
    cubin: Cubin,
    resources: Resources,
    /// Of the run time's compile alone.
    time: Duration,
    /// What the machine code lacks of what the table demands, or has of what it must not have.
    wrong_instructions: Vec<String>,
}

/// Compiles on two threads and hands the outcomes over in the jobs' order.
fn run(jobs: &[Job], nvrtc: &'static Nvrtc, mut each: impl FnMut(&Job, std::result::Result<Built, Error>)) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        for _ in 0..2 {
            let (sender, next) = (sender.clone(), &next);
            scope.spawn(move || {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(job) = jobs.get(index) else { return };
                    // The receiver only goes away if the other side panicked.
                    if sender.send((index, build(job, nvrtc))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let mut waiting = BTreeMap::new();
        let mut shown = 0;
        for (index, outcome) in receiver {
            waiting.insert(index, outcome);
            while let Some(outcome) = waiting.remove(&shown) {
                each(&jobs[shown], outcome);
                shown += 1;
            }
        }
    });
}

fn build(job: &Job, nvrtc: &Nvrtc) -> std::result::Result<Built, Error> {
    let started = Instant::now();
    let cubin = compile::compile(nvrtc, &job.instance, job.arch)?;
    let time = started.elapsed();
    let resources = compile::resources(nvrtc, &job.instance, job.arch)?;
    let demanded = job.instance.demanded_instructions();
    let wrong_instructions = match demanded.is_empty() {
        true => Vec::new(),
        false => match sass::disassemble(&cubin) {
            Ok(sass) => sass::wrong_instructions(&sass, &demanded),
            Err(error) => vec![error],
        },
    };
    Ok(Built { cubin, resources, time, wrong_instructions })
}

/// What a compiled row uses too much of.
fn over_budget(job: &Job, used: &Resources) -> Vec<String> {
    let mut faults = Vec::new();
    if used.spill_stores + used.spill_loads > 0 {
        faults.push(format!(
            "spills {} bytes of stores and {} bytes of loads",
            used.spill_stores, used.spill_loads
        ));
    }
    if used.serialized {
        faults.push("warpgroup products are serialized".to_string());
    }
    if let Some(row) = job.row {
        if used.registers > row.registers {
            faults.push(format!("{} registers, the budget is {}", used.registers, row.registers));
        }
        if used.shared > row.shared {
            faults
                .push(format!("{} bytes of static shared memory, the budget is {}", used.shared, row.shared));
        }
    }
    faults
}

/// Prints what was asked for of the machine code.
fn print_code(cubin: &Cubin, arguments: &Arguments) -> Result {
    let text = sass::disassemble(cubin)?;
    if arguments.loops {
        for found in sass::tensor_loops(&text) {
            println!(
                "    loop: {} instructions, {} of tensor cores, {} that branches may skip",
                found.instructions, found.tensor, found.skippable
            );
        }
    }
    if arguments.sass {
        println!("{text}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_held() {
        let (instance, row) = table::shipped().next().expect("the table has rows");
        let job = |row| Job { instance: instance.clone(), row, arch: Arch::new(8, 0) };
        let within = Resources { registers: row.registers, shared: row.shared, ..Resources::default() };
        let cases = [
            ("all of the budget", Some(row), within, None),
            (
                "a register more",
                Some(row),
                Resources { registers: row.registers + 1, ..within },
                Some("registers"),
            ),
            (
                "a byte more",
                Some(row),
                Resources { shared: row.shared + 1, ..within },
                Some("static shared memory"),
            ),
            (
                "spilled stores",
                Some(row),
                Resources { spill_stores: 4, ..within },
                Some("spills 4 bytes of stores"),
            ),
            ("spilled loads", None, Resources { spill_loads: 8, ..within }, Some("8 bytes of loads")),
            (
                "products that wait for each other",
                None,
                Resources { serialized: true, ..within },
                Some("serialized"),
            ),
            ("no budget", None, Resources { registers: 255, shared: u32::MAX, ..within }, None),
        ];
        for (name, row, used, expected) in cases {
            let faults = over_budget(&job(row), &used);
            match expected {
                None => assert!(faults.is_empty(), "{name}: {faults:?}"),
                Some(words) => assert!(faults.len() == 1 && faults[0].contains(words), "{name}: {faults:?}"),
            }
        }
    }

    #[test]
    fn every_combination_is_listed_once() {
        for kernel in table::kernels() {
            let labels: std::collections::BTreeSet<_> =
                allowed(kernel).map(|instance| instance.label()).collect();
            let expected: usize = kernel.constants.iter().map(|constant| constant.allowed.len()).product();
            assert_eq!(labels.len(), expected, "{}", kernel.name);
            assert!(
                kernel.rows.iter().all(|row| {
                    labels.contains(&Instance { kernel, values: row.values.to_vec() }.label())
                })
            );
        }
    }

    #[test]
    fn arguments_are_read() {
        let words = |text: &str| text.split_whitespace().map(str::to_string).collect::<Vec<_>>();
        let parsed =
            parse(&words("decode --arch sm_90a --all --sass --loops --prebuilt out --nvrtc 12.8 merge"))
                .unwrap();
        assert_eq!(parsed.filters, ["decode", "merge"]);
        assert_eq!((parsed.arch.as_deref(), parsed.nvrtc.as_deref()), (Some("sm_90a"), Some("12.8")));
        assert!(parsed.all && parsed.sass && parsed.loops && parsed.prebuilt == Some(PathBuf::from("out")));
        for (text, expected) in [("--arch", "--arch needs a value"), ("--fast", "there is no option --fast")]
        {
            assert_eq!(parse(&words(text)).err().as_deref(), Some(expected));
        }
    }
}
