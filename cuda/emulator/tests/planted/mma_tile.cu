// d [16, 8] f32 = a [16, 16] bf16 · b [8, 16]ᵀ bf16 (as raw bits), one product of one warp.
#include "core.cuh"
#include "ptx/mma.cuh"

KERNEL(32, 1) mma_tile(const uint16_t* a, const uint16_t* b, float* d, uint32_t bug) {
    const uint32_t g = threadIdx.x / 4, t = threadIdx.x % 4;
    const auto pair = [](const uint16_t* p) { return *reinterpret_cast<const uint32_t*>(p); };
    uint32_t fa[4] = {pair(a + g * 16 + t * 2), pair(a + (g + 8) * 16 + t * 2), pair(a + g * 16 + t * 2 + 8),
                      pair(a + (g + 8) * 16 + t * 2 + 8)};
    uint32_t fb[2] = {pair(b + g * 16 + t * 2), pair(b + g * 16 + t * 2 + 8)};
    if (bug == 1) {
        const uint32_t swap = fb[0];
        fb[0] = fb[1];
        fb[1] = swap;
    }
    if (bug == 2) {
        const uint32_t swap = fa[1];
        fa[1] = fa[2];
        fa[2] = swap;
    }
    float acc[4] = {0, 0, 0, 0};
    mma_m16n8k16_bf16(acc, fa, fb);
    for (uint32_t i = 0; i < 4; i++) {
        const uint32_t row = bug == 3 ? g + 8 * (i % 2) : g + 8 * (i / 2);
        const uint32_t column = bug == 3 ? 2 * t + i / 2 : 2 * t + i % 2;
        d[row * 8 + column] = acc[i];
    }
}
