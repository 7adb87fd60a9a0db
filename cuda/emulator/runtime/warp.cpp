#include "warp.h"

#include "report.h"
#include "scheduler.h"

namespace emulator {

namespace {

constexpr uint32_t ALL = ~0u;

void complete(Warp& warp, const Meeting& meeting, uint32_t lanes, const Thread* runner) {
    meeting.run(warp, lanes);
    if (meeting.orders_memory) {
        Block& block = *warp.threads->block;
        Gathering gathering;
        for_lanes(lanes, [&](unsigned lane) { gathering.add(block.clocks, warp.threads[lane]); });
        Clock* together = gathering.finish(block.clocks);
        for_lanes(lanes, [&](unsigned lane) {
            Thread& thread = warp.threads[lane];
            block.clocks.release(thread.knows);
            thread.knows = ClockPool::retain(together);
        });
        block.clocks.release(together);
    }
    warp.arrived &= ~lanes;
    make_ready(warp, lanes & ~(runner ? 1u << runner->lane : 0));
}

// Two lanes that wait for each other must do so in the same operation with the same mask. Lanes that do not are nobody's
// mistake: half a warp may be in an operation of its own, and come later.
void check_against_others(Warp& warp, const Meeting& meeting, uint32_t mask, const void* pc) {
    if (!warp.arrived) {
        warp.alike = true;
        warp.first_arrival = {&meeting, nullptr, mask};
    } else if (warp.alike && warp.first_arrival.meeting == &meeting && warp.first_arrival.mask == mask) {
        return;  // as all that are there
    }
    warp.alike = !warp.arrived;
    const uint32_t bit = 1u << current->lane;
    for_lanes(warp.arrived & mask, [&](unsigned lane) {
        const Arrival& other = warp.arrivals[lane];
        if (!(other.mask & bit)) return;
        if (other.meeting != &meeting)
            fail(pc, "lanes of a warp meet in different operations: %s here, %s in lane %u", meeting.name,
                 other.meeting->name, lane);
        if (other.mask != mask)
            fail(pc, "%s: mask %08x here, %08x in lane %u, which is part of both", meeting.name, mask, other.mask,
                 lane);
    });
}

// Whether all of `lanes` wait in this operation with this mask.
bool all_there(const Warp& warp, const Meeting& meeting, uint32_t mask, uint32_t lanes) {
    if ((warp.arrived & lanes) != lanes) return false;
    if (warp.alike) return true;
    bool all = true;
    for_lanes(lanes, [&](unsigned lane) {
        const Arrival& arrival = warp.arrivals[lane];
        all &= arrival.meeting == &meeting && arrival.mask == mask;
    });
    return all;
}

}  // namespace

void meet(const Meeting& meeting, uint32_t mask, void* operand, const void* pc) {
    Thread& self = *current;
    Warp& warp = *self.warp;
    const uint32_t bit = 1u << self.lane;
    self.block->counters.collectives++;
    if (!(mask & bit)) fail(pc, "%s: lane %u is not in its own mask %08x", meeting.name, self.lane, mask);
    if (meeting.whole_warp && warp.exited)
        fail(pc, "%s needs all 32 lanes, but lanes %08x of warp %u do not exist or have ended", meeting.name,
             warp.exited, warp.index);
    check_against_others(warp, meeting, mask, pc);
    warp.arrivals[self.lane] = {&meeting, operand, mask};
    warp.arrived |= bit;
    self.pc = pc;
    const uint32_t lanes = mask & ~warp.exited;
    if (all_there(warp, meeting, mask, lanes)) {
        complete(warp, meeting, lanes, &self);
    } else {
        self.state = State::AtWarp;
        self.operation = meeting.name;
        park();
    }
}

void warp_thread_ended(Warp& warp) {
    while (warp.arrived) {
        uint32_t left = warp.arrived, done = 0;
        for (; left && !done; left &= left - 1) {
            const Arrival& arrival = warp.arrivals[__builtin_ctz(left)];
            const uint32_t lanes = arrival.mask & ~warp.exited;
            if (all_there(warp, *arrival.meeting, arrival.mask, lanes)) {
                complete(warp, *arrival.meeting, lanes, nullptr);
                done = lanes;
            }
        }
        if (!done) return;
    }
}

// ---- __syncwarp ---------------------------------------------------------------------------------------------------

void warp_barrier(uint32_t mask) {
    static const Meeting meeting{"__syncwarp", [](Warp&, uint32_t) {}, true, false};
    meet(meeting, mask, nullptr, __builtin_return_address(0));
}

// ---- shuffles -----------------------------------------------------------------------------------------------------

namespace {

struct ShuffleOperand {
    uint64_t value;
    unsigned source;
};

void run_shuffle(Warp& warp, uint32_t lanes) {
    uint64_t values[LANES];
    for_lanes(lanes, [&](unsigned lane) { values[lane] = operand<ShuffleOperand>(warp, lane).value; });
    for_lanes(lanes, [&](unsigned lane) {
        ShuffleOperand& o = operand<ShuffleOperand>(warp, lane);
        // The value of a lane that does not take part is undefined: poison.
        o.value = lanes >> o.source & 1 ? values[o.source] : 0xbad0bad0bad0bad0u;
    });
}

}  // namespace

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int lane, int width) {
    static const Meeting meetings[4] = {{"__shfl_sync", run_shuffle, false, false},
                                        {"__shfl_up_sync", run_shuffle, false, false},
                                        {"__shfl_down_sync", run_shuffle, false, false},
                                        {"__shfl_xor_sync", run_shuffle, false, false}};
    const void* pc = __builtin_return_address(0);
    if (width < 1 || width > 32 || (width & (width - 1)))
        fail(pc, "%s: width %d is not a power of two up to 32", meetings[(int)kind].name, width);
    const int self = current->lane, first = self & ~(width - 1);
    int source = self;
    switch (kind) {
    case Shuffle::Index:
        source = first + (lane & (width - 1));
        break;
    case Shuffle::Up:
        source = self - lane;
        break;
    case Shuffle::Down:
        source = self + lane;
        break;
    case Shuffle::Xor:
        source = self ^ lane;
        break;
    }
    // Out of the segment: one's own value. Xor may reach back into earlier segments.
    const bool inside = source < first + width && (kind == Shuffle::Xor ? source >= 0 : source >= first);
    ShuffleOperand o{value, (unsigned)(inside ? source : self)};
    meet(meetings[(int)kind], mask, &o, pc);
    return o.value;
}

