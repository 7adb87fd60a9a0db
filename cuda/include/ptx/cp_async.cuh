// Asynchronous copies from global to shared memory, in groups. PTX ISA, "Data Movement: cp.async" and "cp.async.wait_group".
//
// A thread issues copies, closes them into a group, and later waits until at most so many of its groups are still under
// way; then its own copies of the older groups have landed. What another thread copied needs a barrier after that wait.
// The destination may be overwritten from the moment of issue on, so a barrier must separate the last read of a slot from
// the copy that refills it.
//
// Both addresses are multiples of the size. The `_zfill` forms copy `source_bytes` (0 up to the size) and fill the rest
// with zeros; with 0 the source is not read, but its address must still be valid to form, and aligned: ptxas keeps what is not copied in
// the low bits of the source address, so that a misaligned one copies another number of bytes instead of faulting. `.cg` (16 bytes only) bypasses L1,
// `.ca` keeps the line there.
#pragma once

#include "core.cuh"

// 16 bytes through L2 only. cp.async.cg
DEVICE void cp_async_16(uint32_t destination, const void* source) {
#ifdef __CUDACC__
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(destination), "l"(source) : "memory");
#else
    emulator::cp_async(destination, source, 16, 16);
#endif
}

// 16 bytes through L2 only, and L2 fetches the whole 128-byte line: for runs of at least 128 bytes. cp.async.cg.L2::128B
DEVICE void cp_async_16_line(uint32_t destination, const void* source) {
#ifdef __CUDACC__
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(destination), "l"(source) : "memory");
#else
    emulator::cp_async(destination, source, 16, 16);
#endif
}

// 16 bytes, of which the first `source_bytes` are copied and the rest zero. cp.async.cg with src-size
DEVICE void cp_async_16_zfill(uint32_t destination, const void* source, uint32_t source_bytes) {
#ifdef __CUDACC__
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(source_bytes) : "memory");
#else
    emulator::cp_async(destination, source, 16, source_bytes);
#endif
}

// An L2 policy that lets lines read once go first, for cp_async_16_policy. createpolicy.fractional.L2::evict_first
DEVICE uint64_t l2_evict_first_policy() {
#ifdef __CUDACC__
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
#else
    return 0;
#endif
}

// An L2 policy that keeps lines which every block reads. createpolicy.fractional.L2::evict_last
DEVICE uint64_t l2_evict_last_policy() {
#ifdef __CUDACC__
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
#else
    return 0;
#endif
}

// 16 bytes under an L2 policy. cp.async.cg.L2::cache_hint
DEVICE void cp_async_16_policy(uint32_t destination, const void* source, uint64_t policy) {
#ifdef __CUDACC__
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "l"(policy)
                 : "memory");
#else
    static_cast<void>(policy);
    emulator::cp_async(destination, source, 16, 16);
#endif
}

// 8 bytes. cp.async.ca
DEVICE void cp_async_8(uint32_t destination, const void* source) {
#ifdef __CUDACC__
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(destination), "l"(source) : "memory");
#else
    emulator::cp_async(destination, source, 8, 8);
#endif
}

// 8 bytes, of which the first `source_bytes` are copied and the rest zero. cp.async.ca with src-size
DEVICE void cp_async_8_zfill(uint32_t destination, const void* source, uint32_t source_bytes) {
#ifdef __CUDACC__
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(destination), "l"(source), "r"(source_bytes) : "memory");
#else
    emulator::cp_async(destination, source, 8, source_bytes);
#endif
}

// 4 bytes. cp.async.ca
DEVICE void cp_async_4(uint32_t destination, const void* source) {
#ifdef __CUDACC__
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(destination), "l"(source) : "memory");
#else
    emulator::cp_async(destination, source, 4, 4);
#endif
}

// 4 bytes, of which the first `source_bytes` are copied and the rest zero. cp.async.ca with src-size
DEVICE void cp_async_4_zfill(uint32_t destination, const void* source, uint32_t source_bytes) {
#ifdef __CUDACC__
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(destination), "l"(source), "r"(source_bytes) : "memory");
#else
    emulator::cp_async(destination, source, 4, source_bytes);
#endif
}

// Closes the copies issued since the last commit into a group; an empty group counts too. cp.async.commit_group
DEVICE void cp_async_commit() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    emulator::cp_async_commit();
#endif
}

// Waits until at most `Pending` of this thread's youngest groups are under way. cp.async.wait_group
template <int Pending>
DEVICE void cp_async_wait() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#else
    emulator::cp_async_wait(Pending);
#endif
}
