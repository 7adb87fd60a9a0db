// Hybrid GEMM for many tokens: O = epilogue(X·Wᵀ), W read where it lies, by two dataflows over disjoint columns of O.
//
// Operands, schedule, receipt and status are those of hybrid_small_m; arrivals is not read, k_splits is 1.
// partials     [ws_columns, tokens, 64] f32: the sums of weight-stationary columns between two K tiles
//
// A block walks its steps of the schedule, each a tile of weights times a panel of 256 tokens. Output-stationary steps (those
// on columns in HBM too) keep their sums in registers while K rises and fetch the tile anew for every panel; weight-stationary
// ones keep the tile in shared memory for all panels and their sums in memory, f32 as they are, so that both dataflows give
// the same bits. The paper's alpha, the share of blocks on the first, is a number in the schedule.
//
// Arch:    sm_80 and later.
// Mapping: one block per SM and per block of the schedule. Eight warps, each 32 output features x 64 tokens; weights, the side
//          of 16, and activations, the side of 8, come by cp.async, 64 inputs ahead.
// Budget:  255 registers; two chunks of activations, four slabs of weights.
// Limit:   the link, HBM or the tensor cores, as alpha and M have it.
#include "core.cuh"
#include "hybrid_gemm_params.h"
#include "tile/copy_ring.cuh"
#include "tile/gemm_epilogue.cuh"
#include "tile/gemm_products.cuh"
#include "tile/gemm_traffic.cuh"
#include "tile/status.cuh"
#include "tile/tile_schedule.cuh"
#include "tile/weight_slab.cuh"
#include "types.cuh"

using Element = StorageOf<X_DTYPE>;
using Weight = WeightFormat<FORMAT>;

constexpr uint32_t THREADS = 256;
constexpr uint32_t WARP_ROWS = 32;
constexpr uint32_t WARP_TOKENS = 64;
constexpr uint32_t PANEL = HYBRID_LARGE_PANEL;
constexpr int X_STAGES = 2;
constexpr uint32_t X_BYTES = PANEL * SLAB_ROW_BYTES;
constexpr uint32_t SLAB_SLOTS = 4;  // a tile of weights has as many slabs at most
constexpr uint32_t SLOT_BYTES = HYBRID_SLAB_BYTES + Weight::SCALE_ROOM;
constexpr uint32_t SLABS_AT = X_STAGES * X_BYTES;
constexpr uint32_t SUMS_TOKENS = X_BYTES / (HYBRID_TILE_ROWS * sizeof(float));  // that a chunk's place holds sums of

struct Tail {
    BlockTraffic traffic;
    GemmProduct product;
};

// Where a block is: a step of the schedule, a chunk of 64 inputs within its tile, and the slots of the tile's slabs.
struct Cursor {
    uint32_t item = 0;
    uint32_t index = 0;  // step of the item
    uint32_t chunk = 0;
    uint32_t first_slot = 0;
    TileStep step;

    DEVICE explicit Cursor(const TileWalk& walk) : step(walk.step(0, 0)) {}

    DEVICE uint32_t slot() const { return (first_slot + chunk / Weight::X_CHUNKS) % SLAB_SLOTS; }

    // To the next chunk, of the next step or item where this tile of `slabs` slabs ends.
    DEVICE void advance(const TileWalk& walk, uint32_t slabs, uint32_t items) {
        chunk++;
        if (chunk < slabs * Weight::X_CHUNKS) return;
        chunk = 0, index++;
        if (index == walk.steps_per_item()) index = 0, item++;
        if (item == items) return;
        step = walk.step(item, index);
        if (step.fetch != TileFetch::KEPT) first_slot = (first_slot + slabs) % SLAB_SLOTS;
    }
};

