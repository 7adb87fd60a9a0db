// Rows of a prefill: which keys they see, their softmax state in registers, and how it ends as output or as carried state.
// Shared by the kernels, which differ in how K and V arrive and how products are made.
#pragma once

#include "core.cuh"
#include "prefill_params.h"
#include "ptx/math.cuh"
#include "ptx/shuffle.cuh"
#include "tile/cache_check.cuh"
#include "tile/fragment.cuh"
#include "tile/prefill_tiles.cuh"
#include "tile/softmax_state.cuh"
#include "types.cuh"

// What a kernel reads and writes beside its parameters; see prefill.cu.
template <class Element>
struct PrefillBuffers {
    const Element* q;
    const Element* k;
    const Element* v;
    const uint32_t* block_table;
    const PrefillTile* tiles;
    const uint32_t* tile_count;
    const uint32_t* valid_len;
};

// The rows that one block works on, and where their keys lie. It lies in shared memory and not in registers, of which the loop
// over keys has none to spare.
template <class Element, bool Paged>
struct PrefillItem {
    PrefillTile tile;
    const uint32_t* table;
    const Element* keys;
    const Element* values;
    uint32_t kv_head;
    uint32_t kv_len;  // of this head: 0 where its pages cannot be read

    // Works out the rest from the tile; for one thread.
    DEVICE void place(uint32_t head, const PrefillBuffers<Element>& buffers, const PrefillParams& params) {
        kv_head = head;
        kv_len = tile.kv_len;
        table = nullptr;
        int64_t start = 0;
        if (Paged) {
            // A head whose own pages cannot be read sees nothing; the others' keys are as many as the tile says.
            if (params.table_head_stride != 0 && kv_len > 0) {
                kv_len = min(kv_len, valid_len_of(buffers.valid_len, tile.sequence, kv_head, params));
            }
            table = buffers.block_table + kv_head * params.table_head_stride + tile.sequence * params.table_batch_stride;
        } else {
            start = tile.kv_start;
        }
        if (buffers.k == nullptr) return;  // a kernel that loads by tensor maps
        keys = buffers.k + start * params.k_token_stride + kv_head * params.k_head_stride;
        values = buffers.v + start * params.v_token_stride + kv_head * params.v_head_stride;
    }

    DEVICE Visible visible_to_row(uint32_t row, const PrefillParams& params) const {
        return visible_to(row / params.group, tile, kv_len);
    }

    // Page of a key, 0 for keys that are not seen.
    DEVICE uint32_t page_of(uint32_t key, const Visible& seen, const PrefillParams& params) const {
        if (!Paged) return 0;
        // prefill_plan has checked the ids, but the table is the caller's to change: never a page outside the pool.
        return seen.sees(key) ? min(table[key >> params.page_shift], params.num_pages - 1) : 0;
    }

    // Offset of a key's row in K or V, in elements.
    static DEVICE int64_t place_of(uint32_t key, uint32_t page, int64_t page_stride, int64_t token_stride,
                                   const PrefillParams& params) {
        if (!Paged) return key * token_stride;
        return page * page_stride + (key & ((1u << params.page_shift) - 1)) * token_stride;
    }

    // Offset of a row of q, or NO_PLACE where the block has no such row. `row` counts from the tile's first.
    DEVICE int64_t place_of_query(uint32_t row, uint32_t q_dim, const PrefillParams& params) const;
};

// Instead of an offset: a row that shared memory gets as zeros.
constexpr int64_t NO_PLACE = -1;

template <class Element, bool Paged>
DEVICE int64_t PrefillItem<Element, Paged>::place_of_query(uint32_t row, uint32_t q_dim, const PrefillParams& params) const {
    const uint32_t query = (tile.first_row + row) / params.group;
    if (query >= tile.queries) return NO_PLACE;
    const uint64_t token = tile.first_query + query;
    const uint64_t head = kv_head * params.group + (tile.first_row + row) % params.group;
    return (token * params.kv_heads * params.group + head) * q_dim;
}

