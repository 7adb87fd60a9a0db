// Hybrid GEMM for few tokens: O = epilogue(X·Wᵀ), W read where it lies, in host memory and in HBM, by one launch.
//
// x            [max_tokens, k] X_DTYPE, rows x_stride apart
// host, hbm    the columns of W on either side: packed as in tile/weight_slab.cuh, or row-major [n, k] X_DTYPE
// scales       f32 [n] of int8 and of fp8 by rows, [ceil(n / 128), ceil(k / 128)] of fp8 in blocks; null in other formats
// bias         [n] f32, residual [max_tokens, out columns] of O's type; null where there is none
// out          [max_tokens, out columns] f32, f16 or bf16, rows out_stride apart
// partials     [k_splits, columns, max_tokens, 64] f32, arrivals [columns, panels] u32, zero before and after: k_splits > 1
// schedule     which block does what: tile/tile_schedule.cuh. It may change between replays of a graph
// experts      [experts], offsets [experts + 1] u32: where the weights and the rows of each expert of a grouped product are
//              (tile/gemm_products.cuh), scales then [experts, …]; null for a single product
// traffic      what was moved is added to it; may be null
// status       FAULT_BAD_LENGTH (tokens), FAULT_BAD_INDEX (panel, K tiles, cluster, an expert's weights), FAULT_BAD_RANGE
//              (columns, blocks, an expert's rows), with the launch's first column, or the expert: O is then zero in the
//              launch's columns
//
// A block takes its items of the schedule, each 64 output features for a panel of tokens, one after another, slab by slab
// through one ring that does not drain in between. Weights are the tensor cores' side of 16, tokens that of 8. With
// k_splits > 1 the blocks (x, 0 … k_splits − 1) share the items of block x by K tiles; the last of them to finish an item
// adds the partial sums in the order of K. Sums are f32 and rise by K, so that with k_splits = 1 an output depends on its
// rows of X and W alone.
//
// Arch:    sm_80 and later.
// Mapping: grid (blocks of the schedule, k_splits), one block per SM. Each of four warps has 16 output features and all
//          tokens of the panel.
// Budget:  128 registers up to 16 tokens (160 with scales of groups or blocks), 224 for 64; a ring of up to 96 KiB.
// Limit:   bytes of W: over the link and from HBM, both at once.
#include "core.cuh"
#include "hybrid_gemm_params.h"
#include "ptx/sync.cuh"
#include "tile/copy_ring.cuh"
#include "tile/gemm_epilogue.cuh"
#include "tile/gemm_products.cuh"
#include "tile/gemm_traffic.cuh"
#include "tile/last_arriver.cuh"
#include "tile/status.cuh"
#include "tile/tile_schedule.cuh"
#include "tile/weight_slab.cuh"
#include "types.cuh"

using Element = StorageOf<X_DTYPE>;
using Weight = WeightFormat<FORMAT>;

constexpr uint32_t THREADS = 128;
constexpr uint32_t TOKEN_TILES = TOKENS / 8;
constexpr uint32_t X_CHUNK_BYTES = TOKENS * SLAB_ROW_BYTES;
constexpr uint32_t SCALES_AT = HYBRID_SLAB_BYTES;
constexpr uint32_t X_AT = SCALES_AT + Weight::SCALE_ROOM;
constexpr uint32_t STAGE_BYTES = X_AT + Weight::X_CHUNKS * X_CHUNK_BYTES;
constexpr uint32_t RING_BYTES = 96 * 1024;
constexpr int STAGES = RING_BYTES / STAGE_BYTES < 10 ? RING_BYTES / STAGE_BYTES : 10;
static_assert(STAGE_BYTES >= TOKENS * HYBRID_TILE_ROWS * sizeof(float), "the sums take the place of the slab that ended them");

// With many tokens one chunk of activations has enough to do for its loads to overlap.
constexpr int CHUNKS_AT_ONCE = TOKENS < 32 ? 4 : 1;

struct Tail {
    BlockTraffic traffic;
    GemmProduct product;
    uint32_t last;
};

// Where a block is in its slabs: a step of the schedule, and the slab within its tile.
struct Cursor {
    uint32_t item = 0;
    uint32_t k_tile;
    uint32_t slab = 0;
    TileStep step;

    DEVICE Cursor(const TileWalk& walk, uint32_t first_tile) : k_tile(first_tile), step(walk.step(0, first_tile)) {}

