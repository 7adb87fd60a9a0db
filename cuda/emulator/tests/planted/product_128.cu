// d [64, 64] f32 = a [64, 64] bf16 · b [64, 64]ᵀ bf16 (as raw bits) by one warpgroup, operands copied by ordinary
// stores.
#include "core.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/wgmma.cuh"

KERNEL(128, 1) product_128(const uint4* a, const uint4* b, float* d, uint32_t bug) {
    DYNAMIC_SHARED(shared);
    const uint32_t base = shared_address(shared);
    uint4* tiles = reinterpret_cast<uint4*>(shared);
    for (uint32_t i = threadIdx.x; i < 512; i += 128) {  // 64 rows of 8 chunks, swizzled
        const uint32_t row = i / 8, chunk = i % 8 ^ row % 8;
        tiles[row * 8 + chunk] = a[i];
        tiles[512 + row * 8 + chunk] = b[i];
    }
    if (bug != 1) async_proxy_fence();
    if (bug != 2) __syncthreads();
    float acc[32];
    for (float& x : acc) x = 0.0f;
    for (uint32_t step = 0; step < 2; step++) {
        if (bug != 3 && (bug != 6 || step == 0)) wgmma_fence();
        for (uint32_t k = 2 * step; k < 2 * step + 2; k++)
            wgmma_ss<bf16, 64>(acc, wgmma_descriptor(base + 32 * k), wgmma_descriptor(base + 8192 + 32 * k), true);
        wgmma_commit();
        if (bug == 4) tiles[threadIdx.x] = make_uint4(0, 0, 0, 0);  // while it is being read
        if (bug == 5) {
            wgmma_wait<1>();  // one group too few
        } else {
            wgmma_wait<0>();
        }
    }
    const uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (uint32_t i = 0; i < 32; i++) d[(16 * warp + g + 8 * (i / 2 % 2)) * 64 + 8 * (i / 4) + 2 * t + i % 2] = acc[i];
    if (bug == 5) wgmma_wait<0>();
}
