// One-dimensional bulk copies by the copy engine of the SM: one thread moves kilobytes. PTX ISA, "cp.async.bulk".
//
// Addresses and sizes are multiples of 16. Loads complete on an mbarrier, which must expect their bytes; stores are grouped
// and waited for like cp.async, by the thread that issued them. The copies work through the async proxy: shared memory
// written by ordinary stores needs async_proxy_fence() before a bulk store reads it.
#pragma once

#include "core.cuh"

#if defined(__CUDACC__) && __CUDA_ARCH__ < 900
#error "ptx/bulk_copy.cuh needs sm_90 or later"
#endif

// `bytes` from global to shared memory; completes on `barrier`. cp.async.bulk.shared::cluster.global.mbarrier
DEVICE void bulk_load(uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier) {
#ifdef __CUDACC__
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(destination),
                 "l"(source), "r"(bytes), "r"(barrier)
                 : "memory");
#else
    emulator::bulk_load(destination, source, bytes, barrier);
#endif
}

// The same under an L2 policy of ptx/cp_async.cuh. cp.async.bulk with .L2::cache_hint
DEVICE void bulk_load_policy(uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier, uint64_t policy) {
#ifdef __CUDACC__
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                     destination),
                 "l"(source), "r"(bytes), "r"(barrier), "l"(policy)
                 : "memory");
#else
    static_cast<void>(policy);
    emulator::bulk_load(destination, source, bytes, barrier);
#endif
}

// `bytes` from shared to global memory. cp.async.bulk.global.shared::cta.bulk_group
DEVICE void bulk_store(void* destination, uint32_t source, uint32_t bytes) {
#ifdef __CUDACC__
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(destination), "r"(source), "r"(bytes)
                 : "memory");
#else
    emulator::bulk_store(destination, source, bytes);
#endif
}

// Closes this thread's bulk stores into a group. cp.async.bulk.commit_group
DEVICE void bulk_commit() {
#ifdef __CUDACC__
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#else
    emulator::bulk_commit();
#endif
}

// Waits until at most `Pending` of this thread's youngest groups are not yet complete. cp.async.bulk.wait_group
template <int Pending>
DEVICE void bulk_wait() {
#ifdef __CUDACC__
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory");
#else
    emulator::bulk_wait(Pending);
#endif
}

// Waits until at most `Pending` groups still read shared memory, which may then be overwritten. cp.async.bulk.wait_group.read
template <int Pending>
DEVICE void bulk_wait_read() {
#ifdef __CUDACC__
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
#else
    emulator::bulk_wait_read(Pending);
#endif
}

// Orders this thread's ordinary accesses to shared memory before later accesses of the async proxy (bulk copies, TMA,
// wgmma). fence.proxy.async.shared::cta
DEVICE void async_proxy_fence() {
#ifdef __CUDACC__
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
    emulator::fence_proxy_async();
#endif
}