// What the rows of a block see of a span of keys, worked out once and kept in shared memory, so that the loop over keys neither
// divides nor holds it in registers; and the tiles of `Keys` keys that some row sees, in order: those of the sinks, then those
// from `main_begin` on.
template <uint32_t Rows, uint32_t Keys>
struct KeyTiles {
    Visible of_row[Rows];  // rows past the last see what the last sees
    Visible seen;          // by some row
    uint32_t of_first_end;
    uint32_t of_last_begin;
    uint32_t sink_end;
    uint32_t main_begin;
    uint32_t end;

    // For the threads from `thread` on, one per row; a barrier before anyone looks. Thread 0 fills in what is not of one row.
    template <class Item>
    DEVICE void fill(uint32_t thread, const Item& item, const PrefillParams& params) {
        const uint32_t last_row = item.tile.queries * params.group - 1;
        if (thread < Rows) of_row[thread] = item.visible_to_row(min(item.tile.first_row + thread, last_row), params);
        if (thread != 0) return;
        const Visible of_first = item.visible_to_row(item.tile.first_row, params);
        const Visible of_last = item.visible_to_row(min(item.tile.first_row + Rows - 1, last_row), params);
        seen = {of_first.begin, of_last.end, of_last.sinks};
        of_first_end = of_first.end;
        of_last_begin = of_last.begin;
        main_begin = seen.begin / Keys;
        end = ceil_div(seen.end, Keys);
        sink_end = min(ceil_div(seen.sinks, Keys), main_begin);
    }
    DEVICE uint32_t first() const { return sink_end > 0 ? 0 : main_begin; }
    DEVICE uint32_t after(uint32_t tile) const { return tile + 1 == sink_end ? main_begin : tile + 1; }
    // Whether some row sees each key of a tile.
    DEVICE bool sees_all(uint32_t first_key) const {
        return (first_key >= seen.begin && first_key + Keys <= seen.end) || first_key + Keys <= seen.sinks;
    }
    // Tiles that every row sees whole need no mask.
    DEVICE bool needs_mask(uint32_t first_key) const {
        return first_key < of_last_begin || first_key + Keys > of_first_end;
    }
};

// Two neighbouring values, in the type of their place.
template <class T>
DEVICE void store_pair(T* place, float left, float right) {
    *reinterpret_cast<uint32_t*>(place) = pack2<T>(left, right);
}
template <>
DEVICE void store_pair<float>(float* place, float left, float right) {
    *reinterpret_cast<float2*>(place) = make_float2(left, right);
}

// Some warps' rows and their softmax state, as accumulators of 16x8 tiles: a lane holds rows lane/4 and lane/4 + 8 of each row
// tile. The first of the warps is `FirstWarp`.
//
// O and l are relative to a reference. Where `Slack` is 0 that is the maximum so far, and O is multiplied whenever it grows. Else a row
// moves its reference to the maximum only once that is more than `Slack` above it, in units of log2: what P and l lose by that is
// nothing, for they are floating-point numbers, at most 2^Slack a key instead of 1; but the maximum takes registers of its own.
// Either way a row's bits hang on its own keys alone, not on who shares its warp.
template <uint32_t FirstWarp, uint32_t RowTiles, uint32_t KeyColumns, uint32_t VDim, bool SoftCap, uint32_t Slack>
struct PrefillRows {
    static constexpr uint32_t KEY_TILES = KeyColumns / 8;
    static constexpr uint32_t V_TILES = VDim / 8;


    float o[RowTiles][V_TILES][4];
    float m[RowTiles][2];     // the reference, in units of log2
    float peak[RowTiles][2];  // the maximum, where there is slack
    float l[RowTiles][2];     // of this lane's columns alone

    // First row of the warp, counted from the tile's first.
    static DEVICE uint32_t warp_row() { return (warp_index() - FirstWarp) * RowTiles * 16; }

    // Row of the item that register pair e of row tile r belongs to.
    template <class Item>
    static DEVICE uint32_t row_of(const Item& item, uint32_t r, uint32_t e) {
        return item.tile.first_row + warp_row() + r * 16 + accumulator_row(lane_index(), 2 * e);
    }

