// cp.async: 4, 8 or 16 bytes from global to shared memory, copied as late as the memory model allows, at the wait.
//
// A destination is marked from issue to wait, and holds its old bytes (poison, at first) until then.
#include "async_copy.h"

#include <cstring>

#include "checker.h"
#include "mbarrier.h"
#include "report.h"

namespace emulator {

namespace {

#define CALLER __builtin_return_address(0)

// The mark carries no time of its own: it only has to be told from other operations of other threads.
Stamp mark_of(const Thread& thread) { return Stamp::make(thread.block->tag, AGENTS + thread.linear, 0, true); }

}  // namespace

void complete_copies(const Thread& issuer, const std::vector<CpAsync>& copies, size_t count, Stamp mark, Stamp done) {
    Block& block = *issuer.block;
    for (size_t i = 0; i < count; i++) {
        const CpAsync& c = copies[i];
        unsigned char* dst = block.shared + (c.dst - SHARED_FIRST);
        memcpy(dst, c.src, c.source_bytes);
        memset(dst + c.source_bytes, 0, c.bytes - c.source_bytes);
        complete_shared(issuer, mark, done, c.dst, c.bytes, Kind::Write, nullptr);
    }
}

void cp_async(uint32_t dst, const void* src, unsigned bytes, unsigned source_bytes) {
    const void* pc = CALLER;
    Thread& self = *current;
    if (bytes != 4 && bytes != 8 && bytes != 16) fail(pc, "cp.async of %u bytes: only 4, 8 and 16 exist", bytes);
    if (source_bytes > bytes) fail(pc, "cp.async: %u source bytes for a copy of %u", source_bytes, bytes);
    shared_bytes(dst, bytes, bytes, "cp.async", pc);
    if (reinterpret_cast<uintptr_t>(src) % bytes)
        fail(pc, "cp.async: source address %p is not a multiple of %u", src, bytes);
    if (source_bytes) check_access(src, source_bytes, Kind::Read, pc);
    mark_shared(self, mark_of(self), dst, bytes, Kind::Write, pc);
    self.copies.copies.push_back(
        {dst, (uint16_t)bytes, (uint16_t)source_bytes, static_cast<const unsigned char*>(src)});
    self.block->counters.async_copies++;
}

void cp_async_commit() { current->copies.group_ends.push_back(current->copies.copies.size()); }

void cp_async_wait(unsigned pending) {
    Thread& self = *current;
    CpAsyncQueue& queue = self.copies;
    if (pending == 0) complete_cp_async_arrivals(self);
    if (queue.group_ends.size() <= pending) return;
    const size_t groups = queue.group_ends.size() - pending;
    const size_t count = queue.group_ends[groups - 1];
    complete_copies(self, queue.copies, count, mark_of(self), self.stamp());
    queue.copies.erase(queue.copies.begin(), queue.copies.begin() + count);
    queue.group_ends.erase(queue.group_ends.begin(), queue.group_ends.begin() + groups);
    for (size_t& end : queue.group_ends) end -= count;
}

void cp_async_mbarrier_arrive_noinc(uint32_t mbar) {
    Thread& self = *current;
    PendingCopy arrival{};
    arrival.kind = PendingCopy::CpAsyncArrival;
    arrival.issuer = self.linear;
    arrival.mbar = mbar;
    arrival.async_stamp = mark_of(self).bits;
    arrival.copies.swap(self.copies.copies);
    for (size_t& end : self.copies.group_ends) end = 0;
    issue_pending(std::move(arrival), CALLER);
}

// ---- bulk stores: shared to global memory -------------------------------------------------------------------------

void bulk_store(void* dst, uint32_t src, uint32_t bytes) {
    const void* pc = CALLER;
    Thread& self = *current;
    if (bytes % 16) fail(pc, "cp.async.bulk: %u bytes are not a multiple of 16", bytes);
    shared_bytes(src, bytes, 16, "cp.async.bulk", pc);
    if (reinterpret_cast<uintptr_t>(dst) % 16) fail(pc, "cp.async.bulk: destination %p is not a multiple of 16", dst);
    if (!bytes) return;
    const Stamp mark = under_way_stamp(self);
    self.step_time();  // so that two stores of one thread have different marks
    mark_shared(self, mark, src, bytes, Kind::Read, pc);
    check_proxy_fence(self, src, bytes, Kind::Read, "cp.async.bulk", pc);
    mark_global(self, mark, dst, bytes, pc);
    self.stores.stores.push_back({static_cast<unsigned char*>(dst), src, bytes, false, mark.bits});
    self.block->counters.async_copies++;
}

void bulk_commit() { current->stores.group_ends.push_back(current->stores.stores.size()); }

namespace {

// The source is read, and the copy made, no earlier than here.
void read_source(Thread& self, BulkStore& store, const void* pc) {
    if (store.source_read) return;
    store.source_read = true;
    memcpy(store.dst, self.block->shared + (store.src - SHARED_FIRST), store.bytes);
    complete_shared(self, {store.async_stamp}, self.stamp(), store.src, store.bytes, Kind::Read, pc);
}

size_t stores_before(const BulkStoreQueue& queue, unsigned pending) {
    return queue.group_ends.size() <= pending ? 0 : queue.group_ends[queue.group_ends.size() - pending - 1];
}

}  // namespace

void bulk_wait_read(unsigned pending) {
    Thread& self = *current;
    const size_t count = stores_before(self.stores, pending);
    for (size_t i = 0; i < count; i++) read_source(self, self.stores.stores[i], CALLER);
}

void bulk_wait(unsigned pending) {
    Thread& self = *current;
    BulkStoreQueue& queue = self.stores;
    const size_t count = stores_before(queue, pending);
    for (size_t i = 0; i < count; i++) {
        BulkStore& store = queue.stores[i];
        read_source(self, store, CALLER);
        complete_global({store.async_stamp}, self.stamp(), store.dst, store.bytes);
    }
    if (queue.group_ends.size() > pending)
        queue.group_ends.erase(queue.group_ends.begin(), queue.group_ends.end() - pending);
    queue.stores.erase(queue.stores.begin(), queue.stores.begin() + count);
    for (size_t& end : queue.group_ends) end -= count;
}

// ---- the async proxy's fence --------------------------------------------------------------------------------------

void fence_proxy_async() {
    Thread& self = *current;
    Block& block = *self.block;
    self.fenced_time = self.time;  // covers all writes so far ...
    self.step_time();              // ... and none that follow
    block.clocks.release(self.fenced_knows);
    self.fenced_knows = ClockPool::retain(self.knows);
}

void check_thread_end(Thread& self) {
    if (!self.copies.copies.empty())
        fail(nullptr, "the thread ended with %zu cp.async copies on their way: wait for them",
             self.copies.copies.size());
    for (const BulkStore& store : self.stores.stores)
        if (!store.source_read)
            fail(nullptr, "the thread ended while a bulk store still reads its shared memory: wait for it");
    if (!self.warp->products.empty() && self.lane == 0)
        fail(nullptr, "the warp ended with %zu wgmma products on their way: wait for them", self.warp->products.size());
}

}  // namespace emulator
