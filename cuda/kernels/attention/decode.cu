// Decode attention: a few queries per sequence against its KV cache, split over the keys.
//
//   out = softmax(mask(cap(scale·q·Kᵀ)))·V,  lse = ln Σ exp(score)        per sequence, query and query head
//
// q           [batch, q_len, q_heads, QK_DIM]   KV_DTYPE
// k, v        by the strides of params; paged: token t of sequence s lies in slot t % page of page block_table[head, s, t / page];
//             contiguous: at token kv_start[s] + t. Vectors are 16-byte aligned.
// valid_len, first_unit   of decode_plan
// out         [batch, q_len, q_heads, V_DIM]    KV_DTYPE
// lse         [batch, q_len, q_heads] f32, natural log
// part_acc    [slots, COLUMNS, V_DIM] f32, part_ml [slots, COLUMNS, 2] f32     (workspace, need not be initialised)
// arrivals    [batch·kv_heads·column_blocks] u32, zero before and after the launch (workspace)
//
// Query i of q_len sees keys ≤ kv_len − q_len + i, of them the last `window`. A query without keys, and every query of a
// sequence and KV head that decode_plan refused, gets out 0 and lse −inf. Keys and values that some query of the sequence
// sees are finite, or their NaN may reach its other queries of that KV head; memory of all others may hold anything.
//
// Arch:    sm_80 and later.
// Mapping: a block serves up to COLUMNS queries × query heads of one KV head, so that K and V are read once for all of them.
//          Tokens lie on M and columns on N: Sᵀ = K·qᵀ, Oᵀ = Vᵀ·Pᵀ by m16n8k16, P transposed in registers by movmatrix.
//          A tile is 64 tokens, 16 for each of the four warps, which stream their own rows through rings of their own with
//          cp.async and keep their own (m, l, O): the main loop has no block barrier. The warps meet in shared memory at the
//          end of a part, the parts of an item through its last arriver (tile/split_plan.cuh, tile/last_arriver.cuh).
// Budget:  168 registers where 3 blocks fit an SM (sm_90), else 255; 64 KB of rings plus 16 rows of q.
// Limit:   bytes of K and V, each read once. On sm_90a with 128 channels and 8 columns a warp spends 527 instructions on its 16
//          rows of a tile: 527 of the 1990 clocks in which an SM's share of HBM (16.4 B per clock) brings a tile's 32 KB.
#include "core.cuh"
#include "decode_params.h"
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/math.cuh"
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"
#include "ptx/shuffle.cuh"
#include "ptx/sync.cuh"
#include "tile/cache_check.cuh"
#include "tile/copy_ring.cuh"
#include "tile/fragment.cuh"
#include "tile/last_arriver.cuh"
#include "tile/softmax_state.cuh"
#include "tile/split_plan.cuh"
#include "types.cuh"

using Element = StorageOf<KV_DTYPE>;

constexpr uint32_t THREADS = 128;
constexpr uint32_t WARPS = THREADS / WARP_SIZE;
constexpr uint32_t TILE = DECODE_TILE;
constexpr uint32_t COLUMNS = COLUMN_TILES * 8;
constexpr uint32_t ROWS = 16;  // tokens of a tile that one warp owns
static_assert(TILE == WARPS * ROWS, "each warp owns 16 tokens of a tile");

constexpr uint32_t K_ROW = QK_DIM * 2;  // bytes
constexpr uint32_t V_ROW = V_DIM * 2;
constexpr uint32_t SLOT = ROWS * (K_ROW > V_ROW ? K_ROW : V_ROW);
constexpr uint32_t WARP_RING = 16 * 1024;
constexpr int SLOTS = WARP_RING / SLOT;
constexpr uint32_t Q_BYTES = 16 * K_ROW;  // always 16 rows, so that two column tiles load at once
static_assert(SLOTS >= 2, "one slot in use, one on its way");
static_assert(COLUMNS * V_DIM * 4 <= WARP_RING, "a warp leaves its O in its own ring");

constexpr uint32_t K_STEPS = QK_DIM / 16;
constexpr uint32_t V_TILES = V_DIM / 16;

