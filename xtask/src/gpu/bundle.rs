//! `cargo xtask gpu-bundle`: everything that a machine with a GPU and without Rust needs to prove the kernels.
//!
//! ```text
//! gpu-bundle/
//!   run.sh         runs it all: `run.sh [--only PART] [--out DIR] [--within SECONDS] [--rest [FILE]]`
//!   bundle.json    what is in it, and the digests of every row
//!   bin/           the runner, test executables without the emulator, benches; compressed until run.sh first runs
//!   cubins/        sm_90a cubins, the ones that the ledger hashes
//!   peers/         Python programs that time other people's kernels
//!   model/         the Python program that trains a larger model for the engine, and the text that it must not see
//! ```

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cuda::prebuilt::PrebuiltWriter;
use serde_json::Value;
use xtask::results::{self, Executable, MANIFEST, Manifest, SCHEMA};

use super::rows;
use crate::{Result, workspace};

/// Peers, those first whose ratio is worth most where time is short: what is claimed of kernels against what is known to be fast. One
/// that compiles for minutes comes last.
const PEERS: [&str; 9] = [
    "prefill",
    "decode",
    "quantized_decode",
    "gemm",
    "sparse",
    "host_weights",
    "low_rank_decode",
    "jax_attention",
    "with_flashinfer",
];

/// Most that the bundle may take.
const BUNDLE_LIMIT: u64 = 36 << 20;
/// Most that tracked files, bundle and wheels may take together: what travels to the machine.
const TOTAL_LIMIT: u64 = 60 << 20;

