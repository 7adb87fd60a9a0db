// out [128] u32: how many barriers each thread has passed.
#include "core.cuh"
#include "ptx/sync.cuh"

KERNEL(128, 1) barriers(uint32_t* out, uint32_t bug) {
    uint32_t passed = 0;
    if (bug == 1 && threadIdx.x >= 100) return;  // ends while the others wait
    if (bug != 2 || threadIdx.x < 40) {
        __syncthreads();
        passed++;
    }
    if (bug == 3) {  // both branches have one, but not the same
        if (threadIdx.x < 64) {
            __syncthreads();
        } else {
            __syncthreads();
        }
    }
    // Warps 0 and 1 wait for all four at barrier 1, warps 2 and 3 only arrive.
    if (threadIdx.x < 64) {
        named_barrier_sync(1, bug == 4 ? 96 : 128);
    } else {
        named_barrier_arrive(1, 128);
    }
    if (bug == 5 && threadIdx.x < 16) named_barrier_sync(2, 32);  // half a warp
    passed++;
    out[threadIdx.x] = passed + __syncthreads_count(threadIdx.x < 5);
}
