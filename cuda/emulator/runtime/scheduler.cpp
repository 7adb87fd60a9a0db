#include "scheduler.h"

#include <unistd.h>

#include <cstring>

#include "async_copy.h"
#include "barrier.h"
#include "fiber.h"
#include "launch.h"
#include "mbarrier.h"
#include "report.h"
#include "warp.h"

#if defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

thread_local Thread* current = nullptr;

namespace {

// ---- choosing -----------------------------------------------------------------------------------------------------

uint32_t next_random(Block& block) {  // xorshift32
    uint32_t x = block.random;
    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    return block.random = x;
}

// One bit of `mask` (not 0): the next after `after` in the launch's order, cyclically.
inline unsigned choose(Block& block, uint32_t mask, unsigned after) {
    switch (block.order) {
    case Order::Forward: {
        const uint32_t above = after >= 31 ? 0 : mask & ~((2u << after) - 1);
        return __builtin_ctz(above ? above : mask);
    }
    case Order::Reverse: {
        const uint32_t below = after >= 32 ? 0 : mask & ((1u << after) - 1);
        return 31 - __builtin_clz(below ? below : mask);
    }
    case Order::Random: {
        unsigned skip = (uint64_t)next_random(block) * (unsigned)__builtin_popcount(mask) >> 32;
        for (; skip; skip--) mask &= mask - 1;
        return __builtin_ctz(mask);
    }
    }
    __builtin_unreachable();
}

// What to pass as `after` for the first bit in the order.
unsigned start_of(Order order) { return order == Order::Reverse ? 32 : 31; }

// A ready thread, or null. Unless the order is random, a warp goes on as long as one of its lanes can.
inline Thread* next_ready(Block& block, unsigned warp_index, unsigned lane) {
    if (!block.ready_warps) return nullptr;
    const bool stay = block.order != Order::Random && block.warps[warp_index].ready;
    Warp& warp = stay ? block.warps[warp_index] : block.warps[choose(block, block.ready_warps, warp_index)];
    return &warp.threads[choose(block, warp.ready, stay ? lane : start_of(block.order))];
}

void unready(Thread& thread) {
    Warp& warp = *thread.warp;
    warp.ready &= ~(1u << thread.lane);
    if (!warp.ready) thread.block->ready_warps &= ~(1u << warp.index);
}

// Nobody is ready: asynchronous copies may bring somebody on; else the block is dead.
Thread* next_or_fail(Block& block, Thread& self) {
    Thread* next = next_ready(block, self.warp->index, self.lane);
    if (next) return next;
    advance_mbarriers(block);
    next = next_ready(block, self.warp->index, self.lane);
    if (!next) fail_deadlock("deadlock: no thread can go on");
    return next;
}

// ---- switching ----------------------------------------------------------------------------------------------------

// Null stands for the OS thread's own stack.
inline void switch_to(Block& block, Thread* from, Thread* to) {
    void* scratch;
    void** save = from ? &from->stack_pointer : &block.main_stack_pointer;
    if (from && from->state == State::Finished) save = &scratch;
#if defined(__SANITIZE_ADDRESS__)
    void** fake = !from ? &block.main_fake_stack : from->state == State::Finished ? nullptr : &from->fake_stack;
    __sanitizer_start_switch_fiber(fake, to ? reinterpret_cast<void*>(to->stack_low) : block.main_stack_low,
                                   to ? STACK_BYTES : block.main_stack_bytes);
#endif
    current = to;
    emulator_switch(save, to ? to->stack_pointer : block.main_stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from ? from->fake_stack : block.main_fake_stack, nullptr, nullptr);
#endif
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    Thread& self = *current;
    Block& block = *self.block;
    block.launch->entry->run(block.launch->arguments);

    check_thread_end(self);
    self.state = State::Finished;
    self.pc = nullptr;
    unready(self);
    block.alive--;
    block.progress++;
    self.warp->exited |= 1u << self.lane;
    barrier_thread_ended(block);
    warp_thread_ended(*self.warp);
    Thread* next = nullptr;
    if (block.alive) {
        next = next_or_fail(block, self);
        block.counters.switches++;
    } else {
        check_block_end(block);
    }
    switch_to(block, &self, next);
    __builtin_unreachable();
}

}  // namespace

void park() {
    Thread& self = *current;
    Block& block = *self.block;
    unready(self);
    Thread* next = next_or_fail(block, self);
    if (next == &self) return;
    block.counters.switches++;
    switch_to(block, &self, next);
}

void make_ready(Warp& warp, uint32_t mask) {
    if (!mask) return;
    warp.ready |= mask;
    Block& block = *warp.threads->block;
    block.ready_warps |= 1u << warp.index;
    block.progress++;
    for (uint32_t rest = mask; rest; rest &= rest - 1) warp.threads[__builtin_ctz(rest)].state = State::Ready;
}

void abandon_block() {
    Thread& self = *current;
    Block& block = *self.block;
    block.failed = true;
    self.state = State::Finished;
    switch_to(block, &self, nullptr);
    __builtin_unreachable();
}

namespace {

// Another warp if there is one, and round robin within each, so that everybody gets on.
void let_others_run(Thread& self) {
    Block& block = *self.block;
    self.warp->last_yield = self.lane;
    Warp& warp = block.warps[choose(block, block.ready_warps, self.warp->index)];
    Thread& next = warp.threads[choose(block, warp.ready, warp.last_yield)];
    if (&next == &self) return;
    block.counters.switches++;
    switch_to(block, &self, &next);
}

void set_stuck(Block& block, bool stuck) {
    if (stuck == block.stuck) return;
    block.stuck = stuck;
    block.launch->stuck += stuck ? 1 : -1;
}

}  // namespace