    // To the next slab, of the next tile or item where this one ends.
    DEVICE void advance(const TileWalk& walk, uint32_t slabs, uint32_t first_tile, uint32_t end_tile, uint32_t items) {
        slab++;
        if (slab < slabs) return;
        slab = 0, k_tile++;
        if (k_tile == end_tile) k_tile = first_tile, item++;
        if (item < items) step = walk.step(item, k_tile);
    }
};

KERNEL(128, 1)
hybrid_small_m(const Element* x, const unsigned char* host, const unsigned char* hbm, const float* scales, const float* bias,
               const void* residual, void* out, float* partials, uint32_t* arrivals, const HybridGemmSchedule* schedule,
               const HybridGemmExpert* experts, const uint32_t* offsets, HybridGemmTraffic* traffic, uint64_t* status,
               const __grid_constant__ HybridGemmParams params) {
    DYNAMIC_SHARED(shared);
    Tail& tail = *reinterpret_cast<Tail*>(shared + STAGES * STAGE_BYTES);
    const uint32_t slabs = ceil_div(params.k, Weight::INPUTS);
    const uint32_t k_tiles = ceil_div(slabs, params.tile_slabs);

    const HybridGemmSchedule plan = *schedule;
    const uint32_t fault = schedule_fault(plan, params, HYBRID_SMALL_PANEL, k_tiles, gridDim.x);
    const uint32_t block_index = blockIdx.y * gridDim.x + blockIdx.x;
    const bool counts = threadIdx.x == 0, first = counts && block_index == 0;
    if (counts) tail.traffic.clear(params, first);
    if (fault != FAULT_NONE && first) report_fault(status, fault, first_column_of(params));
    const bool refused =
        fault != FAULT_NONE || (params.experts > 0 && group_faulty(plan, params, experts, offsets, status, THREADS));
    if (refused) {
        const GemmEpilogue epilogue{scales, bias, residual, out};
        epilogue.store_zeros(params, block_index * THREADS + threadIdx.x, gridDim.x * gridDim.y * THREADS);
        if (counts) tail.traffic.refuse();
    }
    const uint32_t split = blockIdx.y;
    const uint32_t first_tile = split * k_tiles / params.k_splits, end_tile = (split + 1) * k_tiles / params.k_splits;
    const uint32_t first_slab = first_tile * params.tile_slabs;
    const uint32_t end_slab = end_tile * params.tile_slabs < slabs ? end_tile * params.tile_slabs : slabs;
    const uint32_t row0 = warp_index() * 16;
    const bool x_aligned = multiple_of_16(x, params.x_stride * static_cast<int64_t>(sizeof(Element)));
    const auto slabs_of = [&](uint32_t k_tile) {
        const uint32_t left = slabs - k_tile * params.tile_slabs;
        return left < params.tile_slabs ? left : params.tile_slabs;
    };
    const auto inputs_of = [&](uint32_t k_tile) {
        const uint32_t inputs = params.tile_slabs * Weight::INPUTS, left = params.k - k_tile * inputs;
        return left < inputs ? left : inputs;
    };
    const auto rows_of = [&](uint32_t column) {
        const uint32_t left = params.n - column * HYBRID_TILE_ROWS;
        return left < HYBRID_TILE_ROWS ? left : uint32_t(HYBRID_TILE_ROWS);
    };

    GemmProducts products(tail.product, plan, params, experts, offsets);
#pragma unroll 1
    while (!refused && products.advance()) {
        const GemmProduct& product = products.now;
        const TileWalk walk(product.schedule, blockIdx.x);
        const uint32_t items = walk.own_items();
        if (items == 0) continue;
        const bool from_hbm = walk.role == TileRole::HBM;
        WeightSource source{from_hbm ? hbm + product.hbm_offset : host + product.host_offset, from_hbm ? product.hbm_first : 0,
                            from_hbm ? params.hbm_row_major != 0 : params.host_row_major != 0, false};
        source.aligned = multiple_of_16(source.base, static_cast<int64_t>(params.k) * sizeof(Element));
        // With one panel every weight is read once; with more the next panel finds it in L2.
        const uint64_t policy = walk.panels == 1 ? l2_evict_first_policy() : l2_evict_last_policy();

        Cursor ahead(walk, first_tile), now = ahead;
        const auto load = [&](uint32_t slot, uint32_t) {
            unsigned char* const stage = shared + slot * STAGE_BYTES;
            const TileStep& step = ahead.step;
            const uint32_t bytes = stage_slab<THREADS, FORMAT, Element>(stage, stage + SCALES_AT, source, params, step.column,
                                                                        step.k_tile, ahead.slab, policy);
            if (Weight::BLOCKS && counts) {
                const uint32_t slab = step.k_tile * params.tile_slabs + ahead.slab;
                stage_block_scale(stage + SCALES_AT, scales, params, product.expert, step.column, slab);
            }
            if (counts) {
                HybridGemmTraffic& count = tail.traffic.counts;
                tail.traffic.weights(step, ahead.slab == 0, bytes, Weight::BESIDE_BYTES);
                if (ahead.slab == 0) {
                    const uint64_t products = static_cast<uint64_t>(step.tokens) * inputs_of(step.k_tile);
                    count.activation_bytes += products * sizeof(Element);
                    count.flops += 2 * products * rows_of(step.column);
                }
            }
            const uint32_t k0 = (step.k_tile * params.tile_slabs + ahead.slab) * Weight::INPUTS;
            const Element* const tokens = x + (product.first_row + step.first_token) * params.x_stride;
#pragma unroll 1
            for (uint32_t chunk = 0; chunk < Weight::X_CHUNKS; chunk++) {
                stage_rows<THREADS, TOKENS>(stage + X_AT + chunk * X_CHUNK_BYTES, tokens, params.x_stride, step.tokens, params.k,
                                            k0 + chunk * X_CHUNK_INPUTS, x_aligned,
                                            [](uint32_t token, uint32_t chunk) { return Weight::x_chunk(token, chunk); });
            }
            ahead.advance(walk, slabs_of(ahead.k_tile), first_tile, end_tile, items);
        };

        SlabSums<FORMAT, Element, 1, TOKEN_TILES> block;
        block.clear();

        // Adds the parts of all splits in the order of K, from and to shared memory; true for the block that has them all.
        const auto merge = [&](const TileStep& step, float* sums) {
            const uint32_t columns = params.hbm_first + params.hbm_columns;
            const uint32_t part_len = step.tokens * HYBRID_TILE_ROWS;
            const auto part = [&](uint32_t of) {
                const uint64_t column = static_cast<uint64_t>(of) * columns + step.column;
                return partials + (column * params.max_tokens + step.first_token) * HYBRID_TILE_ROWS;
            };
            const auto of_sum = [](uint32_t i) { return sums_index(i / HYBRID_TILE_ROWS, i % HYBRID_TILE_ROWS); };
            float* const own = part(split);
            for (uint32_t i = threadIdx.x; i < part_len; i += THREADS) own[i] = sums[of_sum(i)];
            if (counts) tail.traffic.counts.partial_bytes += part_len * sizeof(float);
            const uint32_t panel = step.first_token / HYBRID_SMALL_PANEL;
            if (!arrive_last(arrivals + step.column * walk.panels + panel, params.k_splits, &tail.last)) return false;
            if (counts) tail.traffic.counts.partial_bytes += params.k_splits * part_len * sizeof(float);
            for (uint32_t i = threadIdx.x; i < part_len; i += THREADS) {
                float sum = 0;
                for (uint32_t of = 0; of < params.k_splits; of++) sum += part(of)[i];
                sums[of_sum(i)] = sum;
            }
            __syncthreads();
            return true;
        };

        stream_tiles_rolled<STAGES>(items * (end_slab - first_slab), load, [&](uint32_t slot, uint32_t) {
            unsigned char* const stage = shared + slot * STAGE_BYTES;
#pragma unroll CHUNKS_AT_ONCE
            for (uint32_t chunk = 0; chunk < Weight::X_CHUNKS; chunk++) {
                block.add(stage, stage + SCALES_AT, stage + X_AT + chunk * X_CHUNK_BYTES, chunk, row0, 0);
            }
            const TileStep step = now.step;
            const bool item_ends = now.k_tile + 1 == end_tile && now.slab + 1 == slabs_of(now.k_tile);
            if (item_ends) {
                // Nobody needs the slab any more, and it is not refilled before the next barrier.
                float* const sums = reinterpret_cast<float*>(stage);
                __syncthreads();
                block.store(sums, row0, 0);
                block.clear();
                __syncthreads();
                if (params.k_splits == 1 || merge(step, sums)) {
                    // What only the end of an item needs is found there: until then it would take registers.
                    const GemmEpilogue epilogue{channel_scales<FORMAT>(scales, params, product.expert), bias, residual, out};
                    epilogue.finish<THREADS>(params, sums, product.first_row + step.first_token, step.tokens, step.column);
                    if (counts) tail.traffic.counts.output_bytes += step.tokens * epilogue.bytes(params, rows_of(step.column));
                }
            }
            now.advance(walk, slabs_of(now.k_tile), first_tile, end_tile, items);
        });
    }
    if (counts) tail.traffic.report(traffic, role_of(plan, blockIdx.x));
}
