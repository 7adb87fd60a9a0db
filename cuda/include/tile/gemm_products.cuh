// The products of a launch of hybrid GEMM: one, or those of the experts of a grouped product (MoE).
//
// The rows of X and O are sorted by expert; offsets [experts + 1] says where each one's start. Experts share the roles of the
// launch's blocks, and each has the schedule that hybrid-gemm/src/grouped.rs gives it: alpha's share of its own host columns is
// output-stationary, and its items are dealt on from the block where those of the expert before ended. Every block walks the
// experts in order; one without rows costs the look at its offset and nothing else. A block's ring drains between two experts.
//
// Where a block is lies in its shared memory: between two products it would only take registers from the loop over K.
#pragma once

#include "core.cuh"
#include "hybrid_gemm_params.h"
#include "tile/status.cuh"
#include "tile/tile_schedule.cuh"

// One product, and the place in the walk, in shared memory.
struct GemmProduct {
    HybridGemmSchedule schedule;
    uint64_t host_offset, hbm_offset;
    uint64_t first_partial;  // f32 before its partial sums
    uint32_t expert;
    uint32_t first_row;  // of X and O
    uint32_t hbm_first;  // the column that its weights in HBM start with
    uint32_t next;       // expert; for a single product 1 when it was done
    uint32_t there;      // whether there was another product
};

// What is wrong with an expert: a FaultCode, FAULT_NONE if its rows, its weights and somebody to compute them are there.
DEVICE uint32_t expert_fault(const HybridGemmSchedule& s, const HybridGemmParams& params, const HybridGemmExpert& expert,
                             uint32_t first_row, uint32_t end_row) {
    const uint32_t columns = ceil_div(params.n, uint32_t(HYBRID_TILE_ROWS));
    if (first_row > end_row || end_row > params.max_tokens) return FAULT_BAD_RANGE;
    if (expert.host_columns > params.host_columns || expert.host_columns > columns) return FAULT_BAD_INDEX;
    const uint64_t host = expert.host_columns * params.column_bytes;
    const uint64_t hbm = (columns - expert.host_columns) * params.column_bytes;
    if ((expert.host_offset | expert.hbm_offset) % 16 != 0) return FAULT_BAD_INDEX;
    if (host > 0 && (expert.host_offset > params.host_bytes || host > params.host_bytes - expert.host_offset)) return FAULT_BAD_INDEX;
    if (hbm > 0 && (expert.hbm_offset > params.hbm_bytes || hbm > params.hbm_bytes - expert.hbm_offset)) return FAULT_BAD_INDEX;
    if ((host > 0 && s.os_blocks + s.ws_blocks == 0) || (hbm > 0 && s.hbm_blocks == 0)) return FAULT_BAD_RANGE;
    return FAULT_NONE;
}

// Checks a grouped launch; reports the first fault that is found and gives whether there is one. The whole block calls.
DEVICE bool group_faulty(const HybridGemmSchedule& s, const HybridGemmParams& params, const HybridGemmExpert* experts,
                         const uint32_t* offsets, uint64_t* status, uint32_t threads) {
    bool faulty = false;
    // Sums of weight-stationary columns between two panels need the room of the plan.
    const uint64_t partials = static_cast<uint64_t>(params.host_columns) * params.max_tokens * HYBRID_TILE_ROWS;
    const bool no_room = s.ws_blocks > 0 && params.max_tokens > s.panel && params.partial_len < partials;
    for (uint32_t i = threadIdx.x; i < params.experts; i += threads) {
        uint32_t fault = expert_fault(s, params, experts[i], offsets[i], offsets[i + 1]);
        if (i == 0 && (no_room || offsets[0] != 0)) fault = FAULT_BAD_RANGE;
        if (fault == FAULT_NONE) continue;
        faulty = true;
        if (blockIdx.x == 0) report_fault(status, fault, i);
    }
    return __syncthreads_or(faulty);
}

// The products of a valid launch, in order. All threads of the block call.
struct GemmProducts {
    const HybridGemmParams& params;
    const HybridGemmExpert* experts;
    const uint32_t* offsets;
    GemmProduct& now;

    DEVICE GemmProducts(GemmProduct& place, const HybridGemmSchedule& schedule, const HybridGemmParams& params,
                        const HybridGemmExpert* experts, const uint32_t* offsets)
        : params(params), experts(experts), offsets(offsets), now(place) {
        if (threadIdx.x != 0) return;
        now.schedule = schedule;
        now.host_offset = now.hbm_offset = now.first_partial = 0;
        now.expert = now.first_row = now.next = 0;
        now.hbm_first = params.hbm_first;
        if (params.experts == 0) return;
        now.schedule.tokens = now.schedule.first_column = 0;
        now.schedule.os_columns = now.schedule.ws_columns = now.schedule.hbm_columns = 0;
        for (int role = 0; role < 3; role++) now.schedule.rotation[role] = 0;
    }

    // To the next product that has rows; false after the last.
    DEVICE bool advance() {
        __syncthreads();  // nobody looks at the one before any more
        if (threadIdx.x == 0) now.there = params.experts == 0 ? now.next++ == 0 : next_expert();
        __syncthreads();
        return now.there;
    }

    DEVICE bool next_expert() {
        HybridGemmSchedule& s = now.schedule;
        // The expert before leaves its place in the deal and its partial sums behind.
        const uint32_t panels = ceil_div(s.tokens, s.panel);
        deal(s.rotation[0], s.os_columns * panels, s.os_blocks);
        deal(s.rotation[1], s.ws_columns, s.ws_blocks);
        deal(s.rotation[2], s.hbm_columns * panels, s.hbm_blocks);
        if (panels > 1) now.first_partial += static_cast<uint64_t>(s.ws_columns) * s.tokens * HYBRID_TILE_ROWS;
        const uint32_t first_row = now.next < params.experts ? offsets[now.next] : 0;
        for (uint32_t index = now.next; index < params.experts; index++) {
            const uint32_t end_row = offsets[index + 1];
            if (end_row == first_row) continue;
            const HybridGemmExpert expert = experts[index];
            const uint32_t columns = ceil_div(params.n, uint32_t(HYBRID_TILE_ROWS));
            const uint32_t link = s.os_blocks + s.ws_blocks;
            now.expert = index, now.next = index + 1;
            now.first_row = first_row, now.hbm_first = expert.host_columns;
            now.host_offset = expert.host_offset, now.hbm_offset = expert.hbm_offset;
            s.tokens = end_row - first_row;
            s.os_columns = 0;
            if (s.os_blocks > 0) {
                s.os_columns = (static_cast<uint64_t>(expert.host_columns) * s.os_blocks + link / 2) / link;
            }
            s.ws_columns = expert.host_columns - s.os_columns;
            s.hbm_columns = columns - expert.host_columns;
            return true;
        }
        now.next = params.experts;
        return false;
    }

    static DEVICE void deal(uint32_t& rotation, uint32_t items, uint32_t blocks) {
        if (blocks > 0) rotation = (rotation + items) % blocks;
    }
};
