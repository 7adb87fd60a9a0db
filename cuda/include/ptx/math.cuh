// Approximate f32 functions of the special function unit. PTX ISA, "Floating-Point Instructions: ex2, lg2, rcp".
//
// The emulator computes them with the host's library and rounds once; results differ from a GPU's in the last bits, so no
// result that must be bit-exact may depend on them. Subnormal inputs and results are flushed to zero.
#pragma once

#include "core.cuh"

// 2^x. At most 2 ulp from the correctly rounded value; exp2(-inf) = +0, exp2(+inf) = +inf. ex2.approx.ftz.f32
DEVICE float exp2_approx(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return emulator::exp2_approx(x);
#endif
}

// log2(x). Absolute error at most 2^-22 for x in (0.5, 2), relative error 2^-22 elsewhere; log2(0) = -inf. lg2.approx.ftz.f32
DEVICE float log2_approx(float x) {
#ifdef __CUDACC__
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return emulator::log2_approx(x);
#endif
}

// 1 / x. At most 1 ulp from the correctly rounded value; 1 / ±0 = ±inf. rcp.approx.ftz.f32
DEVICE float rcp_approx(float x) {
#ifdef __CUDACC__
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return emulator::rcp_approx(x);
#endif
}

// tanh(x) by ex2 and rcp: absolute error at most 4e-7, also near 0, and no branch. A score is off by that times its cap, so hosts
// bound the cap.
DEVICE float tanh_by_exp2(float x) { return 1.0f - 2.0f * rcp_approx(1.0f + exp2_approx(x * (2.0f * LOG2_E))); }
