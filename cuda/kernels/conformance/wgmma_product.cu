// C = A·B by TMA and wgmma: a whole, small matrix product in every form that kernels use.
//
// a_map   tensor map of A [M, K], 16-bit DTYPE, row-major, boxes of 64x64, 128-byte swizzle
// b_map   the same of Bᵀ [N, K]; with WGMMA_RS in `form`, of B [K, N]
// c       [M, N] f32; M a multiple of 64, N of 128; K any (TMA fills with zeros up to a multiple of 64)
// form    bit 0, WGMMA_RS: A comes from registers and B is N-major, else both come from shared memory, K-major;
//         bit 1, WGMMA_N64: two products of 64 columns instead of one of 128
//
// Arch:    sm_90a.
// Mapping: one 64x128 tile of C per block; warps 0-3 multiply, warp 4 loads; ring of two 24 KB slots.
// Budget:  128 registers, 48 KB + 32 bytes of shared memory.
// Limit:   none that matters: it exists to be compared with a plain product.
#include "types.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"
#include "tile/copy_ring.cuh"
#include "tile/fragment.cuh"

using Element = StorageOf<DTYPE>;

constexpr uint32_t WGMMA_RS = 1;
constexpr uint32_t WGMMA_N64 = 2;
constexpr uint32_t TILE_BYTES = 64 * 64 * 2;
constexpr uint32_t SLOT_BYTES = 3 * TILE_BYTES;
constexpr int SLOTS = 2;

// What the consumers do, form by form: a branch between products of a series would make them wait for each other.
template <bool Rs, bool N64>
DEVICE void multiply(float* c, uint32_t n, uint32_t slots, uint32_t full, uint32_t empty, uint32_t steps) {
    // Whatever is there: the first product overwrites it.
    float d[2][32];
#pragma unroll
    for (uint32_t i = 0; i < 64; i++) d[i / 32][i % 32] = QUIET_NAN;
    RingPosition<SLOTS> at;
    for (uint32_t step = 0; step < steps; step++) {
        const uint32_t a_tile = slots + at.slot * SLOT_BYTES, b_tile = a_tile + TILE_BYTES;
        mbarrier_wait(full + 8 * at.slot, at.parity);
        uint32_t a[4][4];
        if (Rs) {
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) load_fragment_a<128>(a[i], a_tile, warp_index() * 16, i * 2);
        }
        wgmma_fence();
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            const bool add = step + i > 0;
            const uint64_t a_descriptor = wgmma_descriptor(a_tile + i * 32);
            if (Rs && N64) {
                wgmma_rs<Element, 64>(d[0], a[i], wgmma_descriptor_n_major(b_tile + i * 2048, TILE_BYTES), add);
                wgmma_rs<Element, 64>(d[1], a[i], wgmma_descriptor_n_major(b_tile + TILE_BYTES + i * 2048, TILE_BYTES), add);
            } else if (Rs) {
                wgmma_rs<Element, 128>(reinterpret_cast<float(&)[64]>(d), a[i],
                                       wgmma_descriptor_n_major(b_tile + i * 2048, TILE_BYTES), add);
            } else if (N64) {
                wgmma_ss<Element, 64>(d[0], a_descriptor, wgmma_descriptor(b_tile + i * 32), add);
                wgmma_ss<Element, 64>(d[1], a_descriptor, wgmma_descriptor(b_tile + TILE_BYTES + i * 32), add);
            } else {
                wgmma_ss<Element, 128>(reinterpret_cast<float(&)[64]>(d), a_descriptor, wgmma_descriptor(b_tile + i * 32), add);
            }
        }
        wgmma_commit();
        wgmma_wait<0>();
        __syncwarp();  // every lane has read its part of A
        if (lane_index() == 0) mbarrier_arrive(empty + 8 * at.slot);
        at.advance();
    }
    const uint32_t row = blockIdx.y * 64 + warp_index() * 16 + lane_index() / 4, column = blockIdx.x * 128 + lane_index() % 4 * 2;
#pragma unroll
    for (uint32_t i = 0; i < 64; i++) {
        c[static_cast<uint64_t>(row + i / 2 % 2 * 8) * n + column + i / 4 * 8 + i % 2] = d[i / 32][i % 32];
    }
}

KERNEL(160, 1)
wgmma_product(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map, float* c, uint32_t n, uint32_t k,
              uint32_t form) {
    DYNAMIC_SHARED(shared);
    const uint32_t slots = shared_address(shared), full = slots + SLOTS * SLOT_BYTES, empty = full + 8 * SLOTS;
    const uint32_t warp = warp_index(), lane = lane_index(), steps = ceil_div(k, 64u);
    const bool rs = (form & WGMMA_RS) != 0;
    if (threadIdx.x == 0) {
        for (uint32_t slot = 0; slot < SLOTS; slot++) {
            mbarrier_init(full + 8 * slot, 1);
            mbarrier_init(empty + 8 * slot, 4);
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    if (warp == 4) {
        if (lane != 0) return;
        RingPosition<SLOTS> at;
        tma_prefetch_map(a_map);
        tma_prefetch_map(b_map);
        for (uint32_t step = 0; step < steps; step++) {
            const uint32_t a = slots + at.slot * SLOT_BYTES, barrier = full + 8 * at.slot;
            mbarrier_wait(empty + 8 * at.slot, at.parity ^ 1);
            mbarrier_arrive_expect_bytes(barrier, SLOT_BYTES);
            tma_load_2d(a, a_map, barrier, step * 64, blockIdx.y * 64);
            for (uint32_t half = 0; half < 2; half++) {
                const uint32_t b = a + TILE_BYTES * (1 + half), column = blockIdx.x * 128 + half * 64;
                tma_load_2d(b, b_map, barrier, rs ? column : step * 64, rs ? step * 64 : column);
            }
            at.advance();
        }
        return;
    }
    switch (form) {
        case 0: return multiply<false, false>(c, n, slots, full, empty, steps);
        case WGMMA_RS: return multiply<true, false>(c, n, slots, full, empty, steps);
        case WGMMA_N64: return multiply<false, true>(c, n, slots, full, empty, steps);
        default: return multiply<true, true>(c, n, slots, full, empty, steps);
    }
}
