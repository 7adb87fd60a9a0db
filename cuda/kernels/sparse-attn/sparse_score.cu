// Scores every partition of a row by its summary, for each query head, and sums up the softmax under which the heads agree.
//
//   score[c, j] = Σ_i s[j, i]·x[c, i]        s[j] the summary of partition j, x[c] what the scorer makes of query c
//
// q           [rows, group, DIM] KV_DTYPE, row = request · kv_heads + kv_head
// summaries   [rows, max_partitions, ROW_DIM] KV_DTYPE, 16-byte aligned; ROW_DIM is DIM for SPARSE_MEAN, else 2·DIM
// num_partitions [rows] u32           rows [rows] u32, a SparseRow each, or null: others than SPARSE_ROW_SELECTS have no partition
// scores      [rows, group, max_partitions] f32, out: unscaled, those of the row's partitions
// sums        [rows, blocks, group, 2] f32, out: maximum and sum of the scaled scores of each block's partitions
// status      first fault: FAULT_BAD_LENGTH with a row of more partitions than there is room for; it is scored as if it had none
//
// Keys are finite. x is [q⁻, q⁺] for minimum and maximum (Quest: q⁻·min + q⁺·max = Σ max(q·min, q·max)), [q, |q|] for centre and distance,
// [q, w·|q|] for mean and deviation, q for the mean; its parts are exact in KV_DTYPE, apart from w·|q|, which is rounded to it.
// Gated blocks (SeerAttention-R) and centroids (RetroInfer) are scored as means are. f32 sums in the order of the tensor cores;
// sums of integers below 2²⁴ are exact.
//
// Arch:    sm_80 and later.
// Mapping: a warp per 16 partitions, rows along y. Partitions lie on M and queries on N of m16n8k16; the channels of a product may
//          come in any order, if both operands have the same: a lane loads 16 bytes of a summary straight into two A fragments.
// Budget:  128 registers; 64 bytes of padding and ROW_DIM elements of shared memory for each of 16 queries, and 1 KB.
// Limit:   bytes of the summaries, read once.
#include "core.cuh"
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"
#include "ptx/shuffle.cuh"
#include "ptx/sync.cuh"
#include "sparse_resolve_params.h"
#include "sparse_select_params.h"
#include "status_params.h"
#include "tile/fragment.cuh"
#include "tile/group_softmax.cuh"
#include "tile/status.cuh"
#include "types.cuh"

using Element = StorageOf<KV_DTYPE>;

constexpr uint32_t THREADS = 128;
constexpr uint32_t WARPS = THREADS / WARP_SIZE;
constexpr uint32_t COLUMNS = 16;
constexpr uint32_t Q_ROW = ROW_DIM * 2 + 64;  // bytes: eight rows of four lanes' 16 bytes meet no bank twice
constexpr uint32_t STEPS = ROW_DIM / 32;      // of four lanes' 16 bytes

struct Shared {
    float sums[WARPS][COLUMNS][2];
};

// Element i of what the scorer makes of a query.
DEVICE float expanded(const Element* q, uint32_t i, const SparseScoreParams& params) {
    if (params.scorer == SPARSE_MEAN) return to_f32(q[i]);
    constexpr uint32_t HALF = ROW_DIM / 2;
    const float x = to_f32(q[i % HALF]);
    const bool second = i >= HALF;
    if (params.scorer == SPARSE_MIN_MAX) return second ? fmaxf(x, 0.0f) : fminf(x, 0.0f);
    if (!second) return x;
    return params.scorer == SPARSE_MEAN_STD ? params.weight * fabsf(x) : fabsf(x);
}

DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if KV_DTYPE == 1
    mma_m16n8k16_f16(d, a, b);
#else
    mma_m16n8k16_bf16(d, a, b);
#endif
}

