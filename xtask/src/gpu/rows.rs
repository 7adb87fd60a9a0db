//! The rows of the kernel table as they are now: the digests that the ledger compares with.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use cuda::cache::{self, Cache};
use cuda::compile::{self, Cubin};
use cuda::digest::Digest;
use cuda::nvrtc::Nvrtc;
use cuda::table::{self, Arch, Instance};
use xtask::results::RowDigests;

use super::launch_code;
use crate::{Result, toolkit, workspace};

/// The architecture that the ledger speaks of.
pub(crate) const ARCH: Arch = Arch::new(9, 0);

/// A shipped row with its sm_90a cubin.
pub(crate) struct Row {
    pub(crate) instance: Instance,
    pub(crate) cubin: Cubin,
    pub(crate) digests: RowDigests,
}

/// The shipped rows that `wanted` picks by label, compiled by the NVRTC that cubins ship from.
///
/// Cubins are kept in `target/gpu-cubins`, where the next call finds them.
pub(crate) fn current(wanted: impl Fn(&str) -> bool) -> Result<Vec<Row>> {
    let instances: Vec<Instance> = shipped().filter(|instance| wanted(&instance.label())).collect();
    if instances.is_empty() {
        return Ok(Vec::new());
    }
    let names: Vec<&str> = instances.iter().map(|instance| instance.kernel.name).collect();
    let launch = launch_code::digests(&names)?;
    let nvrtc = nvrtc()?;
    let cache = Cache::at(workspace().join("target/gpu-cubins"));
    let (next, rows) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((index, instance)) = {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    instances.get(index).map(|instance| (index, instance))
                } {
                    let outcome = cubin(nvrtc, &cache, instance);
                    rows.lock().expect("no thread panicked").insert(index, outcome);
                }
            });
        }
    });
    let rows = rows.into_inner().expect("no thread panicked");
    instances
        .into_iter()
        .zip(rows.into_values())
        .map(|(instance, cubin)| {
            let cubin = cubin.map_err(|error| error.to_string())?;
            let digests = RowDigests {
                label: instance.label(),
                group: instance.kernel.group.to_string(),
                cubin: Digest::of(&cubin.bytes).to_string(),
                launch: launch[instance.kernel.name].to_string(),
            };
            Ok(Row { instance, cubin, digests })
        })
        .collect()
}

/// Shipped rows that run on [`ARCH`].
pub(crate) fn shipped() -> impl Iterator<Item = Instance> {
    table::shipped().map(|(instance, _)| instance).filter(|instance| instance.kernel.arch.runs_on(ARCH))
}

/// The NVRTC that cubins ship from.
pub(crate) fn nvrtc() -> Result<&'static Nvrtc> {
    Nvrtc::open(&toolkit::NVRTC.install()?).map_err(|error| error.to_string())
}

fn cubin(nvrtc: &Nvrtc, cache: &Cache, instance: &Instance) -> std::result::Result<Cubin, cuda::Error> {
    let key = cache::key(instance, ARCH, nvrtc.version());
    if let Some(bytes) = cache.load(instance.kernel.name, key) {
        return Ok(Cubin { bytes, log: String::new() });
    }
    let cubin = compile::compile(nvrtc, instance, ARCH)?;
    cache.store(instance.kernel.name, key, &cubin.bytes);
    Ok(cubin)
}
