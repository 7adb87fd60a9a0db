// A ring of slots in shared memory through which tiles stream while earlier ones are being used.
#pragma once

#include "core.cuh"
#include "ptx/cp_async.cuh"

// Place in a ring of `Stages` slots: the slot, and the parity of how often the ring has gone round. A consumer waits on a
// slot's full barrier for `parity`; a producer waits on its empty barrier for `parity ^ 1`, which a fresh barrier passes.
template <int Stages>
struct RingPosition {
    uint32_t slot = 0;
    uint32_t parity = 0;

    DEVICE void advance() {
        slot += 1;
        if (slot == Stages) {
            slot = 0;
            parity ^= 1;
        }
    }
};

// Streams tiles 0 … tiles - 1 through a ring of `Stages` slots with cp.async, up to Stages - 1 tiles ahead.
//
// Every thread of the block calls with the same `tiles`. `load(slot, tile)` issues the calling thread's share of a tile's
// copies; `use(slot, tile)` sees the whole tile, copied by all threads. One __syncthreads per tile serves both purposes: the
// tile has landed for everyone, and everyone has left the slot that the next load refills. A last __syncthreads frees the
// ring for other use.
template <int Stages, class Load, class Use>
DEVICE void stream_tiles(uint32_t tiles, const Load& load, const Use& use) {
    static_assert(Stages >= 2, "one slot in use, at least one on its way");
#pragma unroll
    for (uint32_t ahead = 0; ahead < Stages - 1; ahead++) {
        if (ahead < tiles) load(ahead, ahead);
        cp_async_commit();  // also when empty, so that the wait below always counts Stages - 1 groups
    }
    RingPosition<Stages> filled, free;
    free.slot = Stages - 1;
    for (uint32_t tile = 0; tile < tiles; tile++) {
        cp_async_wait<Stages - 2>();
        __syncthreads();
        const uint32_t next = tile + Stages - 1;
        if (next < tiles) load(free.slot, next);
        cp_async_commit();
        use(filled.slot, tile);
        filled.advance();
        free.advance();
    }
    cp_async_wait<0>();
    __syncthreads();
}

// The same with one copy of `load` in the code instead of one per stage: for loads of many instructions.
template <int Stages, class Load, class Use>
DEVICE void stream_tiles_rolled(uint32_t tiles, const Load& load, const Use& use) {
    static_assert(Stages >= 2, "one slot in use, at least one on its way");
    constexpr uint32_t AHEAD = Stages - 1;
    RingPosition<Stages> filled, free;
#pragma unroll 1
    for (uint32_t next = 0; next < tiles + AHEAD; next++) {
        if (next >= AHEAD) {
            cp_async_wait<Stages - 2>();
            __syncthreads();
        }
        if (next < tiles) load(free.slot, next);
        cp_async_commit();
        free.advance();
        if (next >= AHEAD) {
            use(filled.slot, next - AHEAD);
            filled.advance();
        }
    }
    cp_async_wait<0>();
    __syncthreads();
}
