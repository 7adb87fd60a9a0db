// The block that arrives last at a counter, which may then read what all the others wrote.
#pragma once
#include "ptx/sync.cuh"
#include "types.cuh"

// True, in every thread of the block, for the last of `expected` blocks that arrive at `counter`; all that those blocks
// wrote before arriving is then visible to every thread of this one. The counter is zero again afterwards, as every launch
// must leave it. `flag` is one word of shared memory.
//
// All threads of the block call it. The first barrier puts the block's writes before thread 0's release; the second puts
// thread 0's acquire before the other threads' reads.
DEVICE bool arrive_last(uint32_t* counter, uint32_t expected, uint32_t* flag) {
    __syncthreads();
    if (threadIdx.x == 0) {
        const uint32_t arrived_before = atomic_add_acq_rel_u32(counter, 1);
        *flag = arrived_before + 1 == expected;
        if (*flag) *counter = 0;  // plain: nobody looks at it before the next launch
    }
    __syncthreads();
    return *flag != 0;
}
