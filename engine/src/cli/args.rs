//! The command line: one table of flags drives parser and help.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write;
use std::path::PathBuf;
use std::str::FromStr;

use crate::mode::{Method, Mode};
use crate::{kv, linear, ranks};

use super::{Failure, Host};

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    Demo,
    Eval,
    Generate,
    Retrieval,
    Logits,
    Compress,
    Inspect,
    Help,
    Version,
}

use Command::{Compress, Demo, Eval, Generate, Inspect, Logits, Retrieval};

const COMMANDS: &[(&str, Command, &str)] = &[
    ("demo", Demo, "generate text, then evaluate held-out text in every mode (the default)"),
    ("eval", Eval, "perplexity of a text, decoded through a KV mode"),
    ("generate", Generate, "continue a prompt"),
    ("retrieval", Retrieval, "share of planted key-value pairs that the model finds again"),
    ("logits", Logits, "logits after each of some tokens"),
    ("compress", Compress, "make a plan for --kv fdc:FILE, calibrated on a text"),
    ("inspect", Inspect, "show a plan FILE: ranks of every layer and head, and why"),
];

struct Flag {
    name: &'static str,
    value: &'static str,
    help: &'static str,
    commands: &'static [Command],
}

const FLAGS: &[Flag] = &[
    Flag {
        name: "model",
        value: "DIR",
        help: "checkpoint: config.json, *.safetensors, tokenizer.json (default: the bundled model)",
        commands: &[Demo, Eval, Generate, Retrieval, Logits, Compress],
    },
    Flag {
        name: "kv",
        value: "MODE",
        help: "KV cache (default: dense)",
        commands: &[Eval, Generate, Retrieval],
    },
    Flag {
        name: "weights",
        value: "MODE",
        help: "where the weights live (default: dense)",
        commands: &[Demo, Eval, Generate, Retrieval, Logits],
    },
    Flag {
        name: "ranks",
        value: "P",
        help: "ranks that share a prompt (default: 1; engine-mpi: its processes)",
        commands: &[Demo, Eval, Generate, Retrieval],
    },
    Flag {
        name: "sp",
        value: "MODE",
        help: "how they share it (default: auto)",
        commands: &[Demo, Eval, Generate, Retrieval],
    },
    Flag {
        name: "text",
        value: "FILE",
        help: "text to evaluate (demo's default: the bundled held-out text) or to calibrate on",
        commands: &[Demo, Eval, Compress],
    },
    Flag { name: "prompt", value: "TEXT", help: "text to continue", commands: &[Demo, Generate] },
    Flag {
        name: "context",
        value: "N",
        help: "tokens of a window (default: 1024; demo: 512) or of a retrieval document (default: 512), at most the model's",
        commands: &[Demo, Eval, Retrieval, Compress],
    },
    Flag {
        name: "prefill",
        value: "N",
        help: "tokens of a window that are prefilled and not scored (default: a quarter)",
        commands: &[Eval],
    },
    Flag { name: "windows", value: "N", help: "windows to evaluate (default: up to 4)", commands: &[Eval] },
    Flag {
        name: "documents",
        value: "N",
        help: "retrieval documents, at most 10000 (default: 8)",
        commands: &[Retrieval],
    },
    Flag { name: "tokens", value: "1,2,3", help: "tokens to run", commands: &[Logits] },
    Flag { name: "max-tokens", value: "N", help: "tokens to generate (default: 128)", commands: &[Generate] },
    Flag {
        name: "temperature",
        value: "T",
        help: "0 takes the likeliest token (default: 0)",
        commands: &[Generate],
    },
    Flag {
        name: "seed",
        value: "S",
        help: "of sampling or documents (default: 0)",
        commands: &[Generate, Retrieval],
    },
    Flag {
        name: "ratio",
        value: "R",
        help: "part of the dense bytes that the plan may take, above 0 and at most 1",
        commands: &[Compress],
    },
    Flag {
        name: "keep-accuracy",
        value: "P",
        help: "part of the accuracy that the plan keeps with the fewest bytes (instead of --ratio)",
        commands: &[Compress],
    },
    Flag {
        name: "projection",
        value: "NAME",
        help: "optimal, joint or key-only (default: optimal)",
        commands: &[Compress],
    },
    Flag { name: "out", value: "FILE", help: "write the plan there", commands: &[Compress] },
    Flag { name: "svg", value: "FILE", help: "draw the rank map there", commands: &[Inspect] },
    Flag {
        name: "json",
        value: "FILE",
        help: "write the result there",
        commands: &[Eval, Retrieval, Logits, Inspect],
    },
];

/// Key of the one argument that stands without a flag: the file of `inspect`.
pub(super) const FILE: &str = "FILE";

/// A parsed command line: the command and its flags, whose values are parsed when they are asked for.
#[derive(Debug)]
pub(super) struct Args {
    pub(super) command: Command,
    pub(super) host: Host,
    values: BTreeMap<&'static str, OsString>,
}

