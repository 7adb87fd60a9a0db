// One-dimensional bulk copies: global to shared through an mbarrier, plainly and under an L2 policy, and back.
//
// source [pieces, bytes], out [pieces, bytes], both 16-byte aligned; bytes is a multiple of 16, at most 8192
// Out is source with every 32-bit word plus 1. Pieces go through two slots in turn.
//
// Arch:    sm_90a.
// Mapping: one block of 128 threads; thread 0 issues the copies.
// Budget:  32 registers, 2·bytes + 16 bytes of shared memory.
// Limit:   bytes.
#include "core.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/mbarrier.cuh"
#include "tile/copy_ring.cuh"

KERNEL(128, 1) bulk_copies(const unsigned char* source, unsigned char* out, uint32_t pieces, uint32_t bytes) {
    DYNAMIC_SHARED(shared);
    const uint32_t slots = shared_address(shared), full = slots + 2 * bytes;
    auto load = [&](uint32_t slot, uint32_t piece) {
        const unsigned char* from = source + static_cast<uint64_t>(piece) * bytes;
        mbarrier_arrive_expect_bytes(full + 8 * slot, bytes);
        if (piece % 2 == 0) {
            bulk_load(slots + slot * bytes, from, bytes, full + 8 * slot);
        } else {
            bulk_load_policy(slots + slot * bytes, from, bytes, full + 8 * slot, l2_evict_first_policy());
        }
    };
    if (threadIdx.x == 0) {
        mbarrier_init(full, 1);
        mbarrier_init(full + 8, 1);
        mbarrier_init_fence();
        for (uint32_t piece = 0; piece < 2 && piece < pieces; piece++) load(piece, piece);
    }
    __syncthreads();

    RingPosition<2> at;
    for (uint32_t piece = 0; piece < pieces; piece++) {
        mbarrier_wait(full + 8 * at.slot, at.parity);
        uint32_t* words = reinterpret_cast<uint32_t*>(shared + at.slot * bytes);
        for (uint32_t word = threadIdx.x; word < bytes / 4; word += 128) words[word] += 1;
        async_proxy_fence();
        __syncthreads();
        if (threadIdx.x == 0) {
            bulk_store(out + static_cast<uint64_t>(piece) * bytes, slots + at.slot * bytes, bytes);
            bulk_commit();
            bulk_wait_read<0>();  // the slot is free again
            if (piece + 2 < pieces) load(at.slot, piece + 2);
        }
        at.advance();
    }
    if (threadIdx.x == 0) bulk_wait<0>();
}
