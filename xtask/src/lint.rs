//! `cargo xtask lint`: what neither rustc nor clippy sees: dependencies, shell scripts, Python programs.

use std::path::Path;
use std::process::Command;

use crate::{Result, toolkit, workspace};

pub(crate) fn command(arguments: &[String]) -> Result {
    if !arguments.is_empty() {
        return Err("usage: cargo xtask lint".to_string());
    }
    let deny = toolkit::DENY.install()?.join("cargo-deny");
    for manifest in ["Cargo.toml", "seq-parallel/mpi/Cargo.toml", "examples/candle/Cargo.toml"] {
        let mut check = Command::new(&deny);
        check.args(["--manifest-path", manifest, "--config"]).arg(workspace().join("deny.toml")).arg("check");
        // The example is there to link what our own crates must not.
        let checks: &[&str] = if manifest == "examples/candle/Cargo.toml" {
            &["licenses", "sources"]
        } else {
            &["licenses", "bans", "sources"]
        };
        // Warnings would be of licences that only another of them has.
        check.args(["--allow", "license-not-encountered"]).args(checks);
        run(check, "cargo-deny")?;
    }

    let tracked = tracked()?;
    let scripts: Vec<&String> = tracked.iter().filter(|path| is_script(path)).collect();
    let mut shellcheck = Command::new(toolkit::SHELLCHECK.install()?.join("shellcheck"));
    shellcheck.args(&scripts);
    run(shellcheck, "shellcheck")?;

    let programs: Vec<&String> = tracked.iter().filter(|path| path.ends_with(".py")).collect();
    let mut python = Command::new("python3");
    // Compiles without leaving files behind.
    let compile = "import sys\nfor path in sys.argv[1:]: compile(open(path).read(), path, 'exec')";
    python.args(["-c", compile]).args(&programs);
    run(python, "python3")?;
    println!("{} shell scripts, {} Python programs", scripts.len(), programs.len());
    Ok(())
}

fn run(mut command: Command, name: &str) -> Result {
    let status = command.current_dir(workspace()).status();
    match status.map_err(|error| format!("{name} does not start: {error}"))? {
        status if status.success() => Ok(()),
        status => Err(format!("{name}: {status}")),
    }
}

fn tracked() -> Result<Vec<String>> {
    let output = Command::new("git").current_dir(workspace()).args(["ls-files", "-z"]).output();
    let output = output.map_err(|error| format!("git does not start: {error}"))?;
    let names = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(names.split('\0').filter(|name| !name.is_empty()).map(str::to_string).collect())
}

/// Whether a file starts as a shell script does.
fn is_script(path: &str) -> bool {
    let mut start = [0; 32];
    let file = std::fs::File::open(workspace().join(Path::new(path)));
    let read = file.and_then(|mut file| std::io::Read::read(&mut file, &mut start)).unwrap_or(0);
    let first = String::from_utf8_lossy(&start[..read]);
    let first = first.lines().next().unwrap_or_default();
    first.starts_with("#!") && first.ends_with("sh")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_are_known_by_their_first_line() {
        assert!(is_script(".ci/run"));
        assert!(!is_script("Cargo.toml") && !is_script("no/such/file"));
    }
}
