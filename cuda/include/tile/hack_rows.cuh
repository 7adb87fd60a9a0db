// The softmax state of one warp's 16 query rows over quantized pages and 16-bit tokens.
//
// Rows lie on M and tokens on N: scores are accumulators [16 rows, 8 tokens], O is [16 rows, 8 channels]. A lane (g = lane / 4,
// t = lane % 4) holds rows g and g + 8; its tokens, and its channels, are 2t and 2t + 1 of every eight. An accumulator of
// scores is an operand of P·V as it is: nothing crosses lanes but the reductions over a row.
//
// Where O is too much for a warp's registers, several warps share the rows: each has all scores and a run of the channels of O, which
// begins with whole channel partitions or lies in one.
//
// All is a function of a HackShape, and of the warps that share rows.
#pragma once

#include "core.cuh"
#include "hack_prefill_params.h"
#include "ptx/math.cuh"
#include "ptx/shuffle.cuh"
#include "tile/fragment.cuh"
#include "tile/hack_codes.cuh"
#include "tile/hack_columns.cuh"
#include "tile/hack_tokens.cuh"
#include "types.cuh"

// The rows that one block works on: those of a KV head and a run of a sequence's queries; row r is query head r % group of
// query r / group.
struct HackRowsItem : HackItem {
    uint32_t queries;      // of the sequence
    uint32_t first_query;  // of the sequence, in q
    uint32_t total;        // position of the sequence's last query, plus 1

    DEVICE VisibleTokens visible_to_row(uint32_t row, const HackDecodeParams& params) const {
        const uint32_t query = row / params.group;
        const uint32_t own = total + query + 1 > queries ? total + query + 1 - queries : 0;
        return visible_before(own, kv_len, params);
    }
};

template <class Shape, int Sharers>
struct Rows {
    using Element = typename Shape::Element;
    static constexpr uint32_t WARP_ROWS = 16;
    static constexpr uint32_t K_ROW = Shape::KEY_DIM * 2;
    static constexpr uint32_t V_ROW = Shape::VALUE_DIM * 2;
    static constexpr uint32_t K_PERIOD = Swizzle<K_ROW>::PERIOD;
    static constexpr uint32_t V_PERIOD = Swizzle<V_ROW>::PERIOD;
    static constexpr uint32_t CHANNELS = Shape::VALUE_DIM / Sharers;  // of this warp
    static constexpr uint32_t V_TILES = CHANNELS / 8;
    static constexpr uint32_t PARTITIONS = ceil_div<uint32_t>(Shape::VALUE_PARTITIONS, Sharers);
    static_assert(CHANNELS % 16 == 0 && V_TILES % V_PERIOD % 2 == 0 && (Sharers == 1 || V_TILES % V_PERIOD == 0),
                  "whole pairs of tiles, and whole periods of the swizzle");
    static_assert(Shape::VALUE_PARTITIONS % Sharers == 0 || Sharers % Shape::VALUE_PARTITIONS == 0, "a run of partitions, or one");

    float o[V_TILES][4];
    float minimum[PARTITIONS][2];  // Σ P·m of this lane's tokens: the same for all channels of a partition
    float m[2];                                 // of rows g and g + 8, in units of log2
    float l[2];                                 // of this lane's tokens alone
    const unsigned char* q_rows;                // the block's queries in shared memory: rows of K_ROW bytes, swizzled
    uint32_t first_row;                         // of the warp, in q_rows
    uint32_t run;                               // which of the runs of channels

    // The first channel partition of the warp's channels.
    DEVICE uint32_t first_partition() const { return run * Shape::VALUE_PARTITIONS / Sharers; }

