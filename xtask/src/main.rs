//! Developer commands: `cargo xtask <command>`.

mod accuracy;
#[cfg(feature = "bindings")]
mod bindings;
#[cfg(feature = "gpu")]
mod gpu;
#[cfg(feature = "kernels")]
mod kernels;
#[cfg(feature = "gpu")]
mod lint;
#[cfg(feature = "gpu")]
mod report;
#[cfg(feature = "kernels")]
mod sass;
mod toolkit;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

const USAGE: &str = "\
cargo xtask <command>

toolkit [--nvrtc 12.8]
    Installs NVRTC, the disassembler and libclang from their pinned wheels into target/toolkit.

kernels [FILTER…] [--arch sm_90a] [--all] [--nvrtc 12.8] [--sass] [--loops] [--prebuilt DIR]
    Compiles the shipped rows of the kernel table for every architecture of the gate and holds them to their budgets.
    FILTER       only rows whose label contains one of the texts
    --arch       only this architecture
    --all        every allowed combination of constants, not only the shipped rows
    --nvrtc      another NVRTC than 13.0; architectures that it does not know are skipped
    --sass       prints the machine code of each row
    --loops      counts the instructions of each row's innermost loops around tensor cores
    --prebuilt   writes the cubins and their manifest to DIR

gpu-bundle
    Builds gpu-bundle/: GPU tests, benches, cubins and a run.sh for a machine with a GPU and without Rust.

gpu-record FILE…
    Reads what run.sh left (results.json) into the ledger, benches/results.

gpu-status [--strict]
    Prints for each row of the kernel table whether it is proven on a GPU, failed, stale or never ran.
    --strict     fails unless every row is proven

accuracy
    Evaluates the bundled model in every KV mode and with every kind of low-rank plan, on the CPU, into benches/results/accuracy.
    Takes some minutes.

report [--check]
    Generates benches/REPORT.md with its plots, and the GPU states and accuracies in README.md, from benches/results, or checks that
    they are fresh.

lint
    Checks licences and sources of dependencies, shell scripts and Python programs.

bindings [--check]
    Generates cuda/src/params.rs from cuda/include/*_params.h, or checks that it is fresh.
";

/// Commands fail with a sentence for the person who typed them.
type Result<T = ()> = std::result::Result<T, String>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.split_first() {
        Some((command, rest)) => match command.as_str() {
            "toolkit" => toolkit::command(rest),
            "accuracy" => accuracy::command(rest),
            #[cfg(feature = "kernels")]
            "kernels" => kernels::command(rest),
            #[cfg(feature = "bindings")]
            "bindings" => bindings::command(rest),
            #[cfg(feature = "gpu")]
            "gpu-bundle" => gpu::bundle::command(rest),
            #[cfg(feature = "gpu")]
            "gpu-record" => gpu::record::command(rest),
            #[cfg(feature = "gpu")]
            "gpu-status" => gpu::status::command(rest),
            #[cfg(feature = "gpu")]
            "report" => report::command(rest),
            #[cfg(feature = "gpu")]
            "lint" => lint::command(rest),
            #[cfg(not(feature = "gpu"))]
            "gpu-bundle" | "gpu-record" | "gpu-status" | "report" | "lint" => {
                with_feature("gpu", command, rest, None)
            }
            #[cfg(not(feature = "kernels"))]
            "kernels" => with_feature("kernels", command, rest, None),
            #[cfg(not(feature = "bindings"))]
            "bindings" => toolkit::LIBCLANG
                .install()
                .and_then(|folder| with_feature("bindings", command, rest, Some(("LIBCLANG_PATH", folder)))),
            "help" | "--help" | "-h" => {
                print!("{USAGE}");
                Ok(())
            }
            other => Err(format!("there is no command {other}\n\n{USAGE}")),
        },
        None => Err(USAGE.to_string()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{}", message.trim_end());
            ExitCode::FAILURE
        }
    }
}

/// Runs a command in a build of this program that has the feature it needs.
#[cfg(not(all(feature = "gpu", feature = "bindings")))]
fn with_feature(
    feature: &str,
    command: &str,
    arguments: &[String],
    variable: Option<(&str, PathBuf)>,
) -> Result {
    let status = std::process::Command::new(env!("CARGO"))
        .args(["run", "--quiet", "--package", "xtask", "--no-default-features", "--features", feature])
        .args(["--", command])
        .args(arguments)
        .envs(variable)
        .status()
        .map_err(|error| format!("cargo does not start: {error}"))?;
    // What went wrong has been said.
    if status.success() { Ok(()) } else { std::process::exit(status.code().unwrap_or(1)) }
}

/// Root of the workspace.
fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace").to_path_buf()
}
