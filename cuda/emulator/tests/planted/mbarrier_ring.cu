// out [64] u32: the sum over `tiles` of in [tiles, 64] u32. Warp 2 loads tiles by bulk copies into a ring of two
// slots, the 64 threads of warps 0 and 1 use them.
#include "core.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/mbarrier.cuh"

KERNEL(96, 1) mbarrier_ring(const uint32_t* in, uint32_t* out, uint32_t tiles, uint32_t bug) {
    DYNAMIC_SHARED(shared);
    const uint32_t base = shared_address(shared), full = base + 512, empty = full + 16;
    if (threadIdx.x == 0) {
        for (uint32_t slot = 0; slot < 2; slot++) {
            mbarrier_init(full + 8 * slot, 1);
            mbarrier_init(empty + 8 * slot, bug == 3 ? 1 : 2);
        }
        if (bug != 8 && bug != 9) mbarrier_init_fence();
    }
    if (bug == 9 && threadIdx.x == 1) mbarrier_init_fence();
    if (bug != 7) __syncthreads();
    if (threadIdx.x >= 64) {
        if (threadIdx.x != 64) return;
        for (uint32_t tile = 0; tile < tiles; tile++) {
            const uint32_t slot = tile % 2, round = tile / 2;
            if (bug != 4) mbarrier_wait(empty + 8 * slot, round % 2 ^ 1);
            mbarrier_arrive_expect_bytes(full + 8 * slot, bug == 5 ? 272 : 256);
            bulk_load(base + slot * 256, in + tile * 64, 256, full + 8 * slot);
        }
        return;
    }
    uint32_t sum = 0;
    for (uint32_t tile = 0; tile < tiles; tile++) {
        const uint32_t slot = tile % 2, round = tile / 2;
        if (bug != 2) mbarrier_wait(full + 8 * slot, round % 2);
        sum += reinterpret_cast<const uint32_t*>(shared)[slot * 64 + threadIdx.x];
        if (bug == 10 || bug == 11) reinterpret_cast<uint32_t*>(shared)[slot * 64 + threadIdx.x] = 0;
        if (bug == 11) async_proxy_fence();
        __syncwarp();
        const bool lost = bug == 1 && threadIdx.x == 32 && tile == 1;
        if (threadIdx.x % 32 == 0 && !lost) mbarrier_arrive(empty + 8 * slot);
    }
    if (bug == 6) sum += reinterpret_cast<const uint32_t*>(shared)[128];  // an mbarrier
    out[threadIdx.x] = sum;
}
