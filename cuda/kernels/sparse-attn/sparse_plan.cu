// Turns the slots of a step into what attention reads: for each row a list of runs that are there, and one of those on their way.
//
// selected    [rows, max_selected] u32, 0xffffffff is padding; slot_of [rows, max_selected] u32; misses [rows, max_selected]
//             SparseMiss, num_misses [rows] u32: as sparse_resolve leaves them
// slot_table  [rows, slots] u32, run of each slot         open_table [rows, max_open] u32, run of each open page
// host_table  [requests, max_pages] u32, host page of each page of a request
// rows        [rows] u32, a SparseRow each, or null: idle and bad ones read nothing
// page_len    [rows, max_pages] u8, tokens of each page, or null where all pages are full
// kv_len      [requests] u32, tokens of each request      closed [rows] u32, of these in pages that can be selected
// hits        [rows, max_selected + max_open] SparseEntry, out: pages that were resident in the order of selection, then open
//             ones; num_hits [rows] u32, out
// missed      [rows, max_selected] SparseEntry, out: pages that are fetched, in the order of selection; num_missed [rows] u32, out
// hit_unit, missed_unit   [rows + 1] u32, out: units of work of a row, summed over the rows before (tile/split_plan.cuh)
// arrivals    [1] u32, zero before and after the launch
// status      first fault, with the row: FAULT_BAD_LENGTH for fewer tokens than are closed, or more open ones than the table holds;
//             FAULT_BAD_INDEX for a slot, FAULT_BAD_PAGE for a run, page or host page out of range. Such a row reads nothing.
//
// A request whose context fits the budget has closed nothing: its hits are its open pages, all of its tokens in order. A unit
// is unit_tiles tiles of 64 tokens; an empty list has one unit, whose block writes its zeros.
//
// Arch:    sm_80 and later.
// Mapping: one block per row; the last block to finish sums over the rows.
// Budget:  64 registers; 1 bit of shared memory per selected page and 64 bytes.
// Limit:   latency: 16 bytes per selected page, read once.
#include "core.cuh"
#include "ptx/shuffle.cuh"
#include "ptx/sync.cuh"
#include "sparse_attend_params.h"
#include "sparse_resolve_params.h"
#include "status_params.h"
#include "tile/block_scan.cuh"
#include "tile/last_arriver.cuh"
#include "tile/status.cuh"

constexpr uint32_t THREADS = 128;
constexpr uint32_t WARPS = THREADS / WARP_SIZE;
constexpr uint32_t NONE = 0xffffffffu;

struct Shared {
    uint32_t of_warp[WARPS];
    uint32_t fault;
    uint32_t is_last;
};

// Units of a list of `entries` pages: never 0.
DEVICE uint32_t units_of(uint32_t entries, const SparsePlanParams& params) {
    const uint32_t units = ceil_div(entries << params.page_shift, SPARSE_TILE * params.unit_tiles);
    return units > 0 ? units : 1;
}

// Sums up the units of all rows. The whole block calls.
DEVICE void sum_units(const uint32_t* counts, uint32_t* first_unit, const SparsePlanParams& params, Shared& shared) {
    const uint32_t share = ceil_div(params.rows, THREADS);
    const uint32_t begin = min(threadIdx.x * share, params.rows);
    const uint32_t end = min(begin + share, params.rows);
    uint32_t sum = 0;
    for (uint32_t row = begin; row < end; row++) sum += units_of(counts[row], params);
    uint32_t total;
    uint32_t before = block_sum_before(sum, total, shared.of_warp);
    for (uint32_t row = begin; row < end; row++) {
        first_unit[row] = before;
        before += units_of(counts[row], params);
    }
    if (threadIdx.x == 0) first_unit[params.rows] = total;
}

// What one row reads; faults are left in shared.fault.
struct RowTables {
    const uint32_t* slot_table;
    const uint8_t* page_len;
    const SparsePlanParams& params;
    Shared& shared;

    DEVICE SparseEntry entry(uint32_t page, uint32_t slot) const {
        if (slot >= params.slots) {
            atomicMax(&shared.fault, FAULT_BAD_INDEX);
            return {0, 0};
        }
        const uint32_t run = slot_table[slot];
        if (run >= params.num_runs || page >= params.max_pages) {
            atomicMax(&shared.fault, FAULT_BAD_PAGE);
            return {0, 0};
        }
        const uint32_t full = 1u << params.page_shift;
        return {run, page_len == nullptr ? full : min(static_cast<uint32_t>(page_len[page]), full)};
    }
};