KERNEL(128, 4)
sparse_score(const Element* q, const Element* summaries, const uint32_t* num_partitions, const uint32_t* rows, float* scores, float* sums,
             uint64_t* status, const __grid_constant__ SparseScoreParams params) {
    DYNAMIC_SHARED(shared_bytes);
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes + COLUMNS * Q_ROW);
    const uint32_t row = blockIdx.y;
    const uint32_t lane = lane_index();
    const uint32_t dim = params.scorer == SPARSE_MEAN ? ROW_DIM : ROW_DIM / 2;

    grid_dependency_wait();
    for (uint32_t index = threadIdx.x; index < COLUMNS * ROW_DIM; index += THREADS) {
        const uint32_t column = index / ROW_DIM;
        const uint32_t i = index % ROW_DIM;
        const Element* const query = q + (static_cast<uint64_t>(row) * params.group + column) * dim;
        const float x = column < params.group ? expanded(query, i, params) : 0.0f;
        *reinterpret_cast<Element*>(shared_bytes + column * Q_ROW + i * 2) = from_f32<Element>(x);
    }
    uint32_t count = rows == nullptr || rows[row] == SPARSE_ROW_SELECTS ? num_partitions[row] : 0;
    if (count > params.max_partitions) {
        if (blockIdx.x == 0 && threadIdx.x == 0) report_fault(status, FAULT_BAD_LENGTH, row);
        count = 0;
    }
    __syncthreads();

    summaries += static_cast<uint64_t>(row) * params.max_partitions * ROW_DIM;
    scores += static_cast<uint64_t>(row) * params.group * params.max_partitions;
    const uint32_t column_tiles = params.group > 8 ? 2 : 1;
    GroupSoftmax softmax[2][2];  // of columns 2t and 2t + 1 of each tile, over this lane's partitions
    for (uint32_t first = (blockIdx.x * WARPS + warp_index()) * 16; first < count; first += params.blocks * WARPS * 16) {
        // Rows g and g + 8 of the 16; past the end the last one once more, whose scores go nowhere.
        const Element* from[2];
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            const uint32_t partition = min(first + lane / 4 + half * 8, count - 1);
            from[half] = summaries + static_cast<uint64_t>(partition) * ROW_DIM + lane % 4 * 8;
        }
        uint4 a[STEPS][2];
#pragma unroll
        for (uint32_t step = 0; step < STEPS; step++) {
            a[step][0] = load_global_16(from[0] + step * 32);
            a[step][1] = load_global_16(from[1] + step * 32);
        }
        float d[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
#pragma unroll
        for (uint32_t step = 0; step < STEPS; step++) {
            const uint32_t low[4] = {a[step][0].x, a[step][1].x, a[step][0].y, a[step][1].y};
            const uint32_t high[4] = {a[step][0].z, a[step][1].z, a[step][0].w, a[step][1].w};
#pragma unroll
            for (uint32_t n = 0; n < 2; n++) {
                if (n >= column_tiles) break;
                const uint32_t column = n * 8 + lane / 4;
                const uint4 x = *reinterpret_cast<const uint4*>(shared_bytes + column * Q_ROW + (step * 32 + lane % 4 * 8) * 2);
                const uint32_t b_low[2] = {x.x, x.y};
                const uint32_t b_high[2] = {x.z, x.w};
                mma(d[n], low, b_low);
                mma(d[n], high, b_high);
            }
        }
#pragma unroll
        for (uint32_t n = 0; n < 2; n++) {
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                const uint32_t partition = first + accumulator_row(lane, i);
                const uint32_t column = n * 8 + accumulator_column(lane, i);
                if (partition >= count || column >= params.group) continue;
                scores[static_cast<uint64_t>(column) * params.max_partitions + partition] = d[n][i];
                softmax[n][i % 2].push(scaled_score(d[n][i], params.scale, params.soft_cap));
            }
        }
    }

    // The block's sums: over the lanes of a column, then over the warps.
#pragma unroll
    for (uint32_t n = 0; n < 2; n++) {
#pragma unroll
        for (uint32_t e = 0; e < 2; e++) {
            GroupSoftmax of_column = softmax[n][e];
#pragma unroll
            for (int distance = 16; distance >= 4; distance /= 2) {
                GroupSoftmax other;
                other.m = __shfl_xor_sync(FULL_WARP, of_column.m, distance);
                other.l = __shfl_xor_sync(FULL_WARP, of_column.l, distance);
                of_column.merge(other);
            }
            if (lane < 4) {
                shared.sums[warp_index()][n * 8 + lane * 2 + e][0] = of_column.m;
                shared.sums[warp_index()][n * 8 + lane * 2 + e][1] = of_column.l;
            }
        }
    }
    __syncthreads();
    if (threadIdx.x < params.group) {
        GroupSoftmax of_block;
        for (uint32_t warp = 0; warp < WARPS; warp++) {
            GroupSoftmax of_warp;
            of_warp.m = shared.sums[warp][threadIdx.x][0];
            of_warp.l = shared.sums[warp][threadIdx.x][1];
            of_block.merge(of_warp);
        }
        float* const to = sums + ((static_cast<uint64_t>(row) * params.blocks + blockIdx.x) * params.group + threadIdx.x) * 2;
        to[0] = of_block.m;
        to[1] = of_block.l;
    }
}
