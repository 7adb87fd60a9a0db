// The tile schedule of hybrid GEMM on the device: hybrid-gemm/src/schedule.rs, whose documentation holds here.
//
// Both walk the same steps, so that a tile that the kernel fetches is one that the CPU path and the simulation fetch. The
// schedule lies in device memory and is not to be trusted: schedule_fault comes first.
#pragma once

#include "core.cuh"
#include "hybrid_gemm_params.h"
#include "status_params.h"

enum class TileRole : uint32_t { OUTPUT_STATIONARY, WEIGHT_STATIONARY, HBM };

// Where the weight tile of a step comes from.
enum class TileFetch : uint32_t { LINK, HBM, KEPT };

// Where a step's sums start, and where they go.
enum class TileStart : uint32_t { ZERO, REGISTERS, WORKSPACE };
enum class TileFinish : uint32_t { REGISTERS, WORKSPACE, OUTPUT };

// One product: a weight tile times a panel of tokens.
struct TileStep {
    TileRole role;
    uint32_t column;
    uint32_t k_tile;
    uint32_t first_token;
    uint32_t tokens;
    TileFetch fetch;
    TileStart start;
    TileFinish finish;
};

// The first column of a single product's launch.
DEVICE uint32_t first_column_of(const HybridGemmParams& params) { return params.host_columns > 0 ? 0 : params.hbm_first; }

// What is wrong with a schedule: a FaultCode, FAULT_NONE if the columns are the launch's, no more and no fewer, and every one
// has somebody to compute it, within the grid and the workspace.
DEVICE uint32_t schedule_fault(const HybridGemmSchedule& s, const HybridGemmParams& params, uint32_t panel, uint32_t k_tiles,
                               uint32_t blocks) {
    if (s.tokens > params.max_tokens) return FAULT_BAD_LENGTH;
    if (s.panel != panel || s.k_tiles != k_tiles || s.cluster != 1) return FAULT_BAD_INDEX;
    if (static_cast<uint64_t>(s.os_blocks) + s.ws_blocks + s.hbm_blocks > blocks) return FAULT_BAD_RANGE;
    if (params.experts > 0) return FAULT_NONE;  // columns are the experts': tile/gemm_products.cuh
    if (s.first_column != first_column_of(params) || static_cast<uint64_t>(s.os_columns) + s.ws_columns != params.host_columns
        || s.hbm_columns != params.hbm_columns) {
        return FAULT_BAD_RANGE;
    }
    if ((s.os_columns > 0 && s.os_blocks == 0) || (s.ws_columns > 0 && s.ws_blocks == 0)
        || (s.hbm_columns > 0 && s.hbm_blocks == 0)) {
        return FAULT_BAD_RANGE;
    }
    const uint64_t partials = static_cast<uint64_t>(s.ws_columns) * s.tokens * HYBRID_TILE_ROWS;
    if (s.tokens > panel && partials > params.partial_len) return FAULT_BAD_RANGE;
    return FAULT_NONE;
}

// The role of a block.
DEVICE TileRole role_of(const HybridGemmSchedule& s, uint32_t block) {
    if (block < s.os_blocks) return TileRole::OUTPUT_STATIONARY;
    return block < s.os_blocks + s.ws_blocks ? TileRole::WEIGHT_STATIONARY : TileRole::HBM;
}

// The walk of one block of a valid schedule.
struct TileWalk {
    const HybridGemmSchedule& schedule;
    uint32_t panels;
    TileRole role;
    uint32_t first;   // item
    uint32_t stride;  // items
    uint32_t items;   // of the role

    DEVICE TileWalk(const HybridGemmSchedule& s, uint32_t block) : schedule(s) {
        panels = ceil_div(s.tokens, s.panel);
        uint32_t rank = block, rotation = s.rotation[0];
        role = TileRole::OUTPUT_STATIONARY, stride = s.os_blocks, items = s.os_columns * panels;
        if (block >= s.os_blocks) {
            rank -= s.os_blocks, rotation = s.rotation[1];
            role = TileRole::WEIGHT_STATIONARY, stride = s.ws_blocks, items = s.ws_columns;
            if (rank >= s.ws_blocks) {
                rank -= s.ws_blocks, rotation = s.rotation[2];
                role = TileRole::HBM, stride = s.hbm_blocks, items = s.hbm_columns * panels;
                if (rank >= s.hbm_blocks) rank = 0, items = 0;  // a block that the schedule does not know
            }
        }
        if (stride == 0) stride = 1;
        first = (rank + stride - rotation % stride) % stride;
    }

    DEVICE bool sums_in_registers() const { return panels <= 1; }

    DEVICE uint32_t steps_per_item() const {
        return role == TileRole::WEIGHT_STATIONARY ? schedule.k_tiles * panels : schedule.k_tiles;
    }

    // Items of this block.
    DEVICE uint32_t own_items() const {
        return first < items && schedule.tokens > 0 ? ceil_div(items - first, stride) : 0;
    }

    // Step `index` of the block's item `item`.
    DEVICE TileStep step(uint32_t item, uint32_t index) const {
        const uint32_t place = first + item * stride;
        if (role == TileRole::WEIGHT_STATIONARY) {
            const uint32_t k_tile = index / panels, panel = index % panels;
            TileStep step = stationary(schedule.os_columns + place, panel, k_tile, panel == 0 ? TileFetch::LINK : TileFetch::KEPT);
            if (!sums_in_registers()) {
                if (step.start == TileStart::REGISTERS) step.start = TileStart::WORKSPACE;
                if (step.finish == TileFinish::REGISTERS) step.finish = TileFinish::WORKSPACE;
            }
            return step;
        }
        const bool hbm = role == TileRole::HBM;
        const uint32_t before = hbm ? schedule.os_columns + schedule.ws_columns : 0;
        return stationary(before + place / panels, place % panels, index, hbm ? TileFetch::HBM : TileFetch::LINK);
    }

    // A step whose sums stay in registers between the first and the last K tile; `column` from the schedule's first.
    DEVICE TileStep stationary(uint32_t column, uint32_t panel, uint32_t k_tile, TileFetch fetch) const {
        const uint32_t first_token = panel * schedule.panel;
        const uint32_t left = schedule.tokens - first_token;
        return TileStep{
            role,
            schedule.first_column + column,
            k_tile,
            first_token,
            left < schedule.panel ? left : schedule.panel,
            fetch,
            k_tile == 0 ? TileStart::ZERO : TileStart::REGISTERS,
            k_tile + 1 == schedule.k_tiles ? TileFinish::OUTPUT : TileFinish::REGISTERS,
        };
    }
};
