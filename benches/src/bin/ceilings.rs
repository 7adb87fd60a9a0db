//! Measures what the machine can do at most and prints it; writes JSON lines to the file that `LONGKV_CEILINGS` names.

use std::process::ExitCode;

use longkv_benches::{GpuBench, ceilings};

fn main() -> ExitCode {
    match GpuBench::new() {
        Some(bench) => {
            ceilings::all(&bench);
            ExitCode::SUCCESS
        }
        // Why has been said.
        None => ExitCode::FAILURE,
    }
}
