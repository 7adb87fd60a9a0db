//! Commands, and how they end: 0 for success, 2 with one line on stderr for bad input, 1 when output fails.

mod args;
mod commands;
mod compress;
mod demo;
mod output;
mod progress;
mod table;
mod traffic;

use std::io::Write;
use std::process::ExitCode;

pub use args::Open;
use args::{Args, Command};

/// Why a command stopped.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// The engine refused its input.
    #[error(transparent)]
    Engine(#[from] crate::Error),
    /// The command line makes no sense.
    #[error("{0}")]
    Usage(String),
    /// A file cannot be written.
    #[error("cannot write {path}: {source}")]
    Write { path: String, source: std::io::Error },
    /// Standard output fails.
    #[error("cannot write to standard output: {0}")]
    Stdout(#[from] std::io::Error),
}

/// Runs the command line's command. `open` makes the ranks of a mode: [`ranks::open`](crate::ranks::open), or what a program has whose
/// processes share prompts. All of them run the same command; only one `speaks` on standard output and writes files.
pub fn main(open: Open, speaks: bool) -> ExitCode {
    output::speak(speaks);
    let failure = match Args::parse(std::env::args_os(), open).and_then(run) {
        Ok(()) => return ExitCode::SUCCESS,
        Err(failure) => failure,
    };
    match &failure {
        // The reader has seen enough (`engine … | head`).
        Failure::Stdout(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return ExitCode::SUCCESS,
        _ => {}
    }
    if !speaks {
        return ExitCode::from(2);
    }
    // One line, whatever a parser's message looks like.
    let message = failure.to_string();
    let message = message.lines().map(str::trim).collect::<Vec<_>>().join(" ");
    // The exit code tells it where nobody reads stderr.
    let _ = writeln!(std::io::stderr(), "error: {message}");
    match failure {
        Failure::Stdout(_) => ExitCode::FAILURE,
        _ => ExitCode::from(2),
    }
}

fn run(args: Args) -> Result<(), Failure> {
    match args.command {
        Command::Demo => demo::run(&args),
        Command::Eval => commands::eval(&args),
        Command::Generate => commands::generate(&args),
        Command::Retrieval => commands::retrieval(&args),
        Command::Logits => commands::logits(&args),
        Command::Compress => compress::compress(&args),
        Command::Inspect => compress::inspect(&args),
        Command::Help => output::print(&args::help()),
        Command::Version => output::print(concat!("engine ", env!("CARGO_PKG_VERSION"), "\n")),
    }
}
