// Prefill attention on Hopper: what prefill computes, by warpgroup products with warps that load and warps that multiply.
//
// Buffers, list of tiles, mask, carried state, work and status are those of prefill.cu. With TMA, K and V come as tensor maps instead of
// pointers, in boxes of 64 channels in the 128-byte swizzle: a row holds a token's heads one after another, or one head's vector with
// the heads' tokens one after another; `map_heads` has the way to the next head. A contiguous cache is a map of two dimensions with
// boxes of 128 rows; of a paged one pages are the third, and boxes have the rows of a page, at most 128.
//
// Arch:    sm_90a.
// Mapping: a block owns 128 rows of one sequence and KV head at a time and stays for others. Warpgroup 0 loads q once per tile of rows,
//          then tiles of 128 keys and of 128 values through two rings of two slots: by cp.async with the swizzle applied on the way, so
//          that any strides do, all four warps; with TMA one lane, of pages one lane for each in the tile, box by box, while the other
//          warps load q (whose rows, tokens times the heads of a group, are no box for groups that do not divide 128). Pages that no
//          row sees are not looked up: a page behind the pool arrives as zeros. Warpgroups 1 and 2 multiply 64 rows each: Q·Kᵀ
//          from shared memory, P·V with P from registers and V as an N-major operand. A warpgroup issues the next tile's Q·Kᵀ before
//          this tile's P·V and works out its softmax while P·V runs (FlashAttention-3, algorithm 2); the two take turns at issuing, so
//          that one's softmax meets the other's products. Masks are worked out in tiles on their edge alone, and O is multiplied only
//          where a row's maximum has left its reference 2^8 behind (FlashAttention-4's slack); states that are kept have the maximum.
// Edges:   values that no row of the block sees become 0, for a weight of 0 would not silence a NaN: cp.async fills in zeros; boxes
//          bring in whatever lies there, the next sequence for one, and the loading warp then waits for the box and overwrites these
//          rows before it hands the tile on. Keys need no such care, their scores are masked.
// Budget:  128 threads of 40 registers and 256 of 232; of shared memory 128·QK_DIM·2 bytes for q, 512·(QK_DIM + V_DIM) for the rings
//          and 1.7 KB beside them: 162 KB at d 128. One block per SM.
// Limit:   flops: 2·(QK_DIM + V_DIM) per visible key and row on the tensor cores. At d 128 a tile of 128 keys takes an SM 2048 clocks of
//          them (64·128·128·2·2 FLOP per warpgroup at 4096 per clock: 1024 each). In that time its two multiplying warps take of each
//          scheduler, by the machine code's count:
//              issue   2 · 463 of 2048 slots; 2 · 663 where the tile is masked, 2 · 77 more where O is multiplied
//              MUFU    2 · 64 exponentials, 8 clocks each: 1024
//              FMA     2 · 64 multiply-adds, 64 additions and some 20 moves: 300
//              ALU     2 · 70 maxima, 32 conversions and 40 for addresses, 2 clocks each: 570 (conversions at 16 a clock would take 512
//                      of these units, or as many of MUFU)
//          so that products are the limit if the turns hold, less the first tile, the last P·V and the epilogue of a tile of rows,
//          about 3 tiles' worth, more where tiles of rows see few keys, since they do not overlap one another. Loading by TMA adds
//          none to speak of; by cp.async it adds 950 slots, 1876 in all. Of 790 TFLOP/s that leaves 600 to 680 by TMA, 500 to 600 by
//          cp.async.
#include "core.cuh"
#include "prefill_params.h"
#include "ptx/bulk_copy.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/shuffle.cuh"
#include "ptx/sync.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"
#include "status_params.h"
#include "tile/prefill_list.cuh"
#include "tile/prefill_rows.cuh"
#include "types.cuh"

using Element = StorageOf<KV_DTYPE>;
using Item = PrefillItem<Element, PAGED>;

constexpr uint32_t LOADERS = 128;  // threads that load, the first warpgroup
constexpr uint32_t Q_LOADERS = TMA ? LOADERS - WARP_SIZE : LOADERS;  // of them, the last ones, those that load q
constexpr uint32_t ROWS = 128;
constexpr uint32_t KEYS = 128;   // of a tile
constexpr uint32_t SLOTS = 2;    // of each ring
constexpr uint32_t SLACK = 8;    // of a row's reference, in units of log2

