// Plans a decode step on the device: checks lengths and page ids, and sums up the work.
//
// kv_len      [batch] u32, keys of each sequence, the step's own included
// kv_start    [batch] u32, first token of each sequence in a contiguous cache; null where paged
// block_table [kv_head, batch, max_pages] u32 by the strides of params; null where contiguous
// valid_len   [batch] u32, out: kv_len, or 0 for a sequence that cannot be read
// first_unit  [batch + 1] u32, out: units of work per item, summed over the sequences before (see tile/split_plan.cuh)
// arrivals    [1] u32, zero before and after the launch
// status      first fault: FAULT_BAD_LENGTH or FAULT_BAD_PAGE with the sequence's index
//
// A unit is unit_tiles tiles of 64 tokens that some query of the sequence can see; an empty sequence has one unit, whose
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
#include "status_params.h"
#include "tile/last_arriver.cuh"
#include "tile/status.cuh"

constexpr uint32_t THREADS = 128;
constexpr uint32_t TILE = DECODE_TILE;
constexpr uint32_t WARPS = THREADS / WARP_SIZE;

struct Shared {
    uint32_t warp_sum[WARPS];
    uint32_t bad_pages;
    uint32_t is_last;
};

// Units of one item of a sequence: never 0.
DEVICE uint32_t units_of(uint32_t kv_len, const DecodeParams& params) {
    uint32_t first_tile = 0;
    if (params.window != 0 && kv_len + 1 > params.q_len + params.window) {
        first_tile = (kv_len + 1 - params.q_len - params.window) / TILE;
    }
    const uint32_t units = ceil_div(ceil_div(kv_len, TILE) - first_tile, params.unit_tiles);
    return units > 0 ? units : 1;
}

KERNEL(128, 8)
decode_plan(const uint32_t* kv_len, const uint32_t* kv_start, const uint32_t* block_table, uint32_t* valid_len,
            uint32_t* first_unit, uint32_t* arrivals, uint64_t* status, const __grid_constant__ DecodeParams params) {
    DYNAMIC_SHARED(shared_bytes);
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    const uint32_t sequence = blockIdx.x;
    if (threadIdx.x == 0) shared.bad_pages = 0;
    __syncthreads();

    grid_dependency_wait();
    uint32_t len = kv_len[sequence];
    bool too_long = len > params.max_kv_len;
    if (block_table == nullptr) {
        too_long = too_long || static_cast<uint64_t>(kv_start[sequence]) + len > params.num_tokens;
    } else {
        too_long = too_long || len > static_cast<uint64_t>(params.max_pages) << params.page_shift;
        const uint32_t pages = too_long ? 0 : ceil_div<uint64_t>(len, 1ull << params.page_shift);
        const uint32_t tables = params.table_head_stride == 0 ? 1 : params.kv_heads;
        bool bad = false;
        for (uint32_t head = 0; head < tables; head++) {
            const uint32_t* table = block_table + head * params.table_head_stride + sequence * params.table_batch_stride;
            for (uint32_t page = threadIdx.x; page < pages; page += THREADS) bad |= table[page] >= params.num_pages;
        }
        if (bad) atomicOr(&shared.bad_pages, 1u);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        if (too_long) report_fault(status, FAULT_BAD_LENGTH, sequence);
        else if (shared.bad_pages) report_fault(status, FAULT_BAD_PAGE, sequence);
        valid_len[sequence] = too_long || shared.bad_pages ? 0 : len;
    }
    if (!arrive_last(arrivals, params.batch, &shared.is_last)) return;

    // Each thread sums a contiguous share of the batch, then all shares are scanned.
    const uint32_t share = ceil_div(params.batch, THREADS);
    const uint32_t begin = min(threadIdx.x * share, params.batch);
    const uint32_t end = min(begin + share, params.batch);
    uint32_t sum = 0;
    for (uint32_t s = begin; s < end; s++) sum += units_of(valid_len[s], params);
    uint32_t before = warp_prefix_sum(sum);
    if (lane_index() == WARP_SIZE - 1) shared.warp_sum[warp_index()] = before + sum;
    __syncthreads();
    for (uint32_t warp = 0; warp < warp_index(); warp++) before += shared.warp_sum[warp];
    for (uint32_t s = begin; s < end; s++) {
        first_unit[s] = before;
        before += units_of(valid_len[s], params);
    }
    if (threadIdx.x == THREADS - 1) first_unit[params.batch] = before;
}
