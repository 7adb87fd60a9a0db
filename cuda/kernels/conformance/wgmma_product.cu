// C = A·Bᵀ by TMA and wgmma: a whole, small matrix product.
//
// a_map, b_map: tensor maps of A [M, K] and B [N, K], 16-bit DTYPE, row-major, boxes of 64x64, 128-byte swizzle
// c [M, N] f32   M and N multiples of 64; K any (TMA fills with zeros up to a multiple of 64)
//
// Arch:    sm_90a.
// Mapping: one 64x64 tile of C per block; warps 0-3 multiply, warp 4 loads; ring of two 16 KB slots.
// Budget:  72 registers, 32 KB + 32 bytes of shared memory.
// Limit:   none that matters: it exists to be compared with a plain product.
#include "types.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"
#include "tile/copy_ring.cuh"

constexpr uint32_t TILE_BYTES = 64 * 64 * 2;
constexpr int SLOTS = 2;

DEVICE void multiply(float (&d)[32], uint64_t a, uint64_t b) {
#if DTYPE == 1
    wgmma_m64n64k16_f16(d, a, b);
#else
    wgmma_m64n64k16_bf16(d, a, b);
#endif
}

KERNEL(160, 1)
wgmma_product(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map, float* c, uint32_t n, uint32_t k) {
    DYNAMIC_SHARED(shared);
    const uint32_t slots = shared_address(shared), full = slots + SLOTS * 2 * TILE_BYTES, empty = full + 8 * SLOTS;
    const uint32_t warp = warp_index(), lane = lane_index(), steps = ceil_div(k, 64u);
    if (threadIdx.x == 0) {
        for (uint32_t slot = 0; slot < SLOTS; slot++) {
            mbarrier_init(full + 8 * slot, 1);
            mbarrier_init(empty + 8 * slot, 4);
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    RingPosition<SLOTS> at;
    if (warp == 4) {
        if (lane != 0) return;
        tma_prefetch_map(a_map);
        tma_prefetch_map(b_map);
        for (uint32_t step = 0; step < steps; step++) {
            const uint32_t a = slots + at.slot * 2 * TILE_BYTES, barrier = full + 8 * at.slot;
            mbarrier_wait(empty + 8 * at.slot, at.parity ^ 1);
            mbarrier_arrive_expect_bytes(barrier, 2 * TILE_BYTES);
            tma_load_2d(a, a_map, barrier, step * 64, blockIdx.y * 64);
            tma_load_2d(a + TILE_BYTES, b_map, barrier, step * 64, blockIdx.x * 64);
            at.advance();
        }
        return;
    }
    float d[32] = {};
    for (uint32_t step = 0; step < steps; step++) {
        const uint32_t a = slots + at.slot * 2 * TILE_BYTES;
        mbarrier_wait(full + 8 * at.slot, at.parity);
        wgmma_fence();
#pragma unroll
        for (uint32_t bytes = 0; bytes < 128; bytes += 32) {
            multiply(d, wgmma_descriptor(a + bytes), wgmma_descriptor(a + TILE_BYTES + bytes));
        }
        wgmma_commit();
        wgmma_wait<0>();
        if (lane == 0) mbarrier_arrive(empty + 8 * at.slot);
        at.advance();
    }
    const uint32_t row = blockIdx.y * 64 + warp * 16 + lane / 4, column = blockIdx.x * 64 + lane % 4 * 2;
#pragma unroll
    for (uint32_t i = 0; i < 32; i++) {
        c[static_cast<uint64_t>(row + i / 2 % 2 * 8) * n + column + i / 4 * 8 + i % 2] = d[i];
    }
}
