// One step of bucketed LRU: makes selected pages resident in a few slots, and lists those that have to be fetched.
//
// selected [rows, max_selected] u32, every page of a row once; 0xffffffff is padding, anywhere
// rows     [rows] u32, a SparseRow each, or null: others than SPARSE_ROW_SELECTS touch no state; one at fault becomes bad
// selected_epoch, epoch [rows] u32, or both null: state of the row's index that the selection was made for, and the state now
// owners   [rows, slots] u32, page of each slot, 0xffffffff for a free one; updated
// ages     [rows, slots] u8, steps since a slot was used, below `buckets`; updated
// dirty    [rows, slots] u8, not 0 for a page that is not in host memory yet: it keeps its slot
// slot_of  [rows, max_selected] u32, out: slot of each selected page, 0xffffffff for padding
// misses   [rows, max_selected] SparseMiss, out: the first num_misses of a row, in the order of selection
// num_misses [rows] u32, out         counts [rows] SparseCounts, added to
// status   first fault: FAULT_STALE with a row whose epochs differ, FAULT_BAD_INDEX with one that selects a page twice,
//          FAULT_BAD_LENGTH with one whose pages do not fit the slots that may go. Such a row keeps its state, and gets no slots
//          and no misses.
//
// A step ages every slot; a selected page that is resident gets age 0; victims are the oldest slots, free ones first, and in the
// bucket where there are enough the first in slot order; victims in slot order go to misses in the order of selection. The
// victims are one digit of a radix select: a histogram of ages, a threshold, and prefix sums. Nothing depends on timing. A prefetch
// ages nothing, and where the slots that may go are fewer than its misses, the first misses get them and the others stay away.
//
// Arch:    sm_80 and later.
// Mapping: one block per row. Pages of the selection go into a hash table in shared memory, owners are scanned once.
// Budget:  64 registers; 6 bytes of shared memory per hash entry, 4 per selected page, 1 per slot, and 1.1 KB.
// Limit:   latency: 6 bytes per slot and 12 per selected page, read once.
#include "core.cuh"
#include "ptx/shuffle.cuh"
#include "ptx/sync.cuh"
#include "sparse_resolve_params.h"
#include "status_params.h"
#include "tile/block_scan.cuh"
#include "tile/status.cuh"

constexpr uint32_t THREADS = 256;
constexpr uint32_t WARPS = THREADS / WARP_SIZE;
constexpr uint32_t NONE = 0xffffffffu;
constexpr uint32_t NO_SLOT = 0xffffu;

// What a slot is to replacement: DIRTY may not go, 1 … buckets is the age after this step plus 1, buckets + 1 is free.
constexpr uint32_t DIRTY = 0;
constexpr uint32_t HIT = 254;     // used by this step
constexpr uint32_t VICTIM = 255;  // gets another page
constexpr uint32_t STATES = 256;

struct Shared {
    uint32_t histogram[STATES];
    uint32_t of_warp[WARPS];
    uint32_t threshold;
    uint32_t ties;      // victims of the age `threshold`
    uint32_t enough;    // whether there are as many victims as misses
    uint32_t available;  // if not: how many there are
    uint32_t repeated;  // whether a page is selected twice
    uint32_t evicted;
};

// Pages of the selection and their places: open addressing, at most half full.
struct PageTable {
    uint32_t* pages;
    uint16_t* places;
    uint32_t mask;

    DEVICE uint32_t home(uint32_t page) const {
        const uint32_t hash = page * 0x9e3779b1u;  // Knuth's multiplier; its high bits are the better ones
        return (hash ^ (hash >> 16)) & mask;
    }

    // Whether the page was new.
    DEVICE bool insert(uint32_t page, uint32_t place) const {
        for (uint32_t entry = home(page);; entry = (entry + 1) & mask) {
            const uint32_t found = atomicCAS(pages + entry, NONE, page);
            if (found == page) return false;
            if (found != NONE) continue;
            places[entry] = static_cast<uint16_t>(place);
            return true;
        }
    }

    // The page's place; NONE if it is not selected.
    DEVICE uint32_t find(uint32_t page) const {
        for (uint32_t entry = home(page);; entry = (entry + 1) & mask) {
            const uint32_t found = pages[entry];
            if (found == page) return places[entry];
            if (found == NONE) return NONE;
        }
    }
};

