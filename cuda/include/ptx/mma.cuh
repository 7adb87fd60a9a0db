// Warp-level matrix products: D += A·B on the tensor cores, one 16x8 tile of D per warp. PTX ISA, "Warp-level Matrix
// Instructions: mma" and "Matrix Fragments for mma.m16n8k*".
//
// All 32 lanes call together. With g = lane / 4 and t = lane % 4, register i of a lane holds (n values per register, the
// lowest index in the lowest bits; n = 2 for 16-bit, 4 for 8-bit, 1 for tf32):
//
//   A [16, K] row-major:   row g + 8·(i % 2),  columns n·t + {0 … n-1} + (K/2)·(i / 2)
//   B [K, 8]:              rows n·t + {0 … n-1} + (K/2)·i,  column g      (that is, K contiguous values of one column)
//   D [16, 8]:             row g + 8·(i / 2),  column 2·t + i % 2
//
// f32 sums are rounded in an order and to a width that the hardware does not specify; integer sums are exact and wrap.
#pragma once

#include "core.cuh"

// D [16, 8] f32 += A [16, 16] bf16 · B [16, 8] bf16. mma.m16n8k16.f32.bf16
DEVICE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    emulator::mma_m16n8k16_bf16(d, a, b);
#endif
}

// D [16, 8] f32 += A [16, 16] f16 · B [16, 8] f16. mma.m16n8k16.f32.f16
DEVICE void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    emulator::mma_m16n8k16_f16(d, a, b);
#endif
}

// D [16, 8] f32 += A [16, 8] tf32 · B [8, 8] tf32; round operands with cvt_tf32_f32 first. mma.m16n8k8.f32.tf32
DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    emulator::mma_m16n8k8_tf32(d, a, b);
#endif
}

// D [16, 8] s32 += A [16, 32] s8 · B [32, 8] s8. mma.m16n8k32.s32.s8.s8
DEVICE void mma_m16n8k32_s8s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    emulator::mma_m16n8k32_s8s8(d, a, b);
#endif
}

// D [16, 8] s32 += A [16, 32] s8 · B [32, 8] u8. mma.m16n8k32.s32.s8.u8
DEVICE void mma_m16n8k32_s8u8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    emulator::mma_m16n8k32_s8u8(d, a, b);
#endif
}

// D [16, 8] s32 += A [16, 32] u8 · B [32, 8] s8. mma.m16n8k32.s32.u8.s8
DEVICE void mma_m16n8k32_u8s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    emulator::mma_m16n8k32_u8s8(d, a, b);
#endif
}

// D [16, 8] s32 += A [16, 32] u8 · B [32, 8] u8. mma.m16n8k32.s32.u8.u8
DEVICE void mma_m16n8k32_u8u8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    emulator::mma_m16n8k32_u8u8(d, a, b);
#endif
}

// The same with a C operand of its own: D = A·B + C. Sums that all start at one constant share its registers.

// D [16, 8] s32 = A [16, 32] u8 · B [32, 8] u8 + C. mma.m16n8k32.s32.u8.u8
DEVICE void mma_m16n8k32_u8u8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int32_t (&c)[4]) {
#ifdef __CUDACC__
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
#else
    for (int i = 0; i < 4; i++) d[i] = c[i];
    emulator::mma_m16n8k32_u8u8(d, a, b);
#endif
}

// D [16, 8] f32 = A [16, 8] tf32 · B [8, 8] tf32 + C. mma.m16n8k8.f32.tf32
DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
#ifdef __CUDACC__
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
    for (int i = 0; i < 4; i++) d[i] = c[i];
    emulator::mma_m16n8k8_tf32(d, a, b);
#endif
}
