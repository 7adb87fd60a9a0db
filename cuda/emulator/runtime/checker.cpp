#include "checker.h"

#include <cstdio>

#include "fiber.h"
#include "launch.h"
#include "report.h"

namespace emulator {

namespace {

constexpr uintptr_t SHARED_WINDOW_BELOW =
    64 * 1024;  // addresses around shared memory count as shared memory out of bounds
constexpr uintptr_t SHARED_WINDOW = SHARED_WINDOW_BELOW + SHARED_LIMIT + 64 * 1024;

uintptr_t shared_base(const Block& block) { return reinterpret_cast<uintptr_t>(block.shared); }

std::string shared_range(const Block& block, uintptr_t address, size_t bytes) {
    char text[96];
    snprintf(text, sizeof text, "%zu byte%s at offset %td", bytes, bytes == 1 ? "" : "s",
             (ptrdiff_t)(address - shared_base(block)));
    return text;
}

// ---- order --------------------------------------------------------------------------------------------------------

struct SharedPast {
    const uint32_t* times;
    uint64_t tag;
    unsigned self;
    // Stamps of another tag are left from earlier blocks of this OS thread.
    bool operator()(Stamp s) const {
        return s.block_tag() != tag || (!s.under_way() && (s.who() == self || times[s.who()] >= s.time()));
    }
};

SharedPast shared_past(const Thread& thread) { return {thread.knows->time, thread.block->tag, AGENTS + thread.linear}; }

struct GlobalPast {
    const Clock* knows;
    uint64_t tag;
    unsigned self;
    bool operator()(Stamp s) const {
        if (s.bits == 0) return true;
        if (s.under_way()) return false;
        if (s.block_tag() == tag) return s.who() == self || knows->time[s.who()] >= s.time();
        const uint32_t* times = knows->blocks.find(s.block_tag() - 1);
        return times && times[s.who()] >= s.time();
    }
};

GlobalPast global_past(const Thread& thread) { return {thread.knows, thread.block->tag, AGENTS + thread.linear}; }

// ---- shared memory ------------------------------------------------------------------------------------------------

// False if the access reads bytes that were never written.
bool touch_shared(const Thread& thread, uintptr_t address, size_t bytes, Kind kind, Stamp now, const void* pc) {
    Block& block = *thread.block;
    const SharedPast past = shared_past(thread);
    const Place place = place_of(pc);
    bool unwritten = false;
    Conflict conflict;
    const bool conflicts = block.shared_shadow.visit(address, bytes, kind == Kind::Write, [&](Cell& cell) {
        if (kind != Kind::Write) unwritten |= cell.write.block_tag() != past.tag && cell.atomic.block_tag() != past.tag;
        return touch(cell, kind, now, place, past, conflict);
    });
    if (!conflicts) return !unwritten;
    if (conflict.other.under_way()) {
        const uint32_t offset = (uint32_t)(address - shared_base(block)) + SHARED_FIRST;
        for (const Mbarrier& m : block.mbarriers)
            if (offset < m.address + 8 && m.address < offset + bytes)
                fail(pc, "shared memory: plain access to the mbarrier at shared address %u", m.address);
    }
    fail_conflict(pc, "shared", conflict, shared_range(block, address, bytes));
}

void access_shared(const Thread& thread, uintptr_t address, size_t bytes, Kind kind, const void* pc) {
    Block& block = *thread.block;
    const uintptr_t offset = address - shared_base(block);
    if (offset > block.launch->dynamic_shared || bytes > block.launch->dynamic_shared - offset)
        fail(pc, "shared memory: %s out of bounds, %s, but the launch has %u bytes",
             kind == Kind::Write ? "write" : "access", shared_range(block, address, bytes).c_str(),
             block.launch->dynamic_shared);
    if (CHECKED && !touch_shared(thread, address, bytes, kind, thread.stamp(), pc))
        fail(pc, "shared memory: read of bytes that this block never wrote, %s",
             shared_range(block, address, bytes).c_str());
}

// ---- global memory ------------------------------------------------------------------------------------------------

std::string global_range(const Buffer& buffer, uintptr_t address, size_t bytes) {
    char text[160];
    snprintf(text, sizeof text, "%zu byte%s at byte %zu of `%s`", bytes, bytes == 1 ? "" : "s",
             (size_t)(address - buffer.begin), buffer.name);
    return text;
}

[[noreturn]] void fail_outside(GlobalMemory& memory, uintptr_t address, size_t bytes, bool write, const void* pc) {
    unsigned ignored = 0;
    if (const Buffer* buffer = write ? memory.find(address, bytes, false, ignored) : nullptr)
        fail(pc, "global memory: write to the read-only buffer `%s`, %s", buffer->name,
             global_range(*buffer, address, bytes).c_str());
    fail(pc, "global memory: %s outside of every buffer, %zu bytes at 0x%zx%s", write ? "write" : "read", bytes,
         (size_t)address, memory.describe(address, bytes).c_str());
}

template <class Visit>
bool visit_global(GlobalMemory& memory, const Launch& launch, const Buffer& buffer, uintptr_t address, size_t bytes,
                  bool whole, const Visit& visit) {
    if (launch.os_threads == 1) return buffer.shadow->visit(address, bytes, whole, visit);
    while (bytes > 0) {  // line by line, each under its lock
        const size_t part = 64 - address % 64 < bytes ? 64 - address % 64 : bytes;
        Stripe& stripe = memory.stripe(address);
        stripe.lock();
        const bool ended = buffer.shadow->visit(address, part, whole, visit);
        stripe.unlock();
        if (ended) return true;
        address += part;
        bytes -= part;
    }
    return false;
}

void access_global(const Thread& thread, uintptr_t address, size_t bytes, Kind kind, Stamp now, const void* pc) {
    Block& block = *thread.block;
    Launch& launch = *block.launch;
    const bool write = kind == Kind::Write || kind == Kind::AtomicUpdate;
    const Buffer* buffer = launch.memory.find(address, bytes, write, block.last_buffer);
    if (!buffer) {
        if (!write && launch.memory.constant(address, bytes)) return;
        fail_outside(launch.memory, address, bytes, write, pc);
    }
    if (!thread.dependency_waited && !buffer->constant) {
        if (CHECKED && launch.programmatic)
            fail(pc, "%s before griddepcontrol.wait, which an earlier kernel may still write or read",
                 global_range(*buffer, address, bytes).c_str());
        if (!current->early_access) current->early_access = place_of(pc);
    }
    Traffic& traffic = block.traffic[buffer->number];
    (write ? traffic.written : traffic.read) += bytes;
    if (!CHECKED || !buffer->writable) return;
    if (bytes <= 16 && kind <= Kind::Write && buffer->shadow->repeated(address, bytes, kind, now)) return;
    const GlobalPast past = global_past(thread);
    const Place place = place_of(pc);
    Conflict conflict;
    const bool conflicts = visit_global(launch.memory, launch, *buffer, address, bytes, kind == Kind::Write,
                                        [&](Cell& cell) { return touch(cell, kind, now, place, past, conflict); });
    if (conflicts) fail_conflict(pc, "global", conflict, global_range(*buffer, address, bytes));
}

void access(uintptr_t address, size_t bytes, Kind kind, const void* pc) {
    Thread* thread = current;
    if (!thread || address - thread->stack_low < STACK_BYTES) return;
    if (address - (shared_base(*thread->block) - SHARED_WINDOW_BELOW) < SHARED_WINDOW) {
        access_shared(*thread, address, bytes, kind, pc);
    } else {
        access_global(*thread, address, bytes, kind, thread->stamp(), pc);
    }
}

// An access of the kernel's own. What can be told at once is: a thread's own stack, and shared memory that it accesses
// again.
template <size_t bytes, Kind kind>
inline __attribute__((always_inline)) void instrumented(uintptr_t address, const void* pc) {
    Thread* thread = current;
    if (!thread || address - thread->stack_low < STACK_BYTES) return;
    // A device faults on an address that is not a multiple of the access; x86 does not.
    if (address & (bytes - 1))
        fail(pc, "misaligned %s of %zu bytes at 0x%zx", kind == Kind::Read ? "read" : "write", bytes, (size_t)address);
    Block& block = *thread->block;
    const uintptr_t offset = address - shared_base(block);
    const uint32_t limit = block.dynamic_shared;
    if (offset < limit && bytes <= limit - offset &&
        block.shared_shadow.repeated(address, bytes, kind, thread->stamp()))
        return;
    access(address, bytes, kind, pc);
}

}  // namespace

// ---- for the runtime ----------------------------------------------------------------------------------------------

void grid_dependency_wait() {
    Thread& self = *current;
    if (CHECKED && self.early_access)
        fail(__builtin_return_address(0),
             "griddepcontrol.wait after an access to global memory at {@%x}, which an earlier kernel may still write or read",
             self.early_access);
    self.dependency_waited = true;
}

bool happened_before(const Thread& thread, Stamp stamp) { return shared_past(thread)(stamp); }

void check_access(const void* address, size_t bytes, Kind kind, const void* pc) {
    access(reinterpret_cast<uintptr_t>(address), bytes, kind, pc);
}

unsigned char* shared_bytes(uint32_t address, size_t bytes, size_t alignment, const char* what, const void* pc) {
    const Block& block = *current->block;
    const uint32_t limit = block.launch->dynamic_shared;
    const uint32_t offset = address - SHARED_FIRST;
    if (address < SHARED_FIRST || offset > limit || bytes > limit - offset)
        fail(pc, "%s: shared memory out of bounds, %zu bytes at offset %lld, but the launch has %u bytes", what, bytes,
             (long long)address - SHARED_FIRST, limit);
    if (address % alignment) fail(pc, "%s: shared address %u is not a multiple of %zu", what, address, alignment);
    return block.shared + offset;
}

void check_shared(const Thread& thread, uint32_t address, size_t bytes, Kind kind, const void* pc) {
    access_shared(thread, shared_base(*thread.block) + (address - SHARED_FIRST), bytes, kind, pc);
}

void check_proxy_fence(const Thread& thread, uint32_t address, size_t bytes, Kind kind, const char* what,
                       const void* pc) {
    if (!CHECKED) return;
    Block& block = *thread.block;
    const SharedPast past = shared_past(thread);
    Conflict missing;
    const bool misses =
        block.shared_shadow.visit(shared_base(block) + (address - SHARED_FIRST), bytes, false, [&](Cell& cell) {
            const Stamp w = cell.write;
            if (w.block_tag() != block.tag || w.by_agent()) return false;  // written by the async proxy itself
            if (!past(w)) return false;
            // The fence may be the writer's, after the write, or the reader's, after it had heard of the write.
            if (block.threads[w.thread()].fenced_time >= w.time()) return false;
            if (thread.fenced_knows && thread.fenced_knows->time[w.who()] >= w.time()) return false;
            return missing.with("no fence", w, cell.write_place);
        });
    if (misses)
        fail(pc,
             "%s %s shared memory that %s wrote through the generic proxy at {@%x}, without fence.proxy.async "
             "between",
             what, kind == Kind::Write ? "overwrites" : "reads", thread_name(block, missing.other.thread()).c_str(), missing.place);
}

Stamp under_way_stamp(const Thread& thread) {
    return Stamp::make(thread.block->tag, AGENTS + thread.linear, thread.time, true);
}

void mark_shared(const Thread& thread, Stamp mark, uint32_t address, size_t bytes, Kind kind, const void* pc) {
    if (!CHECKED) return;
    const uintptr_t a = shared_base(*thread.block) + (address - SHARED_FIRST);
    if (!touch_shared(thread, a, bytes, kind, mark, pc))
        fail(pc, "shared memory: read of bytes that this block never wrote, %s",
             shared_range(*thread.block, a, bytes).c_str());
}

void complete_shared(const Thread& thread, Stamp mark, Stamp done, uint32_t address, size_t bytes, Kind kind,
                     const void* pc) {
    if (!CHECKED) return;
    const SharedPast past = shared_past(thread);
    const uintptr_t a = shared_base(*thread.block) + (address - SHARED_FIRST);
    Conflict conflict;
    const bool conflicts = thread.block->shared_shadow.visit(a, bytes, kind == Kind::Write, [&](Cell& cell) {
        if (kind == Kind::Write) {
            cell.write = done;  // nobody can have touched it since it was marked
            return false;
        }
        for (Stamp& read : cell.read) {
            if (read.bits != mark.bits) continue;
            read = done;
            return false;
        }
        return touch(cell, Kind::Read, done, place_of(pc), past, conflict);  // the mark gave way to other readers
    });
    if (conflicts) fail_conflict(pc, "shared", conflict, shared_range(*thread.block, a, bytes));
}

void mark_global(const Thread& thread, Stamp mark, const void* address, size_t bytes, const void* pc) {
    access_global(thread, reinterpret_cast<uintptr_t>(address), bytes, Kind::Write, mark, pc);
}

void complete_global(Stamp mark, Stamp done, const void* address, size_t bytes) {
    if (!CHECKED) return;
    Block& block = *current->block;
    const Buffer* buffer =
        block.launch->memory.find(reinterpret_cast<uintptr_t>(address), bytes, true, block.last_buffer);
    visit_global(block.launch->memory, *block.launch, *buffer, reinterpret_cast<uintptr_t>(address), bytes, true,
                 [&](Cell& cell) {
                     if (cell.write.bits == mark.bits) cell.write = done;
                     return false;
                 });
}

void set_shared(Stamp mark, uint32_t address, size_t bytes) {
    if (!CHECKED) return;
    Block& block = *current->block;
    block.shared_shadow.visit(shared_base(block) + (address - SHARED_FIRST), bytes, true, [&](Cell& cell) {
        cell = Cell{};
        cell.write = mark;
        return false;
    });
}

}  // namespace emulator

