// Reductions within a warp, and the choice of one lane. PTX ISA, "shfl.sync", "redux.sync" and "elect.sync"; the intrinsics
// of CUDA C++ reach the first two.
//
// All 32 lanes call together. Sums run in a fixed butterfly order, so that every lane holds the same bits and runs repeat.
// Over groups of `Width` lanes (a power of two) each group gets its own result: Width = 4 reduces over the t of an mma
// fragment (lane % 4), stride 4 over its g (lane / 4).
#pragma once

#include "core.cuh"

// Sum over each aligned group of `Width` neighbouring lanes.
template <int Width = 32>
DEVICE float warp_sum(float x) {
    static_assert(Width >= 1 && Width <= 32 && (Width & (Width - 1)) == 0, "groups are powers of two");
#pragma unroll
    for (int distance = Width / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(FULL_WARP, x, distance);
    return x;
}

// Maximum over each aligned group of `Width` neighbouring lanes. NaN loses against any number, as in fmaxf.
template <int Width = 32>
DEVICE float warp_max(float x) {
    static_assert(Width >= 1 && Width <= 32 && (Width & (Width - 1)) == 0, "groups are powers of two");
#pragma unroll
    for (int distance = Width / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, distance));
    return x;
}

// Sum over the lanes that are equal modulo `Stride`: for a column of an mma accumulator, Stride = 4.
template <int Stride>
DEVICE float warp_sum_strided(float x) {
    static_assert(Stride >= 1 && Stride <= 32 && (Stride & (Stride - 1)) == 0, "strides are powers of two");
#pragma unroll
    for (int distance = 16; distance >= Stride; distance /= 2) x += __shfl_xor_sync(FULL_WARP, x, distance);
    return x;
}

// Maximum over the lanes that are equal modulo `Stride`.
template <int Stride>
DEVICE float warp_max_strided(float x) {
    static_assert(Stride >= 1 && Stride <= 32 && (Stride & (Stride - 1)) == 0, "strides are powers of two");
#pragma unroll
    for (int distance = 16; distance >= Stride; distance /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, distance));
    return x;
}

// Integer reductions over the warp in one instruction. redux.sync (sm_80)
DEVICE uint32_t warp_sum(uint32_t x) { return __reduce_add_sync(FULL_WARP, x); }
DEVICE int32_t warp_sum(int32_t x) { return __reduce_add_sync(FULL_WARP, x); }
DEVICE uint32_t warp_max(uint32_t x) { return __reduce_max_sync(FULL_WARP, x); }
DEVICE int32_t warp_max(int32_t x) { return __reduce_max_sync(FULL_WARP, x); }
DEVICE uint32_t warp_min(uint32_t x) { return __reduce_min_sync(FULL_WARP, x); }
DEVICE int32_t warp_min(int32_t x) { return __reduce_min_sync(FULL_WARP, x); }

// A value that all lanes share. Its reduction ends in a uniform register, so that what follows from it is computed once per warp, and
// descriptors of products need no more moves; of a shuffle the compiler would know that nothing changes, and drop it. redux.sync
DEVICE uint32_t warp_uniform(uint32_t x) { return __reduce_max_sync(FULL_WARP, x); }

// The exclusive prefix sum over the warp: lane i gets x of lanes 0 … i - 1 added up.
DEVICE uint32_t warp_prefix_sum(uint32_t x) {
    const uint32_t lane = lane_index();
    uint32_t inclusive = x;
#pragma unroll
    for (uint32_t distance = 1; distance < WARP_SIZE; distance *= 2) {
        const uint32_t below = __shfl_up_sync(FULL_WARP, inclusive, distance);
        if (lane >= distance) inclusive += below;
    }
    return inclusive - x;
}

// True in exactly one lane of the converged warp, always the same one. elect.sync on sm_90, where it tells the compiler
// that the branch is uniform; lane 0 before.
DEVICE bool elect_one() {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 900
    uint32_t elected;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "elect.sync _|p, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(elected));
    return elected != 0;
#else
#ifndef __CUDACC__
    __ballot_sync(FULL_WARP, true);  // all lanes are here, as the instruction demands
#endif
    return lane_index() == 0;
#endif
}
