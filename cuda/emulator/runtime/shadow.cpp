#include "shadow.h"

#include <sys/mman.h>

#include <cstring>
#include <new>

namespace emulator {

namespace {

Cell* map_cells(size_t count) {
    void* memory =
        mmap(nullptr, count * sizeof(Cell), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return static_cast<Cell*>(memory);
}

}  // namespace

void Shadow::map(uintptr_t first, size_t size) {
    base = first & ~uintptr_t(3);
    word_count = (first + size - base + 3) / 4;
    words = map_cells(word_count);
    bytes = map_cells(word_count * 4);
}

void Shadow::clear(size_t size) {
    const size_t count = (size + 3) / 4;
    memset(static_cast<void*>(words), 0, (count < word_count ? count : word_count) * sizeof(Cell));
}

Shadow::~Shadow() {
    if (!words) return;
    munmap(words, word_count * sizeof(Cell));
    munmap(bytes, word_count * 4 * sizeof(Cell));
}

}  // namespace emulator