struct Tail {
    float ml[WARPS][COLUMNS][2];
    uint32_t is_last;
};

// What one block needs to know about the item it works on.
struct Item {
    uint32_t sequence;
    uint32_t kv_head;
    uint32_t first_column;
    uint32_t kv_len;
    uint32_t first_key;   // the first that some query sees
    uint32_t first_tile;  // that it lies in
    uint32_t tiles;       // from first_tile on
};

// Keys [begin, end) that a column sees.
struct Visible {
    uint32_t begin;
    uint32_t end;
};

DEVICE Visible visible_to(uint32_t query, uint32_t kv_len, const DecodeParams& params) {
    const uint32_t end = kv_len + query + 1 > params.q_len ? kv_len + query + 1 - params.q_len : 0;
    return {params.window != 0 && end > params.window ? end - params.window : 0, end};
}

// decode_plan has checked the lengths, but the starts are the caller's to change: keys past the cache do not exist.
DEVICE Item item_of(const Part& part, const uint32_t* valid_len, const uint32_t* kv_start, const DecodeParams& params) {
    Item item;
    item.sequence = part.sequence;
    item.kv_head = part.head / params.column_blocks;
    item.first_column = part.head % params.column_blocks * COLUMNS;
#if PAGED
    const uint64_t readable = static_cast<uint64_t>(params.max_pages) << params.page_shift;
#else
    const uint32_t start = kv_start[part.sequence];
    const uint64_t readable = start < params.num_tokens ? params.num_tokens - start : 0;
#endif
    item.kv_len = valid_len_of(valid_len, item.sequence, item.kv_head, params);
    if (item.kv_len > readable) item.kv_len = static_cast<uint32_t>(readable);
    item.first_key = visible_to(0, item.kv_len, params).begin;
    item.first_tile = item.first_key / TILE;
    item.tiles = ceil_div(item.kv_len, TILE) - item.first_tile;
    return item;
}

// Streams 16 rows of K or V at a time into one warp's ring. Rows of keys that no query sees become 0, whatever memory holds:
// a weight of 0 would not silence a NaN.
struct RowLoader {
    const Element* base;
    int64_t page_stride;
    int64_t token_stride;

    template <uint32_t RowBytes>
    DEVICE void load(uint32_t slot_address, uint32_t token0, const uint32_t (&pages)[2], const Item& item,
                     const DecodeParams& params) const {
        constexpr uint32_t CHUNKS = RowBytes / 16;
        // Eight rows lie in one page: a place for each half, and steps from row to row.
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            const uint32_t token = token0 + half * 8;
#if PAGED
            const int64_t offset = pages[half] * page_stride + (token & ((1u << params.page_shift) - 1)) * token_stride;
#else
            const int64_t offset = token * token_stride;
#endif
            const auto copy = [&](uint32_t row, uint32_t chunk, const Element* from) {
                const bool exists = token0 + row - item.first_key < item.kv_len - item.first_key;
                cp_async_16_zfill(slot_address + Swizzle<RowBytes>::offset(row, chunk), PAGED || exists ? from : base,
                                  exists ? 16 : 0);
            };
            if (WARP_SIZE % CHUNKS == 0) {
                // A lane keeps its chunk, so that each copy is an addition from the one before.
                constexpr uint32_t STEP = CHUNKS <= WARP_SIZE ? WARP_SIZE / CHUNKS : 1;
                const uint32_t first_row = lane_index() / CHUNKS;
                const uint32_t chunk = lane_index() % CHUNKS;
                const Element* from = base + offset + first_row * token_stride + chunk * 8;
#pragma unroll
                for (uint32_t row = 0; row < 8; row += STEP, from += STEP * token_stride) {
                    copy(half * 8 + row + first_row, chunk, from);
                }
            } else {
#pragma unroll
                for (uint32_t i = 0; i < 8 * CHUNKS / WARP_SIZE; i++) {
                    const uint32_t index = i * WARP_SIZE + lane_index();
                    const uint32_t row = index / CHUNKS;
                    const uint32_t chunk = index % CHUNKS;
                    copy(half * 8 + row, chunk, base + offset + row * token_stride + chunk * 8);
                }
            }
        }
    }
};

