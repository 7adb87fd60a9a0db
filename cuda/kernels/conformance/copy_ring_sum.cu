// Streams tiles through a ring of STAGES slots and adds them up, each thread reading what another one copied.
//
// source [blocks, tiles, 128 threads] uint4, 16-byte aligned   out [blocks, 128 threads] u32: the sum over a block's tiles of
// (tile + 1) · (the four words of thread (t + 37) % 128)
//
// Arch:    sm_80 and later.
// Mapping: one block per sequence of tiles, one 16-byte piece per thread and tile.
// Budget:  48 registers, STAGES · 2 KB of shared memory.
// Limit:   bytes of source, read once.
#include "core.cuh"
#include "ptx/cp_async.cuh"
#include "tile/copy_ring.cuh"

constexpr uint32_t THREADS = 128;

KERNEL(128, 1) copy_ring_sum(const uint4* source, uint32_t* out, uint32_t tiles) {
    DYNAMIC_SHARED(shared);
    const uint4* slots = reinterpret_cast<const uint4*>(shared);
    const uint4* from = source + static_cast<uint64_t>(blockIdx.x) * tiles * THREADS + threadIdx.x;
    const uint32_t to = shared_address(shared) + threadIdx.x * 16;
    const uint32_t neighbour = (threadIdx.x + 37) % THREADS;
    uint32_t sum = 0;
    stream_tiles<STAGES>(
        tiles,
        [&](uint32_t slot, uint32_t tile) { cp_async_16(to + slot * THREADS * 16, from + tile * THREADS); },
        [&](uint32_t slot, uint32_t tile) {
            const uint4 v = slots[slot * THREADS + neighbour];
            sum += (tile + 1) * (v.x + v.y + v.z + v.w);
        });
    out[blockIdx.x * THREADS + threadIdx.x] = sum;
}
