//! Weights where a GPU reads them.

use std::sync::Arc;

use cuda::cudarc::driver::{CudaSlice, CudaStream};
use cuda::driver::Gpu;
use cuda::memory::{Space, View};

use super::DeviceWeights;
use crate::weights::gpu::pin;
use crate::{Error, Weights};

/// A matrix on both sides of the link: the host part pinned, the rest copied to HBM. Dropping it waits for whoever reads it.
#[derive(Debug)]
pub struct ResidentWeights {
    weights: Weights,
    ordinal: usize,
    hbm: CudaSlice<u8>,
    scales: CudaSlice<f32>,
}

impl ResidentWeights {
    /// Brings weights to their places. A host part that the device reaches already, such as a pinned file, stays where it is;
    /// any other is copied to pinned memory. Blocks.
    ///
    /// # Errors
    /// As [`pin`]; [`Error::Misaligned`] for a row-major part whose rows start between 16-byte units;
    /// [`Error::Cuda`] when the device has no memory left.
    pub fn new(gpu: &Gpu, stream: &Arc<CudaStream>, weights: &Weights) -> Result<Self, Error> {
        weights.check_in_place()?;
        let ordinal = gpu.device().ordinal;
        let weights = match weights.host_memory().0.device_address(ordinal) {
            Ok(_) => weights.clone(),
            Err(_) => pin(gpu, weights)?,
        };
        // An allocation of nothing has no address.
        let copied = |error| Error::from(cuda::driver::failed("cuMemcpyHtoDAsync")(error));
        let bytes = weights.hbm_bytes();
        let hbm = stream.clone_htod(if bytes.is_empty() { &[0u8][..] } else { bytes }).map_err(copied)?;
        let scales = weights.channel_scales();
        let scales =
            stream.clone_htod(if scales.is_empty() { &[0.0f32][..] } else { scales }).map_err(copied)?;
        Ok(Self { ordinal, hbm, scales, weights })
    }

    /// The weights.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Calls with the weights as arguments of [`Gemm::run`](super::Gemm::run).
    ///
    /// # Errors
    /// Those of `run`; [`Error::NotMapped`] cannot occur after [`new`](Self::new).
    pub fn with<R>(
        &self,
        stream: &CudaStream,
        run: impl FnOnce(DeviceWeights<'_>) -> Result<R, Error>,
    ) -> Result<R, Error> {
        let placement = self.weights.placement();
        let bytes = placement.host_bytes() as usize;
        let host = match bytes {
            0 => None,
            _ => {
                let (memory, start) = self.weights.host_memory();
                let address = memory.device_address(self.ordinal)? + start as u64;
                // SAFETY: the weights hold this many pinned bytes at the address, nobody writes them, and giving them up
                // waits for the kernels that read them.
                Some(unsafe { View::from_raw(address, bytes, Space::Device(self.ordinal)) })
            }
        };
        let hbm = (placement.hbm_columns() > 0).then(|| View::device(&self.hbm, stream));
        let scaled = placement.tiling().format().has_channel_scale();
        let scales = scaled.then(|| View::device(&self.scales, stream));
        run(DeviceWeights { host: host.as_ref(), hbm: hbm.as_ref(), scales: scales.as_ref() })
    }
}
