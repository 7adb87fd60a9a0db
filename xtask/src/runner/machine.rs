//! What machine this is.

use std::path::{Path, PathBuf};
use std::process::Command;

use cuda::probe;
use xtask::results::Machine;

/// Asks the driver and the tools; everything may be missing.
pub(crate) fn describe() -> Machine {
    let mut machine =
        Machine { system: first_line("uname", &["-sr"]).unwrap_or_default(), ..Machine::default() };
    match probe::driver().and_then(|driver| Ok((driver, probe::device(0)?))) {
        Ok((driver, device)) => {
            machine.device = Some(device.name.clone());
            machine.arch = Some(device.arch.to_string());
            machine.sm_count = Some(device.sm_count);
            machine.cuda = Some(driver.version().to_string());
        }
        Err(error) => machine.no_device = Some(error.to_string()),
    }
    machine.driver = first_line("nvidia-smi", &["--query-gpu=driver_version", "--format=csv,noheader"]);
    let tools = [("nvcc", "--version"), ("compute-sanitizer", "--version"), ("python3", "--version")];
    for (tool, argument) in tools {
        let found = find(tool).and_then(|path| last_line(&path, argument));
        machine.tools.insert(tool.to_string(), found.unwrap_or_else(|| "not found".to_string()));
    }
    machine
}

/// How many GPUs there are, as far as `nvidia-smi` tells.
pub(crate) fn gpus() -> usize {
    let list = find("nvidia-smi").and_then(|path| output(&path, &["-L"]));
    list.map_or(0, |list| list.lines().filter(|line| line.starts_with("GPU ")).count())
}

/// Clocks, temperature and load in one line, if `nvidia-smi` tells.
pub(crate) fn clocks() -> Option<String> {
    const QUERY: &str = "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw,utilization.gpu";
    first_line("nvidia-smi", &[QUERY, "--format=csv,noheader"])
}

/// A program of the path or of CUDA's usual folders.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let home = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(home.chain([PathBuf::from("/usr/local/cuda")]).map(|root| root.join("bin")))
        .map(|folder| folder.join(program))
        .find(|path| path.is_file())
}

fn output(program: &Path, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_string())
}

fn first_line(program: &str, arguments: &[&str]) -> Option<String> {
    let output = output(&find(program)?, arguments)?;
    output.lines().next().map(str::to_string)
}

fn last_line(program: &Path, argument: &str) -> Option<String> {
    output(program, &[argument])?.lines().last().map(str::to_string)
}
