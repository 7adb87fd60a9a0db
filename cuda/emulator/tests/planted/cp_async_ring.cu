// out [64] u32: the sum over `tiles` tiles of in [tiles, 64] u32, through a ring of two slots.
#include "core.cuh"
#include "ptx/cp_async.cuh"

KERNEL(64, 1) cp_async_ring(const uint32_t* in, uint32_t* out, uint32_t tiles, uint32_t bug) {
    DYNAMIC_SHARED(shared);
    const uint32_t* ring = reinterpret_cast<const uint32_t*>(shared);
    const uint32_t base = shared_address(shared);
    const auto load = [&](uint32_t tile) {
        const uint32_t slot = tile % 2 * 256;
        if (tile < tiles && threadIdx.x < 16)
            cp_async_16(base + slot + threadIdx.x * 16, in + tile * 64 + threadIdx.x * 4);
        cp_async_commit();
    };
    uint32_t sum = 0;
    load(0);
    for (uint32_t tile = 0; tile < tiles; tile++) {
        load(tile + 1);
        if (bug == 2) {
            cp_async_wait<2>();  // one group too few
        } else if (bug != 1) {
            cp_async_wait<1>();
        }
        if (bug != 3) __syncthreads();
        sum += ring[tile % 2 * 64 + (threadIdx.x ^ 17)];
        if (bug != 4) __syncthreads();
    }
    if (bug == 5) load(0);  // on its way when the thread ends
    out[threadIdx.x ^ 17] = sum;
}