impl Args {
    /// Parses a command line, the program's name first.
    pub(super) fn parse(arguments: impl IntoIterator<Item = OsString>, host: Host) -> Result<Self, Failure> {
        use lexopt::Arg;
        let usage = |error: lexopt::Error| Failure::Usage(format!("{error} (see engine --help)"));
        let mut parser = lexopt::Parser::from_iter(arguments);
        let mut command = None;
        let mut values = BTreeMap::new();
        while let Some(argument) = parser.next().map_err(usage)? {
            match argument {
                Arg::Long("help") | Arg::Short('h') => {
                    return Ok(Args { command: Command::Help, host, values });
                }
                Arg::Long("version") | Arg::Short('V') => {
                    return Ok(Args { command: Command::Version, host, values });
                }
                Arg::Value(name) if command.is_none() && values.is_empty() => {
                    command = Some(Self::command(&name)?);
                }
                Arg::Long(name) => {
                    let command = *command.get_or_insert(Demo);
                    let flag =
                        FLAGS.iter().find(|flag| flag.name == name && flag.commands.contains(&command));
                    let Some(flag) = flag else {
                        let command = name_of(command);
                        return Err(Failure::Usage(format!("{command} has no --{name} (see engine --help)")));
                    };
                    let value = parser.value().map_err(usage)?;
                    if values.insert(flag.name, value).is_some() {
                        return Err(Failure::Usage(format!("--{} is given twice", flag.name)));
                    }
                }
                Arg::Value(file) if command == Some(Inspect) && !values.contains_key(FILE) => {
                    values.insert(FILE, file);
                }
                other => return Err(usage(other.unexpected())),
            }
        }
        Ok(Args { command: command.unwrap_or(Demo), host, values })
    }

    fn command(name: &OsString) -> Result<Command, Failure> {
        if name == "help" {
            return Ok(Command::Help);
        }
        COMMANDS.iter().find(|(known, ..)| name == known).map(|(_, command, _)| *command).ok_or_else(|| {
            let known: Vec<_> = COMMANDS.iter().map(|(known, ..)| *known).collect();
            Failure::Usage(format!("unknown command {name:?} (known: {})", known.join(", ")))
        })
    }

    /// A path, or `None` when it is not given.
    pub(super) fn path(&self, flag: &'static str) -> Option<PathBuf> {
        self.values.get(flag).map(PathBuf::from)
    }

    /// A text, or `None` when it is not given.
    pub(super) fn text(&self, flag: &'static str) -> Result<Option<&str>, Failure> {
        let Some(value) = self.values.get(flag) else { return Ok(None) };
        match value.to_str() {
            Some(text) => Ok(Some(text)),
            None => Err(Failure::Usage(format!("--{flag}: expected UTF-8, found {value:?}"))),
        }
    }

    /// A number, or `None` when it is not given. `expected` says what parses.
    pub(super) fn number<T: FromStr>(
        &self,
        flag: &'static str,
        expected: &str,
    ) -> Result<Option<T>, Failure> {
        let Some(text) = self.text(flag)? else { return Ok(None) };
        text.parse()
            .map(Some)
            .map_err(|_| Failure::Usage(format!("--{flag}: expected {expected}, found {text:?}")))
    }

    /// A count of tokens or of other things, or `None` when it is not given.
    pub(super) fn count(&self, flag: &'static str) -> Result<Option<usize>, Failure> {
        match self.number(flag, "a whole number of at least 1")? {
            Some(0) => {
                Err(Failure::Usage(format!("--{flag}: expected a whole number of at least 1, found \"0\"")))
            }
            count => Ok(count),
        }
    }

    /// A mode.
    pub(super) fn mode(&self, flag: &'static str, default: &str) -> Result<Mode, Failure> {
        Ok(self.text(flag)?.unwrap_or(default).parse()?)
    }

    /// An error for a flag that the command cannot do without.
    pub(super) fn missing(&self, flag: &'static str) -> Failure {
        Failure::Usage(format!("{} needs --{flag} (see engine --help)", name_of(self.command)))
    }
}

fn name_of(command: Command) -> &'static str {
    COMMANDS.iter().find(|(_, known, _)| *known == command).map_or("engine", |(name, ..)| name)
}

/// The help text.
pub(super) fn help(name: &str) -> String {
    let mut text = format!("A small Llama engine on the CPU.\n\nUsage: {name} [COMMAND] [FLAGS]\n");
    for (name, command, help) in COMMANDS {
        let _ = write!(text, "\n  {name:<11} {help}\n");
        for flag in FLAGS.iter().filter(|flag| flag.commands.contains(command)) {
            let _ = writeln!(text, "      --{:<20} {}", format!("{} {}", flag.name, flag.value), flag.help);
        }
    }
    text.push_str("\nA MODE is NAME[:FILE][,key=value…][+NAME].\n");
    for (seam, methods) in [("kv", kv::METHODS), ("weights", linear::METHODS), ("sp", ranks::METHODS)] {
        for Method { name, summary, .. } in methods {
            let _ = writeln!(text, "  {:<24} {summary}", format!("--{seam} {name}"));
        }
    }
    text
}
