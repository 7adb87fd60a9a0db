// total [1] u32: the sum of all blocks' inputs, added up by the block that arrives last. in [blocks, 64], partials
// [blocks, 64].
#include "core.cuh"
#include "ptx/sync.cuh"

KERNEL(64, 1)
last_arriver_sum(const uint32_t* in, uint32_t* partials, uint32_t* counter, uint32_t* total, uint32_t bug) {
    DYNAMIC_SHARED(shared);
    uint32_t* last = reinterpret_cast<uint32_t*>(shared);
    const uint32_t i = blockIdx.x * 64 + threadIdx.x;
    partials[i] = in[i] * 2;
    if (bug != 2) __syncthreads();  // without it the other threads' partials are not part of the release
    if (threadIdx.x == 0) {
        uint32_t before;
        if (bug == 1) {
            __threadfence();
            before = atomicAdd(counter, 1u);
            __threadfence();
        } else if (bug == 3) {
            before = atomic_add_release_u32(counter, 1);  // nothing is acquired
        } else {
            before = atomic_add_acq_rel_u32(counter, 1);
        }
        *last = before + 1 == gridDim.x;
    }
    if (bug != 4) __syncthreads();
    if (*last == 0) return;
    uint32_t sum = 0;
    for (uint32_t block = 0; block < gridDim.x; block++) sum += partials[block * 64 + threadIdx.x];
    atomicAdd(total, sum);
    if (threadIdx.x == 0) *counter = 0;
}