// The pages of the 8-token halves of the rows at token0; pages hold at least 8 tokens. decode_plan has checked the ids, but
// the table is the caller's to change: an id that has gone bad since reads a wrong page, never memory outside the pool.
DEVICE void pages_of(uint32_t (&pages)[2], const uint32_t* table, uint32_t token0, uint32_t kv_len,
                     const DecodeParams& params) {
#if PAGED
    pages[0] = token0 < kv_len ? min(table[token0 >> params.page_shift], params.num_pages - 1) : 0;
    pages[1] = token0 + 8 < kv_len ? min(table[(token0 + 8) >> params.page_shift], params.num_pages - 1) : 0;
#endif
}

DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if KV_DTYPE == 1
    mma_m16n8k16_f16(d, a, b);
#else
    mma_m16n8k16_bf16(d, a, b);
#endif
}

// The states of a part's four warps in shared memory, as seen by a thread that folds one column.
struct WarpStates {
    const unsigned char* rings;
    const Tail* tail;
    uint32_t column = 0;

    DEVICE float m(uint32_t warp) const { return tail->ml[warp][column][0]; }
    DEVICE float l(uint32_t warp) const { return tail->ml[warp][column][1]; }
    DEVICE float4 acc(uint32_t warp, uint32_t channel) const {
        return *reinterpret_cast<const float4*>(rings + warp * WARP_RING + (column * V_DIM + channel) * 4);
    }
};

// The states of an item's parts in the workspace, as seen by a thread that folds one column.
struct PartStates {
    const float* part_acc;
    const float* part_ml;
    const Part& part;
    uint32_t column = 0;

    DEVICE uint64_t row(uint32_t p) const { return part.slot_of(p) * COLUMNS + column; }
    DEVICE float m(uint32_t p) const { return part_ml[2 * row(p)]; }
    DEVICE float l(uint32_t p) const { return part_ml[2 * row(p) + 1]; }
    DEVICE float4 acc(uint32_t p, uint32_t channel) const {
        return *reinterpret_cast<const float4*>(part_acc + row(p) * V_DIM + channel);
    }
};

// Folds `count` states for every column and channel with the whole block, and hands each thread's results to `store`.
template <class States, class Store>
DEVICE void fold_columns(States states, uint32_t count, uint32_t columns, const Store& store) {
    for (uint32_t index = threadIdx.x; index < columns * (V_DIM / 4); index += THREADS) {
        states.column = index / (V_DIM / 4);
        const uint32_t channel = index % (V_DIM / 4) * 4;
        store(fold_states(states, 0, count, 1, channel), states.column, channel);
    }
}

// One warp's queries and softmax state, over its 16 rows of each tile.
struct Warp {
    float o[V_TILES][COLUMN_TILES][4];  // Oᵀ: channels × columns
    float m[COLUMN_TILES][2];           // in units of log2, of columns 2t and 2t + 1
    float l[COLUMN_TILES][2];           // of this lane's rows alone
    Visible visible[COLUMN_TILES][2];

    DEVICE void start(const Item& item, const DecodeParams& params) {
#pragma unroll
        for (uint32_t n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
            for (uint32_t e = 0; e < 2; e++) {
                const uint32_t column = item.first_column + n * 8 + lane_index() % 4 * 2 + e;
                m[n][e] = NEGATIVE_INFINITY;
                l[n][e] = 0.0f;
                visible[n][e] = column < params.q_len * params.group
                                    ? visible_to(column / params.group, item.kv_len, params)
                                    : Visible{0, 0};
            }
#pragma unroll
            for (uint32_t v = 0; v < V_TILES; v++) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) o[v][n][i] = 0.0f;
            }
        }
    }

    // Sᵀ of the 16 rows of K at `k` with the columns of q; the result is unscaled.
    DEVICE void scores(float (&s)[COLUMN_TILES][4], uint32_t k, uint32_t q) const {
#pragma unroll
        for (uint32_t n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) s[n][i] = 0.0f;
        }
