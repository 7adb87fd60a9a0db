// Loops over one operation each, to time it; and `rounds` writes of out [blocks, 128] u32.
#include "core.cuh"
#include "ptx/mma.cuh"

KERNEL(128, 1) speed(uint32_t* out, uint32_t rounds, uint32_t operation) {
    DYNAMIC_SHARED(shared);
    uint32_t* words = reinterpret_cast<uint32_t*>(shared);
    const uint32_t i = threadIdx.x;
    uint32_t x = i;
    words[i] = i;
    __syncthreads();
    float d[4] = {0, 0, 0, 0};
    const uint32_t a[4] = {x, x, x, x}, b[2] = {x, x};
    for (uint32_t round = 0; round < rounds; round++) {
        switch (operation) {
        case 0:
            __syncthreads();
            break;
        case 1:
            x += __shfl_xor_sync(FULL_WARP, x, 1);
            break;
        case 2:
            __syncwarp();
            break;
        case 3:
            x += words[(i + round) % 128];
            break;
        case 4:
            out[blockIdx.x * 128 + i] = round;
            break;
        case 5:
            mma_m16n8k16_bf16(d, a, b);
            break;
        case 6:
            words[i] = round;
            break;
        default:
            break;
        }
    }
    out[blockIdx.x * 128 + i] = x + rounds + (d[0] > 1e30f);
}
