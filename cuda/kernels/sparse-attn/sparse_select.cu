// Selects the pages that each row reads: kept partitions, then the best scores of its group, as far as their pages fit the budget.
//
// scores      [rows, columns, max_partitions] f32, sums [rows, blocks, columns, 2] f32: as sparse_score leaves them, or any scores;
//             sums are not read where params.aggregation is SPARSE_RAW and may be null then
// num_partitions [rows] u32          budget [rows] u32, pages that a row may select, kept ones included
// first_page  [rows, max_partitions + 1] u32, first page of each partition and the end of the last; null where partition j is
//             pages [j·partition_pages, (j + 1)·partition_pages)
// rows        [rows] u32, a SparseRow each, or null: others than SPARSE_ROW_SELECTS select nothing, and one at fault becomes bad
// epoch       [rows] u32, or null: copied to selected_epoch [rows] u32
// aggregated  [rows, max_partitions] f32, out: the group's score of each partition
// selected    [rows, max_selected] u32, out: pages in increasing order, then 0xffffffff; wholly written
// estimated   [rows, max_estimated] u32, out: partitions whose scores come next, in increasing order, then 0xffffffff; null where
//             params.max_estimated is 0
// status      first fault, with the row: FAULT_BAD_LENGTH for more partitions, pages or kept pages than there is room for,
//             FAULT_BAD_RANGE for first_page not ascending. Such a row selects nothing.
//
// Sinks (the first partitions) and recent ones (the last) are always kept. The rest of the budget goes to the best scores, from
// the best down, until the pages of one do not fit. Larger scores first; of equal scores the lowest number; NaN ranks with −inf,
// +0 equals −0. Three rounds of a radix select over the scores' bits (11, 11 and 10), histograms weighted by pages; the ties at the
// threshold go in the order of their numbers. Nothing depends on timing.
//
// Arch:    sm_80 and later.
// Mapping: one block per row. Threads stride over partitions while they count; warps own contiguous stretches while they write.
// Budget:  64 registers; 8.5 KB of shared memory.
// Limit:   latency: scores read once, aggregated scores five times from L2.
#include "core.cuh"
#include "ptx/shuffle.cuh"
#include "ptx/sync.cuh"
#include "sparse_resolve_params.h"
#include "sparse_select_params.h"
#include "status_params.h"
#include "tile/block_scan.cuh"
#include "tile/group_softmax.cuh"
#include "tile/status.cuh"

constexpr uint32_t THREADS = 512;
constexpr uint32_t WARPS = THREADS / WARP_SIZE;
constexpr uint32_t NONE = 0xffffffffu;
constexpr uint32_t BINS = 2048;
constexpr uint32_t PER_THREAD = BINS / THREADS;
constexpr uint32_t MAX_COLUMNS = 16;

struct Shared {
    uint32_t histogram[BINS];
    uint32_t of_warp[WARPS];
    GroupSoftmax softmax[MAX_COLUMNS];
    uint32_t bin;
    uint32_t before;
    uint32_t bad;
};

// A score as an unsigned number of the same order; NaN and −inf are 0.
DEVICE uint32_t key_of(float score) {
    if (score != score || score == NEGATIVE_INFINITY) return 0;
    const uint32_t bits = bit_cast<uint32_t>(score + 0.0f);  // −0 becomes +0
    return bits >> 31 != 0 ? ~bits : bits | 1u << 31;
}

// Which candidates go: those with a larger key, and those with this key below a number.
struct Cut {
    uint32_t key;
    uint32_t end;

    DEVICE bool takes(uint32_t candidate_key, uint32_t number) const {
        return candidate_key > key || (candidate_key == key && number < end);
    }
};

// The partitions of one row.
struct Partitions {
    const uint32_t* first_page;
    uint32_t count;
    uint32_t sinks;         // those below are kept
    uint32_t recent_begin;  // and those from here on
    uint32_t pages_each;

    DEVICE uint32_t begin_of(uint32_t number) const { return first_page == nullptr ? number * pages_each : first_page[number]; }
    DEVICE uint32_t pages_of(uint32_t number) const { return begin_of(number + 1) - begin_of(number); }
    DEVICE bool kept(uint32_t number) const { return number < sinks || number >= recent_begin; }
};

