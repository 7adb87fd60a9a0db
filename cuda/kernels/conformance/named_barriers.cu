// Two pairs of warps meet at named barriers, one pair symmetric, one as producer and consumer.
//
// in [128] u32   out [128] u32: warps 0 and 1 swap their values (barrier 1); warps 2 and 3: the producer warp 2 arrives at
// barrier 2 without waiting and stores 2·in, the consumer warp 3 waits and stores its own value plus the producer's.
//
// Arch:    sm_80 and later.
// Mapping: one block of four warps.
// Budget:  16 registers, 512 bytes of shared memory.
// Limit:   none that matters: it exists to be run in many orders.
#include "core.cuh"
#include "ptx/sync.cuh"

KERNEL(128, 1) named_barriers(const uint32_t* in, uint32_t* out) {
    DYNAMIC_SHARED(shared);
    uint32_t* words = reinterpret_cast<uint32_t*>(shared);
    const uint32_t thread = threadIdx.x;
    const uint32_t value = in[thread];
    words[thread] = value;
    switch (warp_index()) {
        case 0:
        case 1:
            named_barrier_sync(1, 64);
            out[thread] = words[thread ^ 32];
            break;
        case 2:
            named_barrier_arrive(2, 64);
            out[thread] = 2 * value;
            break;
        case 3:
            named_barrier_sync(2, 64);
            out[thread] = value + words[thread - 32];
            break;
    }
}
