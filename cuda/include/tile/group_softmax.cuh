// The softmax of scores over partitions, under which the query heads of a group agree.
//
// A NaN takes no part. Scores of +inf share the whole weight; a row whose best score is −inf has none.
#pragma once

#include "core.cuh"
#include "ptx/math.cuh"

// Maximum and sum over some scores: l is relative to m.
struct GroupSoftmax {
    float m = NEGATIVE_INFINITY;
    float l = 0.0f;

    // The weight of a score relative to m ≥ score; infinities of one sign are equal.
    static DEVICE float relative(float score, float m) { return score == m ? 1.0f : exp2_approx((score - m) * LOG2_E); }

    DEVICE void push(float score) {
        if (score != score) return;
        merge({score, 1.0f});
    }

    DEVICE void merge(const GroupSoftmax& other) {
        const float top = fmaxf(m, other.m);
        l = l * relative(m, top) + other.l * relative(other.m, top);
        m = top;
    }

    // The probability of a score; NaN stays NaN.
    DEVICE float probability(float score) const {
        if (score != score) return score;
        return m == NEGATIVE_INFINITY ? 0.0f : relative(score, m) / l;
    }
};

// A score as the softmax takes it: scaled, then capped where there is a cap.
DEVICE float scaled_score(float score, float scale, float soft_cap) {
    return soft_cap > 0.0f ? soft_cap * tanhf(score * scale / soft_cap) : score * scale;
}
