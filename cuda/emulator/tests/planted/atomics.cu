// histogram [16] u32 of in [n] u32, through a histogram of each block in shared memory.
#include "core.cuh"

KERNEL(64, 1) atomics(const uint32_t* in, uint32_t* histogram, uint32_t n, uint32_t bug) {
    DYNAMIC_SHARED(shared);
    uint32_t* counts = reinterpret_cast<uint32_t*>(shared);
    if (threadIdx.x < 16 && bug != 1) counts[threadIdx.x] = 0;
    if (bug != 2) __syncthreads();
    for (uint32_t i = blockIdx.x * 64 + threadIdx.x; i < n; i += gridDim.x * 64) atomicAdd(&counts[in[i] % 16], 1u);
    if (bug != 3) __syncthreads();
    if (threadIdx.x < 16) {
        if (bug == 4) {
            histogram[threadIdx.x] += counts[threadIdx.x];  // plain, from several blocks
        } else {
            atomicAdd(&histogram[threadIdx.x], counts[threadIdx.x]);
        }
    }
}
