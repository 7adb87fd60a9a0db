// Prefill attention: flash attention of ragged batches of queries over paged or contiguous keys.
//
//   out = softmax(mask(cap(scale·q·Kᵀ)))·V,  lse = ln Σ exp(score)        per query token and query head
//
// q           [num_queries, q_heads, QK_DIM]  KV_DTYPE; sequence s has queries cu_queries[s] … cu_queries[s + 1] − 1
// k, v        by the strides of params; paged: token t of sequence s lies in slot t % page of page block_table[head, s, t / page];
//             contiguous: at token kv_start[s] + t. Vectors are 16-byte aligned.
// kv_len      [batch] u32, keys of each sequence; its queries are aligned to their end
// CARRY 0:    out [num_queries, q_heads, V_DIM] KV_DTYPE, lse [num_queries, q_heads] f32, natural log
// CARRY 1:    state_o [num_queries, q_heads, V_DIM] f32 and state_ml [num_queries, q_heads, 2] f32: the raw state (m, l, O) in
//             natural units, continued where params.resume is 1 and left there; what one step of a ring needs
// status      first fault: FAULT_BAD_LENGTH, FAULT_BAD_PAGE or FAULT_BAD_RANGE with the sequence
//
// Query i of n sits at p = kv_len − n + i. It sees keys up to p if causal (all if not), of them the last `window`, and the
// first `sinks` up to p and the first `prefix` whatever p is. A query without keys, and every query of a sequence that cannot
// be read, gets out 0 and lse −inf (a carried state stays as it is). A sequence whose cu_queries make no sense has no queries.
//
// Arch:    sm_80 and later.
// Mapping: a block owns ROWS rows of one sequence and KV head; row r is query head r % group of token r / group, so that all
//          heads of a group share K and V and short chunks still fill a tile. Four warps split the rows. Keys stream in tiles
//          of 64: K of the next tile loads during PV, V during QKᵀ (FlashAttention-2, algorithm 1). Later tiles come first,
//          because they are the longest of a causal sequence.
// Budget:  255 registers, ROWS·QK_DIM·2 + 64·(QK_DIM + V_DIM)·2 bytes of shared memory.
// Limit:   flops: 2·(QK_DIM + V_DIM) per visible key and row on the tensor cores.
#include "core.cuh"
#include "prefill_params.h"
#include "ptx/cp_async.cuh"
#include "ptx/math.cuh"
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"
#include "ptx/shuffle.cuh"
#include "ptx/sync.cuh"
#include "status_params.h"
#include "tile/fragment.cuh"
#include "tile/softmax_state.cuh"
#include "tile/status.cuh"
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
    uint32_t sequence;
    uint32_t kv_head;
    uint32_t first_query;  // of the sequence, in q
    uint32_t queries;
    uint32_t first_row;  // of the block, among queries·group
    uint32_t kv_len;     // 0 for a sequence that cannot be read
};

// Keys that a row sees: [begin, end) and [0, sinks).
struct Visible {
    uint32_t begin;
    uint32_t end;
    uint32_t sinks;

    DEVICE bool sees(uint32_t key) const { return (key >= begin && key < end) || key < sinks; }
};

DEVICE Visible visible_to(uint32_t query, const Item& item, const PrefillParams& params) {
    // One past the query's own position; 0 where the sequence has more queries than keys up to it.
    const uint32_t own = item.kv_len + query + 1 > item.queries ? item.kv_len + query + 1 - item.queries : 0;
    uint32_t end = params.causal ? min(own, item.kv_len) : item.kv_len;
    const uint32_t begin = params.window != 0 && end > params.window ? end - params.window : 0;
    const uint32_t sinks = min(params.sinks, end);
    return {begin, max(end, min(params.prefix, item.kv_len)), sinks};
}

