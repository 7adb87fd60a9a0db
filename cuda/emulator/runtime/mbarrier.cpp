#include "mbarrier.h"

#include <cstring>

#include "async_copy.h"
#include "checker.h"
#include "report.h"
#include "scheduler.h"
#include "tma.h"

namespace emulator {

namespace {

#define CALLER __builtin_return_address(0)

constexpr uint32_t MAX_COUNT = (1 << 20) - 1;

Mbarrier* find(Block& block, uint32_t address) {
    for (Mbarrier& m : block.mbarriers)
        if (m.address == address) return &m;
    return nullptr;
}

// The mbarrier at this address, whose initialisation must have happened before.
Mbarrier& use(uint32_t address, const char* what, const void* pc) {
    Thread& self = *current;
    shared_bytes(address, 8, 8, what, pc);
    Mbarrier* m = find(*self.block, address);
    if (!m) fail(pc, "%s: there is no mbarrier at shared address %u; was it initialised?", what, address);
    if (CHECKED && !happened_before(self, m->initialised))
        fail(pc, "%s: the mbarrier at shared address %u was initialised by %s, but no barrier makes that known here",
             what, address, thread_name(*self.block, m->initialised.thread()).c_str());
    return *m;
}

// The same for what the async proxy does with it, bytes of copies: a barrier orders an initialisation for threads alone.
Mbarrier& use_async(uint32_t address, const char* what, const void* pc) {
    Mbarrier& m = use(address, what, pc);
    if (CHECKED && !m.fenced)
        fail(pc, "%s: the mbarrier at shared address %u was initialised without fence.mbarrier_init after it", what,
             address);
    return m;
}

// Everything expected has come: the next phase begins and the waiting threads go on.
void complete_phase_if_due(Block& block, Mbarrier& m) {
    if (m.pending != 0 || m.transactions != 0) return;
    block.clocks.release(m.completed);
    m.completed = m.arriving.finish(block.clocks);
    m.phase++;
    m.pending = m.count;
    if (m.has_waiters) {
        for (unsigned w = 0; w < block.warps_in_block; w++) {
            make_ready(block.warps[w], m.waiting[w]);
            m.waiting[w] = 0;
        }
        m.has_waiters = false;
    }
    block.progress++;
}

void arrive(Thread& thread, Mbarrier& m, const char* what, const void* pc) {
    if (m.pending == 0)
        fail(pc, "%s: more arrivals than the %u of a phase, at the mbarrier at shared address %u", what, m.count,
             m.address);
    m.arriving.add(thread.block->clocks, thread);
    m.pending--;
    complete_phase_if_due(*thread.block, m);
}

Stamp agent_stamp(Block& block, const Mbarrier& m) {
    const unsigned agent = m.address / 8 % AGENTS;
    return Stamp::make(block.tag, agent, ++block.agent_time[agent], false);
}

// Performs one copy now. Its bytes are known to whoever waits for the phase.
void perform(Block& block, PendingCopy& copy) {
    Mbarrier* m = find(block, copy.mbar);
    if (!m)
        fail(nullptr, "the mbarrier at shared address %u was invalidated while copies are on their way to it",
             copy.mbar);
    const Thread& issuer = block.threads[copy.issuer];
    const Stamp done = agent_stamp(block, *m);
    const Stamp mark{copy.async_stamp};
    m->arriving.add_agent(block.clocks, done.who(), done.time());
    switch (copy.kind) {
    case PendingCopy::Bulk:
        memcpy(block.shared + (copy.dst - SHARED_FIRST), copy.src, copy.bytes);
        complete_shared(issuer, mark, done, copy.dst, copy.bytes, Kind::Write, nullptr);
        m->transactions -= copy.bytes;
        break;
    case PendingCopy::Tile:
        copy_tile(copy.map, copy.x, copy.y, copy.z, block.shared + (copy.dst - SHARED_FIRST));
        complete_shared(issuer, mark, done, copy.dst, copy.bytes, Kind::Write, nullptr);
        m->transactions -= copy.bytes;
        break;
    case PendingCopy::CpAsyncArrival:
        complete_copies(issuer, copy.copies, copy.copies.size(), mark, done);
        if (m->pending == 0)
            fail(nullptr,
                 "cp.async.mbarrier.arrive: more arrivals than the %u of a phase, at the mbarrier at shared address %u",
                 m->count, m->address);
        m->pending--;
        break;
    }
    complete_phase_if_due(block, *m);
}

// Performs the oldest pending copy that fits; false if there is none.
template <class Fits>
bool perform_first(Block& block, const Fits& fits) {
    for (size_t i = 0; i < block.pending_copies.size(); i++) {
        if (!fits(block.pending_copies[i])) continue;
        PendingCopy copy = std::move(block.pending_copies[i]);
        block.pending_copies.erase(block.pending_copies.begin() + i);
        perform(block, copy);
        return true;
    }
    return false;
}

}  // namespace

void advance_mbarriers(Block& block) {
    const auto waited_for = [&](const PendingCopy& copy) {
        const Mbarrier* m = find(block, copy.mbar);
        return !m || m->has_waiters;
    };
    while (!block.ready_warps && perform_first(block, waited_for)) {
    }
    if (block.ready_warps) return;
    // A kernel may poll with try_wait and do other things between. Let pollers look a few times more.
    constexpr unsigned LOOKS = 64;
    if (block.progress != block.spin_progress) {
        block.spin_progress = block.progress;
        block.spin_rounds = 0;
    }
    if (++block.spin_rounds > LOOKS) return;
    for (Mbarrier& m : block.mbarriers) {
        if (!m.has_waiters) continue;
        m.has_waiters = false;
        for (unsigned w = 0; w < block.warps_in_block; w++) {
            make_ready(block.warps[w], m.waiting[w]);
            m.waiting[w] = 0;
        }
    }
    block.spin_progress = block.progress;  // being looked at again is no progress
}

void issue_pending(PendingCopy copy, const void* pc) {
    // The arrival of a thread's cp.async is the thread's.
    if (copy.kind == PendingCopy::CpAsyncArrival) {
        use(copy.mbar, "asynchronous copy", pc);
    } else {
        use_async(copy.mbar, "asynchronous copy", pc);
    }
    current->block->pending_copies.push_back(std::move(copy));
}

void complete_cp_async_arrivals(Thread& self) {
    while (perform_first(*self.block, [&](const PendingCopy& copy) {
        return copy.kind == PendingCopy::CpAsyncArrival && copy.issuer == self.linear;
    })) {
    }
}

void check_block_end(Block& block) {
    size_t copies = 0;
    for (const PendingCopy& copy : block.pending_copies)
        copies += copy.kind != PendingCopy::CpAsyncArrival || !copy.copies.empty();
    if (copies)
        fail(nullptr, "the block ended with %zu asynchronous copies on their way into its shared memory: wait for them",
             copies);
}

// ---- what kernels call --------------------------------------------------------------------------------------------

void mbarrier_init(uint32_t mbar, uint32_t count) {
    const void* pc = CALLER;
    Thread& self = *current;
    Block& block = *self.block;
    shared_bytes(mbar, 8, 8, "mbarrier.init", pc);
    if (count == 0 || count > MAX_COUNT) fail(pc, "mbarrier.init: a count of %u is not in 1 ... %u", count, MAX_COUNT);
    if (find(block, mbar)) fail(pc, "mbarrier.init: there is already an mbarrier at shared address %u", mbar);
    check_shared(self, mbar, 8, Kind::Write, pc);
    Mbarrier m{};
    m.address = mbar;
    m.count = m.pending = count;
    m.initialised = self.stamp();
    m.completed = block.clocks.make();
    block.mbarriers.push_back(m);
    set_shared(under_way_stamp(self), mbar, 8);
}

void fence_mbarrier_init() {
    const Thread& self = *current;
    for (Mbarrier& m : self.block->mbarriers) m.fenced |= m.initialised.thread() == self.linear;
}

void mbarrier_invalidate(uint32_t mbar) {
    const void* pc = CALLER;
    Block& block = *current->block;
    Mbarrier& m = use(mbar, "mbarrier.inval", pc);
    if (m.has_waiters) fail(pc, "mbarrier.inval: threads still wait at the mbarrier at shared address %u", mbar);
    block.clocks.release(m.completed);
    block.mbarriers.erase(block.mbarriers.begin() + (&m - block.mbarriers.data()));
    set_shared(Stamp{}, mbar, 8);
}

void mbarrier_arrive(uint32_t mbar) {
    const void* pc = CALLER;
    arrive(*current, use(mbar, "mbarrier.arrive", pc), "mbarrier.arrive", pc);
}

void mbarrier_arrive_expect_tx(uint32_t mbar, uint32_t bytes) {
    const void* pc = CALLER;
    Mbarrier& m = use_async(mbar, "mbarrier.arrive.expect_tx", pc);
    m.transactions += bytes;
    arrive(*current, m, "mbarrier.arrive.expect_tx", pc);
}

void mbarrier_expect_tx(uint32_t mbar, uint32_t bytes) {
    use_async(mbar, "mbarrier.expect_tx", CALLER).transactions += bytes;
}

bool mbarrier_try_wait_parity(uint32_t mbar, uint32_t parity) {
    const void* pc = CALLER;
    Thread& self = *current;
    Block& block = *self.block;
    if (parity > 1) fail(pc, "mbarrier.try_wait: parity %u is neither 0 nor 1", parity);
    Mbarrier* m = &use(mbar, "mbarrier.try_wait", pc);
    if ((m->phase & 1) == parity) {
        self.state = State::AtMbarrier;
        self.operation = "mbarrier.try_wait";
        self.detail = mbar;
        self.pc = pc;
        m->has_waiters = true;
        m->waiting[self.warp->index] |= 1u << self.lane;
        park();
        m = &use(mbar, "mbarrier.try_wait", pc);
        if ((m->phase & 1) == parity) {
            block.counters.spins++;
            return false;
        }
    }
    Clock* next = block.clocks.join(self.knows, m->completed);
    block.clocks.release(self.knows);
    self.knows = next;
    return true;
}

}  // namespace emulator
