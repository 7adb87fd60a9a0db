// The receipt of hybrid GEMM: what a block asked for, counted where it asks, in shared memory by one thread.
#pragma once

#include "core.cuh"
#include "hybrid_gemm_params.h"
#include "ptx/sync.cuh"
#include "tile/tile_schedule.cuh"

struct BlockTraffic {
    HybridGemmTraffic counts;

    // By the thread that counts.
    DEVICE void clear() { counts = HybridGemmTraffic{}; }

    DEVICE void weights(TileFetch fetch, bool starts_tile, uint32_t bytes) {
        if (fetch == TileFetch::LINK) {
            counts.link_tiles += starts_tile;
            counts.link_bytes += bytes;
        } else {
            counts.hbm_tiles += starts_tile;
            counts.hbm_weight_bytes += bytes;
        }
    }

    // Adds the counts to the caller's.
    DEVICE void report(HybridGemmTraffic* total) const {
        if (total == nullptr) return;
        const uint64_t* const from = &counts.link_tiles;
        uint64_t* const to = &total->link_tiles;
        for (uint32_t i = 0; i < sizeof(HybridGemmTraffic) / sizeof(uint64_t); i++) {
            if (from[i] != 0) atomic_add_acq_rel_u64(to + i, from[i]);
        }
    }
};