// ---- the compiler's instrumentation -------------------------------------------------------------------------------
// -fsanitize=thread makes g++ call these before each access to memory. ThreadSanitizer's own library is never linked.

#if !defined(EMULATOR_SANITIZE)

using emulator::Kind;

#define ADDRESS reinterpret_cast<uintptr_t>(address)
#define CALLER __builtin_return_address(0)
#define ACCESS(bytes)                                                                                        \
    void __tsan_read##bytes(void* address) { (emulator::instrumented<bytes, Kind::Read>(ADDRESS, CALLER)); } \
    void __tsan_write##bytes(void* address) { (emulator::instrumented<bytes, Kind::Write>(ADDRESS, CALLER)); }
#define UNALIGNED_ACCESS(bytes)                                                                                \
    void __tsan_unaligned_read##bytes(void* address) { emulator::access(ADDRESS, bytes, Kind::Read, CALLER); } \
    void __tsan_unaligned_write##bytes(void* address) { emulator::access(ADDRESS, bytes, Kind::Write, CALLER); }

extern "C" {
void __tsan_init() {}
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
UNALIGNED_ACCESS(2)
UNALIGNED_ACCESS(4)
UNALIGNED_ACCESS(8)
UNALIGNED_ACCESS(16)
void __tsan_read_range(void* address, size_t bytes) { emulator::access(ADDRESS, bytes, Kind::Read, CALLER); }
void __tsan_write_range(void* address, size_t bytes) { emulator::access(ADDRESS, bytes, Kind::Write, CALLER); }
}

#endif
