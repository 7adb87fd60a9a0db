//! The engine's command line. `engine --help` says what it can do.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