void spin(const void* pc, const char* what) {
    Thread& self = *current;
    Block& block = *self.block;
    block.counters.spins++;
    self.pc = pc;
    let_others_run(self);
    if (block.progress != block.spin_progress) {
        block.spin_progress = block.progress;
        block.spin_rounds = 0;
        set_stuck(block, false);
        return;
    }
    // Nothing happens in this block. Another block may still be the one that is waited for, if it runs at the same
    // time.
    constexpr uint64_t PATIENCE = 50000, CHECKS = 1000;
    if (++block.spin_rounds < PATIENCE) return;
    Launch& launch = *block.launch;
    set_stuck(block, true);
    const bool all_stuck = launch.stuck.load() >= launch.running.load();
    if (launch.stop.load()) {  // the block that is waited for was found at fault; that report is enough
        block.report.clear();
        abandon_block();
    }
    if (all_stuck && block.spin_rounds > PATIENCE + CHECKS) fail_deadlock(what);
    usleep(20);
    if (!all_stuck) block.spin_rounds = PATIENCE;
}

bool poll_in_vain(const void* address, uint64_t value) {
    Thread& self = *current;
    const bool same = self.polled == address && self.polled_value == value;
    self.polled = address;
    self.polled_value = value;
    if (!same) self.block->progress++;
    return same;
}

void yield() { spin(__builtin_return_address(0), "deadlock: all threads that have not ended only poll"); }

// ---- a block ------------------------------------------------------------------------------------------------------

bool Block::run(Launch& launched, uint64_t linear_index) {
    launch = &launched;
    linear = linear_index;
    tag = linear + 1;
    dynamic_shared = launch->dynamic_shared;
    order = launch->order;
    const dim3 grid = launch->grid, extent = launch->extent;
    index = {(unsigned)(linear % grid.x), (unsigned)(linear / grid.x % grid.y),
             (unsigned)(linear / ((uint64_t)grid.x * grid.y))};
    threads_in_block = alive = launch->threads;
    warps_in_block = (alive + LANES - 1) / LANES;
    ready_warps = 0;
    random = (launch->seed * 2654435761u ^ (uint32_t)linear * 40503u) | 1;
    progress = spin_progress = spin_rounds = 0;
    failed = stuck = false;
    mbarriers.clear();
    pending_copies.clear();
    memset(agent_time, 0, sizeof agent_time);
    memset(shared, 0xff, launch->dynamic_shared);
    for (Barrier& barrier : barriers) barrier = Barrier{};
    for (; stacks < threads_in_block; stacks++) threads[stacks].stack_low = map_stack();

    clocks.reset(threads_in_block + AGENTS);
    Clock* nothing = clocks.make();
    for (unsigned w = 0; w < warps_in_block; w++) {
        Warp& warp = warps[w];
        const unsigned lanes = threads_in_block - w * LANES < LANES ? threads_in_block - w * LANES : LANES;
        warp.threads = threads + w * LANES;
        warp.index = w;
        warp.ready = lanes == LANES ? ~0u : (1u << lanes) - 1;
        warp.exited = ~warp.ready;
        warp.arrived = 0;
        warp.last_yield = 31;
        warp.wgmma_fenced = false;
        warp.products.clear();
        warp.product_group_ends.clear();
        ready_warps |= 1u << w;
    }
    for (unsigned i = 0; i < threads_in_block; i++) {
        Thread& thread = threads[i];
        thread.block = this;
        thread.warp = &warps[i / LANES];
        thread.linear = (uint16_t)i;
        thread.lane = i % LANES;
        thread.index = {i % extent.x, i / extent.x % extent.y, i / (extent.x * extent.y)};
        thread.state = State::Ready;
        thread.fake_stack = nullptr;
        thread.pc = nullptr;
        thread.polled = nullptr;
        thread.dependency_waited = false;
        thread.early_access = 0;
        thread.time = 1;
        thread.stamp_bits = Stamp::make(tag, AGENTS + i, 1, false).bits;
        thread.fenced_time = 0;
        thread.knows = ClockPool::retain(nothing);
        thread.fenced_knows = nullptr;
        thread.copies.copies.clear();
        thread.copies.group_ends.clear();
        thread.stores.stores.clear();
        thread.stores.group_ends.clear();
        thread.stack_pointer = prepare_stack(thread.stack_low, i, fiber_main);
    }
#if defined(__SANITIZE_ADDRESS__)
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    void* low;
    pthread_attr_getstack(&attributes, &low, &main_stack_bytes);
    main_stack_low = low;
    pthread_attr_destroy(&attributes);
#endif
    launch->running++;
    const unsigned start = start_of(order);
    Warp& first_warp = warps[choose(*this, ready_warps, start)];
    switch_to(*this, nullptr, &first_warp.threads[choose(*this, first_warp.ready, start)]);
    set_stuck(*this, false);
    launch->running--;
#if defined(__SANITIZE_ADDRESS__)
    // No fiber returns from its last frames, so they are still marked as in use.
    for (unsigned i = 0; i < threads_in_block; i++)
        __asan_unpoison_memory_region(reinterpret_cast<void*>(threads[i].stack_low), STACK_BYTES);
#endif
    return !failed;
}

}  // namespace emulator
