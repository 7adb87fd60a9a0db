// Prefill attention: flash attention of ragged batches of queries over paged or contiguous keys.
//
//   out = softmax(mask(cap(scale·q·Kᵀ)))·V,  lse = ln Σ exp(score)        per query token and query head
//
// q           [num_queries, q_heads, QK_DIM]  KV_DTYPE
// k, v        by the strides of params; paged: token t of sequence s lies in slot t % page of page block_table[head, s, t / page];
//             contiguous: at token kv_start of the tile + t. Vectors are 16-byte aligned.
// tiles       [tile_count] PrefillTile, of prefill_plan: which rows see which keys
// valid_len   of prefill_plan; read where every KV head has its own block table
// CARRY 0:    out [num_queries, q_heads, V_DIM] KV_DTYPE, lse [num_queries, q_heads] f32, natural log
// CARRY 1:    state_o [num_queries, q_heads, V_DIM] f32 and state_ml [num_queries, q_heads, 2] f32: the raw state (m, l, O) in
//             natural units, continued where params.resume is 1 and left there; what one step of a ring needs
//
// Query i of n sits at p = kv_len − n + i. It sees keys up to p if causal (all if not), of them the last `window`, and the
// first `sinks` up to p and the first `prefix` whatever p is. A query without keys gets out 0 and lse −inf, or its carried
// state stays bit for bit as it is. Keys and values that some row of a tile sees are finite, or their NaN may reach its other
// rows; memory of all others may hold anything.
//
// Arch:    sm_80 and later.
// Mapping: a block owns ROWS rows of one sequence and KV head; row r is query head r % group of token r / group, so that all
//          heads of a group share K and V and short chunks still fill a tile. Four warps split the rows. Keys stream in tiles
//          of 64: K of the next tile loads during PV, V during QKᵀ (FlashAttention-2, algorithm 1). The list has the longest
//          tiles first; heads follow one another, so that the blocks of a head share its keys in L2.
// Budget:  255 registers, ROWS·QK_DIM·2 + 64·(QK_DIM + V_DIM)·2 + 2080 bytes of shared memory. A tile of keys at d 128 takes 1750
//          instructions on sm_90a: 256 mma, 80 ldmatrix, and over a third that only tiles on an edge of the mask run.
// Limit:   flops: 2·(QK_DIM + V_DIM) per visible key and row on the tensor cores.
#include "core.cuh"
#include "prefill_params.h"
#include "ptx/cp_async.cuh"
#include "ptx/math.cuh"
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"
#include "ptx/shuffle.cuh"
#include "ptx/sync.cuh"
#include "tile/cache_check.cuh"
#include "tile/fragment.cuh"
#include "tile/prefill_tiles.cuh"
#include "tile/softmax_state.cuh"
#include "types.cuh"

using Element = StorageOf<KV_DTYPE>;

constexpr uint32_t THREADS = 128;
constexpr uint32_t WARPS = THREADS / WARP_SIZE;
constexpr uint32_t KEYS = 64;                                            // of a tile
constexpr uint32_t ROW_TILES = QK_DIM <= 128 && V_DIM <= 128 ? 2 : 1;    // of 16 rows, per warp
constexpr uint32_t WARP_ROWS = ROW_TILES * 16;
constexpr uint32_t ROWS = WARPS * WARP_ROWS;
constexpr uint32_t KEY_TILES = KEYS / 8;
constexpr uint32_t V_TILES = V_DIM / 8;
constexpr uint32_t K_STEPS = QK_DIM / 16;

constexpr uint32_t K_ROW = QK_DIM * 2;  // bytes
constexpr uint32_t V_ROW = V_DIM * 2;
constexpr uint32_t Q_BYTES = ROWS * K_ROW;
constexpr uint32_t K_BYTES = KEYS * K_ROW;
constexpr uint32_t V_BYTES = KEYS * V_ROW;

// The rows that one block works on.
struct Item {
    const PrefillTile& tile;
    uint32_t kv_head;
    uint32_t kv_len;  // of this head: 0 where its pages cannot be read

    DEVICE Visible visible_to_row(uint32_t row, const PrefillParams& params) const {
        return visible_to(row / params.group, tile.queries, kv_len, tile.causal != 0, params);
    }
};

// Where the rows of a tile of keys begin in K and V, worked out once per row and tile and not for each of its chunks. Two
// buffers: the next tile's are put while this one's are in use.
struct RowPlaces {
    int64_t offset[2][2][KEYS];  // [buffer, K or V, row] in elements, or NONE
};
constexpr int64_t NONE = -1;
static_assert(THREADS == 2 * KEYS, "one thread per row of K and of V");

