// out [128] u32: each thread's neighbour's input, by way of shared memory.
#include "core.cuh"

KERNEL(128, 1) missing_barrier(const uint32_t* in, uint32_t* out) {
    DYNAMIC_SHARED(shared);
    uint32_t* exchange = reinterpret_cast<uint32_t*>(shared);
    exchange[threadIdx.x] = in[threadIdx.x];
#if BUG != 1
    __syncthreads();
#endif
    out[threadIdx.x] = exchange[(threadIdx.x + 33) % 128];
}