KERNEL(128, 8)
sparse_plan(const uint32_t* selected, const uint32_t* slot_of, const SparseMiss* misses, const uint32_t* num_misses,
            const uint32_t* slot_table, const uint32_t* open_table, const uint32_t* host_table, const uint32_t* rows,
            const uint8_t* page_len, const uint32_t* kv_len, const uint32_t* closed, SparseEntry* hits, uint32_t* num_hits, SparseEntry* missed, uint32_t* num_missed,
            uint32_t* hit_unit, uint32_t* missed_unit, uint32_t* arrivals, uint64_t* status,
            const __grid_constant__ SparsePlanParams params) {
    DYNAMIC_SHARED(shared_bytes);
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    uint32_t* const is_miss = reinterpret_cast<uint32_t*>(shared_bytes + sizeof(Shared));  // a bit per place
    const uint32_t row = blockIdx.x;
    const uint64_t first_place = static_cast<uint64_t>(row) * params.max_selected;
    selected += first_place, slot_of += first_place, misses += first_place, missed += first_place;
    hits += static_cast<uint64_t>(row) * (params.max_selected + params.max_open);
    const RowTables tables{slot_table + static_cast<uint64_t>(row) * params.slots,
                           page_len == nullptr ? nullptr : page_len + static_cast<uint64_t>(row) * params.max_pages, params,
                           shared};

    grid_dependency_wait();
    for (uint32_t word = threadIdx.x; word < ceil_div(params.max_selected, 32u); word += THREADS) is_miss[word] = 0;
    if (threadIdx.x == 0) shared.fault = FAULT_NONE;
    __syncthreads();

    const bool reads = rows == nullptr || rows[row] == SPARSE_ROW_SELECTS || rows[row] == SPARSE_ROW_DENSE;
    const uint32_t* const places = host_table + static_cast<uint64_t>(row / params.kv_heads) * params.max_pages;
    const uint32_t absent = reads ? min(num_misses[row], params.max_selected) : 0;
    for (uint32_t i = threadIdx.x; i < absent; i += THREADS) {
        const SparseMiss miss = misses[i];
        missed[i] = tables.entry(miss.page, miss.slot);
        if (miss.page < params.max_pages && places[miss.page] >= params.host_pages) atomicMax(&shared.fault, FAULT_BAD_PAGE);
        if (miss.place < params.max_selected) atomicOr(&is_miss[miss.place / 32], 1u << miss.place % 32);
    }
    __syncthreads();

    // Hits in the order of selection: every warp has a contiguous stretch of whole groups of 32.
    const uint32_t stretch = ceil_div(ceil_div(params.max_selected, WARP_SIZE), WARPS) * WARP_SIZE;
    const uint32_t begin = min(warp_index() * stretch, params.max_selected);
    const uint32_t end = min(begin + stretch, params.max_selected);
    const auto is_hit = [&](uint32_t place) {
        return reads && place < end && slot_of[place] != NONE && (is_miss[place / 32] >> place % 32 & 1) == 0;
    };
    uint32_t mine = 0;
    for (uint32_t first = begin; first < end; first += WARP_SIZE) mine += is_hit(first + lane_index()) ? 1 : 0;
    uint32_t resident;
    const uint32_t before = block_sum_before(mine, resident, shared.of_warp);
    uint32_t rank = __shfl_sync(FULL_WARP, before, 0);
    for (uint32_t first = begin; first < end; first += WARP_SIZE) {
        const uint32_t place = first + lane_index();
        const uint32_t found = __ballot_sync(FULL_WARP, is_hit(place));
        if (found >> lane_index() & 1) {
            const uint32_t at = rank + __popc(found & ((1u << lane_index()) - 1));
            hits[at] = tables.entry(selected[place], slot_of[place]);
        }
        rank += __popc(found);
    }

    // Open pages, all full but the last.
    const uint32_t tokens = kv_len[row / params.kv_heads];
    const uint32_t open = !reads ? 0 : tokens >= closed[row] ? tokens - closed[row] : NONE;
    const uint32_t page = 1u << params.page_shift;
    uint32_t open_pages = 0;
    if (open > static_cast<uint64_t>(params.max_open) << params.page_shift) {
        atomicMax(&shared.fault, FAULT_BAD_LENGTH);
    } else {
        open_pages = ceil_div(open, page);
        open_table += static_cast<uint64_t>(row) * params.max_open;
        for (uint32_t i = threadIdx.x; i < open_pages; i += THREADS) {
            const uint32_t run = open_table[i];
            if (run >= params.num_runs) atomicMax(&shared.fault, FAULT_BAD_PAGE);
            hits[resident + i] = {run, min(open - i * page, page)};
        }
    }
    __syncthreads();
    const uint32_t fault = shared.fault;
    if (threadIdx.x == 0) {
        num_hits[row] = fault == FAULT_NONE ? resident + open_pages : 0;
        num_missed[row] = fault == FAULT_NONE ? absent : 0;
        if (fault != FAULT_NONE) report_fault(status, fault, row);
    }
    if (!arrive_last(arrivals, params.rows, &shared.is_last)) return;
    sum_units(num_hits, hit_unit, params, shared);
    sum_units(num_missed, missed_unit, params, shared);
}
