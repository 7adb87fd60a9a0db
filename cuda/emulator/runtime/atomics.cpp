// Atomics: relaxed ones on any memory, acquire and release ones on global memory.
//
// Releasing publishes what the thread did and knows to the word; acquiring takes what was published there. An atomic
// read-modify-write keeps what earlier releases published (a release sequence), a store replaces it.
#include <cstring>

#include "checker.h"
#include "launch.h"
#include "report.h"
#include "scheduler.h"

namespace emulator {

namespace {

template <class T>
struct FloatOf;
template <>
struct FloatOf<uint32_t> {
    using type = float;
};
template <>
struct FloatOf<uint64_t> {
    using type = double;
};

template <class T>
T apply(Atomic operation, T old, T value) {
    using Signed = std::make_signed_t<T>;
    using Float = typename FloatOf<T>::type;
    switch (operation) {
    case Atomic::Add:
        return old + value;
    case Atomic::AddFloat: {
        Float a, b;
        memcpy(&a, &old, sizeof a);
        memcpy(&b, &value, sizeof b);
        a += b;
        memcpy(&old, &a, sizeof a);
        return old;
    }
    case Atomic::MinSigned:
        return (Signed)value < (Signed)old ? value : old;
    case Atomic::MaxSigned:
        return (Signed)value > (Signed)old ? value : old;
    case Atomic::MinUnsigned:
        return value < old ? value : old;
    case Atomic::MaxUnsigned:
        return value > old ? value : old;
    case Atomic::And:
        return old & value;
    case Atomic::Or:
        return old | value;
    case Atomic::Xor:
        return old ^ value;
    case Atomic::Exchange:
        return value;
    case Atomic::Increment:
        return old >= value ? 0 : old + 1;
    case Atomic::Decrement:
        return old == 0 || old > value ? value : old - 1;
    }
    __builtin_unreachable();
}

void check_alignment(const void* word, size_t bytes, const void* pc) {
    if (reinterpret_cast<uintptr_t>(word) % bytes) fail(pc, "misaligned atomic of %zu bytes at %p", bytes, word);
}

constexpr const char* POLLS = "deadlock: all threads that have not ended only poll memory";

// Old value; `update(old)` is stored. All atomics of a launch on one line of memory are under one lock.
template <class T, class Update>
T update_relaxed(void* address, const void* pc, const Update& update) {
    check_alignment(address, sizeof(T), pc);
    check_access(address, sizeof(T), Kind::AtomicUpdate, pc);
    T* word = static_cast<T*>(address);
    Stripe& stripe = current->block->launch->memory.stripe(reinterpret_cast<uintptr_t>(address));
    stripe.lock();
    const T old = __atomic_load_n(word, __ATOMIC_RELAXED);
    const T next = update(old);
    __atomic_store_n(word, next, __ATOMIC_RELAXED);
    stripe.unlock();
    if (next != old) {
        current->block->progress++;
    } else if (poll_in_vain(address, old)) {
        spin(pc, POLLS);
    }
    return old;
}

// ---- order between blocks -----------------------------------------------------------------------------------------

void acquire(Thread& self, const Known& released) {
    if (released.empty()) return;
    Block& block = *self.block;
    Clock* next = block.clocks.copy(*self.knows);
    next->blocks.join(released);
    // What threads of this block released comes back as their own times.
    if (const uint32_t* own = released.find(block.linear))
        for (unsigned i = 0; i < block.clocks.entries(); i++)
            next->time[i] = next->time[i] > own[i] ? next->time[i] : own[i];
    block.clocks.release(self.knows);
    self.knows = next;
}

// What the thread did and knows, for others; later accesses are not part of it.
Known publish(Thread& self) {
    Block& block = *self.block;
    Clock* own = block.clocks.copy(*self.knows);
    own->time[AGENTS + self.linear] = self.time;
    self.step_time();
    Known published = self.knows->blocks;
    published.set(block.launch->known_levels, block.linear, own->time, block.clocks.entries());
    block.clocks.release(own);
    block.progress++;
    return published;
}

void check_word(const void* address, size_t bytes, Kind kind, const char* what, const void* pc) {
    check_alignment(address, bytes, pc);
    const Block& block = *current->block;
    const ptrdiff_t offset = static_cast<const unsigned char*>(address) - block.shared;
    if (offset >= 0 && offset < (ptrdiff_t)SHARED_LIMIT)
        fail(pc, "%s on shared memory: it orders blocks, so its word is in global memory", what);
    check_access(address, bytes, kind, pc);
}

template <class T>
T load_acquire(const T* word, const void* pc) {
    check_word(word, sizeof(T), Kind::AtomicRead, "load_acquire", pc);
    Thread& self = *current;
    Stripe& stripe = self.block->launch->memory.stripe(reinterpret_cast<uintptr_t>(word));
    stripe.lock();
    const T value = __atomic_load_n(word, __ATOMIC_ACQUIRE);
    Known released;
    const auto found = stripe.released.find(reinterpret_cast<uintptr_t>(word));
    if (found != stripe.released.end()) released = found->second;
    stripe.unlock();
    acquire(self, released);
    if (poll_in_vain(word, value)) spin(pc, POLLS);
    return value;
}

template <class T>
void store_release(T* word, T value, const void* pc) {
    check_word(word, sizeof(T), Kind::AtomicUpdate, "store_release", pc);
    Thread& self = *current;
    Known published = publish(self);
    Stripe& stripe = self.block->launch->memory.stripe(reinterpret_cast<uintptr_t>(word));
    stripe.lock();
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
    stripe.released[reinterpret_cast<uintptr_t>(word)] = std::move(published);
    stripe.unlock();
}

template <class T, class Update>
T update_release(T* word, bool acquires, const char* what, const void* pc, const Update& update) {
    check_word(word, sizeof(T), Kind::AtomicUpdate, what, pc);
    Thread& self = *current;
    Stripe& stripe = self.block->launch->memory.stripe(reinterpret_cast<uintptr_t>(word));
    Known published = publish(self);
    stripe.lock();
    const T old = __atomic_load_n(word, __ATOMIC_ACQUIRE);
    bool stores = true;
    const T next = update(old, stores);
    __atomic_store_n(word, next, __ATOMIC_RELEASE);
    Known& released = stripe.released[reinterpret_cast<uintptr_t>(word)];
    const Known before = released;
    if (stores) released.join(published);
    stripe.unlock();
    if (acquires) acquire(self, before);
    if (next == old && poll_in_vain(word, old)) spin(pc, POLLS);
    return old;
}

#define CALLER __builtin_return_address(0)

template <class T>
T add_release(T* word, T value, bool acquires, const void* pc) {
    return update_release<T>(word, acquires, "atomic_add", pc, [&](T old, bool&) { return (T)(old + value); });
}

template <class T>
T cas_acq_rel(T* word, T compare, T value, const void* pc) {
    return update_release<T>(word, true, "atomic_cas", pc, [&](T old, bool& stores) {
        stores = old == compare;  // a failed exchange publishes nothing
        return stores ? value : old;
    });
}

}  // namespace

uint32_t atomic_u32(Atomic operation, void* word, uint32_t value) {
    return update_relaxed<uint32_t>(word, CALLER, [&](uint32_t old) { return apply(operation, old, value); });
}
uint64_t atomic_u64(Atomic operation, void* word, uint64_t value) {
    return update_relaxed<uint64_t>(word, CALLER, [&](uint64_t old) { return apply(operation, old, value); });
}
uint32_t atomic_cas_u32(void* word, uint32_t compare, uint32_t value) {
    return update_relaxed<uint32_t>(word, CALLER, [&](uint32_t old) { return old == compare ? value : old; });
}
uint64_t atomic_cas_u64(void* word, uint64_t compare, uint64_t value) {
    return update_relaxed<uint64_t>(word, CALLER, [&](uint64_t old) { return old == compare ? value : old; });
}

uint32_t load_acquire_u32(const uint32_t* word) { return load_acquire(word, CALLER); }
uint64_t load_acquire_u64(const uint64_t* word) { return load_acquire(word, CALLER); }
void store_release_u32(uint32_t* word, uint32_t value) { store_release(word, value, CALLER); }
void store_release_u64(uint64_t* word, uint64_t value) { store_release(word, value, CALLER); }
uint32_t atomic_add_acq_rel_u32(uint32_t* word, uint32_t value) { return add_release(word, value, true, CALLER); }
uint64_t atomic_add_acq_rel_u64(uint64_t* word, uint64_t value) { return add_release(word, value, true, CALLER); }
uint32_t atomic_add_release_u32(uint32_t* word, uint32_t value) { return add_release(word, value, false, CALLER); }
uint64_t atomic_add_release_u64(uint64_t* word, uint64_t value) { return add_release(word, value, false, CALLER); }
uint32_t atomic_cas_acq_rel_u32(uint32_t* word, uint32_t compare, uint32_t value) {
    return cas_acq_rel(word, compare, value, CALLER);
}
uint64_t atomic_cas_acq_rel_u64(uint64_t* word, uint64_t compare, uint64_t value) {
    return cas_acq_rel(word, compare, value, CALLER);
}

}  // namespace emulator