    DEVICE void start(const unsigned char* rows, uint32_t first, uint32_t which_run) {
        q_rows = rows;
        first_row = first;
        run = Sharers == 1 ? 0 : which_run;
#pragma unroll
        for (uint32_t e = 0; e < 2; e++) {
            m[e] = NEGATIVE_INFINITY;
            l[e] = 0.0f;
#pragma unroll
            for (uint32_t p = 0; p < PARTITIONS; p++) minimum[p][e] = 0.0f;
        }
#pragma unroll
        for (uint32_t v = 0; v < V_TILES; v++) {
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) o[v][i] = 0.0f;
        }
    }

    // The A operand of q: channels 16·step … + 15.
    DEVICE void load_q(uint32_t (&a)[4], uint32_t step) const {
        const uint32_t chunk = step * 2;
        load_fragment_a<K_ROW>(a, shared_address(q_rows) + chunk / K_PERIOD * (K_PERIOD * 16), first_row, chunk % K_PERIOD);
    }

    // Four channels of q, 16·half + 4t … + 3, of row g + 8·e: those of a lane's codes.
    DEVICE void load_q(float (&four)[4], uint32_t half, uint32_t e) const {
        const uint32_t lane = lane_index();
        const uint32_t chunk = half * 2;
        const uint32_t offset = Swizzle<K_ROW>::offset(first_row + lane / 4 + 8 * e, chunk % K_PERIOD + lane % 4 / 2) +
                                chunk / K_PERIOD * (K_PERIOD * 16) + lane % 2 * 8;
        const uint2 words = *reinterpret_cast<const uint2*>(q_rows + offset);
        const float2 low = unpack2<Element>(words.x);
        const float2 high = unpack2<Element>(words.y);
        four[0] = low.x, four[1] = low.y, four[2] = high.x, four[3] = high.y;
    }

    // What this lane's rows see.
    DEVICE void visible_to_lane(VisibleTokens (&visible)[2], const HackRowsItem& item, const HackDecodeParams& params) const {
#pragma unroll
        for (uint32_t e = 0; e < 2; e++) {
            visible[e] = item.visible_to_row(item.first_column + first_row + lane_index() / 4 + 8 * e, params);
        }
    }

    // Masks the scores of a closed block, if some row of the item does not see all of it.
    template <uint32_t Tiles>
    DEVICE void mask_block(float (&s)[Tiles][4], const HackRowsItem& item, uint32_t block,
                           const HackDecodeParams& params) const {
        const uint32_t first = params.sinks + block * Shape::BLOCK;
        if (first + Shape::BLOCK <= item.of_first.end && first >= item.last_begin) return;
        VisibleTokens visible[2];
        visible_to_lane(visible, item, params);
#pragma unroll
        for (uint32_t e = 0; e < 2; e++) {
            // No token of a closed block is one of a window's sinks: the visible ones are a run.
            const uint32_t begin = visible[e].begin;
            const uint32_t count = visible[e].end > begin ? visible[e].end - begin : 0;
#pragma unroll
            for (uint32_t n = 0; n < Tiles; n++) {
#pragma unroll
                for (uint32_t i = 0; i < 2; i++) {
                    const uint32_t token = first + n * 8 + lane_index() % 4 * 2 + i;
                    if (token - begin >= count) s[n][2 * e + i] = NEGATIVE_INFINITY;
                }
            }
        }
    }

    // Caps scores, moves the running maximum, and leaves P in `s`. Masked scores are −inf.
    template <uint32_t Tiles>
    DEVICE void softmax(float (&s)[Tiles][4], const HackDecodeParams& params) {
        if constexpr (Shape::CAPPED) {
            const float to_log2 = params.soft_cap * LOG2_E;
#pragma unroll
            for (uint32_t n = 0; n < Tiles; n++) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) {
                    if (s[n][i] != NEGATIVE_INFINITY) s[n][i] = tanhf(s[n][i]) * to_log2;
                }
            }
        }
        float shrink[2];
