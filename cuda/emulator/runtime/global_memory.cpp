#include "global_memory.h"

#include <algorithm>
#include <cstdio>

#include "image.h"

namespace emulator {

void GlobalMemory::set_up(std::vector<Buffer> all, uintptr_t parameters, size_t parameter_bytes) {
    parameters_begin = parameters;
    parameters_end = parameters + parameter_bytes;
    buffers = std::move(all);
    std::sort(buffers.begin(), buffers.end(), [](const Buffer& a, const Buffer& b) {
        return a.writable != b.writable ? a.writable : a.begin < b.begin;
    });
    for (Buffer& b : buffers) {
        unsigned overlaps = 0;
        for (const Buffer& other : buffers) overlaps += b.begin < other.end && other.begin < b.end;
        b.alone = overlaps == 1;  // itself
    }
    // Writable buffers that overlap share one shadow.
    for (size_t i = 0; i < buffers.size() && buffers[i].writable;) {
        size_t next = i + 1;
        uintptr_t end = buffers[i].end;
        for (; next < buffers.size() && buffers[next].writable && buffers[next].begin < end; next++)
            end = std::max(end, buffers[next].end);
        shadows.push_back(std::make_unique<Shadow>());
        shadows.back()->map(buffers[i].begin, end - buffers[i].begin);
        for (; i < next; i++) buffers[i].shadow = shadows.back().get();
    }
}

const Buffer* GlobalMemory::find(uintptr_t address, size_t bytes, bool write, unsigned& last) const {
    const auto holds = [&](const Buffer& b) {
        return address >= b.begin && address < b.end && bytes <= b.end - address && (b.writable || !write);
    };
    // Where buffers overlap the writable one counts, and comes first.
    if (last < buffers.size() && buffers[last].alone && holds(buffers[last])) return &buffers[last];
    for (unsigned i = 0; i < buffers.size(); i++) {
        if (holds(buffers[i])) {
            last = i;
            return &buffers[i];
        }
    }
    return nullptr;
}

bool GlobalMemory::constant(uintptr_t address, size_t bytes) const {
    if (address >= parameters_begin && address + bytes <= parameters_end) return true;
    for (const auto& [begin, end] : Image::get().read_only)
        if (address >= begin && address + bytes <= end) return true;
    return false;
}

std::string GlobalMemory::describe(uintptr_t address, size_t bytes) const {
    const Buffer* nearest = nullptr;
    uintptr_t distance = 0;
    for (const Buffer& b : buffers) {
        const uintptr_t d = address + bytes > b.end && address >= b.begin ? address + bytes - b.end
                            : address < b.begin                           ? b.begin - address
                                                                          : 0;
        if (!nearest || d < distance) {
            nearest = &b;
            distance = d;
        }
    }
    if (!nearest) return "; the launch has no buffers";
    char text[256];
    if (address < nearest->begin) {
        snprintf(text, sizeof text, "; it begins %zu bytes before `%s` (%zu bytes)", (size_t)distance, nearest->name,
                 (size_t)(nearest->end - nearest->begin));
    } else {
        snprintf(text, sizeof text, "; it ends %zu bytes past the end of `%s` (%zu bytes)", (size_t)distance,
                 nearest->name, (size_t)(nearest->end - nearest->begin));
    }
    return text;
}

}  // namespace emulator