    DEVICE void start() {
#pragma unroll
        for (uint32_t r = 0; r < RowTiles; r++) {
#pragma unroll
            for (uint32_t e = 0; e < 2; e++) {
                m[r][e] = NEGATIVE_INFINITY;
                peak[r][e] = NEGATIVE_INFINITY;
                l[r][e] = 0.0f;
            }
#pragma unroll
            for (uint32_t v = 0; v < V_TILES; v++) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) o[r][v][i] = 0.0f;
            }
        }
    }

    // From dot products to scores as a share of the cap, where there is one.
    DEVICE void cap(float (&s)[RowTiles][KEY_TILES][4], const PrefillParams& params) const {
        if (!SoftCap) return;
        const float to_cap = params.scale * rcp_approx(params.soft_cap);
#pragma unroll
        for (uint32_t r = 0; r < RowTiles; r++) {
#pragma unroll
            for (uint32_t n = 0; n < KEY_TILES; n++) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) s[r][n][i] = tanh_by_exp2(s[r][n][i] * to_cap);
            }
        }
    }

    // Words of the hidden keys of a row tile, which has 4 · KEY_TILES scores in a lane; and the bit of score i of a key tile: bit
    // n · 2 + i % 2 for its row's columns of key tile n, the second row in a word of its own or in the upper half.
    static_assert(KEY_TILES <= 16, "a row's columns of a lane fill a word");
    static constexpr uint32_t HIDDEN = KEY_TILES > 8 ? 2 : 1;
    static DEVICE constexpr uint32_t hidden_bit(uint32_t n, uint32_t i) {
        return 1u << (n * 2 + i % 2 + (HIDDEN == 1 ? i / 2 * 16 : 0));
    }

    // Bits of a row's keys from `key` on, of those from `lane_key` on that are this lane's: two of every eight.
    static DEVICE uint32_t bits_from(uint32_t key, uint32_t lane_key) {
        const uint32_t before = key > lane_key ? min(key - lane_key, KeyColumns) : 0;
        const uint32_t columns = before / 8 * 2 + min(before % 8, 2u);
        return columns < 32 ? ~0u << columns : 0;
    }

    // Which of a tile's keys this lane's rows do not see; `of_row` is what each row of the block sees. Worked out before the scores
    // take their registers, and from the ends of what is seen: a comparison per key would take six times as many instructions.
    DEVICE void hide(uint32_t (&hidden)[RowTiles * HIDDEN], uint32_t first_key, const Visible* of_row) const {
        const uint32_t lane_key = first_key + accumulator_column(lane_index(), 0);
#pragma unroll
        for (uint32_t r = 0; r < RowTiles; r++) {
#pragma unroll
            for (uint32_t e = 0; e < 2; e++) {
                const Visible visible = of_row[warp_row() + r * 16 + accumulator_row(lane_index(), 2 * e)];
                const uint32_t bits = (~bits_from(visible.begin, lane_key) | bits_from(visible.end, lane_key)) &
                                      bits_from(visible.sinks, lane_key);
                uint32_t& word = hidden[(r * 2 + e) * HIDDEN / 2];
                if (HIDDEN == 2) {
                    word = bits;
                } else {
                    word = e == 0 ? bits & 0xffff : word | bits << 16;
                }
            }
        }
    }

    // Puts −inf where a row does not see a key.
    DEVICE void mask(float (&s)[RowTiles][KEY_TILES][4], const uint32_t (&hidden)[RowTiles * HIDDEN]) const {
#pragma unroll
        for (uint32_t r = 0; r < RowTiles; r++) {
#pragma unroll
            for (uint32_t n = 0; n < KEY_TILES; n++) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) {
                    if (hidden[(r * 2 + i / 2) * HIDDEN / 2] & hidden_bit(n, i)) s[r][n][i] = NEGATIVE_INFINITY;
                }
            }
        }
    }

    // Takes in a tile's scores: leaves P in `s`, and says whether some row of the warp may have moved its reference, for which O still
    // needs the factors in `shrink`. The factor to units of log2 is positive, so the maximum is taken before it and each score
    // meets it in the multiply-add that also takes the reference away.
    DEVICE bool softmax(float (&s)[RowTiles][KEY_TILES][4], float (&shrink)[RowTiles][2], const PrefillParams& params) {
        const float to_log2 = (SoftCap ? params.soft_cap : params.scale) * LOG2_E;
        float top[RowTiles][2];
        bool moves = false;
#pragma unroll
        for (uint32_t r = 0; r < RowTiles; r++) {
            float largest[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY};
#pragma unroll
            for (uint32_t n = 0; n < KEY_TILES; n++) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) largest[i / 2] = fmaxf(largest[i / 2], s[r][n][i]);
            }