#pragma unroll
        for (uint32_t e = 0; e < 2; e++) {
            float largest = fmaxf(s[0][2 * e], s[0][2 * e + 1]);
#pragma unroll
            for (uint32_t n = 1; n < Tiles; n++) largest = fmaxf(largest, fmaxf(s[n][2 * e], s[n][2 * e + 1]));
            const float m_new = fmaxf(m[e], warp_max<4>(largest));
            const float reference = m_new == NEGATIVE_INFINITY ? 0.0f : m_new;
            shrink[e] = exp2_approx(m[e] - reference);
            m[e] = m_new;
            float sum = 0.0f;
#pragma unroll
            for (uint32_t n = 0; n < Tiles; n++) {
#pragma unroll
                for (uint32_t i = 2 * e; i < 2 * e + 2; i++) {
                    s[n][i] = exp2_approx(s[n][i] - reference);
                    sum += s[n][i];
                }
            }
            l[e] = l[e] * shrink[e] + sum;
        }
        // The maximum seldom moves: then all that follows is multiplied by one.
        if (__any_sync(FULL_WARP, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
            for (uint32_t e = 0; e < 2; e++) {
#pragma unroll
                for (uint32_t p = 0; p < PARTITIONS; p++) minimum[p][e] *= shrink[e];
#pragma unroll
                for (uint32_t v = 0; v < V_TILES; v++) {
                    o[v][2 * e] *= shrink[e];
                    o[v][2 * e + 1] *= shrink[e];
                }
            }
        }
    }

    // Attends to 16 tokens whose 16-bit vectors are swizzled rows at shared addresses `k` and `v`. `token_of_row` names the
    // token in a row, or one past every token.
    template <class TokenOfRow>
    DEVICE void attend_rows(uint32_t k, uint32_t v, const HackRowsItem& item, const HackDecodeParams& params,
                            const TokenOfRow& token_of_row) {
        float s[2][4] = {};
#pragma unroll
        for (uint32_t step = 0; step < Shape::KEY_DIM / 16; step++) {
            uint32_t a[4];
            load_q(a, step);
            uint32_t b[2][2];
            const uint32_t chunk = step * 2;
            load_fragment_b2<K_ROW>(b, k + chunk / K_PERIOD * (K_PERIOD * 16), 0, chunk % K_PERIOD);
#pragma unroll
            for (uint32_t n = 0; n < 2; n++) mma_m16n8k16(Element{}, s[n], a, b[n]);
        }
        const float factor = score_factor<Shape>(params);
        VisibleTokens visible[2];
        visible_to_lane(visible, item, params);
#pragma unroll
        for (uint32_t n = 0; n < 2; n++) {
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                const uint32_t token = token_of_row(n * 8 + accumulator_column(lane_index(), i));
                s[n][i] = visible[i / 2].sees(token) ? s[n][i] * factor : NEGATIVE_INFINITY;
            }
        }
        softmax(s, params);

        // P as the sum of two values of the storage type: what rounding leaves is far below f32's own error in the sums.
        uint32_t high[4];
        uint32_t low[4];
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            const float2 p = make_float2(s[i / 2][i % 2 * 2], s[i / 2][i % 2 * 2 + 1]);
            high[i] = pack2<Element>(p.x, p.y);
            const float2 rounded = unpack2<Element>(high[i]);
            low[i] = pack2<Element>(p.x - rounded.x, p.y - rounded.y);
        }
#pragma unroll
        for (uint32_t tile = 0; tile < V_TILES; tile += 2) {
            uint32_t b[2][2];
            load_fragment_b2_trans<V_ROW>(b, v + run * CHANNELS * 2 + tile / V_PERIOD * (V_PERIOD * 16), 0, tile % V_PERIOD);
#pragma unroll
            for (uint32_t n = 0; n < 2; n++) {
                mma_m16n8k16(Element{}, o[tile + n], high, b[n]);
                mma_m16n8k16(Element{}, o[tile + n], low, b[n]);
            }
        }
    }

    // Makes the state whole: every lane of a row holds its sums.
    DEVICE void finish() {
#pragma unroll
        for (uint32_t e = 0; e < 2; e++) {
            l[e] = warp_sum<4>(l[e]);
#pragma unroll
            for (uint32_t p = 0; p < PARTITIONS; p++) minimum[p][e] = warp_sum<4>(minimum[p][e]);
        }
#pragma unroll
        for (uint32_t v = 0; v < V_TILES; v++) {
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) o[v][i] += minimum[v * PARTITIONS / V_TILES][i / 2];
        }
    }
};
