// Merges the partial attention states of each row into one.
//
//   m = maxₛ lseₛ,  wₛ = exp(lseₛ − m),  out = Σ wₛ·outₛ / Σ wₛ,  lse = m + ln Σ wₛ        over s < num_splits[row]
//
// partial_out [rows, max_splits, V_DIM] f32, 16-byte aligned    out [rows, V_DIM] OUT_DTYPE, 8- or 16-byte aligned
// partial_lse [rows, max_splits] f32, natural log               lse [rows] f32, natural log
// num_splits  [rows] u32, or null: max_splits in every row      status: first fault of the launch
//
// An empty state has lse −inf and its partial_out is not read; a row of empty states gives out 0 and lse −inf. A row with
// num_splits > max_splits gives the same and is reported as FAULT_BAD_SPLITS with its index.
//
// Arch:    sm_80 and later.
// Mapping: V_DIM/4 threads per row, four channels each; as many whole rows per block of 128 threads as fit.
// Budget:  48 registers, no shared memory.
// Limit:   bytes: rows·splits·(4·V_DIM + 4) read once, in fixed order, so that runs are bitwise equal.
#include "merge_states_params.h"
#include "status_params.h"
#include "ptx/memory.cuh"
#include "ptx/sync.cuh"
#include "tile/softmax_state.cuh"
#include "tile/status.cuh"
#include "types.cuh"

constexpr uint32_t THREADS = 128;
constexpr uint32_t LANES = V_DIM / 4;
constexpr uint32_t ROWS_PER_BLOCK = THREADS / LANES;
static_assert(V_DIM % 4 == 0 && LANES <= THREADS, "a row is at most one block of 4-channel threads");

KERNEL(128, 8)
merge_states(const float* partial_out, const float* partial_lse, const uint32_t* num_splits,
             StorageOf<OUT_DTYPE>* out, float* lse, uint64_t* status, const __grid_constant__ MergeStatesParams params) {
    const uint32_t row_in_block = threadIdx.x / LANES;
    const uint32_t row = blockIdx.x * ROWS_PER_BLOCK + row_in_block;
    if (row_in_block >= ROWS_PER_BLOCK || row >= params.rows) return;
    const uint32_t channel = threadIdx.x % LANES * 4;

    grid_dependency_wait();
    uint32_t splits = num_splits ? num_splits[row] : params.max_splits;
    if (splits > params.max_splits) {
        if (channel == 0) report_fault(status, FAULT_BAD_SPLITS, row);
        splits = 0;
    }
    const uint64_t first = (uint64_t)row * params.max_splits;
    const NormalisedStates<V_DIM> states{partial_out + first * V_DIM, partial_lse + first};
    const SoftmaxState merged = fold_states(states, 0, splits, 1, channel);

    store_4(out + (uint64_t)row * V_DIM + channel, merged.out());
    if (channel == 0) lse[row] = merged.lse();
}