// Registers of a thread when a block of 384 starts; then the loaders give some, and the multipliers take no more than these.
constexpr uint32_t START_REGISTERS = 168;
// With 64 channels of V, O takes 32 less; whoever loads pages can do with some.
constexpr uint32_t LOADER_REGISTERS = V_DIM == 64 ? 56 : 40;
constexpr uint32_t MULTIPLIER_REGISTERS = V_DIM == 64 ? 224 : 232;
static_assert((START_REGISTERS - LOADER_REGISTERS) * LOADERS >= (MULTIPLIER_REGISTERS - START_REGISTERS) * 256, "or nobody starts");

// Tiles in shared memory are panels of 64 channels: rows of 128 bytes in the 128-byte swizzle.
constexpr uint32_t PANEL_BYTES = 128 * 128;
constexpr uint32_t Q_BYTES = QK_DIM / 64 * PANEL_BYTES;
constexpr uint32_t K_BYTES = QK_DIM / 64 * PANEL_BYTES;
constexpr uint32_t V_BYTES = V_DIM / 64 * PANEL_BYTES;
constexpr uint32_t K_AT = Q_BYTES;
constexpr uint32_t V_AT = K_AT + SLOTS * K_BYTES;
constexpr uint32_t REST_AT = V_AT + SLOTS * V_BYTES;
static_assert(ROWS * 128 == PANEL_BYTES && KEYS * 128 == PANEL_BYTES, "q, K and V have panels of one size");

using Rows = PrefillRows<LOADERS / WARP_SIZE, 1, KEYS, V_DIM, SOFT_CAP, SLACK>;
using Tiles = KeyTiles<ROWS, KEYS>;
using Scores = float[1][Rows::KEY_TILES][4];

struct Shared {
    Tiles tiles;
    Item item;
    PrefillDraw draw;
    uint32_t _pad;
    uint64_t q_full;          // mbarriers
    uint64_t full[2][SLOTS];  // of K and V
    uint64_t empty[2][SLOTS];
    uint64_t landed;  // a tile of values before its rows that nobody sees are overwritten
};

// The n-th tile of keys that the block has worked on, counted over all its rows, and where it lies.
struct Turn {
    uint32_t count = 0;

    DEVICE uint32_t slot() const { return count % SLOTS; }
    DEVICE uint32_t parity() const { return count / SLOTS % 2; }
};

enum Operand : uint32_t { K = 0, V = 1 };

// Where the slot of an operand's tile lies in shared memory.
template <Operand Which>
DEVICE uint32_t slot_at(Turn turn) {
    return Which == K ? K_AT + turn.slot() * K_BYTES : V_AT + turn.slot() * V_BYTES;
}

// Issues the copies of the block's rows of q by the threads from LOADERS - Q_LOADERS on; rows that do not exist are zero.
DEVICE void copy_queries(uint32_t base, const Element* q, const Item& item, const PrefillParams& params) {
    constexpr uint32_t CHUNKS = QK_DIM / 8;
#pragma unroll 1
    for (uint32_t index = threadIdx.x - (LOADERS - Q_LOADERS); index < ROWS * CHUNKS; index += Q_LOADERS) {
        const uint32_t row = index / CHUNKS, chunk = index % CHUNKS;
        const int64_t place = item.place_of_query(row, QK_DIM, params);
        cp_async_16_zfill(base + chunk / 8 * PANEL_BYTES + Swizzle<128>::offset(row, chunk % 8),
                          q + (place < 0 ? 0 : place) + chunk * 8, place < 0 ? 0 : 16);
    }
}

// Lets `loader` load the span's tiles in the order in which they are multiplied: K is one tile ahead of V.
template <class Loader>
DEVICE void load_span(Loader& loader, const Tiles& tiles, const PrefillParams& params) {
    uint32_t v_tile = tiles.end;
    for (uint32_t k_tile = tiles.first(); k_tile < tiles.end; k_tile = tiles.after(k_tile)) {
        loader.template tile<K>(k_tile * KEYS, params);
        if (v_tile < tiles.end) loader.template tile<V>(v_tile * KEYS, params);
        v_tile = k_tile;
    }
    if (v_tile < tiles.end) loader.template tile<V>(v_tile * KEYS, params);
}