// The stretch of partitions that the calling warp owns: whole groups of 32.
struct Stretch {
    uint32_t begin;
    uint32_t end;

    DEVICE explicit Stretch(uint32_t count) {
        const uint32_t length = ceil_div(ceil_div(count, WARP_SIZE), WARPS) * WARP_SIZE;
        begin = min(warp_index() * length, count);
        end = min(begin + length, count);
    }
};

// How far `room` reaches when candidates go from the best down until one does not fit. key(j) is the key of partition j, weight(j)
// what it takes, 0 for one that is no candidate. The whole block calls.
template <class Key, class Weight>
DEVICE Cut find_cut(uint32_t count, uint32_t room, const Key& key, const Weight& weight, Shared& shared) {
    constexpr uint32_t SHIFTS[4] = {32, 21, 10, 0};
    uint32_t prefix = 0;
#pragma unroll
    for (uint32_t round = 0; round < 3; round++) {
        const uint32_t shift = SHIFTS[round + 1];
        const uint32_t mask = (1u << (SHIFTS[round] - shift)) - 1;
        __syncthreads();
        for (uint32_t bin = threadIdx.x; bin < BINS; bin += THREADS) shared.histogram[bin] = 0;
        __syncthreads();
        // Whole warps go round, so that lanes that count in one bin add up first: scores often share their leading bits.
        for (uint32_t first = warp_index() * WARP_SIZE; first < count; first += THREADS) {
            const uint32_t number = first + lane_index();
            const uint32_t mine = number < count ? weight(number) : 0;
            const uint32_t bits = mine != 0 ? key(number) : 0;
            const bool counts = mine != 0 && (round == 0 || bits >> SHIFTS[round] % 32 == prefix);
            const uint32_t bin = bits >> shift & mask;
            const uint32_t voters = __ballot_sync(FULL_WARP, counts);
            if (voters == 0) continue;
            const uint32_t leader = static_cast<uint32_t>(__ffs(static_cast<int>(voters))) - 1;
            const uint32_t leaders_bin = __shfl_sync(FULL_WARP, bin, leader);
            if (__all_sync(FULL_WARP, !counts || bin == leaders_bin)) {
                const uint32_t sum = warp_sum(counts ? mine : 0u);
                if (lane_index() == leader) atomicAdd(&shared.histogram[leaders_bin], sum);
            } else if (counts) {
                atomicAdd(&shared.histogram[bin], mine);
            }
        }
        __syncthreads();
        // From the highest bin down: the first whose candidates do not all fit.
        uint32_t here[PER_THREAD];
        uint32_t sum = 0;
#pragma unroll
        for (uint32_t i = 0; i < PER_THREAD; i++) {
            here[i] = shared.histogram[BINS - 1 - (threadIdx.x * PER_THREAD + i)];
            sum += here[i];
        }
        uint32_t total;
        uint32_t before = block_sum_before(sum, total, shared.of_warp);
        if (total <= room) return {0, count};  // all of them fit; only in the first round
        if (before <= room && room < before + sum) {
            bool passed = false;
#pragma unroll
            for (uint32_t i = 0; i < PER_THREAD; i++) {
                if (!passed && before + here[i] > room) {
                    passed = true;
                    shared.bin = BINS - 1 - (threadIdx.x * PER_THREAD + i);
                    shared.before = before;
                }
                before += here[i];
            }
        }
        __syncthreads();
        room -= shared.before;
        prefix = prefix << (SHIFTS[round] - shift) | shared.bin;
    }
    // Of the candidates with this key, in order, as many as fit.
    const Stretch stretch(count);
    const auto tie = [&](uint32_t number) { return number < stretch.end && key(number) == prefix ? weight(number) : 0u; };
    uint32_t mine = 0;
    for (uint32_t first = stretch.begin; first < stretch.end; first += WARP_SIZE) mine += tie(first + lane_index());
    uint32_t total;
    const uint32_t lanes_before = block_sum_before(mine, total, shared.of_warp);
    uint32_t before = __shfl_sync(FULL_WARP, lanes_before, 0);
    const uint32_t of_warp = warp_sum(mine);
    if (before <= room && room < before + of_warp) {
        // One warp: the stretch in which the room ends.
        for (uint32_t first = stretch.begin; first < stretch.end; first += WARP_SIZE) {
            const uint32_t weight_here = tie(first + lane_index());
            const uint32_t until = before + warp_prefix_sum(weight_here) + weight_here;
            const uint32_t over = __ballot_sync(FULL_WARP, weight_here != 0 && until > room);
            if (over != 0) {
                if (lane_index() == 0) shared.bin = first + static_cast<uint32_t>(__ffs(static_cast<int>(over))) - 1;
                break;
            }
            before = __shfl_sync(FULL_WARP, until, WARP_SIZE - 1);
        }
    }
    __syncthreads();
    return {prefix, shared.bin};
}

