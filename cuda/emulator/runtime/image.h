// The executable (or library) that the kernels are part of.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace emulator {

struct Image {
    uintptr_t base = 0;
    std::vector<std::pair<uintptr_t, uintptr_t>> read_only;  // begin, end

    static const Image& get();
};

}  // namespace emulator
