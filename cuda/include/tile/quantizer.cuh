// The quantizer of keys and values, operation by operation as the CPU's (`homomorphic_quant::quantizer`): codes, scales and
// minima have the same bits everywhere. Rounding is to nearest, ties to even; nothing is contracted.
//
//   m = store(min x) + 0,  s = store((max x · 0.5 − m · 0.5) / (L · 0.5)),  s = 1 unless s ≥ 2⁻¹²⁶
//   code = clamp(rint((x − m) · (1 / s)), 0, L)
//
// A group that holds an infinity or NaN has NaN as scale and minimum, and codes 0: whatever is computed from it is NaN.
#pragma once

#include "core.cuh"
#include "types.cuh"

constexpr float SMALLEST_SCALE = 1.17549435e-38f;  // 2⁻¹²⁶: below it the reciprocal is past f32's range

// Smallest and largest value so far, and whether all were finite.
struct ValueRange {
    float min = POSITIVE_INFINITY;
    float max = NEGATIVE_INFINITY;
    bool finite = true;

    DEVICE void add(float x) {
        min = fminf(min, x);
        max = fmaxf(max, x);
        finite &= fabsf(x) < POSITIVE_INFINITY;
    }
};

// Scale and minimum of a group as stored, widened to f32, and the reciprocal of the scale.
struct CodeGroup {
    float scale;
    float min;
    float reciprocal;

    // Codes of the element's value; NaN gives 0.
    template <uint32_t Levels>
    DEVICE uint32_t code(float x) const {
        const float position = __fmul_rn(__fsub_rn(x, min), reciprocal);
        return static_cast<uint32_t>(__float2int_rn(fminf(fmaxf(position, 0.0f), static_cast<float>(Levels))));
    }
};

// The group of values in `range`, for codes up to Levels, stored as Element.
template <typename Element, uint32_t Levels>
DEVICE CodeGroup group_of(const ValueRange& range) {
    if (!range.finite) return {QUIET_NAN, QUIET_NAN, QUIET_NAN};
    const float min = __fadd_rn(to_f32(from_f32<Element>(range.min)), 0.0f);
    const float spread = __fsub_rn(__fmul_rn(range.max, 0.5f), __fmul_rn(min, 0.5f));
    const float scale = to_f32(from_f32<Element>(__fdiv_rn(spread, Levels * 0.5f)));
    const float stored = scale >= SMALLEST_SCALE ? scale : 1.0f;
    return {stored, min, __frcp_rn(stored)};
}
