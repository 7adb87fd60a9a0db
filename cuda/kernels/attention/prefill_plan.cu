// Plans a prefill on the device: checks lengths, page ids and query ranges, and lists the tiles of queries to work on.
//
// cu_queries  [batch + 1] u32, first query of each sequence, then one past the last
// kv_len      [batch] u32, keys of each sequence; its queries are aligned to their end
// kv_start    [batch] u32, first token of each sequence in a contiguous cache; null where paged
// block_table [kv_head, batch, max_pages] u32 by the strides of params; null where contiguous
// valid_len   [tables, batch] u32, out: kv_len, or 0 where the sequence cannot be read (see tile/cache_check.cuh)
// cost        [2, batch] u32, scratch
// tiles       [max_tiles] PrefillTile, out    tile_count [1] u32, out
// arrivals    [1] u32, zero before and after the launch
// status      first fault: FAULT_BAD_LENGTH, FAULT_BAD_PAGE or FAULT_BAD_RANGE with the sequence
//
// Sequences are listed by what their longest tile costs, dearest first, and the tiles of a sequence from its last rows on, which
// are the longest of a causal one; so blocks that run together share keys in L2, and the last to start are short. Queries
// of no sequence follow, as tiles without keys: padding behind the last sequence, and sequences whose cu_queries descend,
// end past the queries or begin before an earlier one ends, so that every row has exactly one writer. One plan serves all
// layers, and all steps of one shape.
//
// Arch:    sm_80 and later.
// Mapping: one block per sequence checks its pages; the last block to finish lists the tiles, one warp per sequence.
// Budget:  64 registers, 128 bytes of shared memory.
// Limit:   latency: one pass over the block table, batch² comparisons.
#include "core.cuh"
#include "prefill_params.h"
#include "ptx/shuffle.cuh"
#include "ptx/sync.cuh"
#include "status_params.h"
#include "tile/block_scan.cuh"
#include "tile/cache_check.cuh"
#include "tile/last_arriver.cuh"
#include "tile/prefill_tiles.cuh"

constexpr uint32_t THREADS = 256;
constexpr uint32_t WARPS = THREADS / WARP_SIZE;

struct Shared {
    uint32_t of_warp[WARPS];
    uint32_t is_last;
};

// Queries [begin, end) of a sequence.
struct Queries {
    uint32_t begin;
    uint32_t end;

    // Whether they could be a sequence's.
    DEVICE bool ascend(const PrefillParams& params) const { return begin <= end && end <= params.num_queries; }
};

DEVICE Queries queries_of(const uint32_t* cu_queries, uint32_t sequence) {
    return {cu_queries[sequence], cu_queries[sequence + 1]};
}

DEVICE uint32_t tiles_of(uint32_t queries, const PrefillParams& params) {
    return ceil_div(queries * params.group, params.tile_rows);
}

// The maximum of x over the threads before this one; 0 for the first. The whole block calls.
DEVICE uint32_t block_max_before(uint32_t x, Shared& shared) {
#pragma unroll
    for (uint32_t distance = 1; distance < WARP_SIZE; distance *= 2) {
        const uint32_t below = __shfl_up_sync(FULL_WARP, x, distance);
        if (lane_index() >= distance) x = max(x, below);
    }
    __syncthreads();  // the array may still be read from before
    if (lane_index() == WARP_SIZE - 1) shared.of_warp[warp_index()] = x;
    __syncthreads();
    const uint32_t below = __shfl_up_sync(FULL_WARP, x, 1);
    uint32_t before = lane_index() == 0 ? 0 : below;
    for (uint32_t warp = 0; warp < warp_index(); warp++) before = max(before, shared.of_warp[warp]);
    return before;
}

// Lists the tiles of queries that no sequence has, with `step` threads of which the caller is number `first`.
DEVICE void list_gap(PrefillTile* list, Queries gap, uint32_t first, uint32_t step, const PrefillParams& params) {
    const uint32_t count = tiles_of(gap.end - gap.begin, params);
    for (uint32_t i = first; i < count; i += step) {
        list[i] = segment_tile(0, gap.begin, gap.end - gap.begin, i * params.tile_rows, 0, 0, params);
    }
}