// Beside q, K and V. The tile's description lies here and not in registers, of which the main loop has none to spare.
struct Shared {
    RowPlaces places;
    PrefillTile tile;
};

// Row of the tile, and whether of K or V, that this thread places.
DEVICE uint32_t placed_row() { return threadIdx.x % KEYS; }
DEVICE bool places_v() { return threadIdx.x >= KEYS; }

// The page of the row that this thread places; any, where the row is not seen.
DEVICE uint32_t page_of(const uint32_t* table, uint32_t first_key, const Visible& seen, const PrefillParams& params) {
#if PAGED
    const uint32_t key = first_key + placed_row();
    // prefill_plan has checked the ids, but the table is the caller's to change: never a page outside the pool.
    return seen.sees(key) ? min(table[key >> params.page_shift], params.num_pages - 1) : 0;
#else
    return 0;
#endif
}

// Places this thread's row. Rows of keys that no row of the block sees have no place.
DEVICE void place(RowPlaces& places, uint32_t buffer, uint32_t first_key, uint32_t page, const Visible& seen,
                  const PrefillParams& params) {
    const uint32_t key = first_key + placed_row();
    const int64_t token_stride = places_v() ? params.v_token_stride : params.k_token_stride;
#if PAGED
    const int64_t page_stride = places_v() ? params.v_page_stride : params.k_page_stride;
    const int64_t offset = page * page_stride + (key & ((1u << params.page_shift) - 1)) * token_stride;
#else
    const int64_t offset = key * token_stride;
#endif
    places.offset[buffer][places_v()][placed_row()] = seen.sees(key) ? offset : NONE;
}

// Starts copying a tile of K or V to shared memory, with the swizzle applied on the way. Rows without a place become 0: a weight
// of 0 would not silence a NaN.
template <uint32_t RowBytes>
DEVICE void load_tile(uint32_t tile_address, const Element* base, const int64_t (&offset)[KEYS]) {
    constexpr uint32_t CHUNKS = RowBytes / 16;
#pragma unroll 4
    for (uint32_t i = 0; i < KEYS * CHUNKS / THREADS; i++) {
        const uint32_t index = i * THREADS + threadIdx.x;
        const uint32_t row = index / CHUNKS;
        const uint32_t chunk = index % CHUNKS;
        const int64_t place = offset[row];
        cp_async_16_zfill(tile_address + Swizzle<RowBytes>::offset(row, chunk),
                          base + (place < 0 ? 0 : place) + chunk * 8, place < 0 ? 0 : 16);
    }
    cp_async_commit();
}

DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if KV_DTYPE == 1
    mma_m16n8k16_f16(d, a, b);
#else
    mma_m16n8k16_bf16(d, a, b);
#endif
}

// One warp's rows and their softmax state. A lane holds rows lane/4 and lane/4 + 8 of each row tile.
struct Warp {
    float o[ROW_TILES][V_TILES][4];
    float m[ROW_TILES][2];  // in units of log2
    float l[ROW_TILES][2];  // of this lane's columns alone

    // Row of the item that register pair e of row tile r belongs to.
    static DEVICE uint32_t row_of(const Item& item, uint32_t r, uint32_t e) {
        return item.tile.first_row + warp_index() * WARP_ROWS + r * 16 + accumulator_row(lane_index(), 2 * e);
    }

    DEVICE void start() {
#pragma unroll
        for (uint32_t r = 0; r < ROW_TILES; r++) {
#pragma unroll
            for (uint32_t e = 0; e < 2; e++) {
                m[r][e] = NEGATIVE_INFINITY;
                l[r][e] = 0.0f;
            }
#pragma unroll
            for (uint32_t v = 0; v < V_TILES; v++) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) o[r][v][i] = 0.0f;
            }
        }
    }

    // Dot products of the warp's rows with a tile of keys; with a soft-cap, scores as a share of the cap.
    DEVICE void scores(float (&s)[ROW_TILES][KEY_TILES][4], uint32_t q_tile, uint32_t k_tile,
                       const PrefillParams& params) const {
#pragma unroll
        for (uint32_t r = 0; r < ROW_TILES; r++) {
#pragma unroll
            for (uint32_t n = 0; n < KEY_TILES; n++) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) s[r][n][i] = 0.0f;
            }
        }
