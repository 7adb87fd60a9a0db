// The receipt of hybrid GEMM: what a block asked for, counted where it asks, in shared memory by one thread.
#pragma once

#include "core.cuh"
#include "hybrid_gemm_params.h"
#include "ptx/clock.cuh"
#include "ptx/sync.cuh"
#include "tile/tile_schedule.cuh"

struct BlockTraffic {
    HybridGemmTraffic counts;
    uint64_t started_ns;

    // By the thread that counts.
    DEVICE void clear() {
        counts = HybridGemmTraffic{};
        started_ns = global_timer_ns();
    }

    // `staged`: the weights in HBM are a slab, whose tiles have crossed the link once, whatever number of panels reads them.
    DEVICE void weights(const TileStep& step, bool starts_tile, uint32_t bytes, bool staged) {
        const bool link = step.fetch == TileFetch::LINK;
        if (!link) {
            counts.hbm_tiles += starts_tile;
            counts.hbm_weight_bytes += bytes;
        }
        staged = staged && !link && step.first_token == 0;
        if (staged) counts.staged_bytes += bytes;
        if (link || staged) {
            counts.link_tiles += starts_tile;
            counts.link_bytes += bytes;
        }
    }

    // Adds the counts, and the block's time to those of its role, to the caller's.
    DEVICE void report(HybridGemmTraffic* total, TileRole role) {
        if (total == nullptr) return;
        counts.role_ns[static_cast<uint32_t>(role)] = global_timer_ns() - started_ns;
        const uint64_t* const from = &counts.link_tiles;
        uint64_t* const to = &total->link_tiles;
        for (uint32_t i = 0; i < sizeof(HybridGemmTraffic) / sizeof(uint64_t); i++) {
            if (from[i] != 0) atomic_add_acq_rel_u64(to + i, from[i]);
        }
    }
};
