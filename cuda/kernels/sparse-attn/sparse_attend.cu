// Attention of one token per request over lists of pages, a list to each KV head, split over the keys.
//
//   out = softmax(cap(scale·q·Kᵀ))·V,  lse = ln Σ exp(score)        per row and query head, over all tokens of the row's list
//
// q           [rows, group, QK_DIM] KV_DTYPE, row = request · kv_heads + kv_head: that is [requests, q_heads, QK_DIM]
// runs        [num_runs, K [tokens, QK_DIM] | V [tokens, V_DIM]] KV_DTYPE, a page of 2^page_shift tokens to a run
// entries     [rows, max_entries] SparseEntry, num_entries [rows] u32, first_unit [rows + 1] u32: as sparse_plan leaves them
// prior_out   [rows, group, V_DIM] f32, prior_lse [rows, group] f32: states over other keys that are merged in; null for none
// out         [rows, group, V_DIM] KV_DTYPE, or null where the result is a partial state
// partial     [rows, group, V_DIM] f32, normalised; null where `out` is given
// lse         [rows, group] f32, natural log
// part_acc    [slots, COLUMNS, V_DIM] f32, part_ml [slots, COLUMNS, 2] f32     (workspace, need not be initialised)
// arrivals    [rows] u32, zero before and after the launch (workspace)
//
// Hits are attended while misses are on their way: one launch leaves a partial state, the next takes it as its prior. A row without
// tokens gets its prior, or 0 and −inf. Tokens of a page past its length may hold anything. A list that names all pages of a
// sequence in order gives the bits of `decode` over it.
//
// Arch:    sm_80 and later.
// Mapping: as decode.cu: a block serves the query heads of one row, four warps of 16 tokens a tile with rings of their own
//          (tile/decode_warps.cuh); parts of a row meet in their last arriver.
// Budget:  168 registers where 3 blocks fit an SM (sm_90), else 255; 64 KB of rings plus 16 rows of q.
// Limit:   bytes of K and V, each read once. On sm_90a with 128 channels and 8 columns a warp spends 408 instructions on its 16 rows
//          of a tile, of the 1990 clocks that decode.cu counts for their bytes.
#include "core.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/memory.cuh"
#include "ptx/sync.cuh"
#include "sparse_attend_params.h"
#include "tile/decode_warps.cuh"
#include "tile/split_plan.cuh"
#include "types.cuh"

using Element = StorageOf<KV_DTYPE>;
using Warps = DecodeWarps<Element, QK_DIM, V_DIM, COLUMN_TILES>;

constexpr uint32_t TILE = Warps::TILE;
constexpr uint32_t COLUMNS = Warps::COLUMNS;
static_assert(TILE == SPARSE_TILE, "sparse_plan counts in these tiles");

// Where a warp's 16 rows of a tile lie: two halves of eight tokens, each within one page.
struct Place {
    uint64_t run[2];
    uint32_t in_page[2];
    uint32_t exist[2];  // tokens of the half, 0 to 8
};

// What one block needs to know about the row it works on. The plan has checked the runs, but its list is memory like any
// other: a run out of range reads a wrong page, never memory outside the pool.
struct Row {
    const SparseEntry* entries;
    uint32_t count;

    DEVICE Place place_of(uint32_t token0, const SparseAttendParams& params) const {
        Place place;
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            const uint32_t token = token0 + half * 8;
            const uint32_t index = token >> params.page_shift;
            place.in_page[half] = token & ((1u << params.page_shift) - 1);
            place.run[half] = 0;
            place.exist[half] = 0;
            if (index < count) {
                const SparseEntry entry = entries[index];
                place.run[half] = min(entry.run, params.num_runs - 1);
                place.exist[half] = entry.tokens > place.in_page[half] ? min(entry.tokens - place.in_page[half], 8u) : 0;
            }
        }
        return place;
    }
};

// Streams 16 rows of K or V into a warp's ring; rows of tokens that do not exist become 0, whatever memory holds: a weight of 0
// would not silence a NaN.
template <uint32_t RowBytes>
DEVICE void load_rows(uint32_t slot_address, const Element* base, uint64_t run_elements, const Place& place) {
    constexpr uint32_t DIM = RowBytes / 2;
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        const Element* const rows = base + place.run[half] * run_elements + place.in_page[half] * DIM;
        Warps::for_eight_rows<RowBytes>(half, rows, DIM, [&](uint32_t row, uint32_t chunk, const Element* from) {
            cp_async_16_zfill(slot_address + Swizzle<RowBytes>::offset(row, chunk), from,
                              row - half * 8 < place.exist[half] ? 16 : 0);
        });
    }
}

