// Shadow memory: for every byte, who wrote it last and who has read it since.
//
// An access is recorded as a Stamp: block, thread and the thread's time. The checkers compare it with the stamps that
// a byte holds; "did that happen before this?" is answered by the accessing thread's clock, so that a verdict never
// depends on which of two unordered accesses really ran first.
//
// Cells stand for aligned 4-byte words as long as all four bytes are alike; an access to a part of a word splits its
// cell into four byte cells, and the next write of the whole word joins them again.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

// The block's asynchronous copies run beside its threads and end in the name of one of these.
constexpr unsigned AGENTS = 32;

// 25 bits of block (from 1), 11 bits of who, an "under way" bit, 27 bits of time. Zero: nobody.
// Who: agents of asynchronous copies from 0, then the threads of the block; the same places as in clocks.
struct Stamp {
    uint64_t bits = 0;

    static constexpr uint64_t MAX_BLOCKS = (1ull << 25) - 2;
    static constexpr unsigned TIME_SHIFT = 37;
    static constexpr uint32_t MAX_TIME = (1u << 27) - 1;

    static Stamp make(uint64_t block_tag, unsigned who, uint32_t time, bool under_way) {
        return {(uint64_t)time << TIME_SHIFT | (uint64_t)under_way << 36 | (uint64_t)who << 25 | block_tag};
    }
    uint64_t block_tag() const { return bits & ((1ull << 25) - 1); }
    unsigned who() const { return bits >> 25 & 2047; }
    bool by_agent() const { return who() < AGENTS; }
    unsigned thread() const { return who() - AGENTS; }
    // The access belongs to an asynchronous operation that has been issued and not waited for: nothing is ordered
    // after it.
    bool under_way() const { return bits >> 36 & 1; }
    uint32_t time() const { return (uint32_t)(bits >> TIME_SHIFT); }
    bool same_warp(Stamp other) const { return ((bits ^ other.bits) & (((1ull << 36) - 1) & ~(31ull << 25))) == 0; }
};

// Where the code of an access lies: its offset in the executable.
using Place = uint32_t;

struct Cell {
    Stamp write, atomic, read[2];
    Place write_place, atomic_place, read_place[2];
};

enum class Kind : uint8_t { Read, Write, AtomicUpdate, AtomicRead };

// Two accesses without order between them.
struct Conflict {
    const char* what = nullptr;
    Stamp other;
    Place place = 0;

    // Notes the earlier access; true, so that it can end a search.
    bool with(const char* how, Stamp stamp, Place where) {
        what = how;
        other = stamp;
        place = where;
        return true;
    }
};

// Checks one access against a cell and records it; true if there is a conflict. `past(stamp)` tells whether an earlier
// access happened before this one.
template <class Past>
inline bool touch(Cell& cell, Kind kind, Stamp now, Place place, const Past& past, Conflict& conflict) {
    const bool writes = kind == Kind::Write;
    if (kind == Kind::Read) {
        if (!past(cell.write)) return conflict.with("read after an unordered write", cell.write, cell.write_place);
        if (!past(cell.atomic))
            return conflict.with("plain read beside an unordered atomic", cell.atomic, cell.atomic_place);
        // Replace a reader that happened before this one. Of unordered readers keep two of different warps.
        unsigned slot = 0;
        const auto replaceable = [&](Stamp s) {
            return s.bits == 0 || s.bits == now.bits || (!s.under_way() && past(s));
        };
        if (!replaceable(cell.read[0])) {
            if (replaceable(cell.read[1]) || cell.read[0].same_warp(cell.read[1]) || cell.read[1].same_warp(now)) {
                slot = 1;
            } else if (!cell.read[0].same_warp(now)) {
                slot = now.time() & 1;
            }
        }
        cell.read[slot] = now;
        cell.read_place[slot] = place;
        return false;
    }
    if (!past(cell.write))
        return conflict.with(writes ? "write after an unordered write" : "atomic beside an unordered plain write",
                             cell.write, cell.write_place);
    if (kind == Kind::AtomicRead) return false;
    if (writes && !past(cell.atomic))
        return conflict.with("plain write beside an unordered atomic", cell.atomic, cell.atomic_place);
    for (int i = 0; i < 2; i++) {
        if (!past(cell.read[i]))
            return conflict.with(writes ? "write after an unordered read" : "atomic beside an unordered plain read",
                                 cell.read[i], cell.read_place[i]);
    }
    if (writes) {
        cell = Cell{};  // whoever is ordered after this write is ordered after all before it
        cell.write = now;
        cell.write_place = place;
    } else {
        cell.atomic = now;
        cell.atomic_place = place;
    }
    return false;
}

// The cells of one range of addresses. Memory comes from the kernel page by page, when first touched.
class Shadow {
public:
    Shadow() = default;
    Shadow(const Shadow&) = delete;
    Shadow& operator=(const Shadow&) = delete;
    ~Shadow();
    // Cells for [base, base + bytes); all empty.
    void map(uintptr_t base, size_t bytes);
    bool mapped() const { return words != nullptr; }
    // Empties the cells of the first `bytes` bytes.
    void clear(size_t bytes);

    // Calls `visit_cell(cell)` for every cell of [address, address + bytes) until one returns true, and returns that.
    // `whole`: the visit leaves equal cells behind, so that the bytes of a whole word can share one cell again.
    template <class Visit>
    bool visit(uintptr_t address, size_t bytes, bool whole, const Visit& visit_cell) {
        uintptr_t offset = address - base;
        const uintptr_t end = offset + bytes;
        while (offset < end) {
            const uintptr_t word = offset / 4;
            const uintptr_t stop = word * 4 + 4 < end ? word * 4 + 4 : end;
            Cell& cell = words[word];
            const bool is_split = cell.write.bits == SPLIT;
            if (offset % 4 == 0 && stop == offset + 4 && !is_split) {
                if (visit_cell(cell)) return true;
            } else {
                if (!is_split) {
                    for (int i = 0; i < 4; i++) this->bytes[word * 4 + i] = cell;
                    cell.write.bits = SPLIT;
                }
                for (uintptr_t i = offset; i < stop; i++)
                    if (visit_cell(this->bytes[i])) return true;
                if (whole && stop == offset + 4) cell = this->bytes[offset];
            }
            offset = stop;
        }
        return false;
    }

    // Whether this thread made the same access at the same time before, and nobody another one since: it needs no
    // check. Only for ranges within one word or of whole words. Other OS threads may change the cells meanwhile; a
    // stamp is one load.
    bool repeated(uintptr_t address, size_t bytes, Kind kind, Stamp now) const {
        const uintptr_t offset = address - base;
        const Cell* cell = &words[offset / 4];
        size_t cells = (bytes + 3) / 4;
        if (cell->write.bits == SPLIT && bytes <= 4) {
            cell = &this->bytes[offset];
            cells = bytes;
        }
        for (size_t i = 0; i < cells; i++, cell++) {
            if (kind == Kind::Read ? cell->read[0].bits != now.bits
                                   : (cell->write.bits != now.bits ||
                                      (cell->atomic.bits | cell->read[0].bits | cell->read[1].bits) != 0))
                return false;
        }
        return true;
    }

private:
    static constexpr uint64_t SPLIT = ~0ull;  // as the word's write stamp: look at the bytes
    uintptr_t base = 0;                       // divisible by 4
    Cell* words = nullptr;
    Cell* bytes = nullptr;
    size_t word_count = 0;
};

}  // namespace emulator
