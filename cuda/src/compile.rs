//! From a row of the kernel table to a cubin: which headers and options a compile takes, and what the kernel then uses.

use std::collections::BTreeSet;

use crate::Error;
use crate::digest::Digest;
use crate::nvrtc::{Failure, Input, Nvrtc, Output};
use crate::sources;
use crate::table::{Arch, Instance};

/// A compiled kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cubin {
    /// The image that the driver loads.
    pub bytes: Vec<u8>,
    /// The compiler's warnings; empty if there are none, or if the image comes from a cache.
    pub log: String,
}

/// What a compiled kernel uses, as ptxas reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Resources {
    /// Registers per thread.
    pub registers: u32,
    /// Static shared memory per block, in bytes.
    pub shared: u32,
    /// Bytes of stack per thread: arrays that did not fit registers.
    pub stack: u32,
    /// Bytes of registers written to local memory for want of room.
    pub spill_stores: u32,
    /// Bytes of registers read back.
    pub spill_loads: u32,
    /// Whether ptxas makes warpgroup products wait for each other because of how the kernel uses their registers.
    pub serialized: bool,
}

/// Compiles an instance for one real architecture, as the run time does.
pub fn compile(nvrtc: &Nvrtc, instance: &Instance, arch: Arch) -> Result<Cubin, Error> {
    let output = run(nvrtc, instance, arch, &[])?;
    Ok(Cubin { bytes: output.cubin, log: output.log })
}

/// Compiles an instance once more and reads what it uses from ptxas's log.
///
/// Once more, because a cubin records its options: with this one it would differ from the cubin that runs.
pub fn resources(nvrtc: &Nvrtc, instance: &Instance, arch: Arch) -> Result<Resources, Error> {
    let log = run(nvrtc, instance, arch, &["--ptxas-options=-v"])?.log;
    parse_resources(&log).ok_or_else(|| Error::Compile {
        kernel: instance.label(),
        arch: arch.to_string(),
        log: format!("ptxas's report has no register count:\n{log}"),
    })
}

/// The options that specialise a kernel, without those that name the architecture.
///
/// No fast-math: results are specified operation by operation, and approximations are asked for by name in the source.
pub fn options(instance: &Instance) -> Vec<String> {
    let constants = instance.constants().map(|(name, value)| format!("-D{name}={value}"));
    std::iter::once("--std=c++17".to_string()).chain(constants).collect()
}

/// Fingerprint of everything of ours that decides the machine code: the source, the headers it reaches and the options.
/// The compiler's version and the architecture are not in it.
pub fn source_digest(instance: &Instance) -> Digest {
    let options = options(instance);
    let headers = headers(instance.kernel.source);
    let parts = std::iter::once(instance.kernel.source.as_bytes())
        .chain(headers.iter().flat_map(|(name, text)| [name.as_bytes(), text.as_bytes()]))
        .chain(options.iter().map(|option| option.as_bytes()));
    Digest::of_parts(parts)
}

/// The headers of [`sources::HEADERS`] that a source includes, directly or through others, in the order of that list.
pub fn headers(source: &str) -> Vec<(&'static str, &'static str)> {
    let mut reached = BTreeSet::new();
    let mut texts = vec![source];
    while let Some(text) = texts.pop() {
        for name in includes(text) {
            if let Some(&(name, text)) = sources::HEADERS.iter().find(|(known, _)| *known == name)
                && reached.insert(name)
            {
                texts.push(text);
            }
        }
    }
    sources::HEADERS.iter().copied().filter(|(name, _)| reached.contains(name)).collect()
}

/// Names in `#include "…"` and `#include <…>` lines, whether the preprocessor takes the line or not.
fn includes(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| {
        let rest = line.trim_start().strip_prefix('#')?.trim_start().strip_prefix("include")?.trim_start();
        let close = match rest.chars().next()? {
            '"' => '"',
            '<' => '>',
            _ => return None,
        };
        let rest = &rest[1..];
        Some(&rest[..rest.find(close)?])
    })
}

