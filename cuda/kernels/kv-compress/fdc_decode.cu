// Decode attention in the reduced basis of each KV head: a few queries per sequence against a low-rank cache whose heads may
// all have different ranks, in one launch and without rebuilding keys or values.
//
//   õ = softmax(mask(cap(scale·q̃·K̃ᵀ)))·Ṽ,  lse = ln Σ exp(score)        per sequence, query and query head
//
// q           [batch, q_len, Σ group·r_k] KV_DTYPE: head after head, the group's queries [group, r_k], projected by R_q
// pages       per page and head keys [page size, r_k], then values [page size, r_v], rows of 16-byte chunks swizzled by the
//             token's place in the page (tile/low_rank.cuh, tile/swizzle.cuh)
// block_table [batch, max_pages] u32
// valid_len, first_unit   of attention/decode_plan.cu, which knows nothing of ranks
// out         [batch, q_len, Σ group·r_v] KV_DTYPE: head after head [group, r_v], in the reduced basis of the values;
//             R_vᵀ·W_O brings it back
// lse         [batch, q_len, q_heads] f32, natural log
// part_acc    [slots, COLUMNS, HEAD_DIM] f32, part_ml [slots, COLUMNS, 2] f32     (workspace, need not be initialised)
// arrivals    [batch·kv_heads·column_blocks] u32, zero before and after the launch (workspace)
//
// Query i of q_len sees keys ≤ kv_len − q_len + i, of them the last `window`. A query without keys, and every query of a
// sequence that decode_plan refused, gets out 0 and lse −inf. Keys and values that some query of the sequence sees are finite,
// or their NaN may reach its other queries of that KV head; memory of all others may hold anything.
//
// Arch:    sm_80 and later.
// Mapping: a block serves up to COLUMNS queries × query heads of one KV head, so that keys and values are read once for all.
//          Work is dealt by bytes (tile/weighted_split.cuh), to the group of 16 tokens, over blocks and over a block's warps.
//          Tokens lie on M and columns on N: Sᵀ = K̃·q̃ᵀ, Õᵀ = Ṽᵀ·Pᵀ by m16n8k16, ranks are run-time numbers of 16-channel
//          steps. A warp's tile is as many groups as keys and values of 8 KB hold, 1 at ranks 128 + 128, 8 at 16 + 16: in a
//          page it is a straight run of bytes, which one cp.async of the warp takes 512 at a time.
//          Warps keep their own (m, l, O) and their own ring; they meet in shared memory at the end of a part, the parts of an
//          item through its last arriver.
// Budget:  168 registers where 3 blocks fit an SM, else 255; 64 KB of rings plus 16 rows of q.
// Limit:   bytes of keys and values, each read once. Instructions stay below: 16 tokens take a warp 181 at ranks 16 + 16, 16 more
//          for each further 16 channels of keys and 21 of values (sm_90a), so 292 for the 4 KB of 64 + 64; while these arrive at
//          16.45 B per clock and SM, which is 4.3 TB/s, an SM issues 996. At 16 + 16 it is 181 of 249.
#include "core.cuh"
#include "fdc_params.h"
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/math.cuh"
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"
#include "ptx/shuffle.cuh"
#include "ptx/sync.cuh"
#include "tile/fragment.cuh"
#include "tile/low_rank.cuh"
#include "tile/partial_states.cuh"
#include "tile/weighted_split.cuh"
#include "types.cuh"

using Element = StorageOf<KV_DTYPE>;

constexpr uint32_t THREADS = 128;
constexpr uint32_t WARPS = THREADS / WARP_SIZE;
constexpr uint32_t COLUMNS = COLUMN_TILES * 8;
constexpr uint32_t GROUP = FDC_GROUP;                // tokens
constexpr uint32_t BLOCK_BYTES = GROUP * 32;         // of a group's 16 channels: one 16-byte chunk per lane
constexpr uint32_t STAGE = 8 * 1024;                 // keys and values of a tile
constexpr uint32_t STAGE_BLOCKS = STAGE / BLOCK_BYTES;
constexpr uint32_t WARP_RING = 2 * STAGE;
constexpr uint32_t MAX_STEPS = HEAD_DIM / 16;
constexpr uint32_t Q_ROW = HEAD_DIM * 2;   // bytes
constexpr uint32_t Q_BYTES = 16 * Q_ROW;   // always 16 rows, so that two column tiles load at once
static_assert(STAGE_BLOCKS >= 2 * MAX_STEPS, "a group of full rank fits a stage");
static_assert(COLUMNS * HEAD_DIM * 4 <= WARP_RING, "a warp leaves its O in its own ring");

