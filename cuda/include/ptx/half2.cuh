// Arithmetic on pairs of 16-bit floats in one register. PTX ISA, "Half Precision Floating Point Instructions: fma".
//
// Rounded once, to nearest even; subnormals are kept. On the host the sum is rounded to f32 before.
#pragma once

#include "core.cuh"
#include "types.cuh"

// a·b + c of two pairs of f16. fma.rn.f16x2
DEVICE uint32_t fma2(f16, uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDACC__
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
#else
    const float2 x = unpack2<f16>(a), y = unpack2<f16>(b), z = unpack2<f16>(c);
    return pack2<f16>(__fmaf_rn(x.x, y.x, z.x), __fmaf_rn(x.y, y.y, z.y));
#endif
}

// a·b + c of two pairs of bf16. fma.rn.bf16x2 (sm_80)
DEVICE uint32_t fma2(bf16, uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDACC__
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
#else
    const float2 x = unpack2<bf16>(a), y = unpack2<bf16>(b), z = unpack2<bf16>(c);
    return pack2<bf16>(__fmaf_rn(x.x, y.x, z.x), __fmaf_rn(x.y, y.y, z.y));
#endif
}
