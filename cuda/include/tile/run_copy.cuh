// Copies of whole runs between memories by warps, and the list of items that all warps of a grid share.
#pragma once

#include "core.cuh"
#include "ptx/memory.cuh"
#include "ptx/shuffle.cuh"
#include "ptx/sync.cuh"
#include "status_params.h"
#include "tile/status.cuh"

// Copies `bytes` (a multiple of 16) with the whole warp, four 16-byte loads in flight per lane; zeros where there is no source.
// Coherent loads: host memory may be written by the CPU during the launch, elsewhere.
DEVICE void copy_run(uint8_t* to, const uint8_t* from, uint32_t bytes) {
    constexpr uint32_t IN_FLIGHT = 4;
    for (uint32_t start = lane_index() * 16; start < bytes; start += IN_FLIGHT * WARP_SIZE * 16) {
        uint4 part[IN_FLIGHT];
#pragma unroll
        for (uint32_t i = 0; i < IN_FLIGHT; i++) {
            const uint32_t at = start + i * WARP_SIZE * 16;
            part[i] = from != nullptr && at < bytes ? load_global_16(from + at) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (uint32_t i = 0; i < IN_FLIGHT; i++) {
            const uint32_t at = start + i * WARP_SIZE * 16;
            if (at < bytes) store_global_16(to + at, part[i]);
        }
    }
}

// Shares the items of all rows among the warps of the grid: item (row, index) for index below counts[row], every warp taking
// each W-th. A row with more than `most` items is reported and skipped. Whole warps call `use`.
template <uint32_t Warps, class Use>
DEVICE void for_shared_items(const uint32_t* counts, uint32_t rows, uint32_t most, uint64_t* status, const Use& use) {
    const uint32_t step = gridDim.x * Warps;
    uint32_t next = blockIdx.x * Warps + warp_index();  // this warp's next item of the list
    uint32_t listed = 0;
    for (uint32_t first = 0; first < rows; first += WARP_SIZE) {
        // 32 rows of the list at a time: lane i knows where row first + i begins.
        const uint32_t own = first + lane_index();
        uint32_t count = own < rows ? counts[own] : 0;
        if (count > most) {
            if (blockIdx.x == 0 && warp_index() == 0) report_fault(status, FAULT_BAD_LENGTH, own);
            count = 0;
        }
        const uint32_t begin = listed + warp_prefix_sum(count);
        listed = __shfl_sync(FULL_WARP, begin + count, WARP_SIZE - 1);
        for (; next < listed; next += step) {
            const uint32_t holder = __ballot_sync(FULL_WARP, begin <= next && next < begin + count);
            const uint32_t lane = static_cast<uint32_t>(__ffs(static_cast<int>(holder))) - 1;
            use(first + lane, next - __shfl_sync(FULL_WARP, begin, lane));
        }
    }
}