// The warpgroup that loads, by cp.async.
struct CopyLoader {
    Shared& shared;
    uint32_t base;      // of shared memory
    Turn turns[2];      // of K and V
    uint32_t on_way = 0;  // loads that are not announced yet, at most two
    uint32_t older, newer;  // their barriers

    DEVICE CopyLoader(Shared& shared, uint32_t base) : shared(shared), base(base) {}

    // A load has landed for this thread; the products may read what it wrote.
    static DEVICE void announce(uint32_t barrier) {
        async_proxy_fence();
        mbarrier_arrive(barrier);
    }

    // Closes a load, which completes on `barrier`, and announces the one two before.
    DEVICE void close(uint32_t barrier) {
        cp_async_commit();
        if (on_way == 2) {
            cp_async_wait<2>();
            announce(older);
        } else {
            on_way++;
        }
        older = newer;
        newer = barrier;
    }

    // Announces all loads.
    DEVICE void drain() {
        if (on_way == 2) {
            cp_async_wait<1>();
            announce(older);
        }
        cp_async_wait<0>();
        if (on_way > 0) announce(newer);
        on_way = 0;
    }

    DEVICE void queries(const Element* q, const PrefillParams& params) {
        copy_queries(base, q, shared.item, params);
        close(shared_address(&shared.q_full));
    }

    // Loads a tile of keys or values into the next slot, once it is free. A warp copies the rows that its lanes have placed; rows
    // of keys that no row of the block sees become 0.
    template <Operand Which>
    DEVICE void tile(uint32_t first_key, const PrefillParams& params) {
        constexpr uint32_t CHUNKS = (Which == K ? QK_DIM : V_DIM) / 8;
        constexpr uint32_t ROWS_AT_ONCE = WARP_SIZE / CHUNKS;
        const Item& item = shared.item;
        const uint32_t key = first_key + threadIdx.x;
        const int64_t offset = Item::place_of(key, item.page_of(key, shared.tiles.seen, params),
                                              Which == K ? params.k_page_stride : params.v_page_stride,
                                              Which == K ? params.k_token_stride : params.v_token_stride, params);
        const int64_t place = shared.tiles.seen.sees(key) ? offset : NO_PLACE;
        Turn& turn = turns[Which];
        const uint32_t slot = base + slot_at<Which>(turn);
        const Element* const from = Which == K ? item.keys : item.values;
        const uint32_t chunk = lane_index() % CHUNKS;
        mbarrier_wait(shared_address(&shared.empty[Which][turn.slot()]), turn.parity() ^ 1);
#pragma unroll 4
        for (uint32_t i = 0; i < WARP_SIZE / ROWS_AT_ONCE; i++) {
            const uint32_t row = i * ROWS_AT_ONCE + lane_index() / CHUNKS;
            const int64_t of_row = __shfl_sync(FULL_WARP, place, row);
            cp_async_16_zfill(slot + chunk / 8 * PANEL_BYTES + Swizzle<128>::offset(warp_index() * WARP_SIZE + row, chunk % 8),
                              from + (of_row < 0 ? 0 : of_row) + chunk * 8, of_row < 0 ? 0 : 16);
        }
        close(shared_address(&shared.full[Which][turn.slot()]));
        turn.count++;
    }

    DEVICE void span(const PrefillParams& params) {
        load_span(*this, shared.tiles, params);
        drain();
    }
};

// The warpgroup that loads, by tensor maps: its first warp K and V, the others q.
struct BoxLoader {
    Shared& shared;
    unsigned char* bytes;  // of shared memory
    const TensorMap& k_map;
    const TensorMap& v_map;
    const PrefillMapHeads& map_heads;
    Turn turns[2];              // of K and V
    bool queries_on_way = false;
    uint32_t landed_parity = 0;

    DEVICE BoxLoader(Shared& shared, unsigned char* bytes, const TensorMap& k_map, const TensorMap& v_map,
                     const PrefillMapHeads& map_heads)
        : shared(shared), bytes(bytes), k_map(k_map), v_map(v_map), map_heads(map_heads) {}

    DEVICE void queries(const Element* q, const PrefillParams& params) {
        if (warp_index() == 0) return;
        copy_queries(shared_address(bytes), q, shared.item, params);
        cp_async_commit();
        queries_on_way = true;
    }