struct Tail {
    float ml[WARPS][COLUMNS][2];
    uint32_t is_last;
};

// Keys [begin, end) that a column sees.
struct Visible {
    uint32_t begin;
    uint32_t end;
};

DEVICE Visible visible_to(uint32_t query, uint32_t kv_len, const FdcDecodeParams& params) {
    const uint32_t end = kv_len + query + 1 > params.q_len ? kv_len + query + 1 - params.q_len : 0;
    return {params.window != 0 && end > params.window ? end - params.window : 0, end};
}

// What one block needs to know about the item it works on.
struct Item {
    uint32_t sequence;
    uint32_t kv_head;
    uint32_t first_column;
    uint32_t kv_len;
    uint32_t first_key;    // that some query sees
    uint32_t first_token;  // of the group that it lies in
    uint32_t groups;       // of tokens, from first_token on
    uint32_t k_blocks;     // of 16 channels
    uint32_t v_blocks;
    uint32_t tile_groups;  // groups that a stage holds
};

DEVICE Item item_of(const WeightedPart& part, const uint32_t* valid_len, const FdcDecodeParams& params) {
    Item item;
    item.sequence = part.sequence;
    item.kv_head = part.item / params.column_blocks;
    item.first_column = part.item % params.column_blocks * COLUMNS;
    item.kv_len = valid_len[part.sequence];
    const uint64_t readable = static_cast<uint64_t>(params.max_pages) << params.page_shift;
    if (item.kv_len > readable) item.kv_len = static_cast<uint32_t>(readable);
    item.first_key = visible_to(0, item.kv_len, params).begin;
    item.first_token = item.first_key / GROUP * GROUP;
    item.groups = ceil_div(item.kv_len - item.first_token, GROUP);
    item.k_blocks = k_blocks(params.heads, item.kv_head);
    item.v_blocks = v_blocks(params.heads, item.kv_head);
    item.tile_groups = STAGE_BLOCKS / (item.k_blocks + item.v_blocks);
    return item;
}

DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if KV_DTYPE == 1
    mma_m16n8k16_f16(d, a, b);
#else
    mma_m16n8k16_bf16(d, a, b);
#endif
}

// Folds `count` states for every column and channel with the whole block, and hands each thread's results to `store`. A warp
// takes a column, a lane four of its channels.
struct Fold {
    uint32_t columns;
    uint32_t v_blocks;

    template <class States, class Store>
    DEVICE void operator()(States states, uint32_t count, const Store& store) const {
        const uint32_t channel = lane_index() * 4;
        if (channel >= v_blocks * 16) return;
        for (uint32_t column = warp_index(); column < columns; column += WARPS) {
            states.column = column;
            store(fold_states(states, 0, count, 1, channel), column, channel);
        }
    }
};

// One warp's copies: tiles of its groups [next, end) go to the two stages of its ring in turn, page by page.
struct Copies {
    const Element* k;  // keys and values of the head in page 0
    const Element* v;
    const uint32_t* table;
    uint32_t ring;
    uint32_t next;
    uint32_t end;
    uint32_t stage = 0;
    uint32_t pages = 0;  // lane i: the page of group next + i, looked up one tile ahead

    // decode_plan has checked the ids, but the table is the caller's to change: an id that has gone bad since reads a wrong
    // page, never memory outside the pool.
    DEVICE void look_up(uint32_t group, const Item& item, const FdcDecodeParams& params) {
        const uint32_t token = item.first_token + (group + lane_index()) * GROUP;
        const bool exists = lane_index() < item.tile_groups && group + lane_index() < end;
        pages = exists ? min(table[token >> params.page_shift], params.num_pages - 1) : 0;
    }

    DEVICE void copy_group(uint32_t to, const Element* region, uint32_t page, uint32_t token, uint32_t blocks,
                           const Item& item, const FdcDecodeParams& params) const {
        const uint32_t in_page = token & ((1u << params.page_shift) - 1);
        const Element* from = region + page * params.page_stride + (in_page * blocks * 16 + lane_index() * 8);
        // Rows of keys that no query sees become 0, whatever memory holds: a weight of 0 would not silence a NaN.
        const uint32_t hidden = token < item.first_key ? (item.first_key - token) * blocks * 2 : 0;
        const uint32_t chunks = min(item.kv_len - token, GROUP) * blocks * 2 - hidden;
        to += lane_index() * 16;
#pragma unroll
        for (uint32_t block = 0; block < MAX_STEPS; block++) {
            if (block >= blocks) break;
            cp_async_16_zfill(to + block * BLOCK_BYTES, from + block * (BLOCK_BYTES / 2),
                              block * WARP_SIZE + lane_index() - hidden < chunks ? 16 : 0);
        }
    }

