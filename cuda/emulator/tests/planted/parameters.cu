// out [32] u32: values of different sizes and alignments as they arrive.
#include "core.cuh"

struct alignas(16) Wide {
    uint32_t words[8];
};

// Indexed by a variable, so that it stays in memory: reads of constants are no accesses to a buffer.
constexpr uint32_t TABLE[4] = {1000, 2000, 3000, 4000};

KERNEL(32, 1)
parameters(uint8_t small, const uint32_t* in, const __grid_constant__ Wide wide, uint64_t big, uint32_t* out,
           float real) {
    const uint32_t i = threadIdx.x;
    out[i] = small + in[i] + wide.words[i % 8] + static_cast<uint32_t>(big >> 32) + static_cast<uint32_t>(real) +
             TABLE[in[i] % 4];
}