    // Loads a tile of keys or values into the next slot, once it is free.
    template <Operand Which>
    DEVICE void tile(uint32_t first_key, const PrefillParams& params) {
        Turn& turn = turns[Which];
        const uint32_t full = shared_address(&shared.full[Which][turn.slot()]);
        const bool edge = Which == V && !shared.tiles.sees_all(first_key);
        const uint32_t slot = shared_address(bytes) + slot_at<Which>(turn), barrier = edge ? shared_address(&shared.landed) : full;
        const uint32_t head = shared.item.kv_head;
        const uint32_t column = head * (Which == K ? map_heads.k_columns : map_heads.v_columns);
        const uint32_t head_row = head * (Which == K ? map_heads.k_rows : map_heads.v_rows);
        // A lane's box: the whole tile, or its keys of a page.
        const uint32_t box_rows = PAGED ? min(1u << params.page_shift, KEYS) : KEYS;
        const uint32_t first_row = lane_index() * box_rows;
        const bool loads = first_row < KEYS;
        const uint32_t key = first_key + first_row;
        const uint32_t page = PAGED && loads ? page_of_box(key, box_rows, params) : 0;
        const uint32_t row = head_row + (PAGED ? key & ((1u << params.page_shift) - 1) : shared.item.tile.kv_start + key);
        if (lane_index() == 0) {
            mbarrier_wait(shared_address(&shared.empty[Which][turn.slot()]), turn.parity() ^ 1);
            mbarrier_arrive_expect_bytes(barrier, Which == K ? K_BYTES : V_BYTES);
        }
        if (PAGED) __syncwarp();  // the slot is free, and its bytes are expected
        if (loads) {
#pragma unroll
            for (uint32_t panel = 0; panel < (Which == K ? QK_DIM : V_DIM) / 64; panel++) {
                const uint32_t at = slot + panel * PANEL_BYTES + first_row * 128;
                if (PAGED) {
                    tma_load_3d(at, Which == K ? k_map : v_map, barrier, column + panel * 64, row, page);
                } else {
                    tma_load_2d(at, Which == K ? k_map : v_map, barrier, column + panel * 64, row);
                }
            }
        }
        if (edge) {
            silence(bytes + slot_at<Which>(turn), first_key);
            if (lane_index() == 0) mbarrier_arrive(full);
        }
        turn.count++;
    }

    // The page of some keys, all of one: one behind the pool where no row of the block sees any of them, for its entry may hold
    // anything. Entries that the caller has changed since they were checked lead behind the pool too, at worst.
    DEVICE uint32_t page_of_box(uint32_t key, uint32_t keys, const PrefillParams& params) const {
        const Visible seen = shared.tiles.seen;
        const bool sees = (key < seen.end && key + keys > seen.begin) || key < seen.sinks;
        return sees ? shared.item.table[key >> params.page_shift] : params.num_pages;
    }

    // Waits for the boxes of a tile of values and makes 0 of those that no row of the block sees.
    DEVICE void silence(unsigned char* values, uint32_t first_key) {
        const Visible seen = shared.tiles.seen;
        mbarrier_wait(shared_address(&shared.landed), landed_parity);
        landed_parity ^= 1;
#pragma unroll 1
        for (uint32_t row = lane_index(); row < KEYS; row += WARP_SIZE) {
            if (seen.sees(first_key + row)) continue;
#pragma unroll
            for (uint32_t chunk = 0; chunk < V_DIM / 8; chunk++) {
                // Each lane begins at another chunk, so that eight of them meet all banks.
                const uint32_t at = chunk / 8 * PANEL_BYTES + row * 128 + (chunk + lane_index()) % 8 * 16;
                *reinterpret_cast<uint4*>(values + at) = make_uint4(0, 0, 0, 0);
            }
        }
        async_proxy_fence();
        __syncwarp();
    }

    DEVICE void span(const PrefillParams& params) {
        if (warp_index() == 0) {
            load_span(*this, shared.tiles, params);
        } else if (queries_on_way) {
            cp_async_wait<0>();
            async_proxy_fence();
            mbarrier_arrive(shared_address(&shared.q_full));
            queries_on_way = false;
        }
    }
};

