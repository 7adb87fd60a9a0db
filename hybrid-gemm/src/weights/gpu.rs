//! Weights in host memory that a device reads in place: pinned, and visible to it.
//!
//! Pinning is slow, it touches every page, so it belongs into loading. The pinned memory is shared by whoever holds the weights
//! and lives as long as the last of them; giving it up waits for the kernels that may still read it.

use std::sync::Arc;

use cuda::driver::{Gpu, Mapped, MappedKind, Registered};

use super::{HostMemory, MappedFile, Weights};
use crate::Error;

/// Copies the host part of weights to pinned memory of the device's context.
///
/// # Errors
/// [`Error::Misaligned`] for a row-major part whose rows kernels cannot read; [`Error::Cuda`] when the driver has no memory to
/// pin. A mapped file is pinned without a copy by [`pin_file`].
pub fn pin(gpu: &Gpu, weights: &Weights) -> Result<Weights, Error> {
    weights.check_in_place()?;
    let (memory, start) = weights.host_memory();
    let bytes = &memory.bytes()[start..start + weights.placement().host_bytes() as usize];
    if bytes.is_empty() {
        return Ok(weights.clone());
    }
    // Cached: write-combined memory would make every later read by the CPU very slow.
    let mut arena = Mapped::<u8>::zeroed(gpu, bytes.len(), MappedKind::Cached)?;
    arena.write()?.copy_from_slice(bytes);
    let address = arena.view().address();
    let memory = HostMemory { bytes: Arc::new(Arena(arena)), device: Some((gpu.device().ordinal, address)) };
    Ok(weights.with_host_memory(memory, 0))
}

/// Pins a mapped file where it is, read-only where the device supports that; its tensors are then read in place.
///
/// # Errors
/// [`Error::Cuda`] when the driver refuses, as it does for read-only mappings on devices without
/// `CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED`.
pub fn pin_file(gpu: &Gpu, file: &MappedFile) -> Result<MappedFile, Error> {
    let registered = Registered::<u8, HostMemory>::read_only(gpu, file.memory().clone())?;
    let address = registered.view().address();
    let bytes = Arc::new(File { file: file.memory().clone(), _registered: registered });
    Ok(file.with_memory(HostMemory { bytes, device: Some((gpu.device().ordinal, address)) }))
}

/// Pinned memory that is written no more.
struct Arena(Mapped<u8>);

impl AsRef<[u8]> for Arena {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: only `view` of the memory is handed out after it was filled, which kernels read and do not write.
        unsafe { self.0.as_slice() }
    }
}

/// A mapped file and the registration that keeps it pinned.
struct File {
    file: HostMemory,
    _registered: Registered<u8, HostMemory>,
}

impl AsRef<[u8]> for File {
    fn as_ref(&self) -> &[u8] {
        self.file.bytes()
    }
}