#pragma unroll
        for (uint32_t step = 0; step < K_STEPS; step++) {
            uint32_t a[4];
            uint32_t b[2][2];
            load_fragment_a<K_ROW>(a, k, 0, step * 2);
            load_fragment_b2<K_ROW>(b, q, 0, step * 2);
#pragma unroll
            for (uint32_t n = 0; n < COLUMN_TILES; n++) mma(s[n], a, b[n]);
        }
    }

    // Scales, caps and masks scores, moves the running maximum, and leaves P in `s`.
    DEVICE void softmax(float (&s)[COLUMN_TILES][4], uint32_t token0, bool masked, const DecodeParams& params) {
#if SOFT_CAP
        const float to_cap = params.scale / params.soft_cap;
        const float to_log2 = params.soft_cap * LOG2_E;
#else
        const float to_log2 = params.scale * LOG2_E;
#endif
#pragma unroll
        for (uint32_t n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
#if SOFT_CAP
                s[n][i] = tanhf(s[n][i] * to_cap);
#endif
                const uint32_t token = token0 + accumulator_row(lane_index(), i);
                const Visible keys = visible[n][i % 2];
                if (masked && (token < keys.begin || token >= keys.end)) s[n][i] = NEGATIVE_INFINITY;
            }
#pragma unroll
            for (uint32_t e = 0; e < 2; e++) {
                // The factor is positive, so the maximum is taken before it and each score meets it in a multiply-add.
                const float largest = warp_max_strided<4>(fmaxf(s[n][e], s[n][e + 2]));
                const float m_new = fmaxf(m[n][e], largest * to_log2);
                const float reference = m_new == NEGATIVE_INFINITY ? 0.0f : m_new;
                const float shrink = exp2_approx(m[n][e] - reference);
                m[n][e] = m_new;
                s[n][e] = exp2_approx(__fmaf_rn(s[n][e], to_log2, -reference));
                s[n][e + 2] = exp2_approx(__fmaf_rn(s[n][e + 2], to_log2, -reference));
                l[n][e] = l[n][e] * shrink + s[n][e] + s[n][e + 2];
#pragma unroll
                for (uint32_t v = 0; v < V_TILES; v++) {
                    o[v][n][e] *= shrink;
                    o[v][n][e + 2] *= shrink;
                }
            }
        }
    }

    // Oᵀ += Vᵀ·Pᵀ over the 16 rows of V at `v`.
    DEVICE void accumulate(const float (&p)[COLUMN_TILES][4], uint32_t v) {
        uint32_t b[COLUMN_TILES][2];
#pragma unroll
        for (uint32_t n = 0; n < COLUMN_TILES; n++) {
            b[n][0] = movmatrix_trans(pack2<Element>(p[n][0], p[n][1]));
            b[n][1] = movmatrix_trans(pack2<Element>(p[n][2], p[n][3]));
        }
#pragma unroll
        for (uint32_t tile = 0; tile < V_TILES; tile++) {
            uint32_t a[4];
            load_fragment_a_trans<V_ROW>(a, v, 0, tile * 2);
#pragma unroll
            for (uint32_t n = 0; n < COLUMN_TILES; n++) mma(o[tile][n], a, b[n]);
        }
    }

    // Leaves the state in shared memory: O [columns, channels] in the warp's ring, (m, l) in the tail, m in natural units.
    DEVICE void leave(unsigned char* ring, Tail& tail) const {
        float* acc = reinterpret_cast<float*>(ring);
        const uint32_t lane = lane_index();
#pragma unroll
        for (uint32_t n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
            for (uint32_t e = 0; e < 2; e++) {
                const float sum = warp_sum_strided<4>(l[n][e]);
                const uint32_t column = n * 8 + lane % 4 * 2 + e;
                if (lane < 4) {
                    // The running maximum passes NaN over; a state without a maximum would count as empty.
                    tail.ml[warp_index()][column][0] = sum != sum ? QUIET_NAN : m[n][e] * LN_2;
                    tail.ml[warp_index()][column][1] = sum;
                }
            }
#pragma unroll
            for (uint32_t v = 0; v < V_TILES; v++) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) {
                    const uint32_t column = n * 8 + accumulator_column(lane, i);
                    acc[column * V_DIM + v * 16 + accumulator_row(lane, i)] = o[v][n][i];
                }
            }
        }
    }
};

