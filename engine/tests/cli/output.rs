//! Where results go, and what happens when they cannot.

use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::{heldout, path, read_json, refuse, succeed};

/// Nobody has to read stderr.
#[test]
fn a_closed_stderr_stops_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (file, text) = (folder.path().join("text"), folder.path().join("report.json"));
    std::fs::write(&file, "import sys\n\nsys.exit(0)\n").unwrap();
    let run = |arguments: &[&str]| {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(env!("CARGO_BIN_EXE_engine"));
        command.args(arguments).stderr(writer).stdout(std::process::Stdio::null()).status().unwrap().code()
    };
    assert_eq!(run(&["eval", "--text", path(&file), "--json", path(&text)]), Some(0));
    assert!(read_json(&text)["nll_per_token"].is_f64());
    assert_eq!(run(&["evaluate"]), Some(2), "a usage error");
}

#[test]
fn an_unwritable_json_path_stops_the_command_before_its_work() {
    let folder = tempfile::tempdir().unwrap();
    let heldout = heldout();
    let missing = folder.path().join("missing/report.json");
    // Work would find that the model is missing; the path is found first.
    for (case, file) in
        [("no such folder", missing.as_path()), ("a folder", folder.path()), ("nothing", Path::new(""))]
    {
        let arguments = ["eval", "--text", &heldout, "--model", "/nonexistent", "--json", path(file)];
        refuse(case, &arguments, &["cannot write", path(file)]);
    }
    // And a failure later leaves neither a file nor a change.
    let (new, old) = (folder.path().join("new.json"), folder.path().join("old.json"));
    std::fs::write(&old, "kept").unwrap();
    for file in [&new, &old] {
        refuse(
            "context",
            &["eval", "--text", &heldout, "--context", "9999", "--json", path(file)],
            &["9999"],
        );
        refuse("token", &["logits", "--tokens", "999", "--json", path(file)], &["999"]);
    }
    assert!(!new.exists());
    assert_eq!(std::fs::read_to_string(&old).unwrap(), "kept");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "a temporary file is left");
}

/// A command that is broken off while it works leaves nothing beside its output.
#[test]
fn nothing_is_written_before_the_end() {
    use std::io::{BufRead, BufReader};
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("report.json");
    let mut child = Command::new(env!("CARGO_BIN_EXE_engine"))
        .args(["eval", "--text", &heldout(), "--json", path(&file)])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // The first line says that work begins; it takes many seconds.
    let mut line = String::new();
    BufReader::new(child.stderr.take().unwrap()).read_line(&mut line).unwrap();
    child.kill().unwrap();
    assert!(!child.wait().unwrap().success(), "it was over before it was broken off");
    assert!(line.contains("1024 tokens"), "{line}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "a file is left");
}

/// A link stays a link, and a device a device: a rename would put a file in their place.
#[cfg(unix)]
#[test]
fn links_and_devices_are_written_in_place() {
    let folder = tempfile::tempdir().unwrap();
    let (file, link) = (folder.path().join("file"), folder.path().join("link"));
    std::fs::write(&file, "x".repeat(100_000)).unwrap();
    std::os::unix::fs::symlink(&file, &link).unwrap();
    succeed(&["logits", "--tokens", "1,2", "--json", path(&link)]);
    assert!(link.symlink_metadata().unwrap().is_symlink());
    assert_eq!(read_json(&file)["tokens"], json!([1, 2]), "the old content is gone");

    let device = folder.path().join("null");
    std::os::unix::fs::symlink("/dev/null", &device).unwrap();
    succeed(&["logits", "--tokens", "1,2", "--json", path(&device)]);
    assert!(device.symlink_metadata().unwrap().is_symlink());
}