// Finds the sequence and rows of this block: tiles of rows are numbered sequence by sequence, last rows first. False where
// there are fewer tiles than blocks. Every warp searches for itself. A sequence that begins before an earlier one ends is
// refused, so that no row has two writers.
DEVICE bool find_item(Item& item, const uint32_t* cu_queries, uint64_t* status, const PrefillParams& params) {
    uint32_t tile = blockIdx.x;
    item.kv_head = blockIdx.y;
    uint32_t reached = 0;  // the furthest end of the sequences so far
    for (uint32_t first = 0; first < params.batch; first += WARP_SIZE) {
        const uint32_t sequence = first + lane_index();
        uint32_t begin = 0;
        uint32_t end = 0;
        if (sequence < params.batch) {
            begin = cu_queries[sequence];
            end = cu_queries[sequence + 1];
        }
        const bool ascends = end >= begin && end <= params.num_queries;
        uint32_t furthest = ascends ? end : 0;  // of this and the lanes before
#pragma unroll
        for (uint32_t distance = 1; distance < WARP_SIZE; distance *= 2) {
            const uint32_t before = __shfl_up_sync(FULL_WARP, furthest, distance);
            if (lane_index() >= distance) furthest = max(furthest, before);
        }
        const uint32_t before_lane = __shfl_up_sync(FULL_WARP, furthest, 1);
        const uint32_t taken = lane_index() == 0 ? reached : max(reached, before_lane);
        reached = max(reached, __shfl_sync(FULL_WARP, furthest, WARP_SIZE - 1));
        if (sequence < params.batch && (!ascends || begin < taken)) {
            // No block but those past the last tile looks at all sequences, so each reports what it sees.
            if (blockIdx.y == 0 && warp_index() == 0) report_fault(status, FAULT_BAD_RANGE, sequence);
            begin = end = 0;
        }
        const uint32_t tiles = ceil_div((end - begin) * params.group, ROWS);
        const uint32_t before = warp_prefix_sum(tiles);
        const uint32_t mine = __ballot_sync(FULL_WARP, tile >= before && tile < before + tiles);
        if (mine != 0) {
            const int lane = __ffs(mine) - 1;
            item.sequence = __shfl_sync(FULL_WARP, sequence, lane);
            item.first_query = __shfl_sync(FULL_WARP, begin, lane);
            item.queries = __shfl_sync(FULL_WARP, end - begin, lane);
            item.first_row = (__shfl_sync(FULL_WARP, before + tiles, lane) - 1 - tile) * ROWS;
            return true;
        }
        tile -= __shfl_sync(FULL_WARP, before + tiles, WARP_SIZE - 1);
    }
    return false;
}

// The sequence's length if all its keys can be read, else 0 after a report. The whole block calls.
DEVICE uint32_t checked_len(const Item& item, const uint32_t* kv_len, const uint32_t* kv_start, const uint32_t* table,
                            uint32_t* bad_pages, uint64_t* status, const PrefillParams& params) {
    const uint32_t len = kv_len[item.sequence];
    bool too_long = len > params.max_kv_len;
#if PAGED
    too_long = too_long || len > static_cast<uint64_t>(params.max_pages) << params.page_shift;
    if (threadIdx.x == 0) *bad_pages = 0;
    __syncthreads();
    const uint32_t pages = too_long ? 0 : ceil_div<uint64_t>(len, 1ull << params.page_shift);
    bool bad = false;
    for (uint32_t page = threadIdx.x; page < pages; page += THREADS) bad |= table[page] >= params.num_pages;
    if (bad) atomicOr(bad_pages, 1u);
    __syncthreads();
    const bool unreadable = too_long || *bad_pages != 0;
#else
    too_long = too_long || static_cast<uint64_t>(kv_start[item.sequence]) + len > params.num_tokens;
    const bool unreadable = too_long;
#endif
    if (unreadable && threadIdx.x == 0) report_fault(status, too_long ? FAULT_BAD_LENGTH : FAULT_BAD_PAGE, item.sequence);
    return unreadable ? 0 : len;
}

