// How blocks speak to each other, and barriers of part of a block.
//
// PTX ISA, "Memory Consistency Model": a release store or atomic makes everything its thread wrote before (and, through a
// block barrier before it, everything the block wrote) visible to whoever acquires the value, anywhere on the GPU. These
// wrappers are the only way for blocks to exchange data: the emulator reports a read of another block's word that was not
// released to the reader. There is no fence here on purpose: a fence does not say which word carries the order, so that
// nothing could check its use.
#pragma once

#include "core.cuh"

// ld.acquire.gpu
DEVICE uint32_t load_acquire_u32(const uint32_t* address) {
#ifdef __CUDACC__
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
#else
    return emulator::load_acquire_u32(address);
#endif
}

// ld.acquire.gpu
DEVICE uint64_t load_acquire_u64(const uint64_t* address) {
#ifdef __CUDACC__
    uint64_t value;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return value;
#else
    return emulator::load_acquire_u64(address);
#endif
}

// st.release.gpu
DEVICE void store_release_u32(uint32_t* address, uint32_t value) {
#ifdef __CUDACC__
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
#else
    emulator::store_release_u32(address, value);
#endif
}

// st.release.gpu
DEVICE void store_release_u64(uint64_t* address, uint64_t value) {
#ifdef __CUDACC__
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
#else
    emulator::store_release_u64(address, value);
#endif
}

// Adds `value` and returns the old value; releases what this thread wrote and acquires what earlier adders released: a
// last arriver that sees count - 1 may read what all others wrote. atom.acq_rel.gpu.add
DEVICE uint32_t atomic_add_acq_rel_u32(uint32_t* address, uint32_t value) {
#ifdef __CUDACC__
    uint32_t old;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(value) : "memory");
    return old;
#else
    return emulator::atomic_add_acq_rel_u32(address, value);
#endif
}

// atom.acq_rel.gpu.add
DEVICE uint64_t atomic_add_acq_rel_u64(uint64_t* address, uint64_t value) {
#ifdef __CUDACC__
    uint64_t old;
    asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;" : "=l"(old) : "l"(address), "l"(value) : "memory");
    return old;
#else
    return emulator::atomic_add_acq_rel_u64(address, value);
#endif
}

// Adds `value` and returns the old value, releasing what this thread wrote, acquiring nothing: whoever needs the others'
// writes follows with load_acquire_u32 on the same word. atom.release.gpu.add
DEVICE uint32_t atomic_add_release_u32(uint32_t* address, uint32_t value) {
#ifdef __CUDACC__
    uint32_t old;
    asm volatile("atom.release.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(value) : "memory");
    return old;
#else
    return emulator::atomic_add_release_u32(address, value);
#endif
}

// Stores `desired` if the word holds `expected`; returns the old value either way. atom.acq_rel.gpu.cas
DEVICE uint32_t atomic_cas_acq_rel_u32(uint32_t* address, uint32_t expected, uint32_t desired) {
#ifdef __CUDACC__
    uint32_t old;
    asm volatile("atom.acq_rel.gpu.global.cas.b32 %0, [%1], %2, %3;"
                 : "=r"(old)
                 : "l"(address), "r"(expected), "r"(desired)
                 : "memory");
    return old;
#else
    return emulator::atomic_cas_acq_rel_u32(address, expected, desired);
#endif
}

// atom.acq_rel.gpu.cas
DEVICE uint64_t atomic_cas_acq_rel_u64(uint64_t* address, uint64_t expected, uint64_t desired) {
#ifdef __CUDACC__
    uint64_t old;
    asm volatile("atom.acq_rel.gpu.global.cas.b64 %0, [%1], %2, %3;"
                 : "=l"(old)
                 : "l"(address), "l"(expected), "l"(desired)
                 : "memory");
    return old;
#else
    return emulator::atomic_cas_acq_rel_u64(address, expected, desired);
#endif
}

// Waits until all threads of the block have come, and orders memory between them. With Roles they may come to it at different places of
// the code, as warps with roles do to a function that is inlined for each: PTX allows that without `.aligned` alone, and __syncthreads()
// is aligned. The emulator tells barriers from one another by the line that calls. barrier.sync 0
#ifdef __CUDACC__
template <bool Roles>
DEVICE void block_barrier() {
    if constexpr (Roles) {
        asm volatile("barrier.sync 0;" ::: "memory");
    } else {
        __syncthreads();
    }
}
#else
template <bool Roles>
DEVICE void block_barrier(const char* file = __builtin_FILE(), unsigned line = __builtin_LINE()) {
    emulator::block_barrier(emulator::Vote::None, 0, file, line);
}
#endif

// Waits until `threads` threads (a multiple of 32, whole warps) have come to barrier `id` (1-15; 0 is __syncthreads),
// those that only arrived included; orders memory between them. barrier.sync
DEVICE void named_barrier_sync(uint32_t id, uint32_t threads) {
#ifdef __CUDACC__
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
    emulator::named_barrier_sync(id, threads);
#endif
}

// Counts the calling warp into barrier `id` without waiting: the producer's half of named_barrier_sync. barrier.arrive
DEVICE void named_barrier_arrive(uint32_t id, uint32_t threads) {
#ifdef __CUDACC__
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
    emulator::named_barrier_arrive(id, threads);
#endif
}

// Programmatic dependent launch: waits until the kernels before this one on the stream have finished and their writes are
// visible. Before sm_90 every launch starts in that state. griddepcontrol.wait
DEVICE void grid_dependency_wait() {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
#else
    emulator::grid_dependency_wait();
#endif
}

// Programmatic dependent launch: lets the next kernel of the stream start once every block has come here or ended. That
// kernel may not read this one's output before grid_dependency_wait. griddepcontrol.launch_dependents
DEVICE void grid_dependency_launch() {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
#else
    emulator::grid_dependency_launch();
#endif
}
