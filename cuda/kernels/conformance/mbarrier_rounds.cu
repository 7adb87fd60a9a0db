// A producer warp and three consumer warps share a ring of two slots through mbarriers, for more rounds than the ring is long.
//
// in [rounds, 32] u32   out [rounds, 3, 32] u32: consumer c of a round gets in[round][31 - lane] + c
//
// Arch:    sm_90a.
// Mapping: one block of four warps; warp 3 produces with ordinary stores.
// Budget:  32 registers, 288 bytes of shared memory.
// Limit:   none that matters: it exists to be run in many orders.
#include "core.cuh"
#include "ptx/mbarrier.cuh"
#include "tile/copy_ring.cuh"

constexpr int SLOTS = 2;
constexpr uint32_t CONSUMERS = 3;

KERNEL(128, 1) mbarrier_rounds(const uint32_t* in, uint32_t* out, uint32_t rounds) {
    DYNAMIC_SHARED(shared);
    const uint32_t full = shared_address(shared), empty = full + 8 * SLOTS;
    uint32_t* slots = reinterpret_cast<uint32_t*>(shared + 16 * SLOTS);
    const uint32_t lane = lane_index(), warp = warp_index();
    if (threadIdx.x == 0) {
        for (uint32_t slot = 0; slot < SLOTS; slot++) {
            mbarrier_init(full + 8 * slot, WARP_SIZE);
            mbarrier_init(empty + 8 * slot, CONSUMERS * WARP_SIZE);
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    RingPosition<SLOTS> at;
    for (uint32_t round = 0; round < rounds; round++) {
        if (warp == CONSUMERS) {
            mbarrier_wait(empty + 8 * at.slot, at.parity ^ 1);
            slots[at.slot * WARP_SIZE + lane] = in[round * WARP_SIZE + lane];
            mbarrier_arrive(full + 8 * at.slot);
        } else {
            mbarrier_wait(full + 8 * at.slot, at.parity);
            out[(round * CONSUMERS + warp) * WARP_SIZE + lane] = slots[at.slot * WARP_SIZE + 31 - lane] + warp;
            mbarrier_arrive(empty + 8 * at.slot);
        }
        at.advance();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (uint32_t slot = 0; slot < SLOTS; slot++) {
            mbarrier_invalidate(full + 8 * slot);
            mbarrier_invalidate(empty + 8 * slot);
        }
    }
}
