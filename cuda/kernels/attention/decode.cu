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
//          end of a part, the parts of an item through its last arriver (tile/split_plan.cuh, tile/partial_states.cuh).
// Budget:  168 registers where 3 blocks fit an SM (sm_90), else 255; 64 KB of rings plus 16 rows of q.
// Limit:   bytes of K and V, each read once. On sm_90a with 128 channels and 8 columns a warp spends 517 instructions on its 16
//          rows of a tile: 517 of the 1990 clocks in which an SM's share of HBM (16.4 B per clock) brings a tile's 32 KB.
#include "core.cuh"
#include "decode_params.h"
#include "ptx/cp_async.cuh"
#include "ptx/memory.cuh"
#include "ptx/sync.cuh"
#include "tile/cache_check.cuh"
#include "tile/decode_warps.cuh"
#include "tile/split_plan.cuh"
#include "types.cuh"

using Element = StorageOf<KV_DTYPE>;
using Warps = DecodeWarps<Element, QK_DIM, V_DIM, COLUMN_TILES>;

constexpr uint32_t TILE = Warps::TILE;
constexpr uint32_t COLUMNS = Warps::COLUMNS;
constexpr uint32_t ROWS = Warps::ROWS;
static_assert(TILE == DECODE_TILE, "decode_plan counts in these tiles");

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
        // Eight rows lie in one page: a place for each half, and steps from row to row.
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            const uint32_t token = token0 + half * 8;
#if PAGED
            const int64_t offset = pages[half] * page_stride + (token & ((1u << params.page_shift) - 1)) * token_stride;
#else
            const int64_t offset = token * token_stride;
#endif
            Warps::for_eight_rows<RowBytes>(
                half, base + offset, token_stride, [&](uint32_t row, uint32_t chunk, const Element* from) {
                    const bool exists = token0 + row - item.first_key < item.kv_len - item.first_key;
                    cp_async_16_zfill(slot_address + Swizzle<RowBytes>::offset(row, chunk), PAGED || exists ? from : base,
                                      exists ? 16 : 0);
                });
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

// Runs one warp over its rows of tiles [first, end) of the item, counted from the item's first visible tile.
DEVICE void attend(Warps::Warp& warp, const Item& item, uint32_t first, uint32_t end, uint32_t q_tile, uint32_t ring,
                   const RowLoader& keys, const RowLoader& values, const uint32_t* table, const DecodeParams& params) {
    const uint32_t warp_row = warp_index() * ROWS;
    // Tiles that every query sees whole need no mask.
    const Visible of_first = visible_to(0, item.kv_len, params);
    const Visible of_last = visible_to(params.q_len - 1, item.kv_len, params);
    Visible visible[COLUMN_TILES][2];  // to columns 2t and 2t + 1
#pragma unroll
    for (uint32_t n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
        for (uint32_t e = 0; e < 2; e++) {
            const uint32_t column = item.first_column + n * 8 + lane_index() % 4 * 2 + e;
            visible[n][e] = column < params.q_len * params.group ? visible_to(column / params.group, item.kv_len, params)
                                                                 : Visible{0, 0};
        }
    }

    uint32_t pages[2] = {0, 0};
    float s[COLUMN_TILES][4];
    Warps::stream(
        first, end, ring,
        [&](uint32_t address, uint32_t tile) {
            const uint32_t token0 = (item.first_tile + tile) * TILE + warp_row;
            pages_of(pages, table, token0, item.kv_len, params);
            keys.load<Warps::K_ROW>(address, token0, pages, item, params);
        },
        [&](uint32_t address, uint32_t tile) {
            const uint32_t token0 = (item.first_tile + tile) * TILE + warp_row;
            values.load<Warps::V_ROW>(address, token0, pages, item, params);
        },
        [&](uint32_t address, uint32_t tile) {
            const uint32_t token0 = (item.first_tile + tile) * TILE + warp_row;
            const bool masked = token0 < of_last.begin || token0 + ROWS > of_first.end;
            warp.scores(s, address, q_tile);
            warp.softmax<SOFT_CAP != 0>(s, params.scale, params.soft_cap, [&](uint32_t n, uint32_t i) {
                const uint32_t token = token0 + accumulator_row(lane_index(), i);
                const Visible keys = visible[n][i % 2];
                return masked && (token < keys.begin || token >= keys.end);
            });
        },
        [&](uint32_t address, uint32_t) { warp.accumulate(s, address); });
}

constexpr uint32_t WANTED_BLOCKS = QK_DIM <= 128 && V_DIM <= 128 && !(COLUMN_TILES == 2 && SOFT_CAP) ? 3 : 2;

KERNEL(128, Warps::blocks_per_sm(WANTED_BLOCKS))
decode(const Element* q, const Element* k, const Element* v, const uint32_t* block_table, const uint32_t* kv_start,
       const uint32_t* valid_len, const uint32_t* first_unit, Element* out, float* lse, float* part_acc, float* part_ml,
       uint32_t* arrivals, const __grid_constant__ DecodeParams params) {
    DYNAMIC_SHARED(shared_bytes);
    const uint32_t q_tile = shared_address(shared_bytes);
    unsigned char* const rings = shared_bytes + Warps::Q_BYTES;
    Warps::Tail& tail = *reinterpret_cast<Warps::Tail*>(rings + Warps::WARPS * Warps::RING);
    unsigned char* const ring = rings + warp_index() * Warps::RING;

    grid_dependency_wait();
    const SplitPlan plan(first_unit, params.batch, params.kv_heads * params.column_blocks, gridDim.x, params.min_units,
                         params.fixed_parts != 0);
    if (blockIdx.x >= plan.blocks) return;
    const uint64_t end = plan.begin(blockIdx.x + 1);
    for (uint64_t unit = plan.begin(blockIdx.x); unit < end;) {
        const Part part = plan.part_at(unit, end, blockIdx.x);
        const Item item = item_of(part, valid_len, kv_start, params);
        unit += part.end_unit - part.first_unit;

        Warps::load_queries(q_tile, q, [&](uint32_t row, bool& exists) {
            const uint32_t column = item.first_column + row;
            exists = row < COLUMNS && column < params.q_len * params.group;
            const uint64_t query = exists ? static_cast<uint64_t>(item.sequence) * params.q_len + column / params.group : 0;
            const uint64_t head = exists ? item.kv_head * params.group + column % params.group : 0;
            return query * params.kv_heads * params.group + head;
        });
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
        Warps::Warp warp;
        warp.start();
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
        merge_parts<Warps::COLUMNS, V_DIM>(Warps::WarpStates{rings, tail.ml}, Warps::WARPS, part, part_acc, part_ml, arrivals + item_index,
                                           &tail.is_last, Warps::Fold{columns}, finish);
    }
}