    // Starts the copies of the next tile, if there is one.
    DEVICE void issue(const Item& item, const FdcDecodeParams& params) {
        const uint32_t to = ring + stage * STAGE;
        const uint32_t groups = next < end ? min(end - next, item.tile_groups) : 0;
        const uint32_t v_start = to + item.tile_groups * item.k_blocks * BLOCK_BYTES;
#pragma unroll 1
        for (uint32_t group = 0; group < groups; group++) {
            const uint32_t page = __shfl_sync(FULL_WARP, pages, group);
            const uint32_t token = item.first_token + (next + group) * GROUP;
            copy_group(to + group * item.k_blocks * BLOCK_BYTES, k, page, token, item.k_blocks, item, params);
            copy_group(v_start + group * item.v_blocks * BLOCK_BYTES, v, page, token, item.v_blocks, item, params);
        }
        cp_async_commit();  // also when empty, so that waits always count two groups
        next += groups;
        look_up(next, item, params);
        stage ^= 1;
    }
};

// One warp's queries and softmax state, over its groups of tokens.
struct Warp {
    float o[MAX_STEPS][COLUMN_TILES][4];  // Õᵀ: channels × columns
    float m[COLUMN_TILES][2];             // in units of log2, of columns 2t and 2t + 1
    float l[COLUMN_TILES][2];             // of this lane's rows alone
    Visible visible[COLUMN_TILES][2];
    // Where this lane's rows of a group lie, and what its chunks' places are XORed with, in bytes.
    uint32_t k_row, k_swap, v_row, v_swap;

    DEVICE void start(const Item& item, const FdcDecodeParams& params) {
        const uint32_t lane = lane_index();
#pragma unroll
        for (uint32_t n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
            for (uint32_t e = 0; e < 2; e++) {
                const uint32_t column = item.first_column + n * 8 + lane % 4 * 2 + e;
                m[n][e] = NEGATIVE_INFINITY;
                l[n][e] = 0.0f;
                visible[n][e] = column < params.q_len * params.group
                                    ? visible_to(column / params.group, item.kv_len, params)
                                    : Visible{0, 0};
            }
#pragma unroll
            for (uint32_t v = 0; v < MAX_STEPS; v++) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) o[v][n][i] = 0.0f;
            }
        }
        // A group begins at a multiple of 16 rows of its page, so that its rows are swapped as rows 0-15 are. Chunk 2s + c of
        // a row is at (2s + c) ^ swap = 2s ^ (c ^ swap).
        const SwizzledRows k(item.k_blocks * 32);
        const SwizzledRows v(item.v_blocks * 32);
        const uint32_t k_lane_row = lane % 16;
        const uint32_t v_lane_row = lane % 8 + lane / 16 * 8;
        k_row = k_lane_row * k.row_bytes;
        k_swap = (lane / 16 ^ k.swap(k_lane_row)) * 16;
        v_row = v_lane_row * v.row_bytes;
        v_swap = (lane / 8 % 2 ^ v.swap(v_lane_row)) * 16;
    }

    // Sᵀ of the 16 keys at `k` with the columns of q; the result is unscaled.
    DEVICE void scores(float (&s)[COLUMN_TILES][4], uint32_t k, uint32_t q, uint32_t k_blocks) const {
#pragma unroll
        for (uint32_t n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) s[n][i] = 0.0f;
        }
