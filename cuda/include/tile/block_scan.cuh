// Prefix sums over the threads of a block.
#pragma once

#include "core.cuh"
#include "ptx/shuffle.cuh"

// The sum of x over the threads before this one; `total` is that over all. `of_warp` is shared. The whole block calls.
template <uint32_t Warps>
DEVICE uint32_t block_sum_before(uint32_t x, uint32_t& total, uint32_t (&of_warp)[Warps]) {
    uint32_t before = warp_prefix_sum(x);
    __syncthreads();  // the array may still be read from before
    if (lane_index() == WARP_SIZE - 1) of_warp[warp_index()] = before + x;
    __syncthreads();
    total = 0;
    for (uint32_t warp = 0; warp < Warps; warp++) {
        if (warp == warp_index()) before += total;
        total += of_warp[warp];
    }
    return before;
}
