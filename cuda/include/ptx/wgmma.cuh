// Warpgroup products: D = A·Bᵀ, or D += A·Bᵀ, 64 rows of D per four warps. PTX ISA, "Asynchronous Warpgroup Level Matrix
// Multiply-Accumulate Instructions".
//
// The four warps 4k … 4k + 3 of a block call together. Products run asynchronously: wgmma_fence() first, then a series of
// products, wgmma_commit(), wgmma_wait<n>(); until that wait neither the accumulators nor the operands, registers of A among
// them, may be touched. Shared memory written by ordinary stores or cp.async needs async_proxy_fence() (ptx/bulk_copy.cuh) before.
//
// Accumulator [64, N]: with w = warp % 4, g = lane / 4, t = lane % 4, register i is
//   row 16·w + g + 8·((i / 2) % 2),  column 8·(i / 4) + 2·t + i % 2
// A in registers [64, 16]: four, each with two values of row 16·w + g, and + 8 in the second and the fourth, of columns 2·t and
// 2·t + 1, and + 8 in the third and the fourth: those of mma m16n8k16.
//
// Operands in shared memory lie in rows of 128 bytes (64 values of 16 bits) in the 128-byte swizzle, at a multiple of 1024 bytes,
// exactly as tma_load_2d writes them:
//   K-major, A and B:  a row holds 64 values of K; eight rows of A or B after another are 1024 bytes.
//   N-major, B alone:  a row holds 64 columns of B at one value of K; eight values of K after another are 1024 bytes, and the next
//                      64 columns lie `panel_bytes` further on.
#pragma once

#include "core.cuh"
#include "types.cuh"

#if defined(__CUDACC__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "ptx/wgmma.cuh needs sm_90a"
#endif

// Descriptor of a K-major operand at this shared address. To step K by 16 within the 64 values of a row, step by 32 bytes. Fields:
// start / 16 (bits 0-13), leading offset / 16 (16-29, unused in this layout), 1024 bytes / 16 between groups of 8 rows (32-45),
// swizzle mode 1 = 128 bytes (62-63).
DEVICE uint64_t wgmma_descriptor(uint32_t address) {
    return static_cast<uint64_t>((address & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// Descriptor of an N-major operand at this shared address. To step K by 16, step by 2048 bytes. The leading offset is that between
// panels of 64 columns.
DEVICE uint64_t wgmma_descriptor_n_major(uint32_t address, uint32_t panel_bytes) {
    return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>((panel_bytes & 0x3ffff) >> 4) << 16 | 64ull << 32
         | 1ull << 62;
}

// The descriptor of the same layout `bytes` further on, a multiple of 16 that stays within shared memory: one addition to its low
// word, where a descriptor of its own would take six instructions.
DEVICE uint64_t wgmma_step(uint64_t descriptor, uint32_t bytes) {
    return (descriptor & 0xffffffff00000000ull) | static_cast<uint32_t>(static_cast<uint32_t>(descriptor) + bytes / 16);
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

// Gives registers of this warpgroup back, down to `Count` per thread (a multiple of 8). setmaxnreg.dec
template <int Count>
DEVICE void give_registers() {
#ifdef __CUDACC__
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
#endif
}

// Waits for registers that others give, up to `Count` per thread (a multiple of 8). setmaxnreg.inc
template <int Count>
DEVICE void take_registers() {
#ifdef __CUDACC__
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
#endif
}

// The products themselves. Element is f16 or bf16; `add` is whether D is added to, or overwritten.
//   wgmma_ss:  D [64, N] f32, A [64, 16] and B [N, 16] in shared memory, K-major. wgmma.mma_async.m64nNk16
//   wgmma_rs:  A [64, 16] in registers, B [16, N] in shared memory, N-major. wgmma.mma_async.m64nNk16 with trans-b
template <class Element, uint32_t N>
struct Wgmma;

#ifdef __CUDACC__

// D's registers: in the text of an instruction, and as operands of its asm statement.
#define WGMMA_TEXT_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_TEXT_64 \
    WGMMA_TEXT_32 ", " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_OPERANDS_32 \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
    "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
    "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
    "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define WGMMA_OPERANDS_64 \
    WGMMA_OPERANDS_32, \
    "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
    "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
    "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
    "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])

// Both forms for N columns: D has REGISTERS, and the operands behind it have the numbers P0 to P5.
#define WGMMA_FORMS(ELEMENT, N, REGISTERS, P0, P1, P2, P3, P4, P5)                                                              \
    template <>                                                                                                                \
    struct Wgmma<ELEMENT, N> {                                                                                                  \
        static DEVICE void ss(float (&d)[REGISTERS], uint64_t a, uint64_t b, bool add) {                                        \
            asm volatile("{\n"                                                                                                  \
                         ".reg .pred p;\n"                                                                                      \
                         "setp.ne.u32 p, %" #P2 ", 0;\n"                                                                        \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #ELEMENT "." #ELEMENT " {" WGMMA_TEXT_##REGISTERS    \
                         "}, %" #P0 ", %" #P1 ", p, 1, 1, 0, 0;\n"                                                              \
                         "}\n"                                                                                                  \
                         : WGMMA_OPERANDS_##REGISTERS                                                                           \
                         : "l"(a), "l"(b), "r"(static_cast<uint32_t>(add)));                                                    \
        }                                                                                                                       \
        static DEVICE void rs(float (&d)[REGISTERS], const uint32_t (&a)[4], uint64_t b, bool add) {                            \
            asm volatile("{\n"                                                                                                  \
                         ".reg .pred p;\n"                                                                                      \
                         "setp.ne.u32 p, %" #P5 ", 0;\n"                                                                        \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #ELEMENT "." #ELEMENT " {" WGMMA_TEXT_##REGISTERS    \
                         "}, {%" #P0 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4 ", p, 1, 1, 1;\n"                                 \
                         "}\n"                                                                                                  \
                         : WGMMA_OPERANDS_##REGISTERS                                                                           \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<uint32_t>(add)));                \
        }                                                                                                                       \
    };

WGMMA_FORMS(f16, 64, 32, 32, 33, 34, 35, 36, 37)
WGMMA_FORMS(bf16, 64, 32, 32, 33, 34, 35, 36, 37)
WGMMA_FORMS(f16, 128, 64, 64, 65, 66, 67, 68, 69)
WGMMA_FORMS(bf16, 128, 64, 64, 65, 66, 67, 68, 69)

#undef WGMMA_FORMS
#undef WGMMA_OPERANDS_64
#undef WGMMA_OPERANDS_32
#undef WGMMA_TEXT_64
#undef WGMMA_TEXT_32

#else

template <class Element>
constexpr bool WGMMA_BF16 = false;
template <>
constexpr bool WGMMA_BF16<bf16> = true;

template <class Element, uint32_t N>
struct Wgmma {
    static DEVICE void ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
        emulator::wgmma_ss(d, N, a, b, add, WGMMA_BF16<Element>);
    }
    static DEVICE void rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
        emulator::wgmma_rs(d, N, a, b, add, WGMMA_BF16<Element>);
    }
};

#endif

template <class Element, uint32_t N>
DEVICE void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
    Wgmma<Element, N>::ss(d, a, b, add);
}

template <class Element, uint32_t N>
DEVICE void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
    Wgmma<Element, N>::rs(d, a, b, add);
}
