#include "launch.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <new>
#include <thread>

#include "fiber.h"

namespace emulator {

// ---- blocks are kept for later launches ---------------------------------------------------------------------------

namespace {

constexpr size_t GUARD = 64 * 1024;

unsigned char* map_shared() {
    // Guard pages on both sides: an access of the uninstrumented runtime that went wrong must not hit other memory.
    const size_t bytes = GUARD + SHARED_LIMIT + GUARD;
    void* memory = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    unsigned char* shared = static_cast<unsigned char*>(memory) + GUARD;
    if (mprotect(shared, SHARED_LIMIT, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    return shared;
}

std::mutex pool_mutex;
std::vector<std::unique_ptr<Block>> pool;

std::unique_ptr<Block> take_block() {
    const std::lock_guard<std::mutex> lock(pool_mutex);
    if (pool.empty()) return std::make_unique<Block>();
    std::unique_ptr<Block> block = std::move(pool.back());
    pool.pop_back();
    return block;
}

void give_back(std::unique_ptr<Block> block) {
    const std::lock_guard<std::mutex> lock(pool_mutex);
    pool.push_back(std::move(block));
}

}  // namespace

Block::Block() : threads(new Thread[MAX_THREADS]()), warps(), barriers(), shared(map_shared()), stacks(0) {
    shared_shadow.map(reinterpret_cast<uintptr_t>(shared), SHARED_LIMIT);
}

Block::~Block() {
    for (unsigned i = 0; i < stacks; i++) unmap_stack(threads[i].stack_low);
    delete[] threads;
    munmap(shared - GUARD, GUARD + SHARED_LIMIT + GUARD);
}

// ---- the order of blocks ------------------------------------------------------------------------------------------

uint64_t Launch::block_at(uint64_t place) const {
    switch (order) {
    case Order::Forward:
        return place;
    case Order::Reverse:
        return blocks - 1 - place;
    case Order::Random:
        break;
    }
    // A step that shares no factor with the number of blocks visits each once.
    uint64_t step = (seed * 2654435761ull >> 7) % blocks | 1;
    while (std::__gcd(step, blocks) != 1) step += 2;
    return (place * (step % blocks) + seed * 40503ull) % blocks;
}

namespace {

struct Outcome {
    std::mutex mutex;
    std::vector<std::pair<uint64_t, std::string>> reports;
    Counters counters{};
    std::vector<Traffic> traffic;
};

void work(Launch& launch, Outcome& outcome) {
    std::unique_ptr<Block> block = take_block();
    block->counters = Counters{};
    block->traffic.assign(outcome.traffic.size(), Traffic{});
    block->last_buffer = 0;
    block->shared_shadow.clear(launch.dynamic_shared);
    for (;;) {
        const uint64_t place = launch.next++;
        if (place >= launch.blocks || launch.stop) break;
        if (block->run(launch, launch.block_at(place))) continue;
        launch.stop = true;  // one fault is enough to report
        if (block->report.empty()) continue;
        const std::lock_guard<std::mutex> lock(outcome.mutex);
        outcome.reports.push_back({block->linear, std::move(block->report)});
    }
    {
        const std::lock_guard<std::mutex> lock(outcome.mutex);
        Counters& sum = outcome.counters;
        const Counters& own = block->counters;
        sum.switches += own.switches;
        sum.barriers += own.barriers;
        sum.collectives += own.collectives;
        sum.mma += own.mma;
        sum.async_copies += own.async_copies;
        sum.spins += own.spins;
        for (size_t i = 0; i < outcome.traffic.size(); i++) {
            outcome.traffic[i].read += block->traffic[i].read;
            outcome.traffic[i].written += block->traffic[i].written;
        }
    }
    give_back(std::move(block));
}

constexpr size_t PARAMETER_ALIGNMENT = 128;

size_t slot_of(const Parameter& parameter) {
    return (parameter.bytes + PARAMETER_ALIGNMENT - 1) / PARAMETER_ALIGNMENT * PARAMETER_ALIGNMENT;
}

}  // namespace

// ---- what a thread asks about itself ------------------------------------------------------------------------------

uint3 thread_index() { return current->index; }
uint3 block_index() { return current->block->index; }
dim3 block_extent() { return current->block->launch->extent; }
dim3 grid_extent() { return current->block->launch->grid; }
unsigned char* dynamic_shared() { return current->block->shared; }

uint32_t shared_address(const void* pointer) {
    return (uint32_t)(static_cast<const unsigned char*>(pointer) - current->block->shared) + SHARED_FIRST;
}

void* shared_pointer(uint32_t address) { return current->block->shared + ((ptrdiff_t)address - SHARED_FIRST); }

}  // namespace emulator

using namespace emulator;

extern "C" int emulator_launch(EmulatorLaunch* request, void (*report)(void*, const char*, size_t), void* context) {
    Launch launch;
    launch.entry = request->entry;
    launch.kernel = request->kernel;
    launch.grid = dim3(request->grid[0], request->grid[1], request->grid[2]);
    launch.extent = dim3(request->block[0], request->block[1], request->block[2]);
    launch.blocks = (uint64_t)request->grid[0] * request->grid[1] * request->grid[2];
    launch.threads = request->block[0] * request->block[1] * request->block[2];
    launch.dynamic_shared = request->dynamic_shared;
    launch.order = (Order)request->order;
    launch.seed = request->seed;
    launch.programmatic = request->programmatic != 0;
    launch.os_threads = (unsigned)std::min<uint64_t>(std::max(1u, request->os_threads), launch.blocks);
    launch.known_levels = Known::levels_for(launch.blocks);

    // Kernels see a copy of the argument values: aligned as on a device, and the only host memory besides buffers.
    const Entry& entry = *request->entry;
    size_t bytes = (entry.count + 1) * sizeof(void*) + PARAMETER_ALIGNMENT;
    for (uint32_t i = 0; i < entry.count; i++) bytes += slot_of(entry.parameters[i]);
    std::unique_ptr<unsigned char[]> parameters(new unsigned char[bytes + PARAMETER_ALIGNMENT]);
    void** arguments = reinterpret_cast<void**>(parameters.get());
    unsigned char* slot = parameters.get() + (entry.count + 1) * sizeof(void*);
    slot += -reinterpret_cast<uintptr_t>(slot) & (PARAMETER_ALIGNMENT - 1);
    for (uint32_t i = 0; i < entry.count; i++) {
        memcpy(slot, request->values[i], entry.parameters[i].bytes);
        arguments[i] = slot;
        slot += slot_of(entry.parameters[i]);
    }
    launch.arguments = arguments;

    std::vector<Buffer> buffers;
    for (uint64_t i = 0; i < request->buffer_count; i++) {
        const EmulatorBuffer& b = request->buffers[i];
        if (b.bytes)
            buffers.push_back({(uintptr_t)b.address, (uintptr_t)(b.address + b.bytes), b.name, b.writable != 0, b.constant != 0, false,
                               (unsigned)i, nullptr});
    }
    launch.memory.set_up(std::move(buffers), reinterpret_cast<uintptr_t>(parameters.get()),
                         bytes + PARAMETER_ALIGNMENT);

    Outcome outcome;
    outcome.traffic.resize(request->buffer_count);
    std::vector<std::thread> helpers;
    for (unsigned i = 1; i < launch.os_threads; i++) helpers.emplace_back([&] { work(launch, outcome); });
    work(launch, outcome);
    for (std::thread& helper : helpers) helper.join();

    request->switches = outcome.counters.switches;
    request->barriers = outcome.counters.barriers;
    request->collectives = outcome.counters.collectives;
    request->mma = outcome.counters.mma;
    request->async_copies = outcome.counters.async_copies;
    request->spins = outcome.counters.spins;
    for (uint64_t i = 0; i < request->buffer_count; i++) {
        request->buffers[i].read = outcome.traffic[i].read;
        request->buffers[i].written = outcome.traffic[i].written;
    }
    std::sort(outcome.reports.begin(), outcome.reports.end());
    for (const auto& [block, text] : outcome.reports) report(context, text.data(), text.size());
    return outcome.reports.empty() ? 0 : 1;
}
