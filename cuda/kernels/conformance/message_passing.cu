// Blocks hand data to each other through each of the acquire/release wrappers.
//
// payload [blocks, 64] u32, scratch   words32 [blocks + 1] u32, words64 [blocks + 1] u64: flags and counters, zero at first use
// seen [blocks] u32: what a block made of the others' payloads, MISSED where it found none
//
// Block b writes payload[b][t] = seed + 64·b + t. Then, by mode:
//   0, 1  flag by store_release (u32, u64); block b > 0 looks once at the flag of block b - 1 by load_acquire
//   2, 3  arrives by atomic_add_acq_rel (u32, u64); the last block sums all payloads
//   4     arrives by atomic_add_release; the last block acquires by load_acquire and sums all payloads
//   5, 6  takes a ticket by atomic_cas_acq_rel (u32, u64), retrying; the last block sums all payloads
//
// Arch:    sm_80 and later.
// Mapping: one block of 64 threads per payload.
// Budget:  48 registers, 8 bytes of shared memory.
// Limit:   none that matters: it exists to be run in many orders.
#include "core.cuh"
#include "ptx/sync.cuh"

constexpr uint32_t WORDS = 64;
constexpr uint32_t MISSED = 0xffffffffu;

// The calling thread's place among the blocks, 0 first, by one of the counting wrappers.
DEVICE uint32_t arrive(uint32_t* counter32, uint64_t* counter64, uint32_t mode) {
    switch (mode) {
        case 2: return atomic_add_acq_rel_u32(counter32, 1);
        case 3: return static_cast<uint32_t>(atomic_add_acq_rel_u64(counter64, 1));
        case 4: {
            const uint32_t place = atomic_add_release_u32(counter32, 1);
            load_acquire_u32(counter32);
            return place;
        }
        case 5: {
            uint32_t expected = 0;
            for (;;) {
                const uint32_t found = atomic_cas_acq_rel_u32(counter32, expected, expected + 1);
                if (found == expected) return expected;
                expected = found;
            }
        }
        default: {
            uint64_t expected = 0;
            for (;;) {
                const uint64_t found = atomic_cas_acq_rel_u64(counter64, expected, expected + 1);
                if (found == expected) return static_cast<uint32_t>(expected);
                expected = found;
            }
        }
    }
}

KERNEL(64, 1)
message_passing(uint32_t* payload, uint32_t* words32, uint64_t* words64, uint32_t* seen, uint32_t seed, uint32_t mode) {
    DYNAMIC_SHARED(shared);
    uint32_t* go = reinterpret_cast<uint32_t*>(shared);
    uint32_t* sum = go + 1;
    const uint32_t block = blockIdx.x;

    payload[block * WORDS + threadIdx.x] = seed + block * WORDS + threadIdx.x;
    __syncthreads();  // the block's payload before thread 0's release

    uint32_t first = 0, end = 0;
    if (mode < 2) {
        if (threadIdx.x == 0) {
            if (mode == 0) {
                store_release_u32(words32 + block, 1);
                *go = block > 0 && load_acquire_u32(words32 + block - 1) == 1;
            } else {
                store_release_u64(words64 + block, 1);
                *go = block > 0 && load_acquire_u64(words64 + block - 1) == 1;
            }
            *sum = 0;
        }
        first = block - 1, end = block;
    } else {
        if (threadIdx.x == 0) {
            *go = arrive(words32 + gridDim.x, words64 + gridDim.x, mode) == gridDim.x - 1;
            *sum = 0;
        }
        first = 0, end = gridDim.x;
    }
    __syncthreads();  // thread 0's acquire before the block's reads
    if (*go) {
        for (uint32_t other = first; other < end; other++) atomicAdd(sum, payload[other * WORDS + threadIdx.x]);
    }
    __syncthreads();
    if (threadIdx.x == 0) seen[block] = *go ? *sum : MISSED;
}