KERNEL(256, 1)
hybrid_large_m(const Element* x, const unsigned char* host, const unsigned char* hbm, const float* scales, const float* bias,
               const void* residual, void* out, float* partials, uint32_t*, const HybridGemmSchedule* schedule,
               const HybridGemmExpert* experts, const uint32_t* offsets, HybridGemmTraffic* traffic, uint64_t* status,
               const __grid_constant__ HybridGemmParams params) {
    DYNAMIC_SHARED(shared);
    Tail& tail = *reinterpret_cast<Tail*>(shared + SLABS_AT + SLAB_SLOTS * SLOT_BYTES);
    BlockTraffic& counter = tail.traffic;
    const uint32_t slabs = ceil_div(params.k, Weight::INPUTS);
    const uint32_t k_tiles = ceil_div(slabs, params.tile_slabs);

    const HybridGemmSchedule plan = *schedule;
    const uint32_t fault = schedule_fault(plan, params, PANEL, k_tiles, gridDim.x);
    const bool counts = threadIdx.x == 0, first = counts && blockIdx.x == 0;
    if (counts) counter.clear(params, first);
    if (fault != FAULT_NONE && first) report_fault(status, fault, first_column_of(params));
    const bool refused =
        fault != FAULT_NONE || (params.experts > 0 && group_faulty(plan, params, experts, offsets, status, THREADS));
    if (refused) {
        const GemmEpilogue epilogue{scales, bias, residual, out};
        epilogue.store_zeros(params, blockIdx.x * THREADS + threadIdx.x, gridDim.x * THREADS);
        if (counts) counter.refuse();
    }
    const bool x_aligned = multiple_of_16(x, params.x_stride * static_cast<int64_t>(sizeof(Element)));
    const auto slabs_of = [&](uint32_t k_tile) {
        const uint32_t left = slabs - k_tile * params.tile_slabs;
        return left < params.tile_slabs ? left : params.tile_slabs;
    };
    const auto rows_of = [&](uint32_t column) {
        const uint32_t left = params.n - column * HYBRID_TILE_ROWS;
        return left < HYBRID_TILE_ROWS ? left : uint32_t(HYBRID_TILE_ROWS);
    };
    const uint32_t row0 = warp_index() % 2 * WARP_ROWS;
    const uint32_t token0 = warp_index() / 2 * WARP_TOKENS;

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
        // A weight-stationary block reads each weight once; the others may find it in L2 for the next panel.
        const bool once = walk.role == TileRole::WEIGHT_STATIONARY || walk.sums_in_registers();
        const uint32_t first_kept = product.schedule.first_column + product.schedule.os_columns;  // weight-stationary column
        Cursor ahead(walk), now = ahead;

        const auto load = [&](uint32_t stage, uint32_t) {
            const TileStep& step = ahead.step;
            const uint32_t k_slab = step.k_tile * params.tile_slabs;
            if (step.fetch != TileFetch::KEPT && ahead.chunk % Weight::X_CHUNKS == 0) {
                unsigned char* const slot = shared + SLABS_AT + ahead.slot() * SLOT_BYTES;
                const uint64_t policy = once ? l2_evict_first_policy() : l2_evict_last_policy();
                const uint32_t bytes =
                    stage_slab<THREADS, FORMAT, Element>(slot, slot + HYBRID_SLAB_BYTES, source, params, step.column, step.k_tile,
                                                         ahead.chunk / Weight::X_CHUNKS, policy);
                if (Weight::BLOCKS && counts) {
                    stage_block_scale(slot + HYBRID_SLAB_BYTES, scales, params, product.expert, step.column,
                                      k_slab + ahead.chunk / Weight::X_CHUNKS);
                }
                if (counts) counter.weights(step, ahead.chunk == 0, bytes, Weight::BESIDE_BYTES);
            }
            if (counts && ahead.chunk == 0) {
                const uint32_t inputs = params.tile_slabs * Weight::INPUTS, left = params.k - step.k_tile * inputs;
                const uint64_t products = static_cast<uint64_t>(step.tokens) * (left < inputs ? left : inputs);
                counter.counts.activation_bytes += products * sizeof(Element);
                counter.counts.flops += 2 * products * rows_of(step.column);
            }
            stage_rows<THREADS, PANEL>(shared + stage * X_BYTES, x + (product.first_row + step.first_token) * params.x_stride,
                                       params.x_stride, step.tokens, params.k,
                                       k_slab * Weight::INPUTS + ahead.chunk * X_CHUNK_INPUTS, x_aligned,
                                       [](uint32_t token, uint32_t chunk) { return Weight::x_chunk(token, chunk); });
            ahead.advance(walk, slabs_of(step.k_tile), items);
        };

        SlabSums<FORMAT, Element, 2, WARP_TOKENS / 8> block;
        block.clear();

        const uint32_t passes = walk.role == TileRole::WEIGHT_STATIONARY ? walk.panels : 1;
        stream_tiles_rolled<X_STAGES>(items * passes * slabs * Weight::X_CHUNKS, load, [&](uint32_t stage, uint32_t) {
            const TileStep step = now.step;
            const uint64_t first_sum = static_cast<uint64_t>(step.column - first_kept) * product.schedule.tokens;
            float* const kept = partials + product.first_partial + (first_sum + step.first_token) * HYBRID_TILE_ROWS;
            const uint32_t kept_bytes = step.tokens * HYBRID_TILE_ROWS * sizeof(float);
            if (now.chunk == 0 && step.start == TileStart::WORKSPACE) {
                block.each_sum(row0, token0, step.tokens, [&](uint32_t token, uint32_t row, float& sum) {
                    sum = kept[token * HYBRID_TILE_ROWS + row];
                });
                if (counts) counter.counts.partial_bytes += kept_bytes;
            }
            if (token0 < step.tokens) {
                const unsigned char* const slot = shared + SLABS_AT + now.slot() * SLOT_BYTES;
                block.add(slot, slot + HYBRID_SLAB_BYTES, shared + stage * X_BYTES, now.chunk % Weight::X_CHUNKS, row0, token0);
            }
            if (now.chunk + 1 == slabs_of(step.k_tile) * Weight::X_CHUNKS && step.finish != TileFinish::REGISTERS) {
                if (step.finish == TileFinish::WORKSPACE) {
                    block.each_sum(row0, token0, step.tokens, [&](uint32_t token, uint32_t row, float& sum) {
                        kept[token * HYBRID_TILE_ROWS + row] = sum;
                    });
                    if (counts) counter.counts.partial_bytes += kept_bytes;
                } else {
                    // Nobody needs the activations any more, and they are not refilled before the next barrier: their place
                    // takes the sums of part of the tokens at a time.
                    float* const sums = reinterpret_cast<float*>(shared + stage * X_BYTES);
                    // What only the end of an item needs is found there: until then it would take registers.
                    const GemmEpilogue epilogue{channel_scales<FORMAT>(scales, params, product.expert), bias, residual, out};
#pragma unroll 1
                    for (uint32_t first = 0; first < step.tokens; first += SUMS_TOKENS) {
                        const uint32_t left = step.tokens - first;
                        __syncthreads();
                        if (token0 / SUMS_TOKENS == first / SUMS_TOKENS) block.store(sums, row0, token0 - first);
                        __syncthreads();
                        epilogue.finish<THREADS>(params, sums, product.first_row + step.first_token + first,
                                                 left < SUMS_TOKENS ? left : SUMS_TOKENS, step.column);
                    }
                    if (counts) counter.counts.output_bytes += step.tokens * epilogue.bytes(params, rows_of(step.column));
                }
                block.clear();
            }
            now.advance(walk, slabs_of(step.k_tile), items);
        });
    }
    if (counts) counter.report(traffic, role_of(plan, blockIdx.x));
}