#pragma unroll
        for (uint32_t step = 0; step < K_STEPS; step++) {
            uint32_t a[ROW_TILES][4];
#pragma unroll
            for (uint32_t r = 0; r < ROW_TILES; r++) {
                load_fragment_a<K_ROW>(a[r], q_tile, warp_index() * WARP_ROWS + r * 16, step * 2);
            }
#pragma unroll
            for (uint32_t n = 0; n < KEY_TILES; n += 2) {
                uint32_t b[2][2];
                load_fragment_b2<K_ROW>(b, k_tile, n * 8, step * 2);
#pragma unroll
                for (uint32_t r = 0; r < ROW_TILES; r++) {
                    mma(s[r][n], a[r], b[0]);
                    mma(s[r][n + 1], a[r], b[1]);
                }
            }
        }
#if SOFT_CAP
        const float to_cap = params.scale / params.soft_cap;
#pragma unroll
        for (uint32_t r = 0; r < ROW_TILES; r++) {
#pragma unroll
            for (uint32_t n = 0; n < KEY_TILES; n++) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) s[r][n][i] = tanhf(s[r][n][i] * to_cap);
            }
        }
#endif
    }

    // Puts −inf where a row does not see a key. Few tiles need it, so what rows see is worked out anew, not held in registers.
    DEVICE void mask(float (&s)[ROW_TILES][KEY_TILES][4], uint32_t first_key, const Item& item,
                     const PrefillParams& params) const {
#pragma unroll
        for (uint32_t r = 0; r < ROW_TILES; r++) {
#pragma unroll
            for (uint32_t e = 0; e < 2; e++) {
                const Visible visible = item.visible_to_row(row_of(item, r, e), params);
#pragma unroll
                for (uint32_t n = 0; n < KEY_TILES; n++) {
#pragma unroll
                    for (uint32_t i = 2 * e; i < 2 * e + 2; i++) {
                        const uint32_t key = first_key + n * 8 + accumulator_column(lane_index(), i);
                        if (!visible.sees(key)) s[r][n][i] = NEGATIVE_INFINITY;
                    }
                }
            }
        }
    }

    // Moves the running maximum to take in a tile's scores and leaves P in `s`. The factor to units of log2 is positive, so the
    // maximum is taken before it and each score meets it in the multiply-add that also takes the maximum away.
    DEVICE void softmax(float (&s)[ROW_TILES][KEY_TILES][4], const PrefillParams& params) {
#if SOFT_CAP
        const float to_log2 = params.soft_cap * LOG2_E;
#else
        const float to_log2 = params.scale * LOG2_E;
#endif
#pragma unroll
        for (uint32_t r = 0; r < ROW_TILES; r++) {
            float largest[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY};
#pragma unroll
            for (uint32_t n = 0; n < KEY_TILES; n++) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) largest[i / 2] = fmaxf(largest[i / 2], s[r][n][i]);
            }
