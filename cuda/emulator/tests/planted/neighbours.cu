// out[round] [128] u32: each thread's neighbour's input plus the round, by way of shared memory, for two rounds.
#include "core.cuh"

KERNEL(128, 1) neighbours(const uint32_t* in, uint32_t* out, uint32_t bug) {
    DYNAMIC_SHARED(shared);
    uint32_t* exchange = reinterpret_cast<uint32_t*>(shared);
    for (uint32_t round = 0; round < 2; round++) {
        exchange[threadIdx.x] = in[threadIdx.x] + round;
        if (bug != 1) __syncthreads();
        out[round * 128 + threadIdx.x] = exchange[(threadIdx.x + 33) % 128];
        if (bug != 2) __syncthreads();  // the tail barrier: the next round overwrites
    }
    if (bug == 3) out[threadIdx.x] = exchange[128 + threadIdx.x];  // never written
}
