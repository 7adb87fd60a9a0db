// Shadow memory: for every byte, who wrote it last and who has read it since.
//
// An access is recorded as a Stamp: block, thread and the thread's time. The checkers compare it with the stamps that a byte
// holds; "did that happen before this?" is answered by the accessing thread's clock, so that a verdict never depends on which
// of two unordered accesses really ran first.
//
// Cells stand for aligned 4-byte words as long as all four bytes are alike; an access to a part of a word splits its cell into
// four byte cells, and the next write of the whole word joins them again.
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
    static constexpr uint32_t MAX_TIME = (1u << 27) - 1;

    static Stamp make(uint64_t block_tag, unsigned who, uint32_t time, bool under_way) {
        return {(uint64_t)time << 37 | (uint64_t)under_way << 36 | (uint64_t)who << 25 | block_tag};
    }
    uint64_t block_tag() const { return bits & ((1ull << 25) - 1); }
    unsigned who() const { return bits >> 25 & 2047; }
    bool by_agent() const { return who() < AGENTS; }
    unsigned thread() const { return who() - AGENTS; }
    // The access belongs to an asynchronous operation that has been issued and not waited for: nothing is ordered after it.
    bool under_way() const { return bits >> 36 & 1; }
    uint32_t time() const { return (uint32_t)(bits >> 37); }
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
    explicit operator bool() const { return what != nullptr; }
};

// Checks one access against a cell and records it. `past(stamp)` tells whether an earlier access happened before this one.
template <class Past>
inline Conflict touch(Cell& cell, Kind kind, Stamp now, Place place, const Past& past) {
    const Cell old = cell;
    if (kind == Kind::Read) {
        if (old.read[0].bits == now.bits) return {};  // checked before; a write since then would have cleared it
        if (!past(old.write)) return {"read after an unordered write", old.write, old.write_place};
        if (!past(old.atomic)) return {"plain read beside an unordered atomic", old.atomic, old.atomic_place};
        // Replace a reader that happened before this one. Of unordered readers keep two of different warps.
        unsigned slot = 0;
        const auto replaceable = [&](Stamp s) { return s.bits == 0 || s.bits == now.bits || (!s.under_way() && past(s)); };
        if (!replaceable(old.read[0])) {
            if (replaceable(old.read[1]) || old.read[0].same_warp(old.read[1]) || old.read[1].same_warp(now)) {
                slot = 1;
            } else if (!old.read[0].same_warp(now)) {
                slot = now.time() & 1;
            }
        }
        cell.read[slot] = now;
        cell.read_place[slot] = place;
        return {};
    }
    if (!past(old.write)) {
        const bool atomic = kind != Kind::Write;
        return {atomic ? "atomic beside an unordered plain write" : "write after an unordered write", old.write, old.write_place};
    }
    if (kind == Kind::AtomicRead) return {};
    if (kind == Kind::Write && !past(old.atomic))
        return {"plain write beside an unordered atomic", old.atomic, old.atomic_place};
    for (int i = 0; i < 2; i++) {
        if (!past(old.read[i])) {
            const bool atomic = kind != Kind::Write;
            return {atomic ? "atomic beside an unordered plain read" : "write after an unordered read", old.read[i], old.read_place[i]};
        }
    }
    if (kind == Kind::Write) {
        cell = Cell{};  // whoever is ordered after this write is ordered after all before it
        cell.write = now;
        cell.write_place = place;
    } else {
        cell.atomic = now;
        cell.atomic_place = place;
    }
    return {};
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

    // Calls `visit(cell)` for every cell of [address, address + bytes) until one returns a conflict. `whole`: the visit leaves
    // equal cells behind, so that the bytes of a whole word can share one cell again.
    template <class Visit>
    Conflict visit(uintptr_t address, size_t bytes, bool whole, const Visit& visit_cell) {
        uintptr_t offset = address - base;
        const uintptr_t end = offset + bytes;
        while (offset < end) {
            const uintptr_t word = offset / 4;
            const uintptr_t stop = word * 4 + 4 < end ? word * 4 + 4 : end;
            Cell& cell = words[word];
            const bool is_split = cell.write.bits == SPLIT;
            if (offset % 4 == 0 && stop == offset + 4 && !is_split) {
                if (Conflict c = visit_cell(cell)) return c;
            } else {
                if (!is_split) {
                    for (int i = 0; i < 4; i++) this->bytes[word * 4 + i] = cell;
                    cell.write.bits = SPLIT;
                }
                for (uintptr_t i = offset; i < stop; i++)
                    if (Conflict c = visit_cell(this->bytes[i])) return c;
                if (whole && stop == offset + 4) cell = this->bytes[offset];
            }
            offset = stop;
        }
        return {};
    }

private:
    static constexpr uint64_t SPLIT = ~0ull;  // as the word's write stamp: look at the bytes
    uintptr_t base = 0;                       // divisible by 4
    Cell* words = nullptr;
    Cell* bytes = nullptr;
    size_t word_count = 0;
};

}  // namespace emulator