#pragma unroll
            for (uint32_t e = 0; e < 2; e++) {
                const float m_new = fmaxf(m[r][e], warp_max<4>(largest[e]) * to_log2);
                const float reference = m_new == NEGATIVE_INFINITY ? 0.0f : m_new;
                const float shrink = exp2_approx(m[r][e] - reference);
                m[r][e] = m_new;
                float sum = 0.0f;
#pragma unroll
                for (uint32_t n = 0; n < KEY_TILES; n++) {
#pragma unroll
                    for (uint32_t i = 2 * e; i < 2 * e + 2; i++) {
                        s[r][n][i] = exp2_approx(__fmaf_rn(s[r][n][i], to_log2, -reference));
                        sum += s[r][n][i];
                    }
                }
                l[r][e] = l[r][e] * shrink + sum;
#pragma unroll
                for (uint32_t v = 0; v < V_TILES; v++) {
                    o[r][v][2 * e] *= shrink;
                    o[r][v][2 * e + 1] *= shrink;
                }
            }
        }
    }

    // O += P·V over a tile of keys: the accumulators of two neighbouring key tiles are the A operand of one product.
    DEVICE void accumulate(const float (&p)[ROW_TILES][KEY_TILES][4], uint32_t v_tile) {
#pragma unroll
        for (uint32_t n = 0; n < KEY_TILES; n += 2) {
            uint32_t a[ROW_TILES][4];
#pragma unroll
            for (uint32_t r = 0; r < ROW_TILES; r++) {
                a[r][0] = pack2<Element>(p[r][n][0], p[r][n][1]);
                a[r][1] = pack2<Element>(p[r][n][2], p[r][n][3]);
                a[r][2] = pack2<Element>(p[r][n + 1][0], p[r][n + 1][1]);
                a[r][3] = pack2<Element>(p[r][n + 1][2], p[r][n + 1][3]);
            }
#pragma unroll
            for (uint32_t v = 0; v < V_TILES; v += 2) {
                uint32_t b[2][2];
                load_fragment_b2_trans<V_ROW>(b, v_tile, n * 8, v);
#pragma unroll
                for (uint32_t r = 0; r < ROW_TILES; r++) {
                    mma(o[r][v], a[r], b[0]);
                    mma(o[r][v + 1], a[r], b[1]);
                }
            }
        }
    }

    // Calls `visit(r, e, row)` for each of this lane's rows that exist, with the row's index in out and lse.
    template <class Visit>
    DEVICE void for_each_row(const Item& item, const PrefillParams& params, const Visit& visit) const {
#pragma unroll
        for (uint32_t r = 0; r < ROW_TILES; r++) {
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
};

// Loads the block's rows of q, swizzled; rows that do not exist are zero.
DEVICE void load_queries(uint32_t q_tile, const Element* q, const Item& item, const PrefillParams& params) {
    constexpr uint32_t CHUNKS = K_ROW / 16;
    for (uint32_t index = threadIdx.x; index < ROWS * CHUNKS; index += THREADS) {
        const uint32_t row = index / CHUNKS;
        const uint32_t chunk = index % CHUNKS;
        const uint32_t query = (item.tile.first_row + row) / params.group;
        const bool exists = query < item.tile.queries;
        const uint64_t token = exists ? item.tile.first_query + query : 0;
        const uint64_t head = exists ? item.kv_head * params.group + (item.tile.first_row + row) % params.group : 0;
        const Element* source = q + (token * params.kv_heads * params.group + head) * QK_DIM + chunk * 8;
        cp_async_16_zfill(q_tile + Swizzle<K_ROW>::offset(row, chunk), source, exists ? 16 : 0);
    }
    cp_async_commit();
}

// The tiles of keys that some row of the block sees, in order: those of the sinks, then those from `main_begin` on.
struct KeyTiles {
    uint32_t sink_end;
    uint32_t main_begin;
    uint32_t end;

    DEVICE explicit KeyTiles(const Visible& seen) {
        main_begin = seen.begin / KEYS;
        end = ceil_div(seen.end, KEYS);
        sink_end = min(ceil_div(seen.sinks, KEYS), main_begin);
    }
    DEVICE uint32_t first() const { return sink_end > 0 ? 0 : main_begin; }
    DEVICE uint32_t after(uint32_t tile) const { return tile + 1 == sink_end ? main_begin : tile + 1; }
};

KERNEL(128, 2)
prefill(const Element* q, const Element* k, const Element* v, const uint32_t* block_table, const PrefillTile* tile_list,
        const uint32_t* tile_count, const uint32_t* valid_len,
#if CARRY
        float* state_o, float* state_ml,
#else
        Element* out, float* lse,
#endif
        const __grid_constant__ PrefillParams params) {
    DYNAMIC_SHARED(shared_bytes);
    const uint32_t q_tile = shared_address(shared_bytes);
    const uint32_t k_tile = q_tile + Q_BYTES;
    const uint32_t v_tile = k_tile + K_BYTES;
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes + Q_BYTES + K_BYTES + V_BYTES);
    RowPlaces& places = shared.places;

    grid_dependency_wait();
    if (blockIdx.x >= *tile_count) return;
    if (threadIdx.x == 0) shared.tile = tile_list[blockIdx.x];
    __syncthreads();
    Item item{shared.tile, blockIdx.y, shared.tile.kv_len};
#if PAGED
    // A head whose own pages cannot be read sees nothing; the others' keys are as many as the tile says.
    if (params.table_head_stride != 0 && item.kv_len > 0) {
        item.kv_len = valid_len_of(valid_len, item.tile.sequence, item.kv_head, params);
    }
    const int64_t start = 0;
    const uint32_t* table =
        block_table + item.kv_head * params.table_head_stride + item.tile.sequence * params.table_batch_stride;
#else
    const int64_t start = item.tile.kv_start;
    const uint32_t* table = nullptr;
#endif
    const uint32_t last_row = min(item.tile.first_row + ROWS, item.tile.queries * params.group) - 1;
    const Visible of_first = item.visible_to_row(item.tile.first_row, params);
    const Visible of_last = item.visible_to_row(last_row, params);
    const Visible seen = {of_first.begin, of_last.end, of_last.sinks};
    const KeyTiles tiles(seen);
    const Element* const keys = k + start * params.k_token_stride + item.kv_head * params.k_head_stride;
    const Element* const values = v + start * params.v_token_stride + item.kv_head * params.v_head_stride;

    Warp warp;
    warp.start();
    load_queries(q_tile, q, item, params);
    uint32_t buffer = 0;
    if (tiles.first() < tiles.end) {
        const uint32_t first_key = tiles.first() * KEYS;
        place(places, buffer, first_key, page_of(table, first_key, seen, params), seen, params);
        __syncthreads();
        load_tile<K_ROW>(k_tile, keys, places.offset[buffer][0]);
    }
    for (uint32_t tile = tiles.first(); tile < tiles.end;) {
        const uint32_t first_key = tile * KEYS;
        const uint32_t next = tiles.after(tile);
        cp_async_wait<0>();
        __syncthreads();  // K has landed for everyone, and everyone has left V
        load_tile<V_ROW>(v_tile, values, places.offset[buffer][1]);
        const uint32_t page = page_of(table, next * KEYS, seen, params);  // on its way while scores are computed

        float s[ROW_TILES][KEY_TILES][4];
        warp.scores(s, q_tile, k_tile, params);
        // Tiles that every row sees whole need no mask.
        if (first_key < of_last.begin || first_key + KEYS > of_first.end) warp.mask(s, first_key, item, params);
        buffer ^= 1;
        place(places, buffer, next * KEYS, page, seen, params);
        warp.softmax(s, params);

        cp_async_wait<0>();
        __syncthreads();  // V has landed for everyone, everyone has left K, and the next tile's rows have their places
        if (next < tiles.end) load_tile<K_ROW>(k_tile, keys, places.offset[buffer][0]);
        warp.accumulate(s, v_tile);
        tile = next;
    }
    cp_async_wait<0>();  // q, where no key was seen

    warp.for_each_row(item, params, [&](uint32_t r, uint32_t e, uint64_t row) {
        const uint32_t t = lane_index() % 4;
        // Only the four lanes of a row come here together.
        const uint32_t lanes = 0xfu << (lane_index() & ~3u);
        float l = warp.l[r][e];
        l += __shfl_xor_sync(lanes, l, 1);
        l += __shfl_xor_sync(lanes, l, 2);
#if CARRY
        if (params.resume && warp.m[r][e] == NEGATIVE_INFINITY && l == 0.0f) return;  // nothing to add
        // The state so far joins at the end, when the scores' registers are free.
        float m = warp.m[r][e];
        const float m_before = params.resume ? state_ml[2 * row] * LOG2_E : NEGATIVE_INFINITY;
        m = fmaxf(m, m_before);
        const float reference = m == NEGATIVE_INFINITY ? 0.0f : m;
        const float scale = exp2_approx(warp.m[r][e] - reference);
        const float scale_before = exp2_approx(m_before - reference);
        const bool joins = scale_before != 0.0f;  // an empty state's O may hold anything
        if (joins) l = l * scale + state_ml[2 * row + 1] * scale_before;
        __syncwarp(lanes);  // all four have read what one of them overwrites
        if (t == 0) {
            // The running maximum passes NaN over; a state without a maximum would count as empty in the next step.
            state_ml[2 * row] = l != l ? l : m * LN_2;
            state_ml[2 * row + 1] = l;
        }
#pragma unroll
        for (uint32_t tile = 0; tile < V_TILES; tile++) {
            float2* const place = reinterpret_cast<float2*>(state_o + row * V_DIM + tile * 8 + t * 2);
            float2 pair = make_float2(warp.o[r][tile][2 * e], warp.o[r][tile][2 * e + 1]);
            if (joins) {
                const float2 before = *place;
                pair = make_float2(pair.x * scale + before.x * scale_before, pair.y * scale + before.y * scale_before);
            }
            *place = pair;
        }
#else
        SoftmaxState state;
        state.m = warp.m[r][e] * LN_2;
        state.l = l;
        if (t == 0) lse[row] = state.lse();
        const float scale = l > 0.0f || l != l ? 1.0f / l : 0.0f;
#pragma unroll
        for (uint32_t tile = 0; tile < V_TILES; tile++) {
            *reinterpret_cast<uint32_t*>(out + row * V_DIM + tile * 8 + t * 2) =
                pack2<Element>(warp.o[r][tile][2 * e] * scale, warp.o[r][tile][2 * e + 1] * scale);
        }
#endif
    });
}