// Loads the item's queries into shared memory as 16 swizzled rows; columns that do not exist are zero.
DEVICE void load_queries(uint32_t q_tile, const Element* q, const Item& item, const DecodeParams& params) {
    constexpr uint32_t CHUNKS = K_ROW / 16;
    for (uint32_t index = threadIdx.x; index < 16 * CHUNKS; index += THREADS) {
        const uint32_t row = index / CHUNKS;
        const uint32_t chunk = index % CHUNKS;
        const uint32_t column = item.first_column + row;
        const bool exists = row < COLUMNS && column < params.q_len * params.group;
        const uint64_t query = exists ? static_cast<uint64_t>(item.sequence) * params.q_len + column / params.group : 0;
        const uint64_t head = exists ? item.kv_head * params.group + column % params.group : 0;
        const Element* source = q + (query * params.kv_heads * params.group + head) * QK_DIM + chunk * 8;
        cp_async_16_zfill(q_tile + Swizzle<K_ROW>::offset(row, chunk), source, exists ? 16 : 0);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
}

// Runs one warp over its rows of tiles [first, end) of the item, counted from the item's first visible tile.
DEVICE void attend(Warp& warp, const Item& item, uint32_t first, uint32_t end, uint32_t q_tile, uint32_t ring,
                   const RowLoader& keys, const RowLoader& values, const uint32_t* table, const DecodeParams& params) {
    const uint32_t warp_row = warp_index() * ROWS;
    // Tiles that every query sees whole need no mask.
    const Visible of_first = visible_to(0, item.kv_len, params);
    const Visible of_last = visible_to(params.q_len - 1, item.kv_len, params);

    // Copies of K and V alternate through the ring, SLOTS − 1 of them ahead of use: the copy that the use of a K or V issues is
    // always of the same kind.
    constexpr bool ISSUE_V_BESIDE_K = SLOTS % 2 == 0;
    uint32_t next_tile = first;
    uint32_t pages[2] = {0, 0};
    RingPosition<SLOTS> next, used;
    auto issue = [&](bool is_v) {
        if (next_tile < end) {
            const uint32_t token0 = (item.first_tile + next_tile) * TILE + warp_row;
            const uint32_t address = ring + next.slot * SLOT;
            if (is_v) {
                values.load<V_ROW>(address, token0, pages, item, params);
                next_tile += 1;
            } else {
                pages_of(pages, table, token0, item.kv_len, params);
                keys.load<K_ROW>(address, token0, pages, item, params);
            }
        }
        cp_async_commit();  // also when empty, so that the waits below always count SLOTS − 1 groups
        next.advance();
    };
    // Waits for the oldest copy and refills the slot that was used before it.
    auto step = [&](bool issues_v) {
        cp_async_wait<SLOTS - 2>();
        __syncwarp();
        issue(issues_v);
        const uint32_t address = ring + used.slot * SLOT;
        used.advance();
        return address;
    };

#pragma unroll
    for (int ahead = 0; ahead < SLOTS - 1; ahead++) issue(ahead % 2 == 1);
    for (uint32_t tile = first; tile < end; tile++) {
        const uint32_t token0 = (item.first_tile + tile) * TILE + warp_row;
        const bool masked = token0 < of_last.begin || token0 + ROWS > of_first.end;
        float s[COLUMN_TILES][4];
        warp.scores(s, step(ISSUE_V_BESIDE_K), q_tile);
        warp.softmax(s, token0, masked, params);
        warp.accumulate(s, step(!ISSUE_V_BESIDE_K));
    }
    cp_async_wait<0>();
    __syncwarp();
}

// Blocks of an SM that its shared memory has room for (1 KB of each is the system's): a bound on registers beyond that would
// only starve the block.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr uint32_t SM_SHARED = 100 * 1024;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr uint32_t SM_SHARED = 164 * 1024;
#else
constexpr uint32_t SM_SHARED = 228 * 1024;
#endif
constexpr uint32_t FITTING_BLOCKS = SM_SHARED / (Q_BYTES + WARPS * WARP_RING + sizeof(Tail) + 1024);
constexpr uint32_t WANTED_BLOCKS = QK_DIM <= 128 && V_DIM <= 128 && !(COLUMN_TILES == 2 && SOFT_CAP) ? 3 : 2;

KERNEL(128, FITTING_BLOCKS < WANTED_BLOCKS ? FITTING_BLOCKS : WANTED_BLOCKS)
decode(const Element* q, const Element* k, const Element* v, const uint32_t* block_table, const uint32_t* kv_start,
       const uint32_t* valid_len, const uint32_t* first_unit, Element* out, float* lse, float* part_acc, float* part_ml,
       uint32_t* arrivals, const __grid_constant__ DecodeParams params) {
    DYNAMIC_SHARED(shared_bytes);
    const uint32_t q_tile = shared_address(shared_bytes);
    unsigned char* const rings = shared_bytes + Q_BYTES;
    Tail& tail = *reinterpret_cast<Tail*>(rings + WARPS * WARP_RING);
    unsigned char* const ring = rings + warp_index() * WARP_RING;

    grid_dependency_wait();
    const SplitPlan plan(first_unit, params.batch, params.kv_heads * params.column_blocks, gridDim.x, params.min_units,
                         params.fixed_parts != 0);
    if (blockIdx.x >= plan.blocks) return;
    const uint64_t end = plan.begin(blockIdx.x + 1);
    for (uint64_t unit = plan.begin(blockIdx.x); unit < end;) {
        const Part part = plan.part_at(unit, end, blockIdx.x);
        const Item item = item_of(part, valid_len, kv_start, params);
        unit += part.end_unit - part.first_unit;

        load_queries(q_tile, q, item, params);
#if PAGED
        const int64_t start = 0;
        const uint32_t* table =
            block_table + item.kv_head * params.table_head_stride + item.sequence * params.table_batch_stride;
#else
        const int64_t start = kv_start[item.sequence];
        const uint32_t* table = nullptr;
#endif
        const RowLoader keys{k + start * params.k_token_stride + item.kv_head * params.k_head_stride, params.k_page_stride,
                             params.k_token_stride};
        const RowLoader values{v + start * params.v_token_stride + item.kv_head * params.v_head_stride,
                               params.v_page_stride, params.v_token_stride};
        Warp warp;
        warp.start(item, params);
        attend(warp, item, min(part.first_unit * params.unit_tiles, item.tiles),
               min(part.end_unit * params.unit_tiles, item.tiles), q_tile, shared_address(ring), keys, values, table, params);
        warp.leave(ring, tail);
        __syncthreads();

        // The warps become the part; the parts, in their last arriver, the item.
        const uint32_t columns = min(COLUMNS, params.q_len * params.group - item.first_column);
        const uint32_t item_index = part.sequence * plan.heads + part.head;
        auto finish = [&](const SoftmaxState& state, uint32_t column, uint32_t channel) {
            const uint32_t query = (item.first_column + column) / params.group;
            const uint32_t head = item.kv_head * params.group + (item.first_column + column) % params.group;
            const uint64_t row =
                (static_cast<uint64_t>(item.sequence) * params.q_len + query) * params.kv_heads * params.group + head;
            store_4(out + row * V_DIM + channel, state.out());
            if (channel == 0) lse[row] = state.lse();
        };
        auto keep = [&](const SoftmaxState& state, uint32_t column, uint32_t channel) {
            const uint64_t row = part.slot * COLUMNS + column;
            *reinterpret_cast<float4*>(part_acc + row * V_DIM + channel) = state.acc;
            if (channel == 0) {
                part_ml[2 * row] = state.m;
                part_ml[2 * row + 1] = state.l;
            }
        };
        const WarpStates of_warps{rings, &tail};
        if (part.count == 1) {
            fold_columns(of_warps, WARPS, columns, finish);
        } else {
            fold_columns(of_warps, WARPS, columns, keep);
            if (arrive_last(arrivals + item_index, part.count, &tail.is_last)) {
                fold_columns(PartStates{part_acc, part_ml, part}, part.count, columns, finish);
            }
        }
        __syncthreads();  // the next part reuses the rings
    }
}
