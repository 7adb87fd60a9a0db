// One launch: what all blocks share, and the C interface that the Rust side calls.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "block.h"
#include "global_memory.h"

namespace emulator {

struct Launch {
    const Entry* entry;
    const char* kernel;
    dim3 grid, extent;
    uint64_t blocks;
    unsigned threads;
    uint32_t dynamic_shared;
    Order order;
    uint32_t seed;
    unsigned os_threads;
    unsigned known_levels;
    bool programmatic;
    void* const* arguments;
    GlobalMemory memory;

    std::atomic<uint64_t> next{0};
    std::atomic<bool> stop{false};
    std::atomic<int> running{0}, stuck{0};  // blocks that run, and those of them that only poll

    // The block that is dealt in this place.
    uint64_t block_at(uint64_t place) const;
};

}  // namespace emulator

// The C interface. Keep in step with `src/ffi.rs`.
extern "C" {

struct EmulatorBuffer {
    const char* name;
    uint64_t address, bytes;
    uint32_t writable, constant;
    uint64_t read, written;  // out: bytes that the launch read and wrote
};

struct EmulatorLaunch {
    const emulator::Entry* entry;
    const char* kernel;
    uint32_t grid[3], block[3];
    uint32_t dynamic_shared, order, seed, os_threads;
    const void* const* values;  // one per parameter: the address of its bytes
    EmulatorBuffer* buffers;
    uint64_t buffer_count;
    uint32_t programmatic, padding;
    uint64_t switches, barriers, collectives, mma, async_copies, spins;  // out
};

// Runs the launch. 0: all blocks ended well. Otherwise `report(context, text, length)` was called for the first blocks
// at fault.
int emulator_launch(EmulatorLaunch* launch, void (*report)(void* context, const char* text, size_t length),
                    void* context);
}
