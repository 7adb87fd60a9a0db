// The softmax state of one warp's eight query columns over quantized pages and 16-bit tokens.
//
// Tokens lie on M and columns on N: scores are accumulators [16 tokens, 8 columns], O is Oᵀ [channels, columns]. A lane
// (g = lane / 4, t = lane % 4) holds columns 2t and 2t + 1; its rows are g and g + 8.
//
// All is a function of a HackShape.
#pragma once

#include "core.cuh"
#include "hack_decode_params.h"
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "ptx/shuffle.cuh"
#include "tile/fragment.cuh"
#include "tile/hack_codes.cuh"
#include "tile/hack_tokens.cuh"
#include "types.cuh"

// What one block needs to know about the queries and tokens it works on.
struct HackItem {
    uint32_t sequence;
    uint32_t kv_head;
    uint32_t first_column;
    uint32_t kv_len;
    uint32_t sinks;       // tokens
    uint32_t closed;      // blocks
    uint32_t open;        // tokens
    uint32_t begin_block; // blocks that some query of this item sees: [begin_block, end_block)
    uint32_t end_block;
    VisibleTokens of_first;  // what its first query sees, which sees the least at the end
    uint32_t last_begin;     // where what its last query sees begins
};

// What a kernel is compiled for.
template <class ElementType, class PageType, int Partition, int QkDim, int VDim, int ColumnTiles, bool SoftCap>
struct HackShape {
    using Element = ElementType;
    using Page = PageType;
    static constexpr uint32_t BLOCK = Partition;  // tokens
    static constexpr uint32_t KEY_DIM = QkDim;
    static constexpr uint32_t VALUE_DIM = VDim;
    static constexpr uint32_t VALUE_PARTITIONS = Page::V_PARTITIONS;
    static constexpr uint32_t WARPS_OF_TEAM = ColumnTiles;
    static constexpr bool CAPPED = SoftCap;
};

// Scores to units of log2 e, or of the soft-cap.
template <class Shape>
DEVICE float score_factor(const HackDecodeParams& params) {
    return Shape::CAPPED ? params.scale / params.soft_cap : params.scale * LOG2_E;
}

template <class Shape>
struct Columns {
    using Element = typename Shape::Element;
    static constexpr uint32_t K_ROW = Shape::KEY_DIM * 2;
    static constexpr uint32_t V_ROW = Shape::VALUE_DIM * 2;
    static constexpr uint32_t V_TILES = Shape::VALUE_DIM / 16;

    float o[V_TILES][4];
    float minimum[Shape::VALUE_PARTITIONS][2];  // Σ P·m of this lane's tokens: the same for all channels of a partition
    float m[2];                             // in units of log2
    float l[2];                             // of this lane's tokens alone
    const unsigned char* q_rows;            // the block's queries in shared memory: rows of K_ROW bytes, swizzled
    uint32_t tile;                          // which eight columns of the block's

    DEVICE void start(const unsigned char* rows, uint32_t column_tile) {
        q_rows = rows;
        tile = column_tile;
#pragma unroll
        for (uint32_t e = 0; e < 2; e++) {
            m[e] = NEGATIVE_INFINITY;
            l[e] = 0.0f;
#pragma unroll
            for (uint32_t p = 0; p < Shape::VALUE_PARTITIONS; p++) minimum[p][e] = 0.0f;
        }
#pragma unroll
        for (uint32_t v = 0; v < V_TILES; v++) {
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) o[v][i] = 0.0f;
        }
    }

    // Offset of chunk `first` + `chunk` of a column's query. The swizzle repeats after PERIOD chunks: with `first` known at compile
    // time, the offsets of a row differ by constants.
    DEVICE uint32_t q_offset(uint32_t column, uint32_t first, uint32_t chunk) const {
        constexpr uint32_t PERIOD = Swizzle<K_ROW>::PERIOD;
        return Swizzle<K_ROW>::offset(tile * 8 + column, first % PERIOD + chunk) + first / PERIOD * (PERIOD * 16);
    }

    // Two B operands of q: channels 32·step … + 15 and + 16 … + 31 of the eight columns.
    DEVICE void load_q(uint32_t (&b)[2][2], uint32_t step) const {
        uint32_t r[4];
        const uint32_t lane = lane_index();
        ldmatrix_x4(r, shared_address(q_rows) + q_offset(lane % 8, step * 4, lane / 8));
        b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
    }

    // What this lane's columns see.
    DEVICE void visible_to_lane(VisibleTokens (&visible)[2], const HackItem& item, const HackDecodeParams& params) const {
#pragma unroll
        for (uint32_t e = 0; e < 2; e++) {
            const uint32_t column = item.first_column + tile * 8 + lane_index() % 4 * 2 + e;
            visible[e] = visible_tokens(column / params.group, item.kv_len, params);
        }
    }

    // Masks the scores of a closed block, if some query of the item does not see all of it.
    template <uint32_t Tiles>
    DEVICE void mask_block(float (&s)[Tiles][4], const HackItem& item, uint32_t block, const HackDecodeParams& params) const {
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
            for (uint32_t i = 0; i < 2 * Tiles; i++) {
                const uint32_t token = first + lane_index() / 4 + i * 8;
                if (token - begin >= count) s[i / 2][i % 2 * 2 + e] = NEGATIVE_INFINITY;
            }
        }
    }

    // Caps scores, moves the running maximum, and leaves P in `s`. Masked scores are −inf.
    template <uint32_t Tiles>
    DEVICE void softmax(float (&s)[Tiles][4], const HackDecodeParams& params) {
        if constexpr (Shape::CAPPED) {
            const float to_log2 = params.soft_cap * LOG2_E;
#pragma unroll
            for (uint32_t tile = 0; tile < Tiles; tile++) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) {
                    if (s[tile][i] != NEGATIVE_INFINITY) s[tile][i] = tanhf(s[tile][i]) * to_log2;
                }
            }
        }
        float shrink[2];