// A warpgroup that multiplies.
struct Multiplier {
    Shared& shared;
    uint32_t base;   // of shared memory
    uint32_t group;  // 0 or 1
    Turn turn;       // of K; V's is the same or the one before
    uint32_t q_parity = 0;

    DEVICE Multiplier(Shared& shared, uint32_t base)
        : shared(shared), base(base), group(warp_index() / 4 - LOADERS / 128) {}

    // The two take turns at issuing products.
    DEVICE void wait_turn() const { named_barrier_sync(1 + group, 256); }
    DEVICE void end_turn() const { named_barrier_arrive(2 - group, 256); }

    DEVICE void wait_full(Operand which, Turn at) const {
        mbarrier_wait(shared_address(&shared.full[which][at.slot()]), at.parity());
    }
    DEVICE void release(Operand which, Turn at) const {
        if (lane_index() == 0) mbarrier_arrive(shared_address(&shared.empty[which][at.slot()]));
    }

    // The operands of products: the group's rows of q, and the tiles of a turn.
    DEVICE uint64_t queries() const { return wgmma_descriptor(warp_uniform(base + group * 64 * 128)); }
    DEVICE uint64_t keys(Turn at) const { return wgmma_descriptor(warp_uniform(base + slot_at<K>(at))); }
    DEVICE uint64_t values(Turn at) const {
        return wgmma_descriptor_n_major(warp_uniform(base + slot_at<V>(at)), PANEL_BYTES);
    }

    // Issues S = Q·Kᵀ.
    static DEVICE void multiply_keys(Scores& s, uint64_t q, uint64_t k) {
#pragma unroll
        for (uint32_t step = 0; step < QK_DIM / 16; step++) {
            const uint32_t at = step / 4 * PANEL_BYTES + step % 4 * 32;
            wgmma_ss<Element, KEYS>(reinterpret_cast<float(&)[KEYS / 2]>(s), wgmma_step(q, at), wgmma_step(k, at), step > 0);
        }
        wgmma_commit();
    }

    // Issues O += P·V.
    static DEVICE void multiply_values(Rows& rows, const uint32_t (&p)[KEYS / 16][4], uint64_t v) {
#pragma unroll
        for (uint32_t step = 0; step < KEYS / 16; step++) {
            wgmma_rs<Element, V_DIM>(reinterpret_cast<float(&)[V_DIM / 2]>(rows.o), p[step], wgmma_step(v, step * 16 * 128), true);
        }
        wgmma_commit();
    }

    // From scores to weights; whether O still needs the factors in `shrink`.
    DEVICE bool weigh(Rows& rows, Scores& s, float (&shrink)[1][2], uint32_t first_key, const PrefillParams& params) const {
        rows.cap(s, params);
        if (shared.tiles.needs_mask(first_key)) {
            uint32_t hidden[Rows::HIDDEN];
            rows.hide(hidden, first_key, shared.tiles.of_row);
            rows.mask(s, hidden);
        }
        return rows.softmax(s, shrink, params);
    }

    static DEVICE void pack(uint32_t (&p)[KEYS / 16][4], const Scores& s) {
#pragma unroll
        for (uint32_t step = 0; step < KEYS / 16; step++) pack_p<Element>(p[step], s[0][2 * step], s[0][2 * step + 1]);
    }

    // Takes the keys of the item's span into the rows.
    DEVICE void span(Rows& rows, const PrefillParams& params) {
        const Tiles& tiles = shared.tiles;
        uint32_t tile = tiles.first();
        if (tile >= tiles.end) return;
        Scores s;
        float shrink[1][2];
        uint32_t p[KEYS / 16][4];

        const uint64_t q = queries();
        const uint64_t first = keys(turn);
        wait_full(K, turn);
        wait_turn();
        wgmma_fence();
        multiply_keys(s, q, first);
        end_turn();
        wgmma_wait<0>();
        release(K, turn);
        if (weigh(rows, s, shrink, tile * KEYS, params)) rows.rescale(shrink);
        pack(p, s);
        for (tile = tiles.after(tile); tile < tiles.end; tile = tiles.after(tile)) {
            const Turn before = turn;
            turn.count++;
            const uint64_t k = keys(turn), v = values(before);
            wait_full(K, turn);
            wait_turn();
            wgmma_fence();
            multiply_keys(s, q, k);
            wait_full(V, before);
            wgmma_fence();  // the wait for V stands between O and P and the fence above
            multiply_values(rows, p, v);
            end_turn();
            wgmma_wait<1>();
            release(K, turn);
            const bool moved = weigh(rows, s, shrink, tile * KEYS, params);
            // Never so; but a branch on the sums keeps the compiler from putting the exponentials behind the wait.
            if (rows.l[0][0] + rows.l[0][1] < 0.0f) __trap();
            wgmma_wait<0>();
            release(V, before);
            if (moved) rows.rescale(shrink);
            pack(p, s);
        }
        const uint64_t last = values(turn);
        wait_full(V, turn);
        wgmma_fence();
        multiply_values(rows, p, last);
        wgmma_wait<0>();
        release(V, turn);
        turn.count++;
    }
};