fn run(nvrtc: &Nvrtc, instance: &Instance, arch: Arch, more: &[&str]) -> Result<Output, Error> {
    if !instance.kernel.arch.runs_on(arch) {
        return Err(Error::UnsupportedArch {
            kernel: instance.label(),
            expected: instance.kernel.arch.to_string(),
            found: arch.to_string(),
        });
    }
    if !nvrtc.supports(arch) {
        return Err(Error::NvrtcArch { arch, version: nvrtc.version(), known: nvrtc.archs().to_vec() });
    }
    let mut options = options(instance);
    options.push(format!("--gpu-architecture={arch}"));
    options.extend(more.iter().map(ToString::to_string));
    let name = format!("{}/{}.cu", instance.kernel.group, instance.kernel.name);
    let input = Input {
        name: &name,
        source: instance.kernel.source,
        headers: &headers(instance.kernel.source),
        options: &options,
    };
    nvrtc.cubin(&input).map_err(|failure| match failure {
        Failure::Rejected(log) => Error::Compile { kernel: instance.label(), arch: arch.to_string(), log },
        Failure::Call { call, code, log } => Error::Nvrtc { call, code, log },
    })
}

/// Reads lines such as these; a kernel with functions that were not inlined has several of the first kind.
///
/// ```text
///     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
/// ptxas info    : Used 58 registers, used 1 barriers, 1024 bytes smem, 380 bytes cmem[0]
/// ```
fn parse_resources(log: &str) -> Option<Resources> {
    let mut resources = Resources::default();
    let mut found = false;
    for line in log.lines() {
        let number_before = |what: &str| -> Option<u32> {
            line[..line.find(what)?].trim_end().rsplit(' ').next()?.parse().ok()
        };
        if let Some(stack) = number_before("bytes stack frame") {
            resources.stack = resources.stack.max(stack);
            resources.spill_stores += number_before("bytes spill stores")?;
            resources.spill_loads += number_before("bytes spill loads")?;
        }
        if let Some(registers) = number_before("registers") {
            found = true;
            resources.registers = resources.registers.max(registers);
            resources.shared = resources.shared.max(number_before("bytes smem").unwrap_or(0));
        }
        // (C7510) … (C7514): "wgmma.mma_async instructions are serialized due to …".
        resources.serialized |= line.contains("wgmma.mma_async instructions are serialized");
    }
    found.then_some(resources)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn include_lines_are_found() {
        let text = "#include \"a.cuh\"\n  # include <stdint.h>\n// #include \"no.cuh\"\n#includex\n#include MACRO\n#include \"open";
        assert_eq!(includes(text).collect::<Vec<_>>(), ["a.cuh", "stdint.h"]);
    }

    #[test]
    fn headers_are_reached_through_headers() {
        let known: Vec<_> = sources::HEADERS.iter().map(|(name, _)| *name).collect();
        assert_eq!(headers("int x;"), []);
        assert_eq!(headers("#include \"unknown.cuh\""), []);
        let reached: Vec<_> =
            headers("#include \"tile/status.cuh\"").into_iter().map(|(name, _)| name).collect();
        for name in ["tile/status.cuh", "ptx/sync.cuh", "core.cuh", "stdint.h"] {
            assert!(reached.contains(&name), "{name} is not in {reached:?}");
        }
        assert!(reached.len() < known.len(), "headers that are not reached are left out");
    }

    #[test]
    fn the_digest_follows_the_constants() {
        let mut digests = BTreeSet::new();
        for (instance, _) in crate::table::shipped() {
            assert!(digests.insert(source_digest(&instance).to_string()), "{}", instance.label());
        }
        assert!(digests.len() > 1);
    }

    #[test]
    fn ptxas_reports_are_read() {
        let log = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'k' for 'sm_80'
ptxas info    : Function properties for k
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 58 registers, used 1 barriers, 1024 bytes smem, 380 bytes cmem[0]
ptxas info    : Function properties for helper
    32 bytes stack frame, 1 bytes spill stores, 2 bytes spill loads";
        let expected = Resources {
            registers: 58,
            shared: 1024,
            stack: 32,
            spill_stores: 5,
            spill_loads: 10,
            serialized: false,
        };
        assert_eq!(parse_resources(log), Some(expected));
        let warned = format!(
            "{log}\nptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to \
             insufficient register resources for the wgmma pipeline in the function 'k'"
        );
        assert_eq!(parse_resources(&warned), Some(Resources { serialized: true, ..expected }));
        let bare = "ptxas info    : Used 8 registers, used 0 barriers";
        assert_eq!(parse_resources(bare), Some(Resources { registers: 8, ..Resources::default() }));
        assert_eq!(parse_resources("nothing to see"), None, "a report without registers is no report");
    }
}
