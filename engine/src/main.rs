//! The engine's command line. `engine --help` says what it can do.

use std::process::ExitCode;

fn main() -> ExitCode {
    longkv_engine::cli::main(longkv_engine::cli::Host {
        name: "engine",
        open: longkv_engine::ranks::open,
        ranks: 1,
        speaks: true,
        refused: |message| Some(message.to_string()),
    })
}
