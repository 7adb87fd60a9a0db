// Writes closed pages back to host memory; a page that had to keep its slot until then may lose it afterwards.
//
// closing     [rows, max_closing] SparseClosing, num_closing [rows] u32: as sparse_close leaves them
// host_table  [rows / kv_heads, max_pages] u32, host page of each page of a request
// device      [num_runs, run_bytes], 16-byte aligned
// host        [host_pages, kv_heads, run_bytes], 16-byte aligned: mapped host memory, written over the link
// dirty       [rows, slots] u8, set to 0 for the slots of the pages
// counts      [rows] SparseCounts, `written` added to
// status      first fault, with the row: FAULT_BAD_LENGTH for more pages than the list holds (the row is skipped),
//             FAULT_BAD_PAGE for a page, host page or run out of range: not written, and it keeps its slot
//
// Arch:    sm_80 and later.
// Mapping: a fixed grid; pages of all rows make one list, of which every warp takes each W-th (tile/run_copy.cuh).
// Budget:  64 registers, no shared memory.
// Limit:   bytes of the pages over the host link.
#include "core.cuh"
#include "ptx/sync.cuh"
#include "sparse_pages_params.h"
#include "sparse_resolve_params.h"
#include "status_params.h"
#include "tile/run_copy.cuh"
#include "tile/status.cuh"

constexpr uint32_t THREADS = 256;
constexpr uint32_t WARPS = THREADS / WARP_SIZE;

KERNEL(256, 4)
sparse_flush(const SparseClosing* closing, const uint32_t* num_closing, const uint32_t* host_table, const uint8_t* device,
             uint8_t* host, uint8_t* dirty, SparseCounts* counts, uint64_t* status,
             const __grid_constant__ SparseFlushParams params) {
    grid_dependency_wait();
    for_shared_items<WARPS>(num_closing, params.rows, params.max_closing, status, [&](uint32_t row, uint32_t item) {
        const SparseClosing page = closing[static_cast<uint64_t>(row) * params.max_closing + item];
        uint32_t to = params.host_pages;
        if (page.page < params.max_pages) {
            to = host_table[static_cast<uint64_t>(row / params.kv_heads) * params.max_pages + page.page];
        }
        if (to >= params.host_pages || page.run >= params.num_runs) {
            if (lane_index() == 0) report_fault(status, FAULT_BAD_PAGE, row);
            return;
        }
        const uint64_t run = static_cast<uint64_t>(to) * params.kv_heads + row % params.kv_heads;
        copy_run(host + run * params.run_bytes, device + static_cast<uint64_t>(page.run) * params.run_bytes, params.run_bytes);
        __syncwarp();
        if (lane_index() == 0) {
            if (page.slot < params.slots) dirty[static_cast<uint64_t>(row) * params.slots + page.slot] = 0;
            atomicAdd(reinterpret_cast<unsigned long long*>(&counts[row].written), 1ull);
        }
    });
}
