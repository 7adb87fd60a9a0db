// Barriers in shared memory that count arrivals and bytes. PTX ISA, "Parallel Synchronization: mbarrier".
//
// An mbarrier is 8 bytes of shared memory at an 8-byte boundary, given by its shared address. Its phase completes when
// `count` arrivals have come and every expected byte has been written by asynchronous copies; then it starts over. Waiting
// for parity p returns once the phase of that parity has completed: the first phase has parity 0, and a wait for parity 1
// on a fresh barrier returns at once. Arrivals release and waits acquire within the block.
//
// One thread initialises, then mbarrier_init_fence(), then __syncthreads().
#pragma once

#include "core.cuh"

#if defined(__CUDACC__) && __CUDA_ARCH__ < 900
#error "ptx/mbarrier.cuh needs sm_90 or later"
#endif

// A barrier of `count` arrivals per phase. mbarrier.init
DEVICE void mbarrier_init(uint32_t barrier, uint32_t count) {
#ifdef __CUDACC__
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
#else
    emulator::mbarrier_init(barrier, count);
#endif
}

// Makes initialised barriers visible to asynchronous copies. fence.mbarrier_init
DEVICE void mbarrier_init_fence() {
#ifdef __CUDACC__
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
    emulator::fence_mbarrier_init();
#endif
}

// Gives the 8 bytes back for other use; no thread may still wait. mbarrier.inval
DEVICE void mbarrier_invalidate(uint32_t barrier) {
#ifdef __CUDACC__
    asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
#else
    emulator::mbarrier_invalidate(barrier);
#endif
}

// One arrival. mbarrier.arrive
DEVICE void mbarrier_arrive(uint32_t barrier) {
#ifdef __CUDACC__
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#else
    emulator::mbarrier_arrive(barrier);
#endif
}

// One arrival that also expects `bytes` more from asynchronous copies in this phase. mbarrier.arrive.expect_tx
DEVICE void mbarrier_arrive_expect_bytes(uint32_t barrier, uint32_t bytes) {
#ifdef __CUDACC__
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#else
    emulator::mbarrier_arrive_expect_tx(barrier, bytes);
#endif
}

// Whether the phase of this parity has completed; may suspend the thread for a while first. mbarrier.try_wait.parity
DEVICE bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
#ifdef __CUDACC__
    uint32_t complete;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(complete)
        : "r"(barrier), "r"(parity)
        : "memory");
    return complete != 0;
#else
    return emulator::mbarrier_try_wait_parity(barrier, parity);
#endif
}

// Waits until the phase of this parity has completed.
DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    while (!mbarrier_try_wait(barrier, parity)) {
    }
}
