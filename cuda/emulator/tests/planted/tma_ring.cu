// out [64, 64] f32: the sum over `tiles` of in [tiles * 64 - 5, 64] bf16, a tensor map with boxes of 64x64 in the 128-byte swizzle, of
// which the rows from 40 on of the last tile count as 0, whatever lies there. Warp 2 loads tiles into a ring of two slots, the 64
// threads of warps 0 and 1 use them. `sink` takes a row by a bulk store, so that the async proxy reads what was overwritten.
#include "ptx/bulk_copy.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "tile/swizzle.cuh"
#include "types.cuh"

KERNEL(96, 1) tma_ring(const __grid_constant__ TensorMap in, float* out, uint4* sink, uint32_t tiles, uint32_t bug) {
    DYNAMIC_SHARED(shared);
    constexpr uint32_t BYTES = 64 * 128;
    const uint32_t base = shared_address(shared), full = base + 2 * BYTES, empty = full + 16, landed = empty + 16;
    if (threadIdx.x == 0) {
        for (uint32_t slot = 0; slot < 2; slot++) {
            mbarrier_init(full + 8 * slot, 1);
            mbarrier_init(empty + 8 * slot, 2);
        }
        mbarrier_init(landed, 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x >= 64) {
        for (uint32_t tile = 0; tile < tiles; tile++) {
            const uint32_t slot = tile % 2, round = tile / 2, at = base + slot * BYTES;
            const bool edge = tile + 1 == tiles;
            const uint32_t barrier = edge ? landed : full + 8 * slot;
            if (lane_index() == 0) {
                mbarrier_wait(empty + 8 * slot, round % 2 ^ (bug == 2 ? 0 : 1));
                if (bug == 1) {
                    mbarrier_arrive(barrier);
                } else {
                    // A box outside of the tensor counts in full.
                    mbarrier_arrive_expect_bytes(barrier, bug == 3 && edge ? BYTES - 5 * 128 : BYTES);
                }
                tma_load_2d(at + (bug == 4 ? 128 : 0), in, barrier, 0, tile * 64);
            }
            if (!edge) continue;
            if (bug != 5) mbarrier_wait(landed, 0);
            for (uint32_t row = 40 + lane_index(); row < 64; row += 32) {
                for (uint32_t chunk = 0; chunk < 8; chunk++) {
                    *reinterpret_cast<uint4*>(shared + slot * BYTES + row * 128 + chunk * 16) = make_uint4(0, 0, 0, 0);
                }
            }
            if (bug != 6) async_proxy_fence();
            if (bug != 7) __syncwarp();
            if (lane_index() == 0) mbarrier_arrive(full + 8 * slot);
        }
        return;
    }
    for (uint32_t row = 0; row < 64; row++) out[row * 64 + threadIdx.x] = 0.0f;
    for (uint32_t tile = 0; tile < tiles; tile++) {
        const uint32_t slot = tile % 2, round = tile / 2;
        mbarrier_wait(full + 8 * slot, round % 2 ^ (bug == 8 ? 1 : 0));
        for (uint32_t row = 0; row < 64; row++) {
            const uint32_t place = Swizzle<128>::offset(row, threadIdx.x / 8) + threadIdx.x % 8 * 2;
            out[row * 64 + threadIdx.x] += to_f32(*reinterpret_cast<const bf16*>(shared + slot * BYTES + place));
        }
        if (tile + 1 == tiles && threadIdx.x == 0) {
            bulk_store(sink, base + slot * BYTES + 63 * 128, 128);
            bulk_commit();
            bulk_wait<0>();
        }
        if (bug == 9) *reinterpret_cast<uint16_t*>(shared + slot * BYTES + threadIdx.x * 2) = 0;  // in the first row
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(empty + 8 * slot);
    }
}
