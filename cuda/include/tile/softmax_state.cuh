// The partial state of a softmax-weighted sum, and its merge.
//
// Over a set of keys with scores x and values v a state is m = max x, l = Σ exp(x − m), acc = Σ exp(x − m)·v, in natural
// units. The normalised form is lse = m + ln l, out = acc / l; seen as a state again it is (m = lse, l = 1, acc = out).
// An empty set has m = −inf, l = 0, acc = 0. Merging is exact in any order up to rounding (online softmax: Milakov and
// Gimelshein 2018; merge of splits: Flash-Decoding 2023).
#pragma once
#include "ptx/math.cuh"
#include "ptx/memory.cuh"
#include "types.cuh"

// exp(x − m) for a finite m; x = −inf gives 0.
DEVICE float exp_relative(float x, float m) { return exp2_approx((x - m) * LOG2_E); }

// The part of a state that one thread holds: all of (m, l) and four neighbouring channels of acc.
struct SoftmaxState {
    float m = NEGATIVE_INFINITY;
    float l = 0.0f;
    float4 acc = make_float4(0.0f, 0.0f, 0.0f, 0.0f);

    // Adds weight·(l, acc), where both are already relative to this state's m.
    DEVICE void add(float weight, float other_l, float4 other_acc) {
        l += weight * other_l;
        acc.x += weight * other_acc.x;
        acc.y += weight * other_acc.y;
        acc.z += weight * other_acc.z;
        acc.w += weight * other_acc.w;
    }

    // The four channels of out; an empty state gives 0, never NaN.
    DEVICE float4 out() const {
        const float scale = l > 0.0f || l != l ? 1.0f / l : 0.0f;
        return make_float4(acc.x * scale, acc.y * scale, acc.z * scale, acc.w * scale);
    }

    // Natural log-sum-exp; an empty state gives −inf.
    DEVICE float lse() const { return l > 0.0f || l != l ? m + log2_approx(l) * LN_2 : NEGATIVE_INFINITY; }
};

// The state over the keys of `a` and those of another state (m, l, acc); NaN in either stays NaN.
DEVICE SoftmaxState merged(const SoftmaxState& a, float m, float l, float4 acc) {
    SoftmaxState both;
    both.m = a.m != a.m || m != m ? QUIET_NAN : fmaxf(a.m, m);
    if (both.m == NEGATIVE_INFINITY) return both;
    if (a.m != NEGATIVE_INFINITY) both.add(exp_relative(a.m, both.m), a.l, a.acc);
    if (m != NEGATIVE_INFINITY) both.add(exp_relative(m, both.m), l, acc);
    return both;
}

// Normalised states of one row in memory: out [splits, V_DIM] f32 at 16-byte boundaries, lse [splits] f32, natural log.
template <int VDim>
struct NormalisedStates {
    const float* out;
    const float* lse;

    DEVICE float m(uint32_t s) const { return lse[s]; }  // read by every thread of the row, twice: worth its place in L1
    DEVICE float l(uint32_t) const { return 1.0f; }
    DEVICE float4 acc(uint32_t s, uint32_t channel) const { return load_f32x4(out + (uint64_t)s * VDim + channel); }
};

// Raw states of one row in memory: acc [splits, V_DIM] f32 at 16-byte boundaries, ml [splits, 2] f32.
template <int VDim>
struct RawStates {
    const float* acc_rows;
    const float* ml;

    DEVICE float m(uint32_t s) const { return ml[2 * (uint64_t)s]; }
    DEVICE float l(uint32_t s) const { return ml[2 * (uint64_t)s + 1]; }
    DEVICE float4 acc(uint32_t s, uint32_t channel) const {
        return *reinterpret_cast<const float4*>(acc_rows + (uint64_t)s * VDim + channel);
    }
};

// Folds states first, first + step, … < end into one, in that order, for the four channels from `channel` on.
//
// Two passes keep the second free of a dependency on the running maximum, so its loads and multiply-adds overlap. States
// with m = −inf are skipped without reading acc, which may hold anything.
template <class States>
DEVICE SoftmaxState fold_states(const States& states, uint32_t first, uint32_t end, uint32_t step, uint32_t channel) {
    // Counting in ones, not in steps, lets the compiler unroll: it knows that the counter cannot wrap.
    const uint32_t count = first < end ? ceil_div(end - first, step) : 0;
    SoftmaxState state;
    bool nan = false;
#pragma unroll 4
    for (uint32_t i = 0; i < count; i++) {
        const float m = states.m(first + i * step);
        nan |= m != m;
        state.m = fmaxf(state.m, m);
    }
    if (nan) state.m = QUIET_NAN;  // fmaxf drops NaN, which must never pass for a number
    if (state.m == NEGATIVE_INFINITY) return state;
#pragma unroll 4
    for (uint32_t i = 0; i < count; i++) {
        const uint32_t s = first + i * step;
        const float m = states.m(s);
        if (m == NEGATIVE_INFINITY) continue;
        state.add(exp_relative(m, state.m), states.l(s), states.acc(s, channel));
    }
    return state;
}