// ---- votes, matches, reductions -----------------------------------------------------------------------------------

namespace {

struct VoteOperand {
    uint64_t value;
    uint32_t result;
};

void run_ballot(Warp& warp, uint32_t lanes) {
    uint32_t result = 0;
    for_lanes(lanes, [&](unsigned lane) { result |= (uint32_t)operand<VoteOperand>(warp, lane).value << lane; });
    for_lanes(lanes, [&](unsigned lane) { operand<VoteOperand>(warp, lane).result = result; });
}

uint32_t vote(const Meeting& meeting, uint32_t mask, bool predicate, const void* pc) {
    VoteOperand o{predicate, 0};
    meet(meeting, mask, &o, pc);
    return o.result;
}

void run_match(Warp& warp, uint32_t lanes) {
    for_lanes(lanes, [&](unsigned lane) {
        VoteOperand& o = operand<VoteOperand>(warp, lane);
        o.result = 0;
        for_lanes(lanes, [&](unsigned other) {
            o.result |= (uint32_t)(operand<VoteOperand>(warp, other).value == o.value) << other;
        });
    });
}

template <Reduction kind>
void run_reduce(Warp& warp, uint32_t lanes) {
    uint32_t result = (uint32_t)operand<VoteOperand>(warp, __builtin_ctz(lanes)).value;
    for_lanes(lanes & (lanes - 1), [&](unsigned lane) {
        const uint32_t x = (uint32_t)operand<VoteOperand>(warp, lane).value;
        switch (kind) {
        case Reduction::Add:
            result += x;
            break;
        case Reduction::MinS32:
            result = (int32_t)x < (int32_t)result ? x : result;
            break;
        case Reduction::MaxS32:
            result = (int32_t)x > (int32_t)result ? x : result;
            break;
        case Reduction::MinU32:
            result = x < result ? x : result;
            break;
        case Reduction::MaxU32:
            result = x > result ? x : result;
            break;
        case Reduction::And:
            result &= x;
            break;
        case Reduction::Or:
            result |= x;
            break;
        case Reduction::Xor:
            result ^= x;
            break;
        }
    });
    for_lanes(lanes, [&](unsigned lane) { operand<VoteOperand>(warp, lane).result = result; });
}

}  // namespace

uint32_t ballot(uint32_t mask, bool predicate) {
    static const Meeting meeting{"__ballot_sync", run_ballot, false, false};
    return vote(meeting, mask, predicate, __builtin_return_address(0));
}

bool vote_any(uint32_t mask, bool predicate) {
    static const Meeting meeting{"__any_sync", run_ballot, false, false};
    return vote(meeting, mask, predicate, __builtin_return_address(0)) != 0;
}

bool vote_all(uint32_t mask, bool predicate) {
    static const Meeting meeting{"__all_sync", run_ballot, false, false};
    return vote(meeting, mask, !predicate, __builtin_return_address(0)) == 0;
}

uint32_t match_any(uint32_t mask, uint64_t value) {
    static const Meeting meeting{"__match_any_sync", run_match, false, false};
    VoteOperand o{value, 0};
    meet(meeting, mask, &o, __builtin_return_address(0));
    return o.result;
}

uint32_t match_all(uint32_t mask, uint64_t value, int* all_equal) {
    static const Meeting meeting{"__match_all_sync", run_match, false, false};
    VoteOperand o{value, 0};
    meet(meeting, mask, &o, __builtin_return_address(0));
    const bool all = o.result == (mask & ~current->warp->exited);
    *all_equal = all;
    return all ? o.result : 0;
}

uint32_t reduce(Reduction kind, uint32_t mask, uint32_t value) {
    static const Meeting meetings[8] = {{"__reduce_add_sync", run_reduce<Reduction::Add>, false, false},
                                        {"__reduce_min_sync", run_reduce<Reduction::MinS32>, false, false},
                                        {"__reduce_max_sync", run_reduce<Reduction::MaxS32>, false, false},
                                        {"__reduce_min_sync", run_reduce<Reduction::MinU32>, false, false},
                                        {"__reduce_max_sync", run_reduce<Reduction::MaxU32>, false, false},
                                        {"__reduce_and_sync", run_reduce<Reduction::And>, false, false},
                                        {"__reduce_or_sync", run_reduce<Reduction::Or>, false, false},
                                        {"__reduce_xor_sync", run_reduce<Reduction::Xor>, false, false}};
    VoteOperand o{value, 0};
    meet(meetings[(int)kind], mask, &o, __builtin_return_address(0));
    return o.result;
}

}  // namespace emulator