#pragma unroll
            for (uint32_t e = 0; e < 2; e++) {
                top[r][e] = fmaxf(Slack > 0 ? peak[r][e] : m[r][e], warp_max<4>(largest[e]) * to_log2);
                moves |= rises(top[r][e], m[r][e]);
            }
        }
        if (Slack == 0 || __any_sync(FULL_WARP, moves)) {
            moves = true;
#pragma unroll
            for (uint32_t r = 0; r < RowTiles; r++) {
#pragma unroll
                for (uint32_t e = 0; e < 2; e++) {
                    const bool moved = rises(top[r][e], m[r][e]);
                    shrink[r][e] = moved ? exp2_approx(m[r][e] - top[r][e]) : 1.0f;
                    m[r][e] = moved ? top[r][e] : m[r][e];
                    l[r][e] *= shrink[r][e];
                }
            }
        }
#pragma unroll
        for (uint32_t r = 0; r < RowTiles; r++) {
#pragma unroll
            for (uint32_t e = 0; e < 2; e++) {
                const float reference = m[r][e] == NEGATIVE_INFINITY ? 0.0f : m[r][e];
                float sum = 0.0f;
#pragma unroll
                for (uint32_t n = 0; n < KEY_TILES; n++) {
#pragma unroll
                    for (uint32_t i = 2 * e; i < 2 * e + 2; i++) {
                        s[r][n][i] = exp2_approx(__fmaf_rn(s[r][n][i], to_log2, -reference));
                        sum += s[r][n][i];
                    }
                }
                l[r][e] += sum;
                peak[r][e] = top[r][e];
            }
        }
        return moves;
    }

    // Whether a maximum has left its row's reference behind.
    static DEVICE bool rises(float top, float reference) {
        return Slack > 0 ? top > reference + static_cast<float>(Slack) : top > reference;
    }

    // O as of the reference that softmax has moved.
    DEVICE void rescale(const float (&shrink)[RowTiles][2]) {
#pragma unroll
        for (uint32_t r = 0; r < RowTiles; r++) {
#pragma unroll
            for (uint32_t v = 0; v < V_TILES; v++) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) o[r][v][i] *= shrink[r][i / 2];
            }
        }
    }

    // Makes the maximum the reference, as a state that is kept has it.
    DEVICE void settle() {
        if constexpr (Slack != 0) {
            float shrink[RowTiles][2];
#pragma unroll
            for (uint32_t r = 0; r < RowTiles; r++) {
#pragma unroll
                for (uint32_t e = 0; e < 2; e++) {
                    shrink[r][e] = m[r][e] == NEGATIVE_INFINITY ? 1.0f : exp2_approx(m[r][e] - peak[r][e]);
                    m[r][e] = peak[r][e];
                    l[r][e] *= shrink[r][e];
                }
            }
            rescale(shrink);
        }
    }

    // Calls `visit(r, e, row)` for each of this lane's rows that exist, with the row's index in out and lse.
    template <class Item, class Visit>
    DEVICE void for_each_row(const Item& item, const PrefillParams& params, const Visit& visit) const {
#pragma unroll
        for (uint32_t r = 0; r < RowTiles; r++) {
#pragma unroll
            for (uint32_t e = 0; e < 2; e++) {
                const uint32_t row = row_of(item, r, e);
                const uint32_t query = row / params.group;
                if (query >= item.tile.queries) continue;
                const uint64_t token = item.tile.first_query + query;
                const uint32_t head = item.kv_head * params.group + row % params.group;
                visit(r, e, token * params.kv_heads * params.group + head);
            }
        }
    }

    // Σ of l over the four lanes of a row. Only they come here together.
    DEVICE float row_sum(uint32_t r, uint32_t e) const {
        const uint32_t lanes = row_lanes();
        float sum = l[r][e];
        sum += __shfl_xor_sync(lanes, sum, 1);
        sum += __shfl_xor_sync(lanes, sum, 2);
        return sum;
    }
    static DEVICE uint32_t row_lanes() { return 0xfu << (lane_index() & ~3u); }

    // Whether the row has seen no key yet.
    DEVICE bool untouched(uint32_t r, uint32_t e) const { return m[r][e] == NEGATIVE_INFINITY && row_sum(r, e) == 0.0f; }

    // Divides O by l, and leaves lse [rows].
    template <class Item>
    DEVICE void normalise(float* lse, const Item& item, const PrefillParams& params) {
        for_each_row(item, params, [&](uint32_t r, uint32_t e, uint64_t row) {
            SoftmaxState state;
            state.m = m[r][e] * LN_2;
            state.l = row_sum(r, e);
            if (lane_index() % 4 == 0) lse[row] = state.lse();
            const float scale = state.l > 0.0f || state.l != state.l ? 1.0f / state.l : 0.0f;
#pragma unroll
            for (uint32_t v = 0; v < V_TILES; v++) {
                o[r][v][2 * e] *= scale;
                o[r][v][2 * e + 1] *= scale;
            }
        });
    }

    // O to out [rows, VDim]; rows that are untouched stay as they are stored where `resume` says that they are.
    template <class Out, class Item>
    DEVICE void store(Out* out, bool resume, const Item& item, const PrefillParams& params) const {
        for_each_row(item, params, [&](uint32_t r, uint32_t e, uint64_t row) {
            if (resume && untouched(r, e)) return;
            Out* const first = out + row * VDim + lane_index() % 4 * 2;
#pragma unroll
            for (uint32_t v = 0; v < V_TILES; v++) store_pair(first + v * 8, o[r][v][2 * e], o[r][v][2 * e + 1]);
        });
    }

    // Takes in the state so far, state_o [rows, VDim] and state_ml [rows, 2]; at the end, when the scores' registers are free.
    // Untouched rows stay so, unless they are to end as output.
    template <class Item>
    DEVICE void join_state(const float* state_o, const float* state_ml, bool finish, const Item& item,
                           const PrefillParams& params) {
        for_each_row(item, params, [&](uint32_t r, uint32_t e, uint64_t row) {
            if (!finish && untouched(r, e)) return;
            const uint32_t t = lane_index() % 4;
            const float2 before = *reinterpret_cast<const float2*>(state_ml + 2 * row);
            const float m_before = before.x * LOG2_E;
            const float m_new = fmaxf(m[r][e], m_before);
            const float reference = m_new == NEGATIVE_INFINITY ? 0.0f : m_new;
            const float scale = exp2_approx(m[r][e] - reference);
            const float scale_before = exp2_approx(m_before - reference);
            m[r][e] = m_new;
            l[r][e] *= scale;
#pragma unroll
            for (uint32_t v = 0; v < V_TILES; v++) {
                o[r][v][2 * e] *= scale;
                o[r][v][2 * e + 1] *= scale;
            }
            if (scale_before == 0.0f) return;  // an empty state's O may hold anything
            if (t == 0) l[r][e] += before.y * scale_before;
#pragma unroll
            for (uint32_t v = 0; v < V_TILES; v++) {
                const float2 pair = *reinterpret_cast<const float2*>(state_o + row * VDim + v * 8 + t * 2);
                o[r][v][2 * e] += pair.x * scale_before;
                o[r][v][2 * e + 1] += pair.y * scale_before;
            }
        });
    }

    // m and l to state_ml [rows, 2], of the rows of which store leaves the rest of the state.
    template <class Item>
    DEVICE void store_sums(float* state_ml, bool resume, const Item& item, const PrefillParams& params) const {
        for_each_row(item, params, [&](uint32_t r, uint32_t e, uint64_t row) {
            if (resume && untouched(r, e)) return;
            const float sum = row_sum(r, e);
            __syncwarp(row_lanes());  // all four have read what one of them overwrites
            if (lane_index() % 4 != 0) return;
            // The running maximum passes NaN over; a state without a maximum would count as empty in the next step.
            store_pair(state_ml + 2 * row, sum != sum ? sum : m[r][e] * LN_2, sum);
        });
    }
};

// The A operands of P·V over 16 keys: the accumulators of two neighbouring key tiles, rounded to storage.
template <class Element>
DEVICE void pack_p(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
    a[0] = pack2<Element>(left[0], left[1]);
    a[1] = pack2<Element>(left[2], left[3]);
    a[2] = pack2<Element>(right[0], right[1]);
    a[3] = pack2<Element>(right[2], right[3]);
}
