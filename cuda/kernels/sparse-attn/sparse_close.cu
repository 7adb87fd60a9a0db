// Closes open pages that fill whole partitions: they become pages that can be selected, and take slots by exchanging runs with them.
//
// kv_len      [requests] u32, tokens of each request; 0 where there is none
// host_table  [requests, max_pages] u32, host page of each page of a request
// rows        [rows] u32, out: a SparseRow
// closed      [rows] u32, tokens in closed pages, row = request · kv_heads + kv_head; updated
// partitions  [rows] u32, closed partitions; updated          epoch [rows] u32, how often the row's index has changed; updated
// owners      [rows, slots] u32, page of each slot, 0xffffffff for a free one; updated
// ages        [rows, slots] u8; updated      dirty [rows, slots] u8, not 0 for a page that is not in host memory yet; updated
// slot_table  [rows, slots] u32, run of each slot; updated    open_table [rows, max_open] u32, run of each open page; updated
// closing     [rows, max_closing] SparseClosing, out: the pages that were closed, in order; num_closing [rows] u32, out
// counts      [rows] SparseCounts, `evicted` added to
// status      first fault, with the row: FAULT_BAD_LENGTH for fewer tokens than are closed, more open ones than the table holds,
//             pages past a table's end, more partitions than one where params.bulk is 0, or no slot that may go; FAULT_BAD_PAGE
//             for a page without a run or a place in host memory. Such a row keeps its state and is bad.
//
// A context stays open as a whole while it has at most dense_tokens tokens. The one partition that a decoded token fills later
// gets slots like any page that is fetched between steps, free ones first, then the oldest whose page may go, one page after the
// other. More than that at once (a prompt) go to host memory before the next step, and only the last of them, as many as
// there are free slots, also get these. Pages in slots are dirty until they are written. No bytes move here: a slot takes over the run of the open page and leaves
// its own for later tokens.
//
// Arch:    sm_80 and later.
// Mapping: one block per row.
// Budget:  64 registers, 64 bytes of shared memory.
// Limit:   latency: 6 bytes per slot when something is closed, 12 bytes otherwise.
#include "core.cuh"
#include "ptx/shuffle.cuh"
#include "ptx/sync.cuh"
#include "sparse_pages_params.h"
#include "sparse_resolve_params.h"
#include "status_params.h"
#include "tile/block_scan.cuh"
#include "tile/status.cuh"

constexpr uint32_t THREADS = 128;
constexpr uint32_t WARPS = THREADS / WARP_SIZE;
constexpr uint32_t NONE = 0xffffffffu;

struct Shared {
    uint32_t of_warp[WARPS];
    uint32_t best;
};

// The tables of one row.
struct RowTables {
    uint32_t* owners;
    uint8_t* ages;
    uint8_t* dirty;
    uint32_t* slot_table;
    uint32_t* open_table;
    SparseClosing* closing;

    // Gives open page `open`, which is page `page` from now on, the slot. One thread calls.
    DEVICE void place(uint32_t open, uint32_t page, uint32_t slot, SparseClosing& entry) const {
        const uint32_t run = open_table[open];
        entry = {page, run, slot, owners[slot]};
        open_table[open] = slot_table[slot];
        slot_table[slot] = run;
        owners[slot] = page;
        ages[slot] = 0;
        dirty[slot] = 1;
    }

    // How soon a slot goes: 0 for one that may not, more for an older page, most for a free slot.
    DEVICE uint32_t eviction_age(uint32_t slot, uint32_t buckets) const {
        return owners[slot] == NONE ? buckets + 1 : dirty[slot] != 0 ? 0 : min(ages[slot] + 1u, buckets);
    }
};