#pragma unroll
        for (uint32_t step = 0; step < MAX_STEPS; step++) {
            if (step >= k_blocks) break;
            uint32_t a[4];
            uint32_t b[2][2];
            ldmatrix_x4(a, k + k_row + (step * 32 ^ k_swap));
            load_fragment_b2<Q_ROW>(b, q, 0, step * 2);
#pragma unroll
            for (uint32_t n = 0; n < COLUMN_TILES; n++) mma(s[n], a, b[n]);
        }
    }

    // Scales, caps and masks scores, moves the running maximum, and leaves P in `s`.
    DEVICE void softmax(float (&s)[COLUMN_TILES][4], uint32_t token0, bool masked, uint32_t v_blocks,
                        const FdcDecodeParams& params) {
#if SOFT_CAP
        const float to_cap = params.scale / params.soft_cap;
        const float to_log2 = params.soft_cap * LOG2_E;
#else
        const float to_log2 = params.scale * LOG2_E;
#endif
        float shrink[COLUMN_TILES][2];
#pragma unroll
        for (uint32_t n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
#if SOFT_CAP
                s[n][i] = tanhf(s[n][i] * to_cap);
#endif
                // A negative scale would make the smallest score the largest: the maximum is taken after scaling.
                s[n][i] *= to_log2;
                const uint32_t token = token0 + accumulator_row(lane_index(), i);
                const Visible keys = visible[n][i % 2];
                if (masked && (token < keys.begin || token >= keys.end)) s[n][i] = NEGATIVE_INFINITY;
            }
#pragma unroll
            for (uint32_t e = 0; e < 2; e++) {
                const float m_new = fmaxf(m[n][e], warp_max_strided<4>(fmaxf(s[n][e], s[n][e + 2])));
                const float reference = m_new == NEGATIVE_INFINITY ? 0.0f : m_new;
                shrink[n][e] = exp2_approx(m[n][e] - reference);
                m[n][e] = m_new;
                s[n][e] = exp2_approx(s[n][e] - reference);
                s[n][e + 2] = exp2_approx(s[n][e + 2] - reference);
                l[n][e] = l[n][e] * shrink[n][e] + s[n][e] + s[n][e + 2];
            }
        }
#pragma unroll
        for (uint32_t v = 0; v < MAX_STEPS; v++) {
            if (v >= v_blocks) break;
#pragma unroll
            for (uint32_t n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) o[v][n][i] *= shrink[n][i % 2];
            }
        }
    }

    // Õᵀ += Ṽᵀ·Pᵀ over the 16 values at `v`.
    DEVICE void accumulate(const float (&p)[COLUMN_TILES][4], uint32_t v, uint32_t v_blocks) {
        uint32_t b[COLUMN_TILES][2];
#pragma unroll
        for (uint32_t n = 0; n < COLUMN_TILES; n++) {
            b[n][0] = movmatrix_trans(pack2<Element>(p[n][0], p[n][1]));
            b[n][1] = movmatrix_trans(pack2<Element>(p[n][2], p[n][3]));
        }
#pragma unroll
        for (uint32_t step = 0; step < MAX_STEPS; step++) {
            if (step >= v_blocks) break;
            uint32_t a[4];
            ldmatrix_x4_trans(a, v + v_row + (step * 32 ^ v_swap));
#pragma unroll
            for (uint32_t n = 0; n < COLUMN_TILES; n++) mma(o[step][n], a, b[n]);
        }
    }

    // Leaves the state in shared memory: O [columns, channels] in the warp's ring, (m, l) in the tail, m in natural units.
    DEVICE void leave(unsigned char* ring, Tail& tail, uint32_t v_blocks) const {
        leave_state<HEAD_DIM>(reinterpret_cast<float*>(ring), tail.ml[warp_index()], o, m, l, v_blocks);
    }
};

// Loads the item's queries into shared memory as 16 swizzled rows; columns that do not exist are zero.
DEVICE void load_queries(uint32_t q_tile, const Element* q, const Item& item, const FdcDecodeParams& params) {
    constexpr uint32_t PER_ROW = THREADS / 16;
    const FdcHeads& heads = params.heads;
    const uint32_t row = threadIdx.x / PER_ROW;
    const uint32_t column = item.first_column + row;
    const bool exists = row < COLUMNS && column < params.q_len * params.group;
    const uint64_t query = exists ? static_cast<uint64_t>(item.sequence) * params.q_len + column / params.group : 0;
    const uint32_t in_group = exists ? column % params.group : 0;
    const Element* source = q + query * (heads.k_before[heads.count] * 16 * params.group)
                            + (heads.k_before[item.kv_head] * params.group + in_group * item.k_blocks) * 16;
    for (uint32_t chunk = threadIdx.x % PER_ROW; chunk < 2 * item.k_blocks; chunk += PER_ROW) {
        cp_async_16_zfill(q_tile + Swizzle<Q_ROW>::offset(row, chunk), source + chunk * 8, exists ? 16 : 0);
    }
    cp_async_commit();
}