KERNEL(256, 4)
prefill_plan(const uint32_t* cu_queries, const uint32_t* kv_len, const uint32_t* kv_start, const uint32_t* block_table,
             uint32_t* valid_len, uint32_t* cost, PrefillTile* tiles, uint32_t* tile_count, uint32_t* arrivals,
             uint64_t* status, const __grid_constant__ PrefillParams params) {
    DYNAMIC_SHARED(shared_bytes);
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);

    grid_dependency_wait();
    {
        const Queries own = queries_of(cu_queries, blockIdx.x);
        const uint32_t queries = own.ascend(params) ? own.end - own.begin : 0;
        const uint32_t len = queries > 0 ? kv_len[blockIdx.x] : 0;  // without queries nobody reads the keys
        const PrefillTile segment = segment_tile(blockIdx.x, own.begin, queries, 0, 0, len, params);
        const uint32_t begin = visible_to(0, segment, len).begin;
        const uint32_t sinks = queries > 0 ? visible_to(queries - 1, segment, len).sinks : 0;
        check_sequence<THREADS>(blockIdx.x, len, begin, sinks, kv_start, block_table, valid_len, status, params);
    }
    if (!arrive_last(arrivals, params.batch, &shared.is_last)) return;

    // Each thread looks at a contiguous share of the sequences. First: which begin after all earlier ones have ended?
    uint32_t* const count = cost + params.batch;  // tiles of each sequence; 0 for one that is refused or has no queries
    const uint32_t share = ceil_div(params.batch, THREADS);
    const uint32_t begin = min(threadIdx.x * share, params.batch);
    const uint32_t end = min(begin + share, params.batch);
    uint32_t furthest = 0;
    for (uint32_t s = begin; s < end; s++) {
        const Queries own = queries_of(cu_queries, s);
        if (own.ascend(params)) furthest = max(furthest, own.end);
    }
    uint32_t reached = block_max_before(furthest, shared);
    uint32_t covered = 0;
    uint32_t sum = 0;
    for (uint32_t s = begin; s < end; s++) {
        const Queries own = queries_of(cu_queries, s);
        const bool ascends = own.ascend(params);
        const bool accepted = ascends && own.begin >= reached;
        if (!accepted) report_fault(status, FAULT_BAD_RANGE, s);
        if (ascends) reached = max(reached, own.end);
        const uint32_t queries = accepted ? own.end - own.begin : 0;
        count[s] = tiles_of(queries, params);
        cost[s] = 0;
        if (queries == 0) continue;
        covered = own.end;
        sum += count[s];
        const uint32_t len = longest_len_of(valid_len, s, params);
        const Visible visible = visible_to(queries - 1, segment_tile(s, own.begin, queries, 0, 0, len, params), len);
        cost[s] = visible.end - visible.begin;
    }

    // Then: which queries lie between them? They follow all others in the list.
    covered = block_max_before(covered, shared);
    uint32_t gaps = 0;
    uint32_t before = covered;
    for (uint32_t s = begin; s < end; s++) {
        if (count[s] == 0) continue;
        const Queries own = queries_of(cu_queries, s);
        gaps += tiles_of(own.begin - before, params);
        before = own.end;
    }
    uint32_t all_tiles, all_gaps;
    block_sum_before(sum, all_tiles, shared.of_warp);
    uint32_t place = all_tiles + block_sum_before(gaps, all_gaps, shared.of_warp);
    for (uint32_t s = begin; s < end; s++) {
        if (count[s] == 0) continue;
        const Queries own = queries_of(cu_queries, s);
        list_gap(tiles + place, {covered, own.begin}, 0, 1, params);
        place += tiles_of(own.begin - covered, params);
        covered = own.end;
    }
    // What lies behind the last: only the last thread has seen all.
    __syncthreads();
    if (threadIdx.x == THREADS - 1) shared.of_warp[0] = covered;
    __syncthreads();
    const Queries rest = {shared.of_warp[0], params.num_queries};
    list_gap(tiles + all_tiles + all_gaps, rest, threadIdx.x, THREADS, params);
    if (threadIdx.x == 0) *tile_count = all_tiles + all_gaps + tiles_of(rest.end - rest.begin, params);

    for (uint32_t s = warp_index(); s < params.batch; s += WARPS) {
        if (count[s] == 0) continue;
        uint32_t dearer = 0;
        for (uint32_t other = lane_index(); other < params.batch; other += WARP_SIZE) {
            if (cost[other] > cost[s] || (cost[other] == cost[s] && other < s)) dearer += count[other];
        }
        PrefillTile* const list = tiles + warp_sum(dearer);
        const Queries own = queries_of(cu_queries, s);
        const uint32_t len = longest_len_of(valid_len, s, params);
        const uint32_t start = block_table == nullptr && len > 0 ? kv_start[s] : 0;
        for (uint32_t i = lane_index(); i < count[s]; i += WARP_SIZE) {
            const uint32_t first_row = (count[s] - 1 - i) * params.tile_rows;
            list[i] = segment_tile(s, own.begin, own.end - own.begin, first_row, start, len, params);
        }
    }
}