#pragma unroll
        for (uint32_t e = 0; e < 2; e++) {
            float largest = fmaxf(s[0][e], s[0][e + 2]);
#pragma unroll
            for (uint32_t tile = 1; tile < Tiles; tile++) largest = fmaxf(largest, fmaxf(s[tile][e], s[tile][e + 2]));
            const float m_new = fmaxf(m[e], warp_max_strided<4>(largest));
            const float reference = m_new == NEGATIVE_INFINITY ? 0.0f : m_new;
            shrink[e] = exp2_approx(m[e] - reference);
            m[e] = m_new;
#pragma unroll
            for (uint32_t tile = 0; tile < Tiles; tile++) {
                s[tile][e] = exp2_approx(s[tile][e] - reference);
                s[tile][e + 2] = exp2_approx(s[tile][e + 2] - reference);
            }
        }
        // The maximum seldom moves: then all that follows is multiplied by one.
        if (__any_sync(FULL_WARP, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
            for (uint32_t e = 0; e < 2; e++) {
                l[e] *= shrink[e];
#pragma unroll
                for (uint32_t p = 0; p < Shape::VALUE_PARTITIONS; p++) minimum[p][e] *= shrink[e];
#pragma unroll
                for (uint32_t v = 0; v < V_TILES; v++) {
                    o[v][e] *= shrink[e];
                    o[v][e + 2] *= shrink[e];
                }
            }
        }
#pragma unroll
        for (uint32_t tile = 0; tile < Tiles; tile++) {
            l[0] += s[tile][0] + s[tile][2];
            l[1] += s[tile][1] + s[tile][3];
        }
    }

    // Attends to 16 tokens whose 16-bit vectors are swizzled rows at shared addresses `k` and `v`. `token_of_row` names the
    // token in a row, or one past every token.
    template <class TokenOfRow>
    DEVICE void attend_rows(uint32_t k, uint32_t v, const HackItem& item, const HackDecodeParams& params,
                            const TokenOfRow& token_of_row) {
        float s[1][4] = {};
#pragma unroll
        for (uint32_t step = 0; step < Shape::KEY_DIM / 32; step++) {
            uint32_t q[2][2];
            load_q(q, step);
#pragma unroll
            for (uint32_t half = 0; half < 2; half++) {
                uint32_t a[4];
                constexpr uint32_t PERIOD = Swizzle<K_ROW>::PERIOD;
                const uint32_t chunk = step * 4 + half * 2;
                load_fragment_a<K_ROW>(a, k + chunk / PERIOD * (PERIOD * 16), 0, chunk % PERIOD);
                mma_m16n8k16(Element{}, s[0], a, q[half]);
            }
        }
        const float factor = score_factor<Shape>(params);
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) s[0][i] *= factor;
        VisibleTokens visible[2];
        visible_to_lane(visible, item, params);
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            if (!visible[i % 2].sees(token_of_row(accumulator_row(lane_index(), i)))) s[0][i] = NEGATIVE_INFINITY;
        }
        softmax(s, params);

        // P as the sum of two values of the storage type: what rounding leaves is far below f32's own error in the sums.
        uint32_t b[2][2];
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            const float2 p = make_float2(s[0][half * 2], s[0][half * 2 + 1]);
            const uint32_t high = pack2<Element>(p.x, p.y);
            const float2 rounded = unpack2<Element>(high);
            b[0][half] = movmatrix_trans(high);
            b[1][half] = movmatrix_trans(pack2<Element>(p.x - rounded.x, p.y - rounded.y));
        }
#pragma unroll
        for (uint32_t tile = 0; tile < V_TILES; tile++) {
            uint32_t a[4];
            constexpr uint32_t PERIOD = Swizzle<V_ROW>::PERIOD;
            load_fragment_a_trans<V_ROW>(a, v + tile * 2 / PERIOD * (PERIOD * 16), 0, tile * 2 % PERIOD);
            mma_m16n8k16(Element{}, o[tile], a, b[0]);
            mma_m16n8k16(Element{}, o[tile], a, b[1]);
        }
    }

    // Leaves the state in shared memory: O [8 columns, VALUE_DIM] at `acc`, (m, l) [8, 2] at `ml`, m in natural units.
    DEVICE void leave(float* acc, float (*ml)[2]) {
        const uint32_t lane = lane_index();
#pragma unroll
        for (uint32_t e = 0; e < 2; e++) {
            const float sum = warp_sum_strided<4>(l[e]);
            if (lane < 4) {
                // The running maximum passes NaN over; a state without a maximum would count as empty.
                ml[lane * 2 + e][0] = sum != sum ? QUIET_NAN : m[e] * LN_2;
                ml[lane * 2 + e][1] = sum;
            }
#pragma unroll
            for (uint32_t p = 0; p < Shape::VALUE_PARTITIONS; p++) minimum[p][e] = warp_sum_strided<4>(minimum[p][e]);
        }
#pragma unroll
        for (uint32_t v = 0; v < V_TILES; v++) {
            const uint32_t partition = v * Shape::VALUE_PARTITIONS / V_TILES;
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                acc[accumulator_column(lane, i) * Shape::VALUE_DIM + v * 16 + accumulator_row(lane, i)] =
                    o[v][i] + minimum[partition][i % 2];
            }
        }
    }
};
