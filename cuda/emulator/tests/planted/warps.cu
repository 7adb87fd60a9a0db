// out [32] u32: lane 31 - i's input, once through a shuffle and once through shared memory; the sum of both.
#include "core.cuh"
#include "ptx/ldmatrix.cuh"

KERNEL(32, 1) warps(const uint32_t* in, uint32_t* out, uint32_t bug) {
    DYNAMIC_SHARED(shared);
    uint32_t* exchange = reinterpret_cast<uint32_t*>(shared);
    const uint32_t lane = threadIdx.x, mine = in[lane];
    uint32_t shuffled;
    if (bug == 1) {
        // Two masks that overlap.
        shuffled = __shfl_xor_sync(lane < 16 ? 0x0001ffffu : 0xffffffffu, mine, 31);
    } else if (bug == 2) {
        // Two operations that meet.
        shuffled = lane < 16 ? __shfl_xor_sync(FULL_WARP, mine, 31) : __shfl_sync(FULL_WARP, mine, 31 - lane);
    } else if (bug == 3) {
        shuffled = __shfl_xor_sync(0xfffffffeu, mine, 31);  // lane 0 is not in its mask
    } else if (bug == 4) {
        shuffled = lane == 7 ? 0 : __shfl_xor_sync(FULL_WARP, mine, 31);  // lane 7 goes another way, and ends
        if (lane == 7) __syncwarp(1u << 7);
    } else {
        shuffled = __shfl_xor_sync(FULL_WARP, mine, 31);
    }
    exchange[lane] = mine;
    if (bug != 5) __syncwarp();
    out[lane] = shuffled + exchange[31 - lane];

    // Each lane writes 16 bytes, a row of a matrix, and the warp reads them as matrices.
    __syncwarp();
    for (uint32_t i = 0; i < 4; i++) exchange[lane * 4 + i] = lane;
    if (bug != 6) __syncwarp();
    uint32_t r[4];
    ldmatrix_x4(r, shared_address(exchange + lane * 4));
    if (r[1] != 8 + lane / 4) out[lane] = 0xdead;
}
