#include "barrier.h"

#include <cstring>

#include "report.h"
#include "scheduler.h"

namespace emulator {

namespace {

// Takes the running thread in.
void arrive(Barrier& barrier, Thread& self) {
    Block& block = *self.block;
    if (barrier.arrived == 0) barrier.first_thread = self.linear;
    barrier.arrived++;
    barrier.participants[self.warp->index] |= 1u << self.lane;
    barrier.gathering.add(block.clocks, self);
}

// Lets everybody go who waits, with what all participants know.
void release(Block& block, Barrier& barrier, Thread& self) {
    Clock* together = barrier.gathering.finish(block.clocks);
    const auto teach = [&](Thread& thread) {
        block.clocks.release(thread.knows);
        thread.knows = ClockPool::retain(together);
    };
    const uint32_t self_bit = 1u << self.lane;
    for (unsigned w = 0; w < block.warps_in_block; w++) {
        Warp& warp = block.warps[w];
        for (uint32_t rest = barrier.waiting[w]; rest; rest &= rest - 1) teach(warp.threads[__builtin_ctz(rest)]);
        make_ready(warp, barrier.waiting[w] & ~(warp.index == self.warp->index ? self_bit : 0));
    }
    block.clocks.release(together);
    barrier.arrived = 0;
    memset(barrier.participants, 0, sizeof barrier.participants);
    memset(barrier.waiting, 0, sizeof barrier.waiting);
    block.progress++;
}

void wait(Barrier& barrier, Thread& self, unsigned id, const char* operation, const void* pc) {
    self.state = State::AtBarrier;
    self.operation = operation;
    self.detail = id;
    self.pc = pc;
    barrier.waiting[self.warp->index] |= 1u << self.lane;
    if (barrier.arrived == barrier.expected) {
        release(*self.block, barrier, self);
        self.state = State::Ready;
    } else {
        park();
    }
}

Barrier& named_barrier(unsigned id, unsigned threads, const char* operation, const void* pc) {
    Block& block = *current->block;
    if (id >= NAMED_BARRIERS) fail(pc, "%s: barrier %u does not exist, there are %u", operation, id, NAMED_BARRIERS);
    if (threads == 0 || threads % LANES != 0 || threads > block.warps_in_block * LANES)
        fail(pc, "%s: %u threads at barrier %u, but the block's %u threads come in whole warps", operation, threads, id,
             block.threads_in_block);
    Barrier& barrier = block.barriers[id];
    if (barrier.arrived && barrier.expected != threads)
        fail(pc, "%s: barrier %u expects %u threads, because thread %u said so, and %u here", operation, id,
             barrier.expected, barrier.first_thread, threads);
    barrier.expected = threads;
    barrier.file = "";
    barrier.line = 0;
    if (barrier.participants[current->warp->index] >> current->lane & 1)
        fail(pc, "%s: this thread has already arrived at barrier %u, which still waits for others", operation, id);
    return barrier;
}

// `bar` counts warps: all lanes of one must come before the barrier opens.
void check_whole_warps(Block& block, const Barrier& barrier, unsigned id, const void* pc) {
    for (unsigned w = 0; w < block.warps_in_block; w++) {
        const uint32_t came = barrier.participants[w];
        if (came && (came | block.warps[w].exited) != ~0u)
            fail(pc, "barrier %u is full, but only lanes %08x of warp %u are among its %u threads", id, came, w,
                 barrier.expected);
    }
}

void check_full(Barrier& barrier, unsigned id, const void* pc) {
    if (barrier.arrived == barrier.expected) check_whole_warps(*current->block, barrier, id, pc);
}

}  // namespace

int block_barrier(Vote vote, int predicate, const char* file, unsigned line) {
    const void* pc = __builtin_return_address(0);
    Thread& self = *current;
    Block& block = *self.block;
    Barrier& barrier = block.barriers[0];
    block.counters.barriers++;
    if (block.alive != block.threads_in_block)
        fail(pc, "__syncthreads after %u threads of the block have ended", block.threads_in_block - block.alive);
    if (barrier.arrived == 0) {
        barrier.file = file;
        barrier.line = line;
        barrier.vote = vote;
        barrier.votes = 0;
        barrier.expected = block.threads_in_block;
    } else if (barrier.line != line || (barrier.file != file && strcmp(barrier.file, file) != 0) ||
               barrier.expected != block.threads_in_block) {
        fail(pc, "divergent __syncthreads: this thread came to line %u, %s to line %u", line,
             thread_name(block, barrier.first_thread).c_str(), barrier.line);
    }
    barrier.votes += predicate != 0;
    arrive(barrier, self);
    if (barrier.arrived == barrier.expected) {
        const int all = (int)block.threads_in_block;
        barrier.result = vote == Vote::Count ? barrier.votes
                         : vote == Vote::And ? barrier.votes == all
                                             : barrier.votes != 0;
    }
    // The result stays until all have read it: nobody completes the next round before everybody has arrived there.
    wait(barrier, self, 0, "__syncthreads", pc);
    return barrier.result;
}

void named_barrier_sync(unsigned id, unsigned threads) {
    const void* pc = __builtin_return_address(0);
    Thread& self = *current;
    self.block->counters.barriers++;
    Barrier& barrier = named_barrier(id, threads, "bar.sync", pc);
    arrive(barrier, self);
    check_full(barrier, id, pc);
    wait(barrier, self, id, "bar.sync", pc);
}

void named_barrier_arrive(unsigned id, unsigned threads) {
    const void* pc = __builtin_return_address(0);
    Thread& self = *current;
    Block& block = *self.block;
    block.counters.barriers++;
    Barrier& barrier = named_barrier(id, threads, "bar.arrive", pc);
    arrive(barrier, self);
    check_full(barrier, id, pc);
    if (barrier.arrived == barrier.expected) release(block, barrier, self);
}

void barrier_thread_ended(Block& block) {
    const Barrier& barrier = block.barriers[0];
    if (barrier.arrived && barrier.expected == block.threads_in_block)
        fail_deadlock("deadlock: a thread ended while others wait for it in __syncthreads");
}

}  // namespace emulator
