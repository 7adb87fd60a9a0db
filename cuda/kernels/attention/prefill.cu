// Prefill attention: flash attention of ragged batches of queries over paged or contiguous keys.
//
//   out = softmax(mask(cap(scale·q·Kᵀ)))·V,  lse = ln Σ exp(score)        per query token and query head
//
// q           [num_queries, q_heads, QK_DIM]  KV_DTYPE
// k, v        by the strides of params; paged: token t of sequence s lies in slot t % page of page block_table[head, s, t / page];
//             contiguous: at token kv_start of the tile + t. Vectors are 16-byte aligned.
// tiles       [max_tiles] PrefillTile, of prefill_plan or another list: which rows see which keys. The rows of a tile meet the
//             spans of keys of its `next` too.
// tile_count  [1] u32, tiles of the list that begin rows
// valid_len   of prefill_plan; read where every KV head has its own block table
// out, lse    [num_queries, q_heads, V_DIM] KV_DTYPE and [num_queries, q_heads] f32, natural log
// state_o,    CARRY 1: [num_queries, q_heads, V_DIM] f32 and [num_queries, q_heads, 2] f32: the raw state (m, l, O) in natural
// state_ml    units, continued where params.resume is 1 or the tile says so, and left there unless the tile says that the rows
//             are finished: then out and lse get them, or state_o and lse where out is null; where both are, none is
// work        [1] u32, zero before and after the launch
// status      FAULT_BAD_RANGE or FAULT_BAD_INDEX with the tile: one outside q, the cache or the list is skipped, and so are the
//             spans behind it
//
// In the tiles of prefill_plan query i of n sits at p = kv_len − n + i. It sees keys up to p if causal (all if not), of them the
// last `window`, and the first `sinks` up to p and the first `prefix` whatever p is. A query without keys gets out 0 and lse −inf,
// or its carried state stays bit for bit as it is. Keys and values that some row of a tile sees are finite, or their NaN may
// reach its other rows; memory of all others may hold anything.
//
// Arch:    sm_80 and later.
// Mapping: a block owns ROWS rows of one sequence and KV head; row r is query head r % group of token r / group, so that all
//          heads of a group share K and V and short chunks still fill a tile. Four warps split the rows. Keys stream in tiles
//          of 64: K of the next tile loads during PV, V during QKᵀ (FlashAttention-2, algorithm 1). The list has the longest
//          tiles first; blocks stay and draw one tile of one head after another, all heads of the longest first.
// Budget:  255 registers, ROWS·QK_DIM·2 + 64·(QK_DIM + V_DIM)·2 + 2176 + 12·ROWS bytes of shared memory. A tile of keys at d 128 takes 1380
//          instructions on sm_90a: 256 mma, 80 ldmatrix, and 344 that only tiles on an edge of the mask run.
// Limit:   flops: 2·(QK_DIM + V_DIM) per visible key and row on the tensor cores.
#include "core.cuh"
#include "prefill_params.h"
#include "ptx/cp_async.cuh"
#include "ptx/mma.cuh"
#include "ptx/sync.cuh"
#include "status_params.h"
#include "tile/fragment.cuh"
#include "tile/prefill_list.cuh"
#include "tile/prefill_rows.cuh"
#include "types.cuh"

using Element = StorageOf<KV_DTYPE>;
using Item = PrefillItem<Element, PAGED>;

constexpr uint32_t THREADS = 128;
constexpr uint32_t WARPS = THREADS / WARP_SIZE;
constexpr uint32_t KEYS = 64;                                            // of a tile
constexpr uint32_t ROW_TILES = QK_DIM <= 128 && V_DIM <= 128 ? 2 : 1;    // of 16 rows, per warp
constexpr uint32_t ROWS = WARPS * ROW_TILES * 16;
constexpr uint32_t K_STEPS = QK_DIM / 16;

constexpr uint32_t K_ROW = QK_DIM * 2;  // bytes
constexpr uint32_t V_ROW = V_DIM * 2;
constexpr uint32_t Q_BYTES = ROWS * K_ROW;
constexpr uint32_t K_BYTES = KEYS * K_ROW;
constexpr uint32_t V_BYTES = KEYS * V_ROW;

