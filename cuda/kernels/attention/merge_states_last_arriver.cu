// Merges many partial attention states per row into one, several blocks to a row; the last block of a row finishes it.
//
// Same result, arguments and faults as merge_states, for rows whose states are too many for one block:
//
// partial_out [rows, max_splits, V_DIM] f32, 16-byte aligned    out [rows, V_DIM] OUT_DTYPE, 8- or 16-byte aligned
// partial_lse [rows, max_splits] f32, natural log               lse [rows] f32, natural log
// num_splits  [rows] u32, or null: max_splits in every row      status: first fault of the launch
// chunk_acc   [rows, chunks, V_DIM] f32, 16-byte aligned        chunk_ml [rows, chunks, 2] f32        (workspace)
// arrivals    [rows] u32, zero before and after the launch      (workspace)
//
// Arch:    sm_80 and later.
// Mapping: block (row, chunk) with chunks = ceil(max_splits / splits_per_block); V_DIM/4 threads by GROUPS, which take the
//          chunk's states in turn and meet in shared memory. Which block comes last does not change the order of any sum.
// Budget:  56 registers, 2.1 KB of shared memory.
// Limit:   bytes: rows·splits·(4·V_DIM + 4) read once, plus the chunk states written and read once through L2.
#include "merge_states_params.h"
#include "status_params.h"
#include "ptx/memory.cuh"
#include "ptx/sync.cuh"
#include "tile/last_arriver.cuh"
#include "tile/softmax_state.cuh"
#include "tile/status.cuh"
#include "types.cuh"

constexpr uint32_t THREADS = 128;
constexpr uint32_t LANES = V_DIM / 4;
constexpr uint32_t GROUPS = THREADS / LANES;
static_assert(V_DIM % 4 == 0 && LANES <= THREADS, "a row is at most one block of 4-channel threads");

struct Shared {
    float acc[GROUPS * V_DIM];
    float ml[GROUPS * 2];
    uint32_t is_last;
};

// Folds the states first, first + 1, … < end of a row with the whole block; the result is valid in group 0.
template <class States>
DEVICE SoftmaxState fold_with_block(const States& states, uint32_t first, uint32_t end, Shared& shared) {
    const uint32_t group = threadIdx.x / LANES;
    const uint32_t channel = threadIdx.x % LANES * 4;
    if (group < GROUPS) {
        const SoftmaxState state = fold_states(states, first + group, end, GROUPS, channel);
        *reinterpret_cast<float4*>(shared.acc + group * V_DIM + channel) = state.acc;
        if (channel == 0) {
            shared.ml[2 * group] = state.m;
            shared.ml[2 * group + 1] = state.l;
        }
    }
    __syncthreads();
    SoftmaxState folded;
    if (group == 0) folded = fold_states(RawStates<V_DIM>{shared.acc, shared.ml}, 0, GROUPS, 1, channel);
    return folded;
}

KERNEL(128, 8)
merge_states_last_arriver(const float* partial_out, const float* partial_lse, const uint32_t* num_splits,
                          StorageOf<OUT_DTYPE>* out, float* lse, float* chunk_acc, float* chunk_ml, uint32_t* arrivals,
                          uint64_t* status, const __grid_constant__ MergeStatesParams params) {
    DYNAMIC_SHARED(shared_bytes);
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    const uint32_t chunks = (params.max_splits + params.splits_per_block - 1) / params.splits_per_block;
    const uint32_t row = blockIdx.x / chunks;
    const uint32_t chunk = blockIdx.x % chunks;
    const uint32_t channel = threadIdx.x % LANES * 4;
    const bool in_group_0 = threadIdx.x < LANES;

    grid_dependency_wait();
    uint32_t splits = num_splits ? num_splits[row] : params.max_splits;
    if (splits > params.max_splits) {
        if (chunk == 0 && threadIdx.x == 0) report_fault(status, FAULT_BAD_SPLITS, row);
        splits = 0;
    }

    const uint64_t first_state = (uint64_t)row * params.max_splits;
    const NormalisedStates<V_DIM> states{partial_out + first_state * V_DIM, partial_lse + first_state};
    const uint32_t first = chunk * params.splits_per_block;
    const uint32_t end = min(first + params.splits_per_block, splits);
    const SoftmaxState of_chunk = fold_with_block(states, first, end, shared);

    const uint64_t first_chunk = (uint64_t)row * chunks;
    if (in_group_0) {
        *reinterpret_cast<float4*>(chunk_acc + (first_chunk + chunk) * V_DIM + channel) = of_chunk.acc;
        if (channel == 0) {
            chunk_ml[2 * (first_chunk + chunk)] = of_chunk.m;
            chunk_ml[2 * (first_chunk + chunk) + 1] = of_chunk.l;
        }
    }
    if (!arrive_last(arrivals + row, chunks, &shared.is_last)) return;

    const RawStates<V_DIM> of_chunks{chunk_acc + first_chunk * V_DIM, chunk_ml + 2 * first_chunk};
    const SoftmaxState merged = fold_with_block(of_chunks, 0, chunks, shared);
    if (in_group_0) {
        store_4(out + (uint64_t)row * V_DIM + channel, merged.out());
        if (channel == 0) lse[row] = merged.lse();
    }
}