const RUN_SH: &str = r#"#!/usr/bin/env bash
# Runs the GPU tests, sanitizers, ceilings, benches and peers of this bundle on a Linux x86-64 machine with CUDA 13.
#   run.sh [--only PART[,PART…]] [--out DIR] [--within SECONDS] [--rest [FILE]] [--filter TEXT] [--jobs N]
# Leaves results.json and log.txt in DIR, else in $OUT, else in gpu-results beside the bundle. `run.sh --help` names the parts.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# Executables travel compressed.
find "$here/bin" -name '*.gz' -exec gunzip --force {} +
chmod +x "$here"/bin/* 2>/dev/null || true
exec "$here/bin/gpu-runner" --bundle "$here" --spent "$SECONDS" "$@"
"#;

pub(crate) fn command(arguments: &[String]) -> Result {
    if !arguments.is_empty() {
        return Err("usage: cargo xtask gpu-bundle".to_string());
    }
    let folder = workspace().join("gpu-bundle");
    if folder.exists() {
        std::fs::remove_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    }
    let bin = folder.join("bin");
    std::fs::create_dir_all(&bin).map_err(|error| format!("{}: {error}", bin.display()))?;

    let rows = rows::current(|_| true)?;
    let nvrtc = rows::nvrtc()?.version();
    let mut writer = PrebuiltWriter::create(&folder.join("cubins")).map_err(|error| error.to_string())?;
    for row in &rows {
        writer.add(&row.instance, rows::ARCH, &row.cubin).map_err(|error| error.to_string())?;
    }
    writer.finish(nvrtc).map_err(|error| error.to_string())?;

    let targets = gpu_test_targets()?;
    let mut built = build(&targets)?;
    let mut glibc = (0, 0);
    let mut ship = |artifact: &Artifact| -> Result<Executable> {
        let file = format!("bin/{}", artifact.name.replace('/', "."));
        let to = folder.join(&file);
        std::fs::copy(&artifact.path, &to).map_err(|error| format!("{}: {error}", to.display()))?;
        // Symbols are most of an executable.
        tool("strip", &[], &to)?;
        let bytes = std::fs::read(&to).map_err(|error| format!("{}: {error}", to.display()))?;
        glibc = glibc.max(glibc_needed(&bytes).unwrap_or_default());
        tool("gzip", &["--best", "--no-name", "--force"], &to)?;
        Ok(Executable { name: artifact.name.clone(), file })
    };
    let mut manifest = Manifest {
        schema: SCHEMA,
        commit: commit()?,
        built: results::now(),
        glibc: String::new(),
        nvrtc: nvrtc.to_string(),
        rows: rows.into_iter().map(|row| row.digests).collect(),
        tests: Vec::new(),
        benches: Vec::new(),
        ceilings: None,
        peers: peers(&folder)?,
        trainer: Some(trainer(&folder)?),
    };
    built.sort_by(|a, b| a.name.cmp(&b.name));
    let mut tests = 0;
    for artifact in &built {
        match (artifact.kind, artifact.target.as_str()) {
            (Kind::Test, _) => {
                let count = gpu_tests(&artifact.path)?.len();
                if count > 0 {
                    tests += count;
                    manifest.tests.push(ship(artifact)?);
                } else if targets.contains(&artifact.name) {
                    // They would never run anywhere.
                    return Err(format!(
                        "{} asks for a GPU, but no name of its tests ends in `::gpu` or `_gpu`",
                        artifact.name
                    ));
                }
            }
            (Kind::Bench, _) => manifest.benches.push(ship(artifact)?),
            (Kind::Binary, "gpu-runner") => {
                let runner = Artifact { name: "gpu-runner".to_string(), ..artifact.clone() };
                ship(&runner)?;
            }
            (Kind::Binary, "ceilings") => manifest.ceilings = Some(ship(artifact)?),
            (Kind::Binary, _) => {}
        }
    }
    if tests == 0 {
        return Err("no executable has a GPU test".to_string());
    }
    manifest.glibc = format!("{}.{}", glibc.0, glibc.1);
    results::write(&folder.join(MANIFEST), &manifest)?;
    let run = folder.join("run.sh");
    std::fs::write(&run, RUN_SH).map_err(|error| format!("{}: {error}", run.display()))?;
    make_executable(&run)?;

    println!(
        "{} tests in {} executables, {} benches, {} rows, {} peers; needs glibc {} or later",
        tests,
        manifest.tests.len(),
        manifest.benches.len(),
        manifest.rows.len(),
        manifest.peers.len(),
        manifest.glibc
    );
    check_sizes(&folder)
}

/// What cargo built.
#[derive(Clone)]
struct Artifact {
    /// `package/target`.
    name: String,
    target: String,
    kind: Kind,
    path: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Test,
    Bench,
    Binary,
}

/// Test targets whose sources make GPU tests, as `package/target`: those with `device_test!` or `gpu_or_skip` in them.
fn gpu_test_targets() -> Result<BTreeSet<String>> {
    let mut targets = BTreeSet::new();
    for package in packages()? {
        let name = package["name"].as_str().unwrap_or_default();
        // The one defines the macro, the other looks for it.
        if name == "longkv-emulator" || name == "xtask" {
            continue;
        }
        for target in package["targets"].as_array().into_iter().flatten() {
            let source = Path::new(target["src_path"].as_str().unwrap_or_default());
            let mut files = vec![source.to_path_buf()];
            // The modules of `tests/name/main.rs` and of a library lie beside it; `tests/name.rs` has its own.
            if !source.parent().is_some_and(|folder| folder.ends_with("tests")) {
                rust_files(source.parent().expect("a file has a folder"), &mut files);
            }
            let tests_gpu = |path: &PathBuf| {
                let text = std::fs::read_to_string(path).unwrap_or_default();
                text.contains("device_test!") || text.contains("gpu_or_skip")
            };
            if !files.iter().any(tests_gpu) {
                continue;
            }
            let target_name = target["name"].as_str().unwrap_or_default();
            if target["kind"][0] != "test" {
                return Err(format!(
                    "{name}: GPU tests in the target {target_name}; only those in `tests` are shipped"
                ));
            }
            let manifest = Path::new(package["manifest_path"].as_str().unwrap_or_default());
            targets.insert(artifact_name(manifest, target_name));
        }
    }
    Ok(targets)
}

/// Benches and programs of the package of benches, as `(kind, name)`.
fn bench_targets() -> Result<Vec<(String, String)>> {
    let packages = packages()?;
    let benches = packages
        .iter()
        .find(|package| package["name"] == "longkv-benches")
        .map(|package| &package["targets"]);
    let targets = benches.and_then(Value::as_array).ok_or("there is no package longkv-benches")?;
    let named = targets.iter().filter_map(|target| {
        let kind = target["kind"][0].as_str().filter(|kind| ["bench", "bin"].contains(kind))?;
        Some((kind.to_string(), target["name"].as_str()?.to_string()))
    });
    Ok(named.collect())
}

/// Every member of the workspace, as `cargo metadata` has it.
fn packages() -> Result<Vec<Value>> {
    let output = Command::new(env!("CARGO"))
        .current_dir(workspace())
        .args(["metadata", "--no-deps", "--format-version=1"])
        .output()
        .map_err(|error| format!("cargo does not start: {error}"))?;
    let mut metadata: Value = serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())?;
    match metadata["packages"].take() {
        Value::Array(packages) => Ok(packages),
        _ => Err("cargo metadata lists no packages".to_string()),
    }
}

fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) {
    for path in std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            rust_files(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// Builds test executables without the emulator, the benches, the ceilings program and the runner.
///
/// In the development profile, which is optimised, and for the whole workspace, so that nearly everything is there already
/// from `cargo test --workspace`.
fn build(tests: &BTreeSet<String>) -> Result<Vec<Artifact>> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .current_dir(workspace())
        .args(["build", "--quiet", "--workspace", "--features", "longkv-emulator/off"])
        .args(["--message-format=json-render-diagnostics", "--bin", "gpu-runner"]);
    for test in tests.iter().filter_map(|test| test.rsplit('/').next()).collect::<BTreeSet<_>>() {
        cargo.args(["--test", test]);
    }
    for (kind, target) in bench_targets()? {
        cargo.args([format!("--{kind}"), target]);
    }
    let output =
        cargo.stderr(Stdio::inherit()).output().map_err(|error| format!("cargo does not start: {error}"))?;
    if !output.status.success() {
        return Err("the bundle's executables do not build".to_string());
    }
    Ok(artifacts(&String::from_utf8_lossy(&output.stdout)))
}

/// Executables in cargo's messages.
fn artifacts(messages: &str) -> Vec<Artifact> {
    let artifact = |line: &str| {
        let message: Value = serde_json::from_str(line).ok()?;
        let path = PathBuf::from(message["executable"].as_str()?);
        let target = message["target"]["name"].as_str()?.to_string();
        let kind = match message["target"]["kind"][0].as_str()? {
            "test" => Kind::Test,
            "bench" => Kind::Bench,
            "bin" if message["profile"]["test"] == false => Kind::Binary,
            _ => return None,
        };
        let manifest = Path::new(message["manifest_path"].as_str()?);
        Some(Artifact { name: artifact_name(manifest, &target), target, kind, path })
    };
    messages.lines().filter_map(artifact).collect()
}

/// The folder of a package and one of its targets: `package/target`.
fn artifact_name(manifest: &Path, target: &str) -> String {
    let package = manifest.parent().and_then(Path::file_name).unwrap_or_default();
    format!("{}/{target}", package.to_string_lossy())
}

/// GPU tests of an executable: those whose name ends in `gpu`.
fn gpu_tests(executable: &Path) -> Result<Vec<String>> {
    let output = Command::new(executable)
        .args(["--list", "--format", "terse"])
        .output()
        .map_err(|error| format!("{}: {error}", executable.display()))?;
    let list = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(results::gpu_tests(&list.lines().collect::<Vec<_>>(), false))
}

/// Copies `benches/peers`; its programs are the files without a leading underscore, in the order of [`PEERS`].
fn peers(bundle: &Path) -> Result<Vec<Executable>> {
    let to = bundle.join("peers");
    std::fs::create_dir_all(&to).map_err(|error| format!("{}: {error}", to.display()))?;
    let mut found = BTreeSet::new();
    let files = std::fs::read_dir(workspace().join("benches/peers")).into_iter().flatten().flatten();
    for path in files.map(|entry| entry.path()) {
        let name = path.file_name().expect("a file has a name").to_string_lossy().into_owned();
        if let Some(stem) = name.strip_suffix(".py") {
            std::fs::copy(&path, to.join(&name)).map_err(|error| format!("{}: {error}", path.display()))?;
            if !stem.starts_with('_') {
                found.insert(stem.to_string());
            }
        }
    }
    let ordered: BTreeSet<String> = PEERS.iter().map(ToString::to_string).collect();
    if let Some(name) = found.symmetric_difference(&ordered).next() {
        return Err(format!(
            "peers: {name} is a program without a place in the order, or a place without a program"
        ));
    }
    let peer = |stem: &&str| Executable { name: format!("peers/{stem}"), file: format!("peers/{stem}.py") };
    Ok(PEERS.iter().map(peer).collect())
}

/// Copies what trains a model: the program and the text that is held out.
fn trainer(bundle: &Path) -> Result<Executable> {
    let to = bundle.join("model");
    std::fs::create_dir_all(&to).map_err(|error| format!("{}: {error}", to.display()))?;
    for name in ["train_gpu.py", "heldout.txt"] {
        let from = workspace().join("engine/model").join(name);
        std::fs::copy(&from, to.join(name)).map_err(|error| format!("{}: {error}", from.display()))?;
    }
    Ok(Executable { name: "model/train_gpu".to_string(), file: "model/train_gpu.py".to_string() })
}

fn commit() -> Result<String> {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").current_dir(workspace()).args(arguments).output();
        output
            .map_err(|error| format!("git does not start: {error}"))
            .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_string())
    };
    let dirty =
        if git(&["status", "--porcelain", "--untracked-files=no"])?.is_empty() { "" } else { "-dirty" };
    Ok(git(&["rev-parse", "HEAD"])? + dirty)
}

/// The newest glibc version that an executable asks for: the largest `GLIBC_x.y` among its strings.
fn glibc_needed(bytes: &[u8]) -> Option<(u32, u32)> {
    const PREFIX: &[u8] = b"GLIBC_";
    let starts = bytes.windows(PREFIX.len()).enumerate().filter(|(_, window)| *window == PREFIX);
    starts
        .filter_map(|(at, _)| {
            let rest = &bytes[at + PREFIX.len()..];
            let end = rest.iter().position(|b| !b.is_ascii_digit() && *b != b'.')?;
            let mut numbers = std::str::from_utf8(&rest[..end]).ok()?.split('.');
            Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
        })
        .max()
}

/// Runs a tool on a file.
fn tool(program: &str, options: &[&str], file: &Path) -> Result {
    let status = Command::new(program).args(options).arg(file).status();
    match status.map_err(|error| format!("{program} does not start: {error}"))? {
        status if status.success() => Ok(()),
        status => Err(format!("{program} {}: {status}", file.display())),
    }
}

fn check_sizes(bundle: &Path) -> Result {
    let tracked = tracked_bytes()?;
    let [bundled, wheels] =
        [bundle.to_path_buf(), workspace().join("gpu-wheels")].map(|folder| bytes_below(&folder));
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let total = tracked + bundled + wheels;
    println!(
        "tracked files {:.1} MiB + gpu-bundle {:.1} MiB + gpu-wheels {:.1} MiB = {:.1} MiB",
        mib(tracked),
        mib(bundled),
        mib(wheels),
        mib(total)
    );
    if bundled > BUNDLE_LIMIT {
        return Err(format!("the bundle is larger than {} MiB", BUNDLE_LIMIT >> 20));
    }
    if total > TOTAL_LIMIT {
        return Err(format!("what travels is larger than {} MiB", TOTAL_LIMIT >> 20));
    }
    Ok(())
}

fn tracked_bytes() -> Result<u64> {
    let output = Command::new("git")
        .current_dir(workspace())
        .args(["ls-files", "-z"])
        .output()
        .map_err(|error| format!("git does not start: {error}"))?;
    let names = String::from_utf8_lossy(&output.stdout).into_owned();
    let sizes = names.split('\0').filter_map(|name| workspace().join(name).symlink_metadata().ok());
    Ok(sizes.filter(|meta| meta.is_file()).map(|meta| meta.len()).sum())
}

fn bytes_below(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => bytes_below(&entry.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .sum()
}

#[cfg(unix)]
fn make_executable(path: &Path) -> Result {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))
        .map_err(|error| format!("{}: {error}", path.display()))
}

#[cfg(not(unix))]
fn make_executable(_path: &Path) -> Result {
    Err("bundles are built on Linux".to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_with_gpu_tests_are_found() {
        let targets = gpu_test_targets().expect("cargo metadata works");
        assert!(targets.contains("cuda/conformance") && targets.contains("attention/gpu"), "{targets:?}");
        assert!(!targets.contains("attention/oracle"), "{targets:?}");
        let benches = bench_targets().expect("cargo metadata works");
        assert!(benches.contains(&("bench".to_string(), "kernels".to_string())), "{benches:?}");
    }

    /// One that has no place in the order, or none behind its place, would be left out.
    #[test]
    fn every_peer_has_its_place() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let names: Vec<_> = peers(folder.path()).expect("every peer").into_iter().map(|p| p.name).collect();
        assert_eq!(names.first().map(String::as_str), Some("peers/prefill"));
        assert_eq!(names.last().map(String::as_str), Some("peers/with_flashinfer"));
        assert!(names.iter().all(|name| folder.path().join(format!("{name}.py")).exists()), "{names:?}");
    }

    #[test]
    fn executables_are_found_in_cargos_messages() {
        let line = |kind: &str, test: bool, executable: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","manifest_path":"/w/attention/Cargo.toml","target":{{"kind":["{kind}"],"name":"t"}},"profile":{{"test":{test}}},"executable":{executable}}}"#
            )
        };
        let messages = [
            line("test", true, "\"/w/t1\""),
            line("bench", false, "\"/w/t2\""),
            line("bin", false, "\"/w/t3\""),
            line("bin", true, "\"/w/t4\""),
            line("lib", false, "null"),
            "not JSON".to_string(),
        ];
        let found: Vec<_> = artifacts(&messages.join("\n"))
            .into_iter()
            .map(|artifact| (artifact.name, artifact.kind, artifact.path))
            .collect();
        let expected = [(Kind::Test, "/w/t1"), (Kind::Bench, "/w/t2"), (Kind::Binary, "/w/t3")];
        let expected = expected.map(|(kind, path)| ("attention/t".to_string(), kind, PathBuf::from(path)));
        assert_eq!(found, expected);
    }

    #[test]
    fn the_newest_glibc_is_read() {
        let bytes = b"\0GLIBC_2.2.5\0x\0GLIBC_2.34\0GLIBC_2.9\0GLIBC_PRIVATE\0";
        assert_eq!(glibc_needed(bytes), Some((2, 34)));
        assert_eq!(glibc_needed(b"GLIBC"), None);
    }
}