using Rows = PrefillRows<0, ROW_TILES, KEYS, V_DIM, SOFT_CAP, 0>;
using Tiles = KeyTiles<ROWS, KEYS>;
constexpr uint32_t KEY_TILES = Rows::KEY_TILES;
using Scores = float[ROW_TILES][KEY_TILES][4];

// Where the rows of a tile of keys begin in K and V, worked out once per row and tile and not for each of its chunks. Two
// buffers: the next tile's are put while this one's are in use.
struct RowPlaces {
    int64_t offset[2][2][KEYS];  // [buffer, K or V, row] in elements, or NO_PLACE
};
static_assert(THREADS == 2 * KEYS, "one thread per row of K and of V");

// Beside q, K and V.
struct Shared {
    RowPlaces places;
    Tiles tiles;
    Item item;
    PrefillDraw draw;
    uint32_t q_tile;  // address
};

// Row of the tile, and whether of K or V, that this thread places.
DEVICE uint32_t placed_row() { return threadIdx.x % KEYS; }
DEVICE bool places_v() { return threadIdx.x >= KEYS; }

// Places this thread's row. Rows of keys that no row of the block sees have no place.
DEVICE void place(RowPlaces& places, uint32_t buffer, uint32_t first_key, uint32_t page, const Visible& seen,
                  const PrefillParams& params) {
    const uint32_t key = first_key + placed_row();
    const int64_t offset = Item::place_of(key, page, places_v() ? params.v_page_stride : params.k_page_stride,
                                          places_v() ? params.v_token_stride : params.k_token_stride, params);
    places.offset[buffer][places_v()][placed_row()] = seen.sees(key) ? offset : NO_PLACE;
}

