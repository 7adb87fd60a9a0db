// Rebuilds dense keys and values from a low-rank KV cache: what methods must do whose attention runs in the full dimension.
// The decode of this project never does; this is the baseline that it is measured against.
//
//   K = K̃·B_k,  V = Ṽ·B_v        per KV head h, from r_k(h) or r_v(h) channels to HEAD_DIM
//
// pages    the low-rank cache (tile/low_rank.cuh)
// back_k   head after head [r_k, HEAD_DIM], back_v head after head [r_v, HEAD_DIM], KV_DTYPE, 16-byte aligned
// k, v     [pages, kv_heads, page size, HEAD_DIM] KV_DTYPE: pages of the dense decode kernel, under the same ids
//
// Arch:    sm_80 and later.
// Mapping: a block takes 64 tokens of the pool and the keys or the values of one head; each warp 16 tokens, which never cross a
//          page. Latents and B lie swizzled in shared memory: X·B by m16n8k16. Results leave through the warp's rows of shared
//          memory as 16-byte chunks.
// Budget:  96 registers, 64 rows and HEAD_DIM rows of HEAD_DIM: 48 KB at 128.
// Limit:   bytes: the latents read, the dense vectors written.
#include "core.cuh"
#include "fdc_params.h"
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"
#include "ptx/sync.cuh"
#include "tile/fragment.cuh"
#include "tile/low_rank.cuh"
#include "types.cuh"

using Element = StorageOf<KV_DTYPE>;

constexpr uint32_t THREADS = 128;
constexpr uint32_t WARPS = THREADS / WARP_SIZE;
constexpr uint32_t CHUNK = 8;             // elements in 16 bytes
constexpr uint32_t ROW = HEAD_DIM * 2;    // bytes of a dense row
constexpr uint32_t MAX_STEPS = HEAD_DIM / 16;
constexpr uint32_t WARP_BYTES = FDC_GROUP * ROW;

DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if KV_DTYPE == 1
    mma_m16n8k16_f16(d, a, b);
#else
    mma_m16n8k16_bf16(d, a, b);
#endif
}

KERNEL(128, 4)
fdc_reconstruct(const Element* pages, const Element* back_k, const Element* back_v, Element* k, Element* v,
                const __grid_constant__ FdcReconstructParams params) {
    DYNAMIC_SHARED(shared);
    const FdcHeads& heads = params.heads;
    const uint32_t lane = lane_index();
    const uint32_t regions = 2 * heads.count;
    const uint32_t head = blockIdx.x % regions / 2;
    const bool is_v = blockIdx.x % 2 != 0;
    const uint32_t blocks = is_v ? v_blocks(heads, head) : k_blocks(heads, head);
    unsigned char* const mine = shared + warp_index() * WARP_BYTES;
    const uint32_t rows_tile = shared_address(mine);
    const uint32_t back_tile = shared_address(shared) + WARPS * WARP_BYTES;

    const Element* back =
        is_v ? back_v + heads.v_before[head] * 16 * HEAD_DIM : back_k + heads.k_before[head] * 16 * HEAD_DIM;
    for (uint32_t index = threadIdx.x; index < blocks * 16 * (ROW / 16); index += THREADS) {
        const uint32_t row = index / (ROW / 16);
        const uint32_t chunk = index % (ROW / 16);
        cp_async_16(back_tile + Swizzle<ROW>::offset(row, chunk), back + index * CHUNK);
    }
    grid_dependency_wait();
    const uint64_t token = (static_cast<uint64_t>(blockIdx.x / regions) * WARPS + warp_index()) * FDC_GROUP;
    const uint64_t page = token >> params.page_shift;
    const uint32_t in_page = static_cast<uint32_t>(token) & ((1u << params.page_shift) - 1);
    const bool exists = page < params.num_pages;
    if (exists) {
        const uint32_t before = blocks_before(heads, head) + (is_v ? k_blocks(heads, head) : 0);
        const Element* from = pages + page * params.page_stride + (static_cast<uint64_t>(before * 16) << params.page_shift)
                              + in_page * blocks * 16 + lane * CHUNK;
        for (uint32_t block = 0; block < blocks; block++) {
            cp_async_16(rows_tile + (block * WARP_SIZE + lane) * 16, from + block * WARP_SIZE * CHUNK);
        }
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    if (!exists) return;

    const SwizzledRows rows(blocks * 32);
    uint32_t a[MAX_STEPS][4];
#pragma unroll
    for (uint32_t step = 0; step < MAX_STEPS; step++) {
        if (step >= blocks) break;
        ldmatrix_x4(a[step], rows_tile + rows.offset(lane % 16, step * 2 + lane / 16));
    }
    __syncwarp();  // the latents are in registers: their place is free
#pragma unroll 1
    for (uint32_t n = 0; n < MAX_STEPS; n++) {
        float d[2][4] = {};
#pragma unroll
        for (uint32_t step = 0; step < MAX_STEPS; step++) {
            if (step >= blocks) break;
            uint32_t b[2][2];
            load_fragment_b2_trans<ROW>(b, back_tile, step * 16, n * 2);
            mma(d[0], a[step], b[0]);
            mma(d[1], a[step], b[1]);
        }
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            const uint32_t row = lane / 4 + i % 2 * 8;
            unsigned char* const chunk = mine + Swizzle<ROW>::offset(row, n * 2 + i / 2);
            *reinterpret_cast<uint32_t*>(chunk + lane % 4 * 4) =
                pack2<Element>(d[i / 2][i % 2 * 2], d[i / 2][i % 2 * 2 + 1]);
        }
    }
    __syncwarp();
    Element* const to = (is_v ? v : k)
                        + (((page * heads.count + head) << params.page_shift) + in_page) * static_cast<uint64_t>(HEAD_DIM);
    for (uint32_t index = lane; index < FDC_GROUP * (ROW / 16); index += WARP_SIZE) {
        const uint32_t row = index / (ROW / 16);
        const uint32_t chunk = index % (ROW / 16);
        store_global_16(to + index * CHUNK,
                        *reinterpret_cast<const uint4*>(mine + Swizzle<ROW>::offset(row, chunk)));
    }
}