// Writes what is taken, in order: `size(j)` values from `first(j)` on for each partition, none for one that is not taken; then
// padding. The whole block calls.
template <class First, class Size>
DEVICE void write_taken(uint32_t count, uint32_t* to, uint32_t room, const First& first_of, const Size& size_of,
                        Shared& shared) {
    const Stretch stretch(count);
    uint32_t mine = 0;
    for (uint32_t first = stretch.begin; first < stretch.end; first += WARP_SIZE) {
        const uint32_t number = first + lane_index();
        mine += number < stretch.end ? size_of(number) : 0;
    }
    uint32_t total;
    uint32_t at = __shfl_sync(FULL_WARP, block_sum_before(mine, total, shared.of_warp), 0);
    for (uint32_t first = stretch.begin; first < stretch.end; first += WARP_SIZE) {
        const uint32_t number = first + lane_index();
        const uint32_t size = number < stretch.end ? size_of(number) : 0;
        const uint32_t begin = at + warp_prefix_sum(size);
        for (uint32_t i = 0; i < size; i++) to[begin + i] = first_of(number) + i;
        at = __shfl_sync(FULL_WARP, begin + size, WARP_SIZE - 1);
    }
    for (uint32_t place = total + threadIdx.x; place < room; place += THREADS) to[place] = NONE;
}