// Runs one warp over its rows of tiles [first, end) of a row's list.
DEVICE void attend(Warps::Warp& warp, const Row& row, uint32_t first, uint32_t end, uint32_t q_tile, uint32_t ring,
                   const Element* runs, const SparseAttendParams& params) {
    const uint32_t warp_row = warp_index() * Warps::ROWS;
    const uint32_t page = 1u << params.page_shift;
    const uint64_t run_elements = static_cast<uint64_t>(page) * (QK_DIM + V_DIM);
    const Element* const values = runs + page * QK_DIM;
    Place loading;
    // The lengths that the next use will ask for, fetched one tile ahead.
    Place next = row.place_of(first * TILE + warp_row, params);
    float s[COLUMN_TILES][4];
    Warps::stream(
        first, end, ring,
        [&](uint32_t address, uint32_t tile) {
            loading = row.place_of(tile * TILE + warp_row, params);
            load_rows<Warps::K_ROW>(address, runs, run_elements, loading);
        },
        [&](uint32_t address, uint32_t) { load_rows<Warps::V_ROW>(address, values, run_elements, loading); },
        [&](uint32_t address, uint32_t tile) {
            const uint32_t exist[2] = {next.exist[0], next.exist[1]};
            next = row.place_of((tile + 1) * TILE + warp_row, params);
            warp.scores(s, address, q_tile);
            warp.softmax<SOFT_CAP != 0>(s, params.scale, params.soft_cap, [&](uint32_t, uint32_t i) {
                return lane_index() / 4 >= exist[i / 2];
            });
        },
        [&](uint32_t address, uint32_t) { warp.accumulate(s, address); });
}

constexpr uint32_t WANTED_BLOCKS = QK_DIM <= 128 && V_DIM <= 128 && !(COLUMN_TILES == 2 && SOFT_CAP) ? 3 : 2;

KERNEL(128, Warps::blocks_per_sm(WANTED_BLOCKS))
sparse_attend(const Element* q, const Element* runs, const SparseEntry* entries, const uint32_t* num_entries,
              const uint32_t* first_unit, const float* prior_out, const float* prior_lse, Element* out, float* partial,
              float* lse, float* part_acc, float* part_ml, uint32_t* arrivals,
              const __grid_constant__ SparseAttendParams params) {
    DYNAMIC_SHARED(shared_bytes);
    const uint32_t q_tile = shared_address(shared_bytes);
    unsigned char* const rings = shared_bytes + Warps::Q_BYTES;
    Warps::Tail& tail = *reinterpret_cast<Warps::Tail*>(rings + Warps::WARPS * Warps::RING);
    unsigned char* const ring = rings + warp_index() * Warps::RING;

    grid_dependency_wait();
    const SplitPlan plan(first_unit, params.rows, 1, gridDim.x, params.min_units, params.fixed_parts != 0);
    if (blockIdx.x >= plan.blocks) return;
    const uint64_t end = plan.begin(blockIdx.x + 1);
    for (uint64_t unit = plan.begin(blockIdx.x); unit < end;) {
        const Part part = plan.part_at(unit, end, blockIdx.x);
        const uint32_t row_index = part.sequence;
        unit += part.end_unit - part.first_unit;
        const Row row{entries + static_cast<uint64_t>(row_index) * params.max_entries,
                      min(num_entries[row_index], params.max_entries)};
        const uint32_t tiles = ceil_div(row.count << params.page_shift, TILE);
        const uint64_t first_head = static_cast<uint64_t>(row_index) * params.group;

        Warps::load_queries(q_tile, q, [&](uint32_t column, bool& exists) {
            exists = column < params.group;
            return first_head + (exists ? column : 0);
        });
        Warps::Warp warp;
        warp.start();
        attend(warp, row, min(part.first_unit * params.unit_tiles, tiles), min(part.end_unit * params.unit_tiles, tiles),
               q_tile, shared_address(ring), runs, params);
        warp.leave(ring, tail);
        __syncthreads();

        // The warps become the part; the parts, in their last arriver, the row.
        auto finish = [&](const SoftmaxState& of_list, uint32_t column, uint32_t channel) {
            const uint64_t head = first_head + column;
            SoftmaxState state = of_list;
            if (prior_lse != nullptr) {
                // A prior without keys has memory behind it that nobody need have written.
                const float m = prior_lse[head];
                const bool empty = m == NEGATIVE_INFINITY;
                const float4 acc = empty ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : load_f32x4(prior_out + head * V_DIM + channel);
                state = merged(state, m, empty ? 0.0f : 1.0f, acc);
            }
            if (out != nullptr) {
                store_4(out + head * V_DIM + channel, state.out());
            } else {
                store_4(partial + head * V_DIM + channel, state.out());
            }
            if (channel == 0) lse[head] = state.lse();
        };
        merge_parts<COLUMNS, V_DIM>(Warps::WarpStates{rings, tail.ml}, Warps::WARPS, part, part_acc, part_ml, arrivals + row_index,
                                    &tail.is_last, Warps::Fold{min(COLUMNS, params.group)}, finish);
    }
}
