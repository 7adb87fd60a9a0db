// Where partial softmax states (tile/softmax_state.cuh) wait for their merge: those of a part's warps, or of teams of its warps, in the
// rings through which these have read; those of an item's parts in the workspace. A state is that of `Columns` queries, O [columns, Dim]
// f32 and (m, l) [columns, 2] f32 in natural units.
#pragma once

#include "core.cuh"
#include "ptx/shuffle.cuh"
#include "tile/fragment.cuh"
#include "tile/last_arriver.cuh"
#include "tile/softmax_state.cuh"

// States in shared memory, each O at the start of a ring of `Ring` bytes, as seen by a thread that folds one column.
template <uint32_t Columns, uint32_t Dim, uint32_t Ring>
struct RingStates {
    const unsigned char* rings;
    const float (*ml)[Columns][2];
    uint32_t column = 0;

    DEVICE float m(uint32_t i) const { return ml[i][column][0]; }
    DEVICE float l(uint32_t i) const { return ml[i][column][1]; }
    DEVICE float4 acc(uint32_t i, uint32_t channel) const {
        return *reinterpret_cast<const float4*>(rings + i * Ring + (column * Dim + channel) * 4);
    }
};

// The states of an item's parts in the workspace, each in its slot, as seen by a thread that folds one column.
template <uint32_t Columns, uint32_t Dim, class Part>
struct PartStates {
    const float* part_acc;
    const float* part_ml;
    const Part& part;
    uint32_t column = 0;

    DEVICE uint64_t row(uint32_t p) const { return part.slot_of(p) * Columns + column; }
    DEVICE float m(uint32_t p) const { return part_ml[2 * row(p)]; }
    DEVICE float l(uint32_t p) const { return part_ml[2 * row(p) + 1]; }
    DEVICE float4 acc(uint32_t p, uint32_t channel) const {
        return *reinterpret_cast<const float4*>(part_acc + row(p) * Dim + channel);
    }
};

// Folds `count` states for every column and channel with the `Threads` of the block, and hands each thread's results to `store`.
template <uint32_t Dim, uint32_t Threads>
struct ColumnFold {
    uint32_t columns;

    template <class States, class Store>
    DEVICE void operator()(States states, uint32_t count, const Store& store) const {
        for (uint32_t index = threadIdx.x; index < columns * (Dim / 4); index += Threads) {
            states.column = index / (Dim / 4);
            const uint32_t channel = index % (Dim / 4) * 4;
            store(fold_states(states, 0, count, 1, channel), states.column, channel);
        }
    }
};

// `count` states of the block become the part, and parts, in their last arriver at `counter`, the item: `fold` folds states column by
// column, `finish` takes four channels of what an item's column has come to. The whole block calls, after a barrier.
template <uint32_t Columns, uint32_t Dim, class States, class Part, class Fold, class Finish>
DEVICE void merge_parts(const States& states, uint32_t count, const Part& part, float* part_acc, float* part_ml, uint32_t* counter,
                        uint32_t* is_last, const Fold& fold, const Finish& finish) {
    if (part.count == 1) {
        fold(states, count, finish);
    } else {
        fold(states, count, [&](const SoftmaxState& state, uint32_t column, uint32_t channel) {
            const uint64_t row = part.slot * Columns + column;
            *reinterpret_cast<float4*>(part_acc + row * Dim + channel) = state.acc;
            if (channel == 0) {
                part_ml[2 * row] = state.m;
                part_ml[2 * row + 1] = state.l;
            }
        });
        if (arrive_last(counter, part.count, is_last)) {
            fold(PartStates<Columns, Dim, Part>{part_acc, part_ml, part}, part.count, finish);
        }
    }
    __syncthreads();  // the next part reuses the rings
}

// A warp's state as m16n8k16 accumulators of Oᵀ, channels × columns, with m in units of log2 and l of this lane's rows alone: leaves
// its first `v_tiles` tiles of 16 channels at `acc`, and (m, l) at `ml`.
template <uint32_t Dim, uint32_t VTiles, uint32_t ColumnTiles>
DEVICE void leave_state(float* acc, float (*ml)[2], const float (&o)[VTiles][ColumnTiles][4], const float (&m)[ColumnTiles][2],
                        const float (&l)[ColumnTiles][2], uint32_t v_tiles) {
    const uint32_t lane = lane_index();
#pragma unroll
    for (uint32_t n = 0; n < ColumnTiles; n++) {
#pragma unroll
        for (uint32_t e = 0; e < 2; e++) {
            const float sum = warp_sum_strided<4>(l[n][e]);
            const uint32_t column = n * 8 + lane % 4 * 2 + e;
            if (lane < 4) {
                // The running maximum passes NaN over; a state without a maximum would count as empty.
                ml[column][0] = sum != sum ? QUIET_NAN : m[n][e] * LN_2;
                ml[column][1] = sum;
            }
        }
#pragma unroll
        for (uint32_t v = 0; v < VTiles; v++) {
            if (v >= v_tiles) break;
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                const uint32_t column = n * 8 + accumulator_column(lane, i);
                acc[column * Dim + v * 16 + accumulator_row(lane, i)] = o[v][n][i];
            }
        }
    }
}