// Runs one warp over its share of the groups [first, end) of the item.
DEVICE void attend(Warp& warp, const Item& item, uint32_t first, uint32_t end, uint32_t q_tile, Copies copies,
                   const FdcDecodeParams& params) {
    const uint32_t groups = end - first;
    // Shares differ by one group at most.
    const uint32_t next = first + groups / WARPS * warp_index() + min(groups % WARPS, warp_index());
    copies.next = next;
    copies.end = next + groups / WARPS + (warp_index() < groups % WARPS);
    copies.look_up(next, item, params);
    copies.issue(item, params);
    copies.issue(item, params);
    // The queries were copied before, by all threads.
    cp_async_wait<2>();
    __syncthreads();

    // Groups that every query sees whole need no mask.
    const Visible of_first = visible_to(0, item.kv_len, params);
    const Visible of_last = visible_to(params.q_len - 1, item.kv_len, params);
    uint32_t stage = copies.ring;
    uint32_t token0 = item.first_token + next * GROUP;
    for (uint32_t left = copies.end - next; left > 0;) {
        const uint32_t in_tile = min(left, item.tile_groups);
        cp_async_wait<1>();
        __syncwarp();
        uint32_t k = stage;
        uint32_t v = stage + item.tile_groups * item.k_blocks * BLOCK_BYTES;
#pragma unroll 1
        for (uint32_t group = 0; group < in_tile; group++) {
            const bool masked = token0 < of_last.begin || token0 + GROUP > of_first.end;
            float s[COLUMN_TILES][4];
            warp.scores(s, k, q_tile, item.k_blocks);
            warp.softmax(s, token0, masked, item.v_blocks, params);
            warp.accumulate(s, v, item.v_blocks);
            k += item.k_blocks * BLOCK_BYTES;
            v += item.v_blocks * BLOCK_BYTES;
            token0 += GROUP;
        }
        left -= in_tile;
        __syncwarp();
        copies.issue(item, params);
        stage = stage == copies.ring ? copies.ring + STAGE : copies.ring;
    }
    cp_async_wait<0>();
    __syncwarp();
}

KERNEL(128, COLUMN_TILES == 2 && SOFT_CAP ? 2 : 3)
fdc_decode(const Element* q, const Element* pages, const uint32_t* block_table, const uint32_t* valid_len,
           const uint32_t* first_unit, Element* out, float* lse, float* part_acc, float* part_ml, uint32_t* arrivals,
           const __grid_constant__ FdcDecodeParams params) {
    DYNAMIC_SHARED(shared_bytes);
    const uint32_t q_tile = shared_address(shared_bytes);
    unsigned char* const rings = shared_bytes + Q_BYTES;
    Tail& tail = *reinterpret_cast<Tail*>(rings + WARPS * WARP_RING);
    unsigned char* const ring = rings + warp_index() * WARP_RING;
    const FdcHeads& heads = params.heads;

    grid_dependency_wait();
    const WeightedSplit split(first_unit, params, gridDim.x);
    if (blockIdx.x >= split.blocks) return;
    uint64_t at = split.begin(blockIdx.x);
    const uint64_t end = split.begin(blockIdx.x + 1);
    WeightedPart part;
    while (split.next(part, at, end, blockIdx.x)) {
        const Item item = item_of(part, valid_len, params);
        load_queries(q_tile, q, item, params);
        const uint64_t region = static_cast<uint64_t>(blocks_before(heads, item.kv_head) * 16) << params.page_shift;
        Copies copies;
        copies.k = pages + region;
        copies.v = copies.k + (static_cast<uint64_t>(item.k_blocks * 16) << params.page_shift);
        copies.table = block_table + item.sequence * params.table_batch_stride;
        copies.ring = shared_address(ring);
        Warp warp;
        warp.start(item, params);
        attend(warp, item, min(part.first_group, item.groups), min(part.end_group, item.groups), q_tile, copies, params);
        warp.leave(ring, tail, item.v_blocks);
        __syncthreads();

        // The warps become the part; the parts, in their last arriver, the item.
        const uint32_t columns = min(COLUMNS, params.q_len * params.group - item.first_column);
        auto finish = [&](const SoftmaxState& state, uint32_t column, uint32_t channel) {
            const uint64_t query =
                static_cast<uint64_t>(item.sequence) * params.q_len + (item.first_column + column) / params.group;
            const uint32_t in_group = (item.first_column + column) % params.group;
            Element* const to = out + query * (heads.v_before[heads.count] * 16 * params.group)
                                + (heads.v_before[item.kv_head] * params.group + in_group * item.v_blocks) * 16;
            store_4(to + channel, state.out());
            if (channel == 0) lse[(query * heads.count + item.kv_head) * params.group + in_group] = state.lse();
        };
        uint32_t* const counter = arrivals + static_cast<uint64_t>(part.sequence) * split.items + part.item;
        merge_parts<COLUMNS, HEAD_DIM>(RingStates<COLUMNS, HEAD_DIM, WARP_RING>{rings, tail.ml}, WARPS, part, part_acc, part_ml, counter,
                                       &tail.is_last, Fold{columns, item.v_blocks}, finish);
    }
}