// Starts copying a tile of K or V to shared memory, with the swizzle applied on the way. Rows without a place become 0: a weight
// of 0 would not silence a NaN.
template <uint32_t RowBytes>
DEVICE void load_tile(uint32_t tile_address, const Element* base, const int64_t (&offset)[KEYS]) {
    constexpr uint32_t CHUNKS = RowBytes / 16;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
    constexpr uint32_t AHEAD = 1;  // what registers are left for there
#else
    constexpr uint32_t AHEAD = PAGED && K_ROW % 128 == 0 ? 4 : 2;
#endif
#pragma unroll AHEAD
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

// Loads the block's rows of q, swizzled; rows that do not exist are zero.
DEVICE void load_queries(uint32_t q_tile, const Element* q, const Item& item, const PrefillParams& params) {
    constexpr uint32_t CHUNKS = K_ROW / 16;
    for (uint32_t index = threadIdx.x; index < ROWS * CHUNKS; index += THREADS) {
        const uint32_t row = index / CHUNKS;
        const uint32_t chunk = index % CHUNKS;
        const int64_t place = item.place_of_query(row, QK_DIM, params);
        cp_async_16_zfill(q_tile + Swizzle<K_ROW>::offset(row, chunk), q + (place < 0 ? 0 : place) + chunk * 8,
                          place < 0 ? 0 : 16);
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

// Dot products of the warp's rows with a tile of keys.
DEVICE void multiply_keys(Scores& s, uint32_t q_tile, uint32_t k_tile) {
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
            load_fragment_a<K_ROW>(a[r], q_tile, Rows::warp_row() + r * 16, step * 2);
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
}

// O += P·V over a tile of keys.
DEVICE void multiply_values(Rows& rows, const Scores& p, uint32_t v_tile) {
#pragma unroll
    for (uint32_t n = 0; n < KEY_TILES; n += 2) {
        uint32_t a[ROW_TILES][4];
#pragma unroll
        for (uint32_t r = 0; r < ROW_TILES; r++) pack_p<Element>(a[r], p[r][n], p[r][n + 1]);
#pragma unroll
        for (uint32_t v = 0; v < Rows::V_TILES; v += 2) {
            uint32_t b[2][2];
            load_fragment_b2_trans<V_ROW>(b, v_tile, n * 8, v);
#pragma unroll
            for (uint32_t r = 0; r < ROW_TILES; r++) {
                mma(rows.o[r][v], a[r], b[0]);
                mma(rows.o[r][v + 1], a[r], b[1]);
            }
        }
    }
}

// Takes the keys of the item's span into the rows.
DEVICE void absorb(Rows& rows, Shared& shared, const PrefillParams& params) {
    const Item& item = shared.item;
    RowPlaces& places = shared.places;
    Tiles& tiles = shared.tiles;
    uint32_t buffer = 0;
    tiles.fill(threadIdx.x, item, params);
    __syncthreads();
    if (tiles.first() < tiles.end) {
        const uint32_t first_key = tiles.first() * KEYS;
        place(places, buffer, first_key, item.page_of(first_key + placed_row(), tiles.seen, params), tiles.seen, params);
        __syncthreads();
        load_tile<K_ROW>(shared.q_tile + Q_BYTES, item.keys, places.offset[buffer][0]);
    }
    for (uint32_t tile = tiles.first(); tile < tiles.end;) {
        const uint32_t first_key = tile * KEYS;
        const uint32_t next = tiles.after(tile);
        cp_async_wait<0>();
        __syncthreads();  // K has landed for everyone, and everyone has left V
        // The address is read anew for each tile of keys, or the compiler keeps some forty places within the tiles in registers.
        const uint32_t q_tile = shared.q_tile;
        const uint32_t k_tile = q_tile + Q_BYTES;
        load_tile<V_ROW>(k_tile + K_BYTES, item.values, places.offset[buffer][1]);
        // On its way while scores are computed.
        const uint32_t page = item.page_of(next * KEYS + placed_row(), tiles.seen, params);
        uint32_t hidden[ROW_TILES * Rows::HIDDEN];
        if (tiles.needs_mask(first_key)) rows.hide(hidden, first_key, tiles.of_row);

        Scores s;
        float shrink[ROW_TILES][2];
        multiply_keys(s, q_tile, k_tile);
        rows.cap(s, params);
        if (tiles.needs_mask(first_key)) rows.mask(s, hidden);
        buffer ^= 1;
        place(places, buffer, next * KEYS, page, tiles.seen, params);
        if (rows.softmax(s, shrink, params)) rows.rescale(shrink);

        cp_async_wait<0>();
        __syncthreads();  // V has landed for everyone, everyone has left K, and the next tile's rows have their places
        if (next < tiles.end) load_tile<K_ROW>(k_tile, item.keys, places.offset[buffer][0]);
        multiply_values(rows, s, shared.q_tile + Q_BYTES + K_BYTES);
        tile = next;
    }
    cp_async_wait<0>();  // q, where no key was seen
}

KERNEL(128, 2)
prefill(const Element* q, const Element* k, const Element* v, const uint32_t* block_table, const PrefillTile* tile_list,
        const uint32_t* tile_count, const uint32_t* valid_len,
#if CARRY
        float* state_o, float* state_ml,
#endif
        Element* out, float* lse, uint32_t* work, uint64_t* status, const __grid_constant__ PrefillParams params) {
    DYNAMIC_SHARED(shared_bytes);
    const uint32_t q_tile = shared_address(shared_bytes);
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes + Q_BYTES + K_BYTES + V_BYTES);
    const PrefillBuffers<Element> buffers = {q, k, v, block_table, tile_list, tile_count, valid_len};
    Rows rows;
    if (threadIdx.x == 0) shared.q_tile = q_tile;

    grid_dependency_wait();
    while (draw_tile(shared.draw, shared.item, buffers, work, status, params)) {
        rows.start();
        load_queries(q_tile, q, shared.item, params);
        do {
            absorb(rows, shared, params);
        } while (next_span(shared.draw, shared.item, buffers, status, params));
#if CARRY
        leave_rows(rows, state_o, state_ml, out, lse, shared.draw, shared.item, params);
#else
        rows.normalise(lse, shared.item, params);
        rows.store(out, false, shared.item, params);
#endif
    }
}
