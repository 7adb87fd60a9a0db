// Warpgroup products: D += A·Bᵀ with both operands in shared memory, 64 rows of D per four warps. PTX ISA, "Asynchronous
// Warpgroup Level Matrix Multiply-Accumulate Instructions".
//
// The four warps 4k … 4k + 3 of a block call together. Products run asynchronously: wgmma_fence() first, then a series of
// products, wgmma_commit(), wgmma_wait<n>(); until that wait neither the accumulators nor the operands may be touched. Shared
// memory written by ordinary stores needs async_proxy_fence() (ptx/bulk_copy.cuh) before.
//
// Accumulator [64, N]: with w = warp % 4, g = lane / 4, t = lane % 4, register i is
//   row 16·w + g + 8·((i / 2) % 2),  column 8·(i / 4) + 2·t + i % 2
//
// Operands are K-major tiles of 128-byte rows (64 values of 16 bits) in the 128-byte swizzle, at a multiple of 1024 bytes,
// exactly as tma_load_2d writes them.
#pragma once

#include "core.cuh"

#if defined(__CUDACC__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "ptx/wgmma.cuh needs sm_90a"
#endif

// Descriptor of an operand tile at this shared address. To step K by 16 within the 64 values of a row, add 32 bytes to the
// address. Fields: start / 16 (bits 0-13), leading offset 16 bytes (16-29, unused in this layout), 1024 bytes between
// groups of 8 rows (32-45), swizzle mode 1 = 128 bytes (62-63).
DEVICE uint64_t wgmma_descriptor(uint32_t address) {
    return static_cast<uint64_t>((address & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// Orders earlier register and shared-memory accesses before the next products. wgmma.fence
DEVICE void wgmma_fence() {
#ifdef __CUDACC__
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
    emulator::wgmma_fence();
#endif
}

// Closes the products issued since the last commit into a group. wgmma.commit_group
DEVICE void wgmma_commit() {
#ifdef __CUDACC__
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
    emulator::wgmma_commit();
#endif
}

// Waits until at most `Pending` of the youngest groups are under way. wgmma.wait_group
template <int Pending>
DEVICE void wgmma_wait() {
#ifdef __CUDACC__
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
#else
    emulator::wgmma_wait(Pending);
#endif
}

// D [64, 64] f32 += A [64, 16] bf16 · Bᵀ, B [64, 16] bf16. wgmma.mma_async.m64n64k16.f32.bf16
DEVICE void wgmma_m64n64k16_bf16(float (&d)[32], uint64_t a, uint64_t b) {
#ifdef __CUDACC__
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, 1, 1, 1, 0, 0;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "l"(a), "l"(b));
#else
    emulator::wgmma_m64n64k16_bf16(d, a, b);
#endif
}

// D [64, 64] f32 += A [64, 16] f16 · Bᵀ, B [64, 16] f16. wgmma.mma_async.m64n64k16.f32.f16
DEVICE void wgmma_m64n64k16_f16(float (&d)[32], uint64_t a, uint64_t b) {
#ifdef __CUDACC__
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, 1, 1, 1, 0, 0;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "l"(a), "l"(b));
#else
    emulator::wgmma_m64n64k16_f16(d, a, b);
#endif
}
