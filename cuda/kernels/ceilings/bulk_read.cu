// Reads memory as fast as bulk copies into shared memory go, with a chosen number of bytes in flight.
//
// source [pieces, bytes], 16-byte aligned, in device memory or in host memory that the device sees; bytes is a multiple of 16
// out    [blocks, 4] u32: for each warp the exclusive-or of all words that it took from shared memory
//
// Blocks take pieces in turn; `stages` pieces of a block are in flight.
//
// Arch:    sm_90a.
// Mapping: 128 threads; thread 0 issues the copies, all threads read what has landed.
// Budget:  40 registers, stages · (bytes + 8) bytes of shared memory.
// Limit:   bytes.
#include "core.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/mbarrier.cuh"

constexpr uint32_t THREADS = 128;

KERNEL(THREADS, 1) bulk_read(const unsigned char* source, uint32_t* out, uint32_t pieces, uint32_t bytes, uint32_t stages) {
    DYNAMIC_SHARED(shared);
    const uint32_t slots = shared_address(shared), full = slots + stages * bytes;
    // The block's pieces are blockIdx.x, blockIdx.x + gridDim.x, …
    const uint32_t mine = blockIdx.x < pieces ? (pieces - blockIdx.x - 1) / gridDim.x + 1 : 0;
    auto load = [&](uint32_t slot, uint32_t index) {
        const uint64_t piece = blockIdx.x + static_cast<uint64_t>(index) * gridDim.x;
        mbarrier_arrive_expect_bytes(full + 8 * slot, bytes);
        bulk_load(slots + slot * bytes, source + piece * bytes, bytes, full + 8 * slot);
    };
    if (threadIdx.x == 0) {
        for (uint32_t slot = 0; slot < stages; slot++) mbarrier_init(full + 8 * slot, 1);
        mbarrier_init_fence();
        for (uint32_t slot = 0; slot < stages && slot < mine; slot++) load(slot, slot);
    }
    __syncthreads();

    uint32_t sum = 0, slot = 0, parity = 0;
    for (uint32_t index = 0; index < mine; index++) {
        mbarrier_wait(full + 8 * slot, parity);
        const uint4* landed = reinterpret_cast<const uint4*>(shared + slot * bytes);
        for (uint32_t i = threadIdx.x; i < bytes / 16; i += THREADS) {
            const uint4 words = landed[i];
            sum ^= words.x ^ words.y ^ words.z ^ words.w;
        }
        __syncthreads();  // everyone has left the slot
        if (threadIdx.x == 0 && index + stages < mine) load(slot, index + stages);
        slot += 1;
        if (slot == stages) {
            slot = 0;
            parity ^= 1;
        }
    }
#pragma unroll
    for (uint32_t distance = 16; distance > 0; distance /= 2) sum ^= __shfl_xor_sync(FULL_WARP, sum, distance);
    if (lane_index() == 0) out[blockIdx.x * (THREADS / WARP_SIZE) + warp_index()] = sum;
}
