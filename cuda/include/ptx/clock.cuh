// Time on the device.
#pragma once

#include "core.cuh"

// Nanoseconds of a clock that all SMs share; it moves in steps of up to a microsecond. %globaltimer. No time passes in the emulator.
DEVICE uint64_t global_timer_ns() {
#ifdef __CUDACC__
    uint64_t value;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(value));
    return value;
#else
    return 0;
#endif
}
