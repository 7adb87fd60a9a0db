// Plans a decode step on the device: checks lengths and page ids, and sums up the work.
//
// kv_len      [batch] u32, keys of each sequence, the step's own included
// kv_start    [batch] u32, first token of each sequence in a contiguous cache; null where paged
// block_table [kv_head, batch, max_pages] u32 by the strides of params; null where contiguous
// valid_len   [tables, batch] u32, out: kv_len, or 0 where the sequence cannot be read (see tile/cache_check.cuh)
// first_unit  [batch + 1] u32, out: units of work per item, summed over the sequences before (see tile/split_plan.cuh)
// arrivals    [1] u32, zero before and after the launch
// status      first fault: FAULT_BAD_LENGTH or FAULT_BAD_PAGE with the sequence's index
//
// Only entries of pages that some query sees are looked at. A unit is unit_tiles tiles of 64 tokens that some query of the sequence can see; an empty sequence has one unit, whose
// block writes its zeros. One plan serves all layers of a step.
//
// Arch:    sm_80 and later.
// Mapping: one block per sequence checks its pages; the last block to finish sums over the batch.
// Budget:  64 registers, 64 bytes of shared memory.
// Limit:   latency: one pass over the block table, 4 bytes per page.
#include "core.cuh"
#include "decode_params.h"
#include "ptx/shuffle.cuh"
#include "ptx/sync.cuh"
#include "tile/cache_check.cuh"
#include "tile/last_arriver.cuh"

constexpr uint32_t THREADS = 128;
constexpr uint32_t TILE = DECODE_TILE;
constexpr uint32_t WARPS = THREADS / WARP_SIZE;

struct Shared {
    uint32_t warp_sum[WARPS];
    uint32_t is_last;
};

// The first key that some query of a sequence sees: the first of the first query's window.
DEVICE uint32_t first_visible(uint32_t kv_len, const DecodeParams& params) {
    const uint32_t hidden = params.q_len - 1 + params.window;
    return params.window != 0 && kv_len > hidden ? kv_len - hidden : 0;
}

// Units of one item of a sequence: never 0.
DEVICE uint32_t units_of(uint32_t kv_len, const DecodeParams& params) {
    const uint32_t first_tile = first_visible(kv_len, params) / TILE;
    const uint32_t units = ceil_div(ceil_div(kv_len, TILE) - first_tile, params.unit_tiles);
    return units > 0 ? units : 1;
}

KERNEL(128, 8)
decode_plan(const uint32_t* kv_len, const uint32_t* kv_start, const uint32_t* block_table, uint32_t* valid_len,
            uint32_t* first_unit, uint32_t* arrivals, uint64_t* status, const __grid_constant__ DecodeParams params) {
    DYNAMIC_SHARED(shared_bytes);
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    const uint32_t sequence = blockIdx.x;

    grid_dependency_wait();
    const uint32_t len = kv_len[sequence];
    check_sequence<THREADS>(sequence, len, first_visible(len, params), 0, kv_start, block_table, valid_len, status, params);
    if (!arrive_last(arrivals, params.batch, &shared.is_last)) return;

    // Each thread sums a contiguous share of the batch, then all shares are scanned.
    const uint32_t share = ceil_div(params.batch, THREADS);
    const uint32_t begin = min(threadIdx.x * share, params.batch);
    const uint32_t end = min(begin + share, params.batch);
    uint32_t sum = 0;
    for (uint32_t s = begin; s < end; s++) sum += units_of(longest_len_of(valid_len, s, params), params);
    uint32_t before = warp_prefix_sum(sum);
    if (lane_index() == WARP_SIZE - 1) shared.warp_sum[warp_index()] = before + sum;
    __syncthreads();
    for (uint32_t warp = 0; warp < warp_index(); warp++) before += shared.warp_sum[warp];
    for (uint32_t s = begin; s < end; s++) {
        first_unit[s] = before;
        before += units_of(longest_len_of(valid_len, s, params), params);
    }
    if (threadIdx.x == THREADS - 1) first_unit[params.batch] = before;
}