// Streams tiles of K or V into shared memory, with the swizzle applied on the way.
struct TileLoader {
    const Element* base;
    const uint32_t* table;
    int64_t page_stride;
    int64_t token_stride;

    template <uint32_t RowBytes>
    DEVICE void load(uint32_t tile_address, uint32_t first_key, uint32_t kv_len, const PrefillParams& params) const {
        constexpr uint32_t CHUNKS = RowBytes / 16;
#if PAGED
#pragma unroll
        for (uint32_t i = 0; i < KEYS * CHUNKS / THREADS; i++) {
            const uint32_t index = i * THREADS + threadIdx.x;
            const uint32_t row = index / CHUNKS;
            const uint32_t chunk = index % CHUNKS;
            const uint32_t key = first_key + row;
            const bool exists = key < kv_len;
            int64_t offset = 0;
            if (exists) {
                const uint32_t page = min(table[key >> params.page_shift], params.num_pages - 1);
                offset = page * page_stride + (key & ((1u << params.page_shift) - 1)) * token_stride;
            }
            cp_async_16_zfill(tile_address + Swizzle<RowBytes>::offset(row, chunk), base + offset + chunk * 8,
                              exists ? 16 : 0);
        }
#else
        // Few live addresses: this runs while O and P fill the registers.
        const Element* const tile = base + first_key * token_stride;
        const uint32_t keys = first_key < kv_len ? kv_len - first_key : 0;
#pragma unroll 1
        for (uint32_t index = threadIdx.x; index < KEYS * CHUNKS; index += THREADS) {
            const uint32_t row = index / CHUNKS;
            const uint32_t chunk = index % CHUNKS;
            const bool exists = row < keys;
            cp_async_16_zfill(tile_address + Swizzle<RowBytes>::offset(row, chunk),
                              (exists ? tile + row * token_stride : base) + chunk * 8, exists ? 16 : 0);
        }
#endif
        cp_async_commit();
    }
};

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
        return item.first_row + warp_index() * WARP_ROWS + r * 16 + accumulator_row(lane_index(), 2 * e);
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

    // Scores of the warp's rows with a tile of keys, scaled and capped, in units of log2.
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
        const float to_log2 = params.soft_cap * LOG2_E;
#else
        const float to_log2 = params.scale * LOG2_E;
