// Warp operations: lanes meet, and the last to arrive does the work for all.
#pragma once

#include "block.h"

namespace emulator {

// One kind of warp operation.
struct Meeting {
    const char* name;
    // Runs the operation for `lanes`; operands are in warp.arrivals[lane].operand.
    void (*run)(Warp& warp, uint32_t lanes);
    // Whether memory accesses of the lanes are ordered by it. By the memory model only __syncwarp does that.
    bool orders_memory;
    // Whether all 32 lanes must take part (.sync.aligned).
    bool whole_warp;
};

void meet(const Meeting& meeting, uint32_t mask, void* operand, const void* pc);

// A thread has ended: those who only waited for it can go on.
void warp_thread_ended(Warp& warp);

template <class T>
T& operand(Warp& warp, unsigned lane) {
    return *static_cast<T*>(warp.arrivals[lane].operand);
}

// Calls f(lane) for each bit of `lanes`.
template <class F>
void for_lanes(uint32_t lanes, const F& f) {
    for (; lanes; lanes &= lanes - 1) f((unsigned)__builtin_ctz(lanes));
}

}  // namespace emulator
