// Many threads report to one status word at once.
//
// status [1] u64 or null   Thread i of the grid with i % stride == 0 reports code i % 7 + 1, index i.
//
// Arch:    sm_80 and later.
// Mapping: one thread per report.
// Budget:  16 registers, no shared memory.
// Limit:   none that matters: it exists to be run in many orders.
#include "core.cuh"
#include "tile/status.cuh"

KERNEL(64, 1) status_contention(uint64_t* status, uint32_t stride) {
    const uint32_t i = blockIdx.x * 64 + threadIdx.x;
    if (i % stride == 0) report_fault(status, i % 7 + 1, i);
}
