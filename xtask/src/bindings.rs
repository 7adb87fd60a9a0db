//! `cargo xtask bindings`: `cuda/include/*_params.h` to `cuda/src/params.rs`.
//!
//! bindgen takes longer to build than everything else here and needs libclang, so it hides behind a feature.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use bindgen::callbacks::{DeriveInfo, ParseCallbacks, TypeKind};
use sha2::{Digest as _, Sha256};

use crate::{Result, workspace};

pub(crate) fn command(arguments: &[String]) -> Result {
    let check = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => false,
        ["--check"] => true,
        _ => return Err("usage: cargo xtask bindings [--check]".to_string()),
    };
    let path = workspace().join("cuda/src/params.rs");
    let fresh = rustfmt(&generate()?)?;
    if check {
        let committed = std::fs::read_to_string(&path).unwrap_or_default();
        if committed != fresh {
            return Err(format!("{} is stale: run `cargo xtask bindings`", path.display()));
        }
        println!("{} is fresh", path.display());
    } else {
        std::fs::write(&path, fresh).map_err(|error| format!("{}: {error}", path.display()))?;
        println!("wrote {}", path.display());
    }
    Ok(())
}

/// All parameter headers, by name.
fn headers(include: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(include).map_err(|error| format!("{}: {error}", include.display()))?;
    let mut headers: Vec<_> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.to_string_lossy().ends_with("_params.h"))
        .collect();
    headers.sort();
    if headers.is_empty() { Err("cuda/include has no *_params.h".to_string()) } else { Ok(headers) }
}

fn generate() -> Result<String> {
    let headers = headers(&workspace().join("cuda/include"))?;
    let mut builder = bindgen::Builder::default();
    let mut digests = String::new();
    for header in &headers {
        let text = std::fs::read(header).map_err(|error| format!("{}: {error}", header.display()))?;
        let name = header.file_name().expect("a file has a name").to_string_lossy();
        writeln!(digests, "({name:?}, {:?}),", hex(&Sha256::digest(&text))).expect("a string grows");
        builder = builder.header(header.display().to_string());
    }
    let bindings = builder
        // Plain comments become the documentation.
        .clang_args(["-xc", "-std=c11", "-fparse-all-comments"])
        .allowlist_file(".*_params\\.h")
        .rust_target(bindgen::RustTarget::stable(85, 0).map_err(|error| error.to_string())?)
        .rust_edition(bindgen::RustEdition::Edition2024)
        .use_core()
        .derive_copy(true)
        .derive_debug(true)
        .default_enum_style(bindgen::EnumVariation::Consts)
        .prepend_enum_name(false)
        .parse_callbacks(Box::new(Derives))
        .disable_header_comment()
        .generate()
        .map_err(|error| error.to_string())?;
    Ok(format!(
        "//! Structs and constants that kernels and host code share, generated from `cuda/include/*_params.h`.\n\
         //!\n\
         //! Do not edit: change the header and run `cargo xtask bindings`.\n\n\
         /// Digests of the headers that this file was generated from.\n\
         pub const HEADER_DIGESTS: &[(&str, &str)] = &[{digests}];\n\n{bindings}"
    ))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Every struct is plain data: a derive that turns hidden padding into a compile error.
#[derive(Debug)]
struct Derives;

impl ParseCallbacks for Derives {
    fn add_derives(&self, info: &DeriveInfo<'_>) -> Vec<String> {
        match info.kind {
            TypeKind::Struct => vec!["bytemuck::Pod".into(), "bytemuck::Zeroable".into()],
            _ => vec![],
        }
    }
}

fn rustfmt(text: &str) -> Result<String> {
    let mut child = Command::new("rustfmt")
        .arg("--config-path")
        .arg(workspace().join("rustfmt.toml"))
        .args(["--edition", "2024"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("rustfmt does not start: {error}"))?;
    let mut input = child.stdin.take().expect("stdin is piped");
    input.write_all(text.as_bytes()).map_err(|error| error.to_string())?;
    drop(input);
    let output = child.wait_with_output().map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err("rustfmt rejects the bindings".to_string());
    }
    String::from_utf8(output.stdout).map_err(|error| error.to_string())
}
