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

use args::{Args, Command};

use crate::mode::Mode;
use crate::ranks::Ranks;

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

/// What a program brings to the command line.
#[derive(Debug, Clone, Copy)]
pub struct Host {
    /// Its name, for help.
    pub name: &'static str,
    /// Makes the ranks of a mode: [`ranks::open`](crate::ranks::open), or what a program has whose processes share prompts.
    pub open: fn(&Mode) -> Result<Box<dyn Ranks>, crate::Error>,
    /// How many ranks share a prompt where the command line does not say.
    pub ranks: usize,
    /// Whether this process writes: of several that run the same command, one writes to standard output and to files.
    pub speaks: bool,
    /// Hears why this process stops, where that is no other process's fault, and gives what is to be said of it, if anything: of several
    /// that run the same command, all mostly stop for the same reason.
    pub refused: fn(&str) -> Option<String>,
}

/// Runs the command line's command.
pub fn main(host: Host) -> ExitCode {
    output::speak(host.speaks);
    let failure = match Args::parse(std::env::args_os(), host).and_then(run) {
        Ok(()) => return ExitCode::SUCCESS,
        Err(failure) => failure,
    };
    match &failure {
        // The reader has seen enough (`engine … | head`).
        Failure::Stdout(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return ExitCode::SUCCESS,
        _ => {}
    }
    // One line, whatever a parser's message looks like.
    let message = failure.to_string();
    let mut message = message.lines().map(str::trim).collect::<Vec<_>>().join(" ");
    // What went wrong between processes, each has its own view of.
    if !failure.is_between_ranks() {
        match (host.refused)(&message) {
            Some(words) => message = words,
            None => return ExitCode::from(2),
        }
    }
    // The exit code tells it where nobody reads stderr.
    // At once, so that lines of several processes do not mix.
    let _ = std::io::stderr().write_all(format!("error: {message}\n").as_bytes());
    match failure {
        Failure::Stdout(_) => ExitCode::FAILURE,
        _ => ExitCode::from(2),
    }
}

impl Failure {
    /// Whether it is a rank that failed another.
    fn is_between_ranks(&self) -> bool {
        use seq_parallel::Error::{Mismatch, Peer};
        matches!(self, Failure::Engine(crate::Error::SeqParallel(error)) if matches!(**error, Mismatch { .. } | Peer { .. }))
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
        Command::Help => output::print(&args::help(args.host.name)),
        Command::Version => output::print(&format!("{} {}\n", args.host.name, env!("CARGO_PKG_VERSION"))),
    }
}
