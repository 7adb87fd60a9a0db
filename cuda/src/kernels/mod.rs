//! Typed kernels: one struct per kernel owns its function and has its only launch.
//!
//! Each struct checks lengths, alignment and shared memory, then launches; it is generic over
//! [`Function`](crate::launch::Function), so the same code runs on the driver and in the emulator.

pub mod attention;
pub mod ceilings;
pub mod conformance;
pub mod homomorphic_quant;
pub mod hybrid_gemm;
pub mod kv_compress;
pub mod seq_parallel;
pub mod sparse_attn;
mod split;

/// Blocks of `shared` bytes of shared memory that an SM of a data-centre GPU holds at once: 228 KB on sm_90, of which each block
/// takes 1 KB more than it asks for. Plans without a device count by it; smaller SMs work through the blocks in turns.
pub(crate) const fn fitting_blocks(shared: usize) -> u32 {
    const SM_SHARED: usize = 228 * 1024;
    const OF_BLOCK: usize = 1024;
    (SM_SHARED / (shared + OF_BLOCK)) as u32
}

#[cfg(test)]
mod tests {
    use super::homomorphic_quant::{DecodeVariant, Method};
    use super::kv_compress::FdcDecodeVariant;
    use crate::table;

    /// Blocks that share an SM fit its shared memory and, where rows have a budget of their own, its 64 Ki registers.
    #[test]
    fn blocks_that_share_an_sm_fit_it() {
        let rows = |kernel| table::kernel(kernel).expect("a kernel").rows;
        let fits = |name: &str, values: &[i64], blocks: u32, shared: usize| {
            assert!((1..=3).contains(&blocks), "{name} {values:?}: {blocks} blocks");
            assert!(blocks as usize * (shared + 1024) <= 228 * 1024, "{name} {values:?}: {shared} bytes");
        };
        for row in rows("fdc_decode") {
            let v = row.values;
            let variant = FdcDecodeVariant {
                head_dim: v[0] as usize,
                column_tiles: v[1] as usize,
                soft_cap: v[3] != 0,
            };
            let blocks = variant.blocks_per_sm();
            fits("fdc_decode", v, blocks, variant.shared_bytes());
            assert!(blocks * 128 * row.registers <= 65_536, "{v:?}: {blocks} blocks");
        }
        let mut found = Vec::new();
        for row in rows("hack_decode") {
            let v = row.values;
            let size = |i: usize| v[i] as usize;
            let variant = DecodeVariant {
                method: Method::Codes,
                k_bits: size(0),
                v_bits: size(1),
                partition: size(2),
                qk_dim: size(3),
                v_dim: size(4),
                column_tiles: size(5),
                soft_cap: v[7] != 0,
            };
            fits("hack_decode", v, variant.blocks_per_sm(), variant.shared_bytes());
            found.push(variant.blocks_per_sm());
        }
        assert!(found.contains(&3) && found.contains(&2), "it depends on the variant: {found:?}");
    }
}
