// The running block: its threads, warps, barriers and everything else that lives and dies with it.
//
// A Block object belongs to one OS thread at a time and runs one block of the grid after another; stacks, shared
// memory and shadow are kept from block to block. `current` is the CUDA thread whose fiber runs on this OS thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "clock.h"
#include "emulator_api.h"
#include "shadow.h"

namespace emulator {

struct Block;
struct Launch;
struct Warp;

constexpr unsigned LANES = 32;
constexpr unsigned MAX_THREADS = 1024;
constexpr unsigned MAX_WARPS = MAX_THREADS / LANES;
constexpr unsigned NAMED_BARRIERS = 16;
constexpr uint32_t SHARED_LIMIT = 227 * 1024;
constexpr uint32_t SHARED_FIRST =
    1024;  // shared address of the first byte, so that a null shared address is out of bounds

enum class Order : uint32_t { Forward, Reverse, Random };

enum class State : uint8_t { Ready, AtWarp, AtBarrier, AtMbarrier, Finished };

// cp.async: copies of one thread, oldest first, and how many of them each committed group ends after.
struct CpAsync {
    uint32_t dst;
    uint16_t bytes, source_bytes;
    const unsigned char* src;
};
struct CpAsyncQueue {
    std::vector<CpAsync> copies;
    std::vector<size_t> group_ends;
};

// cp.async.bulk shared -> global: likewise. A store reads its source first and is written later.
struct BulkStore {
    unsigned char* dst;
    uint32_t src, bytes;
    bool source_read;
    uint64_t async_stamp;  // under which source and destination are marked
};
struct BulkStoreQueue {
    std::vector<BulkStore> stores;
    std::vector<size_t> group_ends;
};

struct Thread {
    // scheduler
    void* stack_pointer;
    uintptr_t stack_low;
    Block* block;
    Warp* warp;
    uint3 index;
    uint16_t linear;
    uint8_t lane;
    State state;
    void* fake_stack;  // AddressSanitizer's
    // where it waits, for reports
    const char* operation;
    const void* pc;
    uint32_t detail;  // barrier id or mbarrier address
    const void* polled;
    uint64_t polled_value;
    // programmatic dependent launch
    bool dependency_waited;
    uint32_t early_access;  // place of an access to what an earlier kernel may still write
    // checker
    uint32_t time;
    uint32_t fenced_time;  // of the last fence.proxy.async
    Clock* knows;
    Clock* fenced_knows;
    // asynchronous copies
    CpAsyncQueue copies;
    BulkStoreQueue stores;

    uint64_t stamp_bits;  // of `time`

    void step_time() {
        time++;
        stamp_bits += 1ull << Stamp::TIME_SHIFT;
    }
    Stamp stamp() const { return {stamp_bits}; }
};

struct Meeting;

// A lane that waits for its warp.
struct Arrival {
    const Meeting* meeting;
    void* operand;
    uint32_t mask;
};

struct Wgmma {
    uint64_t a, b;
    unsigned n;
    float* d[LANES];
    const uint32_t* a_registers[LANES];
    bool in_registers, add, bf16;
    const void* pc;
    Stamp mark;  // on its operands
};

struct Warp {
    Thread* threads;
    unsigned index;
    uint32_t ready, exited, arrived;  // one bit per lane; lanes that do not exist count as exited
    uint32_t last_yield;
    Arrival arrivals[LANES];
    bool alike;  // all that have arrived are in the same operation with the same mask: that of first_arrival
    Arrival first_arrival;
    // wgmma
    bool wgmma_fenced;
    std::vector<Wgmma> products;
    std::vector<size_t> product_group_ends;
};

struct Barrier {
    uint32_t arrived, expected;
    uint32_t participants[MAX_WARPS], waiting[MAX_WARPS];
    const char* file;
    unsigned line;
    Vote vote;
    int votes, result;
    uint16_t first_thread;
    Gathering gathering;
};

struct Mbarrier {
    uint32_t address;
    uint32_t count, pending;
    int64_t transactions;  // bytes expected and not yet copied
    uint32_t phase;
    Stamp initialised;
    bool fenced;  // the initialisation, for the async proxy
    Gathering arriving;
    Clock* completed;  // what the last phase's arrivals knew
    bool has_waiters;
    uint32_t waiting[MAX_WARPS];
};

// An asynchronous operation that ends at an mbarrier and has been issued, not performed.
struct PendingCopy {
    enum Kind : uint8_t { Bulk, Tile, CpAsyncArrival } kind;
    uint16_t issuer;
    uint32_t mbar, dst, bytes;
    const unsigned char* src;
    TensorMap map;
    int x, y, z;
    uint64_t async_stamp;
    std::vector<CpAsync> copies;
};

struct Counters {
    uint64_t switches, barriers, collectives, mma, async_copies, spins;
};

struct Traffic {
    uint64_t read, written;
};

struct Block {
    Launch* launch;
    uint3 index;
    uint64_t linear;
    uint64_t tag;  // linear + 1, in stamps
    unsigned threads_in_block, warps_in_block, alive;
    uint32_t ready_warps;
    uint32_t random;
    uint64_t progress;  // counts whatever lets somebody go on
    uint64_t spin_progress, spin_rounds;
    bool stuck;
    Thread* threads;
    Warp warps[MAX_WARPS];
    Barrier barriers[NAMED_BARRIERS];
    std::vector<Mbarrier> mbarriers;
    std::vector<PendingCopy> pending_copies;
    uint32_t agent_time[AGENTS];

    unsigned char* shared;    // the dynamic shared memory
    uint32_t dynamic_shared;  // its size in this launch
    Order order;
    Shadow shared_shadow;
    ClockPool clocks;
    unsigned last_buffer;
    std::vector<Traffic> traffic;
    Counters counters;

    bool failed;
    std::string report;

    void* main_stack_pointer;
    void* main_fake_stack;
    const void* main_stack_low;
    size_t main_stack_bytes;
    unsigned stacks;

    Block();
    ~Block();
    Block(const Block&) = delete;
    // Runs one block of the launch; false when it was found at fault, with `report` set.
    bool run(Launch& launch, uint64_t linear_index);
};

extern thread_local Thread* current;

}  // namespace emulator
