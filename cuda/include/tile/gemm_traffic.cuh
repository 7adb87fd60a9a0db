// The receipt of hybrid GEMM: what a block asked for, counted where it asks, in shared memory by one thread; and the slab that a
// copy engine has brought for a launch, booked by the launch.
#pragma once

#include "core.cuh"
#include "hybrid_gemm_params.h"
#include "ptx/clock.cuh"
#include "ptx/sync.cuh"
#include "tile/tile_schedule.cuh"

struct BlockTraffic {
    HybridGemmTraffic counts;
    uint64_t started_ns;

    // By the thread that counts. The `first` one of the launch books the slab that a copy engine has brought for it: that has
    // crossed the link, whether its tiles are read or not, for want of tokens or because the schedule is refused.
    DEVICE void clear(const HybridGemmParams& params, bool first) {
        counts = HybridGemmTraffic{};
        if (first && params.staged_bytes > 0) {
            counts.link_tiles = params.staged_tiles;
            counts.link_bytes = counts.staged_bytes = params.staged_bytes;
        }
        started_ns = global_timer_ns();
    }

    // A launch that refuses its schedule does no role's work: its time is nobody's.
    DEVICE void refuse() { started_ns = 0; }

    // `bytes` where the tile lies, and `beside` of scales, which lie in HBM.
    DEVICE void weights(const TileStep& step, bool starts_tile, uint32_t bytes, uint32_t beside) {
        counts.hbm_weight_bytes += beside;
        if (step.fetch == TileFetch::LINK) {
            counts.link_tiles += starts_tile;
            counts.link_bytes += bytes;
        } else {
            counts.hbm_tiles += starts_tile;
            counts.hbm_weight_bytes += bytes;
        }
    }

    // Adds the counts, and the block's time to those of its role, to the caller's.
    DEVICE void report(HybridGemmTraffic* total, TileRole role) {
        if (total == nullptr) return;
        if (started_ns != 0) counts.role_ns[static_cast<uint32_t>(role)] = global_timer_ns() - started_ns;
        const uint64_t* const from = &counts.link_tiles;
        uint64_t* const to = &total->link_tiles;
        for (uint32_t i = 0; i < sizeof(HybridGemmTraffic) / sizeof(uint64_t); i++) {
            if (from[i] != 0) atomic_add_acq_rel_u64(to + i, from[i]);
        }
    }
};