KERNEL(128, 8)
sparse_close(const uint32_t* kv_len, const uint32_t* host_table, uint32_t* rows, uint32_t* closed, uint32_t* partitions, uint32_t* epoch, uint32_t* owners,
             uint8_t* ages, uint8_t* dirty, uint32_t* slot_table, uint32_t* open_table, SparseClosing* closing,
             uint32_t* num_closing, SparseCounts* counts, uint64_t* status,
             const __grid_constant__ SparseCloseParams params) {
    DYNAMIC_SHARED(shared_bytes);
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    const uint32_t row = blockIdx.x;
    const uint64_t first_slot = static_cast<uint64_t>(row) * params.slots;
    const RowTables tables{owners + first_slot,
                           ages + first_slot,
                           dirty + first_slot,
                           slot_table + first_slot,
                           open_table + static_cast<uint64_t>(row) * params.max_open,
                           closing + static_cast<uint64_t>(row) * params.max_closing};

    grid_dependency_wait();
    const uint32_t tokens = kv_len[row / params.kv_heads];
    const uint32_t before = closed[row];
    const uint32_t open = tokens > before ? tokens - before : 0;
    const uint32_t partition = params.partition_pages << params.page_shift;
    const bool dense = before == 0 && open <= params.dense_tokens;
    const uint32_t count = dense ? 0 : open / partition;
    if (count == 0) {
        if (threadIdx.x == 0) {
            num_closing[row] = 0;
            const bool lost = tokens != 0 && tokens < before;
            if (lost) report_fault(status, FAULT_BAD_LENGTH, row);
            rows[row] = tokens == 0   ? SPARSE_ROW_IDLE
                        : lost        ? SPARSE_ROW_BAD
                        : before == 0 ? SPARSE_ROW_DENSE
                                      : SPARSE_ROW_SELECTS;
        }
        return;
    }
    const bool decoded = before > 0 && count == 1;
    const uint32_t pages = count * params.partition_pages;
    const uint32_t first_page = before >> params.page_shift;

    // Slots that may go, and those that are free.
    uint32_t mine = 0;
    for (uint32_t slot = threadIdx.x; slot < params.slots; slot += THREADS) {
        const uint32_t age = tables.eviction_age(slot, params.buckets);
        mine += (age > 0 ? 1u : 0u) + (age > params.buckets ? 1u << 16 : 0u);
    }
    uint32_t total;
    block_sum_before(mine, total, shared.of_warp);
    const uint32_t available = total & 0xffffu;
    const uint32_t free = total >> 16;
    const bool fits = open <= static_cast<uint64_t>(params.max_open) << params.page_shift &&
                      pages <= params.max_closing && static_cast<uint64_t>(first_page) + pages <= params.max_pages &&
                      (decoded ? available >= pages : params.bulk != 0);
    bool safe = true;
    if (fits) {
        const uint32_t* const places = host_table + static_cast<uint64_t>(row / params.kv_heads) * params.max_pages + first_page;
        for (uint32_t i = threadIdx.x; i < pages; i += THREADS) {
            safe = safe && places[i] < params.host_pages && tables.open_table[i] < params.num_runs;
        }
    }
    uint32_t unsafe_pages;
    block_sum_before(safe ? 0u : 1u, unsafe_pages, shared.of_warp);
    if (!fits || unsafe_pages != 0) {
        if (threadIdx.x == 0) {
            num_closing[row] = 0;
            rows[row] = SPARSE_ROW_BAD;
            report_fault(status, fits ? FAULT_BAD_PAGE : FAULT_BAD_LENGTH, row);
        }
        return;
    }

    if (decoded) {
        for (uint32_t i = 0; i < pages; i++) {
            __syncthreads();
            if (threadIdx.x == 0) shared.best = 0;
            __syncthreads();
            uint32_t best = 0;  // the oldest, of equal age the first slot
            for (uint32_t slot = threadIdx.x; slot < params.slots; slot += THREADS) {
                const uint32_t age = tables.eviction_age(slot, params.buckets);
                if (age > 0) best = max(best, age << 16 | (0xffffu - slot));
            }
            best = warp_max(best);
            if (lane_index() == 0) atomicMax(&shared.best, best);
            __syncthreads();
            if (threadIdx.x == 0) {
                const uint32_t slot = 0xffffu - (shared.best & 0xffffu);
                tables.place(i, first_page + i, slot, tables.closing[i]);
                if (tables.closing[i].evicted != NONE) counts[row].evicted += 1;
            }
        }
    } else {
        // The last pages take the free slots, in order of both; every warp has a contiguous stretch of slots.
        const uint32_t warm = pages > free ? pages - free : 0;
        for (uint32_t i = threadIdx.x; i < warm; i += THREADS) {
            tables.closing[i] = {first_page + i, tables.open_table[i], NONE, NONE};
        }
        const uint32_t stretch = ceil_div(ceil_div(params.slots, WARP_SIZE), WARPS) * WARP_SIZE;
        const uint32_t begin = min(warp_index() * stretch, params.slots);
        const uint32_t end = min(begin + stretch, params.slots);
        const auto is_free = [&](uint32_t slot) { return slot < end && tables.owners[slot] == NONE; };
        uint32_t here = 0;
        for (uint32_t first = begin; first < end; first += WARP_SIZE) here += is_free(first + lane_index()) ? 1 : 0;
        uint32_t all;
        uint32_t rank = __shfl_sync(FULL_WARP, block_sum_before(here, all, shared.of_warp), 0);
        for (uint32_t first = begin; first < end; first += WARP_SIZE) {
            const uint32_t slot = first + lane_index();
            const uint32_t found = __ballot_sync(FULL_WARP, is_free(slot));
            const uint32_t i = warm + rank + __popc(found & ((1u << lane_index()) - 1));
            if ((found >> lane_index() & 1) != 0 && i < pages) {
                tables.place(i, first_page + i, slot, tables.closing[i]);
            }
            rank += __popc(found);
        }
    }
    __syncthreads();

    // What stays open moves to the front. It is less than a partition, so both ends are apart.
    const uint32_t rest = ceil_div(open - (pages << params.page_shift), 1u << params.page_shift);
    for (uint32_t i = threadIdx.x; i < rest; i += THREADS) {
        const uint32_t run = tables.open_table[pages + i];
        tables.open_table[pages + i] = tables.open_table[i];
        tables.open_table[i] = run;
    }
    if (threadIdx.x == 0) {
        closed[row] = before + (pages << params.page_shift);
        partitions[row] += count;
        epoch[row] += 1;
        num_closing[row] = pages;
        rows[row] = SPARSE_ROW_SELECTS;
    }
}
