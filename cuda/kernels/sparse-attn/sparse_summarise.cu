// Summarises the chunks of keys that were just closed.
//
// closing     [rows, max_closing] SparseClosing, num_closing [rows] u32: as sparse_close leaves them, whole chunks in order
// runs        [num_runs, run_elements] KV_DTYPE, keys [page, dim] first
// summaries   [rows, max_partitions, vectors, dim] KV_DTYPE, out: those of the closed chunks
// status      first fault, with the row: FAULT_BAD_PAGE for a run out of range, FAULT_BAD_LENGTH for a list or a chunk past a
//             table's end; the chunk is left out
//
// Per channel, over the keys k of a chunk: SPARSE_MIN_MAX min k, max k (exact); SPARSE_CUBOID_MEAN c = (min + max)/2, mean |c − k|;
// SPARSE_MEAN_STD mean, √mean (k − mean)²; SPARSE_MEAN mean alone. f32, tokens in order, rounded once at the end.
//
// Arch:    sm_80 and later.
// Mapping: a warp per chunk, a lane per pair of channels; rows along y, the chunks of a row along x in steps of the grid.
// Budget:  64 registers, no shared memory.
// Limit:   bytes of the keys, read from L2 where they were just written.
#include "core.cuh"
#include "ptx/shuffle.cuh"
#include "ptx/sync.cuh"
#include "sparse_pages_params.h"
#include "sparse_select_params.h"
#include "status_params.h"
#include "tile/status.cuh"
#include "types.cuh"

using Element = StorageOf<KV_DTYPE>;

constexpr uint32_t THREADS = 128;
constexpr uint32_t WARPS = THREADS / WARP_SIZE;

// Visits one pair of channels of all tokens of a chunk in order.
template <class Use>
DEVICE void for_tokens(const SparseClosing* chunk, const Element* runs, uint32_t pair, const SparseSummariseParams& params,
                       const Use& use) {
    for (uint32_t i = 0; i < params.chunk_pages; i++) {
        const Element* const keys = runs + static_cast<uint64_t>(chunk[i].run) * params.run_elements + pair * 2;
#pragma unroll 8
        for (uint32_t token = 0; token < 1u << params.page_shift; token++) {
            use(unpack2<Element>(*reinterpret_cast<const uint32_t*>(keys + token * params.dim)));
        }
    }
}

KERNEL(128, 8)
sparse_summarise(const SparseClosing* closing, const uint32_t* num_closing, const Element* runs, Element* summaries,
                 uint64_t* status, const __grid_constant__ SparseSummariseParams params) {
    grid_dependency_wait();
    const uint32_t row = blockIdx.y;
    const uint32_t page_tokens = 1u << params.page_shift;
    const uint32_t vectors = params.scorer == SPARSE_MEAN ? 1 : 2;
    uint32_t pages = num_closing[row];
    if (pages > params.max_closing) {
        if (blockIdx.x == 0 && threadIdx.x == 0) report_fault(status, FAULT_BAD_LENGTH, row);
        pages = 0;
    }
    closing += static_cast<uint64_t>(row) * params.max_closing;
    for (uint32_t chunk = blockIdx.x * WARPS + warp_index(); chunk < pages / params.chunk_pages; chunk += gridDim.x * WARPS) {
        const SparseClosing* const of_chunk = closing + chunk * params.chunk_pages;
        bool bad = false;
        for (uint32_t i = lane_index(); i < params.chunk_pages; i += WARP_SIZE) bad |= of_chunk[i].run >= params.num_runs;
        bad = __ballot_sync(FULL_WARP, bad) != 0;
        const uint32_t partition = of_chunk[0].page / params.chunk_pages;
        if (bad || partition >= params.max_partitions) {
            if (lane_index() == 0) report_fault(status, bad ? FAULT_BAD_PAGE : FAULT_BAD_LENGTH, row);
            continue;
        }
        Element* const summary =
            summaries + (static_cast<uint64_t>(row) * params.max_partitions + partition) * vectors * params.dim;

        for (uint32_t pair = lane_index(); pair < params.dim / 2; pair += WARP_SIZE) {
            float2 low = make_float2(POSITIVE_INFINITY, POSITIVE_INFINITY);
            float2 high = make_float2(NEGATIVE_INFINITY, NEGATIVE_INFINITY);
            float2 sum = make_float2(0.0f, 0.0f);
            for_tokens(of_chunk, runs, pair, params, [&](float2 k) {
                low = make_float2(fminf(low.x, k.x), fminf(low.y, k.y));
                high = make_float2(fmaxf(high.x, k.x), fmaxf(high.y, k.y));
                sum = make_float2(sum.x + k.x, sum.y + k.y);
            });
            const float scale = 1.0f / static_cast<float>(page_tokens * params.chunk_pages);
            float2 first = make_float2(sum.x * scale, sum.y * scale);
            float2 second = make_float2(0.0f, 0.0f);
            if (params.scorer == SPARSE_MIN_MAX) {
                first = low;
                second = high;
            } else if (params.scorer == SPARSE_CUBOID_MEAN) {
                first = make_float2((low.x + high.x) * 0.5f, (low.y + high.y) * 0.5f);
                for_tokens(of_chunk, runs, pair, params, [&](float2 k) {
                    second = make_float2(second.x + fabsf(first.x - k.x), second.y + fabsf(first.y - k.y));
                });
                second = make_float2(second.x * scale, second.y * scale);
            } else if (params.scorer == SPARSE_MEAN_STD) {
                for_tokens(of_chunk, runs, pair, params, [&](float2 k) {
                    const float2 d = make_float2(k.x - first.x, k.y - first.y);
                    second = make_float2(second.x + d.x * d.x, second.y + d.y * d.y);
                });
                second = make_float2(sqrtf(second.x * scale), sqrtf(second.y * scale));
            }
            uint32_t* const to = reinterpret_cast<uint32_t*>(summary);
            to[pair] = pack2<Element>(first.x, first.y);
            if (vectors == 2) to[params.dim / 2 + pair] = pack2<Element>(second.x, second.y);
        }
    }
}
