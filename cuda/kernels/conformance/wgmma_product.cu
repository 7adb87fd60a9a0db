// C = A·B by wgmma: a whole, small matrix product in every form that kernels use.
//
// a, b    A [M, K], 16-bit DTYPE, row-major, 16-byte aligned; Bᵀ [N, K], with WGMMA_RS in `form` B [K, N]
// a_map   tensor map of `a`, boxes of 64x64, 128-byte swizzle
// b_map   the same of `b`
// c       [M, N] f32; M a multiple of 64, N of 128; K a multiple of 8 (loads fill with zeros up to a multiple of 64)
// form    bit 0, WGMMA_RS: A comes from registers and B is N-major, else both come from shared memory, K-major;
//         bit 1, WGMMA_N64: two products of 64 columns instead of one of 128;
//         bit 2, WGMMA_COPIES: tiles come by cp.async, a proxy fence and arrivals of all loaders, else by TMA
//
// Arch:    sm_90a.
// Mapping: one 64x128 tile of C per block; warps 0-3 multiply, with registers that warps 4-7 gave them, which load; ring of two 24 KB
//          slots.
// Budget:  128 registers, 48 KB + 32 bytes of shared memory.
// Limit:   none that matters: it exists to be compared with a plain product.
#include "types.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"
#include "tile/copy_ring.cuh"
#include "tile/fragment.cuh"

using Element = StorageOf<DTYPE>;

constexpr uint32_t WGMMA_RS = 1;
constexpr uint32_t WGMMA_N64 = 2;
constexpr uint32_t WGMMA_COPIES = 4;
constexpr uint32_t LOADERS = 128;
constexpr int LOADER_REGISTERS = 40;
constexpr int MULTIPLIER_REGISTERS = 216;  // with the loaders' 256 of what two threads have
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

// What the box of a map at `column`, `row` would bring to `tile`: the loaders' copies. Columns are a multiple of 8.
DEVICE void copy_box(uint32_t tile, const Element* from, uint32_t columns, uint32_t rows, uint32_t column, uint32_t row) {
    for (uint32_t i = threadIdx.x % LOADERS; i < 64 * 8; i += LOADERS) {
        const uint32_t x = column + i % 8 * 8, y = row + i / 8;
        const bool inside = x < columns && y < rows;
        cp_async_16_zfill(tile + Swizzle<128>::offset(i / 8, i % 8), from + (inside ? static_cast<uint64_t>(y) * columns + x : 0),
                          inside ? 16 : 0);
    }
}

KERNEL(256, 2)
wgmma_product(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map, const Element* a, const Element* b,
              float* c, uint32_t n, uint32_t k, uint32_t form) {
    DYNAMIC_SHARED(shared);
    const uint32_t slots = shared_address(shared), full = slots + SLOTS * SLOT_BYTES, empty = full + 8 * SLOTS;
    const uint32_t steps = ceil_div(k, 64u);
    const bool rs = (form & WGMMA_RS) != 0, copies = (form & WGMMA_COPIES) != 0;
    if (threadIdx.x == 0) {
        for (uint32_t slot = 0; slot < SLOTS; slot++) {
            mbarrier_init(full + 8 * slot, copies ? LOADERS : 1);
            mbarrier_init(empty + 8 * slot, 4);
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    if (threadIdx.x >= LOADERS) {
        give_registers<LOADER_REGISTERS>();
        RingPosition<SLOTS> at;
        if (copies) {
            for (uint32_t step = 0; step < steps; step++) {
                const uint32_t a_tile = slots + at.slot * SLOT_BYTES;
                mbarrier_wait(empty + 8 * at.slot, at.parity ^ 1);
                copy_box(a_tile, a, k, gridDim.y * 64, step * 64, blockIdx.y * 64);
                for (uint32_t half = 0; half < 2; half++) {
                    const uint32_t b_tile = a_tile + TILE_BYTES * (1 + half), column = blockIdx.x * 128 + half * 64;
                    copy_box(b_tile, b, rs ? n : k, rs ? k : n, rs ? column : step * 64, rs ? step * 64 : column);
                }
                cp_async_commit();
                cp_async_wait<0>();
                async_proxy_fence();  // each thread's own copies, before wgmma reads them
                mbarrier_arrive(full + 8 * at.slot);
                at.advance();
            }
            return;
        }
        if (threadIdx.x != LOADERS) return;
        tma_prefetch_map(a_map);
        tma_prefetch_map(b_map);
        for (uint32_t step = 0; step < steps; step++) {
            const uint32_t a_tile = slots + at.slot * SLOT_BYTES, barrier = full + 8 * at.slot;
            mbarrier_wait(empty + 8 * at.slot, at.parity ^ 1);
            mbarrier_arrive_expect_bytes(barrier, SLOT_BYTES);
            tma_load_2d(a_tile, a_map, barrier, step * 64, blockIdx.y * 64);
            for (uint32_t half = 0; half < 2; half++) {
                const uint32_t b_tile = a_tile + TILE_BYTES * (1 + half), column = blockIdx.x * 128 + half * 64;
                tma_load_2d(b_tile, b_map, barrier, rs ? column : step * 64, rs ? step * 64 : column);
            }
            at.advance();
        }
        return;
    }
    take_registers<MULTIPLIER_REGISTERS>();
    switch (form & (WGMMA_RS | WGMMA_N64)) {
        case 0: return multiply<false, false>(c, n, slots, full, empty, steps);
        case WGMMA_RS: return multiply<true, false>(c, n, slots, full, empty, steps);
        case WGMMA_N64: return multiply<false, true>(c, n, slots, full, empty, steps);
        default: return multiply<true, true>(c, n, slots, full, empty, steps);
    }
}
