// Copies the pages that a step missed from host memory into their slots.
//
// misses      [rows, max_selected] SparseMiss, the first num_misses of a row, as sparse_resolve leaves them
// num_misses  [rows] u32
// host_table  [rows / kv_heads, max_pages] u32, host page of each page of a request
// slot_table  [rows, slots] u32, device run of each slot
// host        [host_pages, kv_heads, run_bytes], 16-byte aligned: mapped host memory, read over the link
// device      [device_pages, run_bytes], 16-byte aligned
// status      first fault, with the row: FAULT_BAD_LENGTH for more misses than the list holds (the row is skipped),
//             FAULT_BAD_INDEX for a slot or a device run out of range (skipped), FAULT_BAD_PAGE for a page or host page out of
//             range (the slot's run becomes zeros: nothing stale is ever served)
//
// Host memory may be written by the CPU during the launch, elsewhere: it is read by coherent loads, never through the
// read-only path.
//
// Arch:    sm_80 and later.
// Mapping: a fixed grid; misses of all rows make one list, of which every warp takes each W-th. One warp copies one run,
//          four 16-byte loads in flight per lane: 2 KiB a warp, so that a few blocks cover the latency of the link and the
//          grid caps the bytes in flight.
// Budget:  64 registers, no shared memory.
// Limit:   bytes of the misses over the host link.
#include "core.cuh"
#include "ptx/memory.cuh"
#include "ptx/shuffle.cuh"
#include "ptx/sync.cuh"
#include "sparse_gather_params.h"
#include "sparse_resolve_params.h"
#include "status_params.h"
#include "tile/status.cuh"

constexpr uint32_t THREADS = 256;
constexpr uint32_t WARPS = THREADS / WARP_SIZE;
constexpr uint32_t IN_FLIGHT = 4;

// Copies a run with the whole warp; zeros where there is no source.
DEVICE void copy_run(uint8_t* to, const uint8_t* from, uint32_t bytes) {
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

KERNEL(256, 4)
sparse_gather(const SparseMiss* misses, const uint32_t* num_misses, const uint32_t* host_table,
              const uint32_t* slot_table, const uint8_t* host, uint8_t* device, uint64_t* status,
              const __grid_constant__ SparseGatherParams params) {
    const uint32_t step = gridDim.x * WARPS;
    uint32_t next = blockIdx.x * WARPS + warp_index();  // this warp's next item of the list

    grid_dependency_wait();
    uint32_t listed = 0;
    for (uint32_t first = 0; first < params.rows; first += WARP_SIZE) {
        // 32 rows of the list at a time: lane i knows where row first + i begins.
        const uint32_t own = first + lane_index();
        uint32_t count = own < params.rows ? num_misses[own] : 0;
        if (count > params.max_selected) {
            if (blockIdx.x == 0 && warp_index() == 0) report_fault(status, FAULT_BAD_LENGTH, own);
            count = 0;
        }
        const uint32_t begin = listed + warp_prefix_sum(count);
        listed = __shfl_sync(FULL_WARP, begin + count, WARP_SIZE - 1);
        for (; next < listed; next += step) {
            const uint32_t holder = __ballot_sync(FULL_WARP, begin <= next && next < begin + count);
            const uint32_t lane = static_cast<uint32_t>(__ffs(static_cast<int>(holder))) - 1;
            const uint32_t row = first + lane;
            const uint32_t item = next - __shfl_sync(FULL_WARP, begin, lane);

            const SparseMiss miss = misses[static_cast<uint64_t>(row) * params.max_selected + item];
            uint32_t to = params.device_pages;
            if (miss.slot < params.slots) to = slot_table[static_cast<uint64_t>(row) * params.slots + miss.slot];
            if (to >= params.device_pages) {
                if (lane_index() == 0) report_fault(status, FAULT_BAD_INDEX, row);
                continue;
            }
            const uint32_t request = row / params.kv_heads;
            const uint32_t kv_head = row % params.kv_heads;
            uint32_t page = params.host_pages;
            if (miss.page < params.max_pages) {
                page = host_table[static_cast<uint64_t>(request) * params.max_pages + miss.page];
            }
            const uint8_t* from = nullptr;
            if (page < params.host_pages) {
                from = host + (static_cast<uint64_t>(page) * params.kv_heads + kv_head) * params.run_bytes;
            } else if (lane_index() == 0) {
                report_fault(status, FAULT_BAD_PAGE, row);
            }
            copy_run(device + static_cast<uint64_t>(to) * params.run_bytes, from, params.run_bytes);
        }
    }
}