// The age from which on slots go, so that `need` go together. One warp calls.
DEVICE void find_threshold(uint32_t need, uint32_t buckets, Shared& shared) {
    uint32_t older = 0;
    for (uint32_t top = buckets + 1;; top -= WARP_SIZE) {
        // Lane i looks at the i-th oldest state of this stretch; states below 1 may not go.
        const uint32_t here = lane_index() < top ? shared.histogram[top - lane_index()] : 0;
        const uint32_t before = older + warp_prefix_sum(here);
        const uint32_t reached = __ballot_sync(FULL_WARP, before + here >= need);
        if (reached != 0) {
            if (lane_index() == static_cast<uint32_t>(__ffs(static_cast<int>(reached))) - 1) {
                shared.threshold = top - lane_index();
                shared.ties = need - before;
                shared.enough = 1;
            }
            return;
        }
        older = __shfl_sync(FULL_WARP, before + here, WARP_SIZE - 1);
        if (top <= WARP_SIZE) break;
    }
    if (lane_index() == 0) {
        shared.enough = 0;
        // All that may go.
        shared.available = older;
        shared.threshold = 0;
        shared.ties = 0;
    }
}

KERNEL(256, 2)
sparse_resolve(const uint32_t* selected, uint32_t* rows, const uint32_t* selected_epoch, const uint32_t* epoch,
               uint32_t* owners, uint8_t* ages, const uint8_t* dirty, uint32_t* slot_of, SparseMiss* misses,
               uint32_t* num_misses, SparseCounts* counts, uint64_t* status,
               const __grid_constant__ SparseResolveParams params) {
    DYNAMIC_SHARED(shared_bytes);
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    uint32_t* const pages = reinterpret_cast<uint32_t*>(shared_bytes + sizeof(Shared));
    uint16_t* const places = reinterpret_cast<uint16_t*>(pages + params.hash_entries);
    uint16_t* const slot_at = places + params.hash_entries;         // [max_selected] slot of each place
    uint16_t* const missing = slot_at + params.max_selected;        // [max_selected] places of the misses
    uint8_t* const state = reinterpret_cast<uint8_t*>(missing + params.max_selected);  // [slots]
    const PageTable table{pages, places, params.hash_entries - 1};

    const uint32_t row = blockIdx.x;
    const uint64_t first_place = static_cast<uint64_t>(row) * params.max_selected;
    const uint64_t first_slot = static_cast<uint64_t>(row) * params.slots;
    selected += first_place, slot_of += first_place, misses += first_place;
    owners += first_slot, ages += first_slot, dirty += first_slot;

    grid_dependency_wait();
    const bool stale = epoch != nullptr && selected_epoch[row] != epoch[row];
    const bool selects = rows == nullptr || rows[row] == SPARSE_ROW_SELECTS;
    __syncthreads();  // everyone has read the row's state
    if (stale || !selects) {
        for (uint32_t place = threadIdx.x; place < params.max_selected; place += THREADS) slot_of[place] = NONE;
        if (threadIdx.x == 0) {
            num_misses[row] = 0;
            if (stale && selects) {
                report_fault(status, FAULT_STALE, row);
                if (rows != nullptr) rows[row] = SPARSE_ROW_BAD;
            }
        }
        return;
    }
    const uint32_t ageing = params.prefetch != 0 ? 0 : 1;

    shared.histogram[threadIdx.x] = 0;
    for (uint32_t entry = threadIdx.x; entry < params.hash_entries; entry += THREADS) pages[entry] = NONE;
    if (threadIdx.x == 0) {
        shared.repeated = 0;
        shared.evicted = 0;
    }
    __syncthreads();
    for (uint32_t place = threadIdx.x; place < params.max_selected; place += THREADS) {
        const uint32_t page = selected[place];
        slot_at[place] = NO_SLOT;
        if (page != NONE && !table.insert(page, place)) atomicOr(&shared.repeated, 1u);
    }
    __syncthreads();

    for (uint32_t slot = threadIdx.x; slot < params.slots; slot += THREADS) {
        const uint32_t owner = owners[slot];
        uint32_t mine = params.buckets + 1;
        if (owner != NONE) {
            const uint32_t place = table.find(owner);
            const uint32_t age = min(static_cast<uint32_t>(ages[slot]) + ageing, params.buckets - 1);
            mine = place != NONE ? HIT : dirty[slot] != 0 ? DIRTY : age + 1;
            if (place != NONE) slot_at[place] = static_cast<uint16_t>(slot);
        }
        state[slot] = static_cast<uint8_t>(mine);
        if (mine != HIT && mine != DIRTY) atomicAdd(&shared.histogram[mine], 1u);
    }
    __syncthreads();

    // Misses in the order of selection: every thread looks at a contiguous share.
    uint32_t wanted = 0;
    uint32_t need = 0;
    {
        const uint32_t share = ceil_div(params.max_selected, THREADS);
        const uint32_t begin = min(threadIdx.x * share, params.max_selected);
        const uint32_t end = min(begin + share, params.max_selected);
        uint32_t mine = 0;
        for (uint32_t place = begin; place < end; place++) {
            const bool real = selected[place] != NONE;
            const bool miss = real && slot_at[place] == NO_SLOT;
            mine += (miss ? 1u : 0u) + (real ? 1u << 16 : 0u);
        }
        uint32_t total;
        uint32_t rank = block_sum_before(mine, total, shared.of_warp) & 0xffffu;
        need = total & 0xffffu;
        wanted = total >> 16;
        for (uint32_t place = begin; place < end; place++) {
            if (selected[place] != NONE && slot_at[place] == NO_SLOT) missing[rank++] = static_cast<uint16_t>(place);
        }
    }
    if (warp_index() == 0) find_threshold(need, params.buckets, shared);
    __syncthreads();
    if (shared.enough == 0 && params.prefetch != 0) need = shared.available;
    if (shared.repeated != 0 || (shared.enough == 0 && params.prefetch == 0)) {
        for (uint32_t place = threadIdx.x; place < params.max_selected; place += THREADS) slot_of[place] = NONE;
        if (threadIdx.x == 0) {
            num_misses[row] = 0;
            report_fault(status, shared.repeated != 0 ? FAULT_BAD_INDEX : FAULT_BAD_LENGTH, row);
            if (rows != nullptr) rows[row] = SPARSE_ROW_BAD;
        }
        return;
    }

    // Victims in slot order. Slots past the threshold all go; of those at it, the first `ties`.
    if (need > 0) {
        const uint32_t share = ceil_div(params.slots, THREADS);
        const uint32_t begin = min(threadIdx.x * share, params.slots);
        const uint32_t end = min(begin + share, params.slots);
        const uint32_t threshold = shared.threshold;
        const uint32_t allowed = shared.ties;
        uint32_t mine = 0;
        for (uint32_t slot = begin; slot < end; slot++) {
            const uint32_t of = state[slot];
            mine += (of != HIT && of > threshold ? 1u << 16 : 0u) + (of == threshold ? 1u : 0u);
        }
        uint32_t total;
        const uint32_t before = block_sum_before(mine, total, shared.of_warp);
        uint32_t older = before >> 16;
        uint32_t ties = before & 0xffffu;
        for (uint32_t slot = begin; slot < end; slot++) {
            const uint32_t of = state[slot];
            const uint32_t rank = older + min(ties, allowed);
            const bool tie = of == threshold && ties < allowed;
            ties += of == threshold ? 1 : 0;
            if (of == HIT || (of <= threshold && !tie)) continue;
            older += tie ? 0 : 1;
            const uint32_t place = missing[rank];
            const uint32_t page = selected[place];
            const uint32_t evicted = owners[slot];
            misses[rank] = {place, page, slot, evicted};
            owners[slot] = page;
            slot_at[place] = static_cast<uint16_t>(slot);
            state[slot] = VICTIM;
            if (evicted != NONE) atomicAdd(&shared.evicted, 1u);
        }
    }
    __syncthreads();

    for (uint32_t slot = threadIdx.x; slot < params.slots; slot += THREADS) {
        const uint32_t aged = min(static_cast<uint32_t>(ages[slot]) + ageing, params.buckets - 1);
        ages[slot] = state[slot] >= HIT ? 0 : static_cast<uint8_t>(aged);
    }
    for (uint32_t place = threadIdx.x; place < params.max_selected; place += THREADS) {
        slot_of[place] = slot_at[place] == NO_SLOT ? NONE : slot_at[place];
    }
    if (threadIdx.x == 0) {
        num_misses[row] = need;
        SparseCounts& total = counts[row];
        total.evicted += shared.evicted;
        if (params.prefetch != 0) {
            total.prefetched += need;
            return;
        }
        total.steps += 1;
        total.selected += wanted;
        total.hits += wanted - need;
        total.misses += need;
    }
}