#endif
#pragma unroll
        for (uint32_t r = 0; r < ROW_TILES; r++) {
#pragma unroll
            for (uint32_t n = 0; n < KEY_TILES; n++) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) {
#if SOFT_CAP
                    s[r][n][i] = tanhf(s[r][n][i] * to_cap);
#endif
                    s[r][n][i] *= to_log2;
                }
            }
        }
    }

    // Puts −inf where a row does not see a key. Few tiles need it, so what rows see is worked out anew, not held in registers.
    DEVICE void mask(float (&s)[ROW_TILES][KEY_TILES][4], uint32_t first_key, const Item& item,
                     const PrefillParams& params) const {
#pragma unroll
        for (uint32_t r = 0; r < ROW_TILES; r++) {
#pragma unroll
            for (uint32_t e = 0; e < 2; e++) {
                const Visible visible = visible_to(row_of(item, r, e) / params.group, item, params);
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

    // Moves the running maximum to take in scores, which are in units of log2, and leaves P in `s`.
    DEVICE void softmax(float (&s)[ROW_TILES][KEY_TILES][4]) {
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
                const float m_new = fmaxf(m[r][e], warp_max<4>(largest[e]));
                const float reference = m_new == NEGATIVE_INFINITY ? 0.0f : m_new;
                const float shrink = exp2_approx(m[r][e] - reference);
                m[r][e] = m_new;
                float sum = 0.0f;
#pragma unroll
                for (uint32_t n = 0; n < KEY_TILES; n++) {
#pragma unroll
                    for (uint32_t i = 2 * e; i < 2 * e + 2; i++) {
                        s[r][n][i] = exp2_approx(s[r][n][i] - reference);
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
                if (query >= item.queries) continue;
                const uint64_t token = item.first_query + query;
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
        const uint32_t query = (item.first_row + row) / params.group;
        const bool exists = query < item.queries;
        const uint64_t token = exists ? item.first_query + query : 0;
        const uint64_t head = exists ? item.kv_head * params.group + (item.first_row + row) % params.group : 0;
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

    DEVICE KeyTiles(const Visible& of_first, const Visible& of_last) {
        main_begin = of_first.begin / KEYS;
        end = ceil_div(of_last.end, KEYS);
        sink_end = min(ceil_div(of_last.sinks, KEYS), main_begin);
    }
    DEVICE uint32_t first() const { return sink_end > 0 ? 0 : main_begin; }
    DEVICE uint32_t after(uint32_t tile) const { return tile + 1 == sink_end ? main_begin : tile + 1; }
};

KERNEL(128, 2)
prefill(const Element* q, const Element* k, const Element* v, const uint32_t* cu_queries, const uint32_t* kv_len,
        const uint32_t* kv_start, const uint32_t* block_table,
#if CARRY
        float* state_o, float* state_ml,
#else
        Element* out, float* lse,
#endif
        uint64_t* status, const __grid_constant__ PrefillParams params) {
    DYNAMIC_SHARED(shared_bytes);
    const uint32_t q_tile = shared_address(shared_bytes);
    const uint32_t k_tile = q_tile + Q_BYTES;
    const uint32_t v_tile = k_tile + K_BYTES;
    uint32_t* const flag = reinterpret_cast<uint32_t*>(shared_bytes + Q_BYTES + K_BYTES + V_BYTES);

    grid_dependency_wait();
    Item item;
    if (!find_item(item, cu_queries, status, params)) return;
#if PAGED
    const int64_t start = 0;
    const uint32_t* table =
        block_table + item.kv_head * params.table_head_stride + item.sequence * params.table_batch_stride;
#else
    const uint32_t* table = nullptr;
#endif
    item.kv_len = checked_len(item, kv_len, kv_start, table, flag, status, params);
#if !PAGED
    const int64_t start = item.kv_len > 0 ? kv_start[item.sequence] : 0;
#endif
    const TileLoader keys{k + start * params.k_token_stride + item.kv_head * params.k_head_stride, table,
                          params.k_page_stride, params.k_token_stride};
    const TileLoader values{v + start * params.v_token_stride + item.kv_head * params.v_head_stride, table,
                            params.v_page_stride, params.v_token_stride};

    const uint32_t last_query = min((item.first_row + ROWS - 1) / params.group, item.queries - 1);
    const Visible of_first = visible_to(item.first_row / params.group, item, params);
    const Visible of_last = visible_to(last_query, item, params);
    const KeyTiles tiles(of_first, of_last);

    Warp warp;
    warp.start();
    load_queries(q_tile, q, item, params);
    if (tiles.first() < tiles.end) keys.load<K_ROW>(k_tile, tiles.first() * KEYS, item.kv_len, params);
    for (uint32_t tile = tiles.first(); tile < tiles.end; tile = tiles.after(tile)) {
        const uint32_t first_key = tile * KEYS;
        cp_async_wait<0>();
        __syncthreads();  // K has landed for everyone, and everyone has left V
        values.load<V_ROW>(v_tile, first_key, item.kv_len, params);

        float s[ROW_TILES][KEY_TILES][4];
        warp.scores(s, q_tile, k_tile, params);
        // Tiles that every row sees whole need no mask.
        if (first_key < of_last.begin || first_key + KEYS > of_first.end) warp.mask(s, first_key, item, params);
        warp.softmax(s);

        cp_async_wait<0>();
        __syncthreads();  // V has landed for everyone, and everyone has left K
        const uint32_t next = tiles.after(tile);
        if (next < tiles.end) keys.load<K_ROW>(k_tile, next * KEYS, item.kv_len, params);
        warp.accumulate(s, v_tile);
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
