//! Random data in device memory, without end: some megabytes of it, over and over. Zeros draw less power and clock higher.

use std::sync::Arc;

use longkv_attention::Element;
use longkv_attention::testing::{Inputs, poison};
use longkv_cuda::cudarc::driver::{CudaSlice, CudaStream, DeviceRepr, ValidAsZeroBits};

/// Different vectors before the first comes again: a prime, so that no two pages or heads of a cache hold the same.
const PERIOD: usize = 8191;
/// Elements that are copied from the host; more are copied on the device.
const BLOCK: usize = 4 << 20;

/// Vectors `[∞, dim]` of N(0, 1): an index names a vector, on the host as on the device.
#[derive(Debug, Clone)]
pub struct Vectors<T> {
    dim: usize,
    block: Vec<T>,
}

impl<T: Element + DeviceRepr + ValidAsZeroBits> Vectors<T> {
    /// The vectors of a seed.
    pub fn new(dim: usize, seed: u64) -> Self {
        Vectors { dim, block: Inputs::Normal.generate(PERIOD, dim, seed) }
    }

    /// Vector `index` `[dim]`.
    pub fn get(&self, index: usize) -> &[T] {
        &self.block[index % PERIOD * self.dim..][..self.dim]
    }

    /// The first vectors `[vectors, dim]` on the device.
    ///
    /// # Panics
    /// When the device has not enough memory.
    pub fn upload(&self, stream: &Arc<CudaStream>, vectors: usize) -> CudaSlice<T> {
        repeated(stream, &self.block, vectors * self.dim)
    }

    /// The same as bytes.
    ///
    /// # Panics
    /// When the device has not enough memory.
    pub fn upload_bytes(&self, stream: &Arc<CudaStream>, vectors: usize) -> CudaSlice<u8> {
        repeated(stream, bytemuck::cast_slice(&self.block), vectors * self.dim * size_of::<T>())
    }
}

/// `len` elements on the device: `piece` over and over.
///
/// # Panics
/// When `piece` is empty or the device has not enough memory.
pub fn repeated<T: Copy + DeviceRepr + ValidAsZeroBits>(
    stream: &Arc<CudaStream>,
    piece: &[T],
    len: usize,
) -> CudaSlice<T> {
    // Whole pieces, and enough of them for few copies.
    let block_len = (BLOCK.div_ceil(piece.len()) * piece.len()).min(len);
    let block: Vec<T> = piece.iter().copied().cycle().take(block_len).collect();
    let mut device = stream.alloc_zeros::<T>(len).expect("device memory");
    if len > 0 {
        let first = stream.clone_htod(&block).expect("copy");
        for start in (0..len).step_by(block_len) {
            let end = (start + block_len).min(len);
            let mut to = device.slice_mut(start..end);
            stream.memcpy_dtod(&first.slice(..end - start), &mut to).expect("copy");
        }
    }
    // The copies read `block`, which is about to go.
    stream.synchronize().expect("the copies ran");
    device
}

/// `len` elements of NaN on the device: what no kernel leaves behind where it writes.
///
/// # Panics
/// When the device has not enough memory.
pub fn poisoned<T: Element + DeviceRepr + ValidAsZeroBits>(
    stream: &Arc<CudaStream>,
    len: usize,
) -> CudaSlice<T> {
    repeated(stream, &poison::<T>(1), len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_names_a_vector() {
        let vectors = Vectors::<f32>::new(4, 7);
        assert_eq!(vectors.get(3), &Inputs::Normal.values(PERIOD, 4, 7)[12..16]);
        assert_eq!(vectors.get(3), vectors.get(3 + PERIOD));
        assert_ne!(vectors.get(3), vectors.get(4));
    }
}
