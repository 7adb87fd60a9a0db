// Vector clocks: which accesses of which threads happened before the present.
//
// Every thread counts its own time, and steps it whenever it publishes what it did so far (at a barrier, an arrival, a
// release). A Clock says up to which time its owner has heard of each thread of the block; an access of thread u at
// time t happened before whatever the owner does next if the owner's clock has t or more for u. Clocks are immutable
// once shared, so that after a barrier all threads hold the same one.
//
// The block's asynchronous copies run beside the threads: they complete in the name of one of 32 agents, whose times
// come before the threads' in each clock.
//
// Of other blocks a clock knows what came through acquire/release on a global word: a persistent map from block to that
// block's times, shared between clocks of all blocks.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "shadow.h"

namespace emulator {

struct Thread;

// A persistent map from block to the times of its threads: a 16-way trie whose nodes never change, with shared
// subtrees.
class Known {
public:
    struct Node;  // level 0: the times of one block; else 16 children

    Known() = default;
    Known(const Known& other);
    Known(Known&& other) noexcept : root(other.root) { other.root = nullptr; }
    Known& operator=(Known other) noexcept;
    ~Known();

    bool empty() const { return root == nullptr; }
    // Times of `block`'s agents and threads, or null where nothing is known.
    const uint32_t* find(uint64_t block) const;
    // Adds all that `other` knows.
    void join(const Known& other);
    // Replaces what is known of `block`. `levels` is that of the launch: see levels_for.
    void set(unsigned levels, uint64_t block, const uint32_t* times, unsigned entries);
    // Levels that a map needs for so many blocks.
    static unsigned levels_for(uint64_t blocks);

private:
    const Node* root = nullptr;
};

struct Clock {
    uint32_t references;
    Known blocks;
    uint32_t* time;  // agents, then threads of the block
};

// The clocks of one block. All of them die with the block, also when it is abandoned in the middle of something.
class ClockPool {
public:
    ~ClockPool();
    // Forgets all clocks; the next ones have `entries` times.
    void reset(unsigned entries);
    // A clock that knows nothing. The caller owns one reference.
    Clock* make();
    Clock* copy(const Clock& from);
    static Clock* retain(Clock* clock) {
        clock->references++;
        return clock;
    }
    void release(Clock* clock) {
        if (clock && --clock->references == 0) free.push_back(clock);
    }
    void join_into(Clock& sum, const Clock& other) const;
    // `a` joined with `b`: an owned reference. Remembers the last pair, because whole warps acquire the same thing.
    Clock* join(Clock* a, Clock* b);
    unsigned entries() const { return entry_count; }

private:
    void destroy_all();
    unsigned entry_count = 0;
    std::vector<Clock*> all, free;
    Clock *memo_a = nullptr, *memo_b = nullptr, *memo_result = nullptr;
};

// What a set of threads, arriving one after another, knows together.
class Gathering {
public:
    // Takes in all that the thread did and knows, and steps the thread's time.
    void add(ClockPool& pool, Thread& thread);
    // Takes in one asynchronous operation.
    void add_agent(ClockPool& pool, unsigned agent, uint32_t time);
    // The result, owned by the caller; the next gathering begins.
    Clock* finish(ClockPool& pool);
    // Forgets everything without touching the pool, for a new block.
    void abandon() { sum = last = nullptr; }

private:
    Clock* sum = nullptr;
    Clock* last = nullptr;  // joined last: most arrivals bring the same clock
};

}  // namespace emulator
