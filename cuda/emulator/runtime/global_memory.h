// The global memory of a launch: its buffers, their shadow, and the words that carry order between blocks.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "block.h"

namespace emulator {

struct Buffer {
    uintptr_t begin, end;
    const char* name;
    bool writable;
    bool constant;    // no earlier kernel of the stream writes it
    bool alone;       // overlaps no other buffer
    unsigned number;  // among the launch's buffers
    Shadow* shadow;   // of writable buffers; overlapping ones share it
};

// A lock for the cells and words of every 64th 64-byte line, used where blocks run in parallel.
struct alignas(64) Stripe {
    std::atomic_flag held = ATOMIC_FLAG_INIT;
    // What was released to a word: whoever acquires it learns this.
    std::unordered_map<uintptr_t, Known> released;

    void lock() {
        while (held.test_and_set(std::memory_order_acquire)) __builtin_ia32_pause();
    }
    void unlock() { held.clear(std::memory_order_release); }
};

class GlobalMemory {
public:
    static constexpr unsigned STRIPES = 256;

    // `parameters` is read-only memory that kernels may read too.
    void set_up(std::vector<Buffer> all, uintptr_t parameters, size_t parameter_bytes);

    // The buffer that holds [address, address + bytes) and may be used so, or null. `last` caches its place.
    const Buffer* find(uintptr_t address, size_t bytes, bool write, unsigned& last) const;
    // Whether this is constant memory outside of every buffer: the executable's read-only data or the kernel's
    // parameters.
    bool constant(uintptr_t address, size_t bytes) const;
    // What lies near a wild address, for reports.
    std::string describe(uintptr_t address, size_t bytes) const;
    Stripe& stripe(uintptr_t address) { return stripes[address / 64 % STRIPES]; }

private:
    std::vector<Buffer> buffers;  // writable ones first
    std::vector<std::unique_ptr<Shadow>> shadows;
    uintptr_t parameters_begin = 0, parameters_end = 0;
    std::unique_ptr<Stripe[]> stripes{new Stripe[STRIPES]};
};

}  // namespace emulator
