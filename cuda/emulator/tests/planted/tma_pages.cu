// out [64, 64] f32: the sum of two tiles of 64 rows, each four pages by the table [8] u32, of in [pages, 16, 64] bf16, a tensor map of
// three dimensions with boxes of 16x64 in the 128-byte swizzle; a page that is not in the pool counts as 0. Four lanes of warp 2 load a
// page each, the 64 threads of warps 0 and 1 use them.
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "tile/swizzle.cuh"
#include "types.cuh"

KERNEL(96, 1) tma_pages(const __grid_constant__ TensorMap in, const uint32_t* table, float* out, uint32_t bug) {
    DYNAMIC_SHARED(shared);
    constexpr uint32_t PAGE_BYTES = 16 * 128, BYTES = 4 * PAGE_BYTES;
    const uint32_t base = shared_address(shared), full = base + 2 * BYTES;
    if (threadIdx.x == 0) {
        mbarrier_init(full, 1);
        mbarrier_init(full + 8, 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x >= 64) {
        for (uint32_t tile = 0; tile < 2; tile++) {
            const uint32_t lane = lane_index(), barrier = full + 8 * tile;
            const uint32_t page = lane < 4 ? table[tile * 4 + lane] : 0;
            const uint32_t there = __popc(__ballot_sync(FULL_WARP, lane < 4 && page < 5));
            // A box of a page that there is not counts in full.
            const uint32_t bytes = bug == 2 ? there * PAGE_BYTES : bug == 3 ? PAGE_BYTES : BYTES;
            if (lane == 0) mbarrier_arrive_expect_bytes(barrier, bytes);
            __syncwarp();
            if (lane >= 4) continue;
            const uint32_t at = base + tile * BYTES + (bug == 5 && lane == 2 ? 1 : lane) * PAGE_BYTES;
            if (bug == 6) {
                tma_load_2d(at, in, barrier, 0, page * 16);
            } else {
                tma_load_3d(at, in, barrier, 0, bug == 4 ? 4 : 0, bug == 1 ? tile * 4 + lane : page);
            }
        }
        return;
    }
    for (uint32_t row = 0; row < 64; row++) {
        float sum = 0.0f;
        for (uint32_t tile = 0; tile < 2; tile++) {
            mbarrier_wait(full + 8 * tile, 0);
            const uint32_t place = Swizzle<128>::offset(row, threadIdx.x / 8) + threadIdx.x % 8 * 2;
            sum += to_f32(*reinterpret_cast<const bf16*>(shared + tile * BYTES + place));
        }
        out[row * 64 + threadIdx.x] = sum;
    }
}
