// Every reduction of ptx/shuffle.cuh.
//
// in [warps, 32] u32: integers, and the same numbers as f32 in `values`   out [16, warps, 32] u32: see the stores below
//
// Arch:    sm_80 and later.
// Mapping: one block of one warp per row of 32.
// Budget:  56 registers, no shared memory.
// Limit:   none that matters: it exists to be compared with plain loops.
#include "core.cuh"
#include "ptx/shuffle.cuh"

KERNEL(32, 1) warp_reductions(const uint32_t* in, const float* values, uint32_t* out) {
    const uint32_t at = blockIdx.x * WARP_SIZE + threadIdx.x;
    const uint32_t plane = gridDim.x * WARP_SIZE;
    const uint32_t u = in[at];
    const int32_t s = bit_cast<int32_t>(u);
    const float f = values[at];
    const float floats[8] = {warp_sum(f),           warp_max(f),           warp_sum<4>(f),        warp_max<4>(f),
                             warp_sum<16>(f),       warp_sum_strided<4>(f), warp_max_strided<4>(f), warp_sum_strided<8>(f)};
    const uint32_t integers[8] = {warp_sum(u),
                                  warp_max(u),
                                  warp_min(u),
                                  bit_cast<uint32_t>(warp_sum(s)),
                                  bit_cast<uint32_t>(warp_max(s)),
                                  bit_cast<uint32_t>(warp_min(s)),
                                  warp_prefix_sum(u),
                                  elect_one()};
    for (uint32_t i = 0; i < 8; i++) out[i * plane + at] = bit_cast<uint32_t>(floats[i]);
    for (uint32_t i = 0; i < 8; i++) out[(8 + i) * plane + at] = integers[i];
}
