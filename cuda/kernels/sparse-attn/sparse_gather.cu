// Copies the pages that a step missed from host memory into their slots.
//
// misses      [rows, max_selected] SparseMiss, the first num_misses of a row, as sparse_resolve leaves them
// num_misses  [rows] u32
// host_table  [rows / kv_heads, max_pages] u32, host page of each page of a request
// slot_table  [rows, slots] u32, device run of each slot
// host        [host_pages, kv_heads, run_bytes], 16-byte aligned: mapped host memory, read over the link
// device      [device_pages, run_bytes], 16-byte aligned
// owners      [rows, slots] u32, page of each slot: 0xffffffff, free again, where no page arrived
// status      first fault, with the row: FAULT_BAD_LENGTH for more misses than the list holds (the row is skipped),
//             FAULT_BAD_INDEX for a slot or a device run out of range (skipped), FAULT_BAD_PAGE for a page or host page out of
//             range (the slot's run becomes zeros: nothing stale is ever served, nor taken for the page later)
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
#include "ptx/sync.cuh"
#include "sparse_gather_params.h"
#include "sparse_resolve_params.h"
#include "status_params.h"
#include "tile/run_copy.cuh"
#include "tile/status.cuh"

constexpr uint32_t THREADS = 256;
constexpr uint32_t WARPS = THREADS / WARP_SIZE;

KERNEL(256, 4)
sparse_gather(const SparseMiss* misses, const uint32_t* num_misses, const uint32_t* host_table,
              const uint32_t* slot_table, const uint8_t* host, uint8_t* device, uint32_t* owners, uint64_t* status,
              const __grid_constant__ SparseGatherParams params) {
    grid_dependency_wait();
    for_shared_items<WARPS>(num_misses, params.rows, params.max_selected, status, [&](uint32_t row, uint32_t item) {
        const SparseMiss miss = misses[static_cast<uint64_t>(row) * params.max_selected + item];
        uint32_t to = params.device_pages;
        if (miss.slot < params.slots) to = slot_table[static_cast<uint64_t>(row) * params.slots + miss.slot];
        // A page that does not arrive must not be taken for one that is there.
        const auto forget = [&](uint32_t code) {
            if (lane_index() != 0) return;
            report_fault(status, code, row);
            if (miss.slot < params.slots) owners[static_cast<uint64_t>(row) * params.slots + miss.slot] = 0xffffffffu;
        };
        if (to >= params.device_pages) {
            forget(FAULT_BAD_INDEX);
            return;
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
        } else {
            forget(FAULT_BAD_PAGE);
        }
        copy_run(device + static_cast<uint64_t>(to) * params.run_bytes, from, params.run_bytes);
    });
}