KERNEL(512, 2)
sparse_select(const float* scores, const float* sums, const uint32_t* num_partitions, const uint32_t* budget,
              const uint32_t* first_page, uint32_t* rows, const uint32_t* epoch, float* aggregated, uint32_t* selected, uint32_t* estimated,
              uint32_t* selected_epoch, uint64_t* status, const __grid_constant__ SparseSelectParams params) {
    DYNAMIC_SHARED(shared_bytes);
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    const uint32_t row = blockIdx.x;
    scores += static_cast<uint64_t>(row) * params.columns * params.max_partitions;
    aggregated += static_cast<uint64_t>(row) * params.max_partitions;
    selected += static_cast<uint64_t>(row) * params.max_selected;

    grid_dependency_wait();
    if (threadIdx.x == 0 && epoch != nullptr) selected_epoch[row] = epoch[row];
    const bool selects = rows == nullptr || rows[row] == SPARSE_ROW_SELECTS;
    const uint32_t count = selects ? num_partitions[row] : 0;
    const uint32_t room = selects ? budget[row] : 0;
    Partitions partitions;
    partitions.first_page =
        first_page == nullptr ? nullptr : first_page + static_cast<uint64_t>(row) * (params.max_partitions + 1);
    partitions.count = count;
    partitions.pages_each = params.partition_pages;
    partitions.sinks = min(params.sinks, count);
    partitions.recent_begin = count > params.recent ? count - params.recent : 0;

    // What is wrong with the row, if anything is.
    if (threadIdx.x == 0) shared.bad = count > params.max_partitions || room > params.max_selected ? FAULT_BAD_LENGTH : 0;
    __syncthreads();
    const bool fits = shared.bad == 0;
    __syncthreads();
    if (fits && first_page != nullptr) {
        for (uint32_t number = threadIdx.x; number < count; number += THREADS) {
            if (partitions.begin_of(number) >= partitions.begin_of(number + 1)) atomicMax(&shared.bad, FAULT_BAD_RANGE);
        }
    }
    __syncthreads();
    uint32_t kept_pages = 0;
    if (shared.bad == 0) {
        const uint32_t recent_begin = max(partitions.recent_begin, partitions.sinks);
        kept_pages = partitions.begin_of(partitions.sinks) - partitions.begin_of(0) + partitions.begin_of(count) -
                     partitions.begin_of(recent_begin);
    }
    const uint32_t fault = shared.bad != 0 ? shared.bad : kept_pages > params.max_selected ? FAULT_BAD_LENGTH : FAULT_NONE;
    if (fault != FAULT_NONE) {
        for (uint32_t place = threadIdx.x; place < params.max_selected; place += THREADS) selected[place] = NONE;
        if (params.max_estimated != 0) {
            estimated += static_cast<uint64_t>(row) * params.max_estimated;
            for (uint32_t place = threadIdx.x; place < params.max_estimated; place += THREADS) estimated[place] = NONE;
        }
        if (threadIdx.x == 0) {
            report_fault(status, fault, row);
            if (rows != nullptr) rows[row] = SPARSE_ROW_BAD;
        }
        return;
    }

    // The group's scores.
    if (params.aggregation != SPARSE_RAW && warp_index() < params.columns) {
        const uint32_t column = warp_index();
        GroupSoftmax softmax;
        for (uint32_t block = lane_index(); block < params.blocks; block += WARP_SIZE) {
            const float* const part = sums + ((static_cast<uint64_t>(row) * params.blocks + block) * params.columns + column) * 2;
            GroupSoftmax of_block;
            of_block.m = part[0];
            of_block.l = part[1];
            softmax.merge(of_block);
        }
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) {
            GroupSoftmax other;
            other.m = __shfl_xor_sync(FULL_WARP, softmax.m, distance);
            other.l = __shfl_xor_sync(FULL_WARP, softmax.l, distance);
            softmax.merge(other);
        }
        if (lane_index() == 0) shared.softmax[column] = softmax;
    }
    __syncthreads();
    for (uint32_t number = threadIdx.x; number < count; number += THREADS) {
        const bool sums_up = params.aggregation == SPARSE_AVERAGE || params.aggregation == SPARSE_SUM;
        float total = sums_up ? 0.0f : NEGATIVE_INFINITY;
        for (uint32_t column = 0; column < params.columns; column++) {
            float score = scores[static_cast<uint64_t>(column) * params.max_partitions + number];
            if (params.aggregation != SPARSE_RAW) {
                score = shared.softmax[column].probability(scaled_score(score, params.scale, params.soft_cap));
            }
            if (total != total || score != score) total = QUIET_NAN;
            else total = sums_up ? total + score : fmaxf(total, score);
        }
        if (params.aggregation == SPARSE_AVERAGE) total /= static_cast<float>(params.columns);
        aggregated[number] = total;
    }
    __syncthreads();

    const auto key = [&](uint32_t number) { return key_of(aggregated[number]); };
    const Cut read = find_cut(
        count, room > kept_pages ? room - kept_pages : 0, key,
        [&](uint32_t number) { return partitions.kept(number) ? 0u : partitions.pages_of(number); }, shared);
    const auto is_read = [&](uint32_t number) { return partitions.kept(number) || read.takes(key(number), number); };
    write_taken(
        count, selected, params.max_selected, [&](uint32_t number) { return partitions.begin_of(number); },
        [&](uint32_t number) { return is_read(number) ? partitions.pages_of(number) : 0; }, shared);
    if (params.max_estimated == 0) return;

    estimated += static_cast<uint64_t>(row) * params.max_estimated;
    const uint32_t wanted = static_cast<uint32_t>(ceil(params.estimate * static_cast<double>(count)));
    const Cut next = find_cut(
        count, min(wanted, params.max_estimated), key, [&](uint32_t number) { return is_read(number) ? 0u : 1u; }, shared);
    write_taken(
        count, estimated, params.max_estimated, [](uint32_t number) { return number; },
        [&](uint32_t number) { return !is_read(number) && next.takes(key(number), number) ? 1u : 0u; }, shared);
}