// Both kinds of warpgroups meet here, at one place of the source, once the span's tiles are filled in.
DEVICE void meet_for_span() { block_barrier<true>(); }

KERNEL(384, 1)
prefill_sm90a(const Element* q,
#if TMA
              const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
              const __grid_constant__ PrefillMapHeads map_heads,
#else
              const Element* k, const Element* v,
#endif
              const uint32_t* block_table, const PrefillTile* tile_list, const uint32_t* tile_count, const uint32_t* valid_len,
#if CARRY
              float* state_o, float* state_ml,
#endif
              Element* out, float* lse, uint32_t* work, uint64_t* status, const __grid_constant__ PrefillParams params) {
    DYNAMIC_SHARED(shared_bytes);
    const uint32_t base = shared_address(shared_bytes);
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes + REST_AT);
#if TMA
    const PrefillBuffers<Element> buffers = {q, nullptr, nullptr, block_table, tile_list, tile_count, valid_len};
#else
    const PrefillBuffers<Element> buffers = {q, k, v, block_table, tile_list, tile_count, valid_len};
#endif
    // By a thread that does nothing else alone, or the compiler would keep what thread 0 is known by in a register throughout.
    if (threadIdx.x == LOADERS) {
        mbarrier_init(shared_address(&shared.q_full), Q_LOADERS);
        mbarrier_init(shared_address(&shared.landed), 1);
        for (uint32_t which = 0; which < 2; which++) {
            for (uint32_t slot = 0; slot < SLOTS; slot++) {
                mbarrier_init(shared_address(&shared.full[which][slot]), TMA ? 1 : LOADERS);
                mbarrier_init(shared_address(&shared.empty[which][slot]), 2 * 4);
            }
        }
        mbarrier_init_fence();
#if TMA
        if ((PAGED ? params.num_pages : params.num_tokens) > 0) {
            tma_prefetch_map(k_map);
            tma_prefetch_map(v_map);
        }
#endif
    }
    __syncthreads();

    grid_dependency_wait();
    if (threadIdx.x < LOADERS) {
        give_registers<LOADER_REGISTERS>();
#if TMA
        BoxLoader loader(shared, shared_bytes, k_map, v_map, map_heads);
#else
        CopyLoader loader(shared, base);
#endif
        while (draw_tile<true>(shared.draw, shared.item, buffers, work, status, params)) {
            loader.queries(q, params);
            do {
                shared.tiles.fill(threadIdx.x, shared.item, params);
                meet_for_span();
                loader.span(params);
            } while (next_span<true>(shared.draw, shared.item, buffers, status, params));
        }
    } else {
        take_registers<MULTIPLIER_REGISTERS>();
        Multiplier multiplier(shared, base);
        if (multiplier.group == 1) multiplier.end_turn();  // the first turn is group 0's
        while (draw_tile<true>(shared.draw, shared.item, buffers, work, status, params)) {
            Rows rows;
            rows.start();
            bool first = true;
            do {
                meet_for_span();
                if (first) mbarrier_wait(shared_address(&shared.q_full), multiplier.q_parity);
                first = false;
                multiplier.span(rows, params);
            } while (next_span<true>(shared.draw, shared.item, buffers, status, params));
            multiplier.q_parity ^= 1;
#if CARRY
            leave_rows(rows, state_o, state_ml, out, lse, shared.draw, shared.item, params);
#else
            rows.normalise(lse, shared.item, params);
            rows.store(out, false, shared.item, params);
#endif
        }
        if (multiplier.group == 0) multiplier.wait_turn();  // the turn that group 1 has given last
    }
}
