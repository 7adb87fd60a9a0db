//! The real binary: what it prints and writes, and how it refuses bad input.

#[path = "../support/mod.rs"]
mod support;

mod checkpoints;
mod compress;
mod demo;
mod eval;
mod generate;
mod logits;
mod output;
mod ranks;
mod retrieval;
mod usage;
mod weights;

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use support::bundled;

fn engine(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_engine")).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs a command that must succeed.
fn succeed(arguments: &[&str]) -> String {
    let output = engine(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// Runs a command that must fail with exit code 2 and one line on stderr that has all of `named`.
fn refuse(case: &str, arguments: &[&str], named: &[&str]) {
    let output = engine(arguments);
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(2), "{case}: {stderr}");
    assert_eq!(stdout, "", "{case}: something was printed");
    assert_eq!(stderr.lines().count(), 1, "{case}: {stderr}");
    assert!(stderr.starts_with("error: "), "{case}: {stderr}");
    for name in named {
        assert!(stderr.contains(name), "{case}: no {name:?} in {stderr}");
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn heldout() -> String {
    path(&bundled().join("heldout.txt")).to_string()
}
