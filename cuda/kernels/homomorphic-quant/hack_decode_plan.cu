// Plans attention over a quantized KV cache on the device: checks lengths, page ids and places, and sums up the work.
//
// kv_len      [batch] u32, tokens of each sequence, the step's own included
// block_table [batch, max_pages] u32 by params: the page of each closed block
// sink_page   [batch] u32, open_page [batch] u32: the page of each sequence in its pool
// valid_len   [batch] u32, out: kv_len, or 0 for a sequence that cannot be read
// first_unit  [batch + 1] u32, out: units of work per item, summed over the sequences before (see tile/split_plan.cuh)
// arrivals    [1] u32, zero before and after the launch
// status      first fault, with the sequence: FAULT_BAD_LENGTH, FAULT_BAD_PAGE or FAULT_BAD_INDEX (sink or open page)
//
// An item's unit 0 is its 16-bit tokens, sinks and open block; the others are unit_pages closed blocks each, from the first
// that some query sees. One plan serves all layers of a step.
//
// Arch:    sm_80 and later.
// Mapping: one block per sequence checks its pages; the last block to finish sums over the batch.
// Budget:  64 registers, 64 bytes of shared memory.
// Limit:   latency: one pass over the block table, 4 bytes per page.
#include "core.cuh"
#include "hack_decode_params.h"
#include "ptx/shuffle.cuh"
#include "ptx/sync.cuh"
#include "status_params.h"
#include "tile/hack_tokens.cuh"
#include "tile/last_arriver.cuh"
#include "tile/status.cuh"

constexpr uint32_t THREADS = 128;
constexpr uint32_t WARPS = THREADS / WARP_SIZE;

struct Shared {
    uint32_t warp_sum[WARPS];
    uint32_t bad_pages;
    uint32_t is_last;
};

DEVICE uint32_t units_of(uint32_t kv_len, const HackDecodeParams& params) {
    const HackTokens tokens(kv_len, params);
    return 1 + ceil_div(tokens.closed - tokens.first_block, params.unit_pages);
}

KERNEL(128, 8)
hack_decode_plan(const uint32_t* kv_len, const uint32_t* block_table, const uint32_t* sink_page, const uint32_t* open_page,
                 uint32_t* valid_len, uint32_t* first_unit, uint32_t* arrivals, uint64_t* status,
                 const __grid_constant__ HackDecodeParams params) {
    DYNAMIC_SHARED(shared_bytes);
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    const uint32_t sequence = blockIdx.x;
    if (threadIdx.x == 0) shared.bad_pages = 0;
    __syncthreads();

    grid_dependency_wait();
    const uint32_t len = kv_len[sequence];
    const HackTokens tokens(len, params);
    const bool too_long = len > params.max_kv_len || tokens.closed > params.max_pages;
    const bool bad_place = (tokens.sinks > 0 && sink_page[sequence] >= params.num_sink_pages) ||
                           (tokens.open > 0 && open_page[sequence] >= params.num_open_pages);
    const uint32_t* const table = block_table + sequence * params.table_batch_stride;
    bool bad = false;
    for (uint32_t page = threadIdx.x; page < (too_long ? 0 : tokens.closed); page += THREADS) {
        bad |= table[page] >= params.num_pages;
    }
    if (bad) atomicOr(&shared.bad_pages, 1u);
    __syncthreads();
    if (threadIdx.x == 0) {
        if (too_long) report_fault(status, FAULT_BAD_LENGTH, sequence);
        else if (shared.bad_pages) report_fault(status, FAULT_BAD_PAGE, sequence);
        else if (bad_place) report_fault(status, FAULT_BAD_INDEX, sequence);
        valid_len[sequence] = too_long || shared.bad_pages || bad_place ? 0 : len;
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
