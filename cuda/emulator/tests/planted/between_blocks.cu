// Blocks that speak to each other. out [blocks, 64] u32, flag [1] u32, zero before.
#include "core.cuh"
#include "ptx/sync.cuh"

KERNEL(64, 1) between_blocks(uint32_t* out, uint32_t* flag, uint32_t bug) {
    const uint32_t block = blockIdx.x, i = threadIdx.x;
    out[block * 64 + i] = block;
    if (bug == 1) out[i] = block;                      // two blocks write one word
    if (bug == 2 && block == 1) out[64 + i] = out[i];  // reads another block's word
    if (bug == 3 && i == 0) {                          // waits for a block that never comes
        while (load_acquire_u32(flag) != gridDim.x + 1) __nanosleep(20);
    }
    // One lane of a warp releases what another one wrote.
    if (i < 32) {
        if (bug != 4) __syncwarp();
        uint32_t before = 0;
        if (i == 0) before = atomic_add_acq_rel_u32(flag, 1);
        before = __shfl_sync(FULL_WARP, before, 0);
        if (bug != 5) __syncwarp();
        if (before == 1) out[block * 64 + i] += out[(1 - block) * 64 + i];
    }
}
