// Appends new tokens to a low-rank KV cache: rotates queries and keys by position (RoPE), projects each head onto its own
// basis, and writes keys and values to their slots.
//
//   q̃ = rope(q)·R_q,  k̃ = rope(k)·R_k,  ṽ = v·R_v        per KV head h, of r_k(h) or r_v(h) columns
//
// q_new       [tokens, kv_heads, group, HEAD_DIM] KV_DTYPE; null where group is 0
// k_new       [tokens, kv_heads, HEAD_DIM], or [tokens, Σ r_k] head after head where project_k is null: already reduced
// v_new       [tokens, kv_heads, HEAD_DIM], or [tokens, Σ r_v] head after head where project_v is null: R_v is in W_V
//             tokens by the strides of params, so that slices of a fused projection serve; vectors are 16-byte aligned
// project_q, project_k   head after head [HEAD_DIM, r_k], project_v [HEAD_DIM, r_v], KV_DTYPE, 16-byte aligned
// cos, sin    [positions, rotary_dim / 2] f32, 16-byte aligned
// position    [tokens] u32    slot [tokens] i64: page · page size + place in the page; a negative slot skips the token
// q           [tokens, q_heads · r_k, head after head] KV_DTYPE; 0 where the token is skipped; null where group is 0
// pages       the cache: per page and head keys [page size, r_k], then values [page size, r_v], 16-byte chunks of a row
//             swizzled by the token's place in the page (tile/swizzle.cuh)
// status      first fault: FAULT_BAD_INDEX with the token whose slot or position is out of range, which is skipped
//
// Rotated vectors are rounded to KV_DTYPE as attention/append.cu rounds them, products are summed in f32 and rounded once.
//
// Arch:    sm_80 and later.
// Mapping: a block takes 64 rows of the queries (tokens × group), the keys or the values (tokens) of one KV head; each warp 16
//          rows. Rows and the head's projection lie swizzled in shared memory: X·R by m16n8k16, X in registers for all
//          columns. Results return through the warp's rows of shared memory and leave as 16-byte chunks.
// Budget:  96 registers, 64 rows and HEAD_DIM rows of HEAD_DIM: 48 KB at 128.
// Limit:   bytes of the vectors, and for few tokens those of the projections; 2·HEAD_DIM operations per element written.
#include "core.cuh"
#include "fdc_params.h"
#include "ptx/cp_async.cuh"
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"
#include "ptx/sync.cuh"
#include "status_params.h"
#include "tile/fragment.cuh"
#include "tile/low_rank.cuh"
#include "tile/rotary.cuh"
#include "tile/status.cuh"
#include "types.cuh"

using Element = StorageOf<KV_DTYPE>;

constexpr uint32_t THREADS = 128;
constexpr uint32_t ROWS = 64;
constexpr uint32_t WARP_ROWS = 16;
constexpr uint32_t CHUNK = 8;  // elements in 16 bytes
constexpr uint32_t X_ROW = HEAD_DIM * 2;  // bytes
constexpr uint32_t K_STEPS = HEAD_DIM / 16;
// Threads that share a row while rows are loaded: each takes every LOADERS-th chunk.
constexpr uint32_t LOADERS = THREADS / ROWS;

// What a block works on.
enum Kind { QUERIES, KEYS, VALUES };

struct Work {
    Kind kind;
    uint32_t head;
    uint32_t first_row;
    uint32_t rows;      // of all tokens
    uint32_t per_token; // rows of one token
    uint32_t blocks;    // of 16 output channels
};

DEVICE Work work_of(uint32_t block, const FdcAppendParams& params) {
    const uint32_t tiles = params.q_tiles + 2 * params.kv_tiles;
    const uint32_t tile = block % tiles;
    Work work;
    work.head = block / tiles;
    work.per_token = 1;
    if (tile < params.q_tiles) {
        work.kind = QUERIES;
        work.first_row = tile * ROWS;
        work.per_token = params.group;
    } else if (tile < params.q_tiles + params.kv_tiles) {
        work.kind = KEYS;
        work.first_row = (tile - params.q_tiles) * ROWS;
    } else {
        work.kind = VALUES;
        work.first_row = (tile - params.q_tiles - params.kv_tiles) * ROWS;
    }
    work.rows = params.tokens * work.per_token;
    work.blocks = work.kind == VALUES ? v_blocks(params.heads, work.head) : k_blocks(params.heads, work.head);
    return work;
}

// The slot of a token, or −1 where it is skipped.
DEVICE int64_t checked_slot(uint32_t token, const int64_t* slot, const uint32_t* position, const FdcAppendParams& params) {
    const int64_t to = slot[token];
    const bool bad = to >= params.num_slots || (ROTARY != 0 && position[token] >= params.positions);
    return to < 0 || bad ? -1 : to;
}

// Loads a vector into a row of the X tile, rotated. Each of the row's loaders takes its share of the chunks.
DEVICE void load_rotated(unsigned char* x, uint32_t row, uint32_t loader, const Element* from, const float* cosines,
                         const float* sines, const FdcAppendParams& params) {
    const uint32_t planes = params.rotary_dim / 2;  // 0 where nothing rotates
    auto place = [&](uint32_t channel) {
        return reinterpret_cast<uint4*>(x + Swizzle<X_ROW>::offset(row, channel / CHUNK));
    };
    if (ROTARY == HALF_SPLIT) {
        for (uint32_t low = loader * CHUNK; low < planes; low += LOADERS * CHUNK) {
            Channels<Element> a(load_global_16(from + low));
            Channels<Element> b(load_global_16(from + low + planes));
            rotate_halves(a, b, cosines + low, sines + low);
            *place(low) = a.bits();
            *place(low + planes) = b.bits();
        }
    }
    for (uint32_t first = (ROTARY == HALF_SPLIT ? 2 * planes : 0) + loader * CHUNK; first < HEAD_DIM;
         first += LOADERS * CHUNK) {
        const uint4 bits = load_global_16(from + first);
        if (ROTARY == INTERLEAVED && first < 2 * planes) {
            Channels<Element> pairs(bits);
            rotate_pairs(pairs, cosines + first / 2, sines + first / 2);
            *place(first) = pairs.bits();
        } else {
            *place(first) = bits;
        }
    }
}

// The head's projection into shared memory: HEAD_DIM rows of 16·blocks elements, swizzled; the copies are left under way.
DEVICE void load_projection(uint32_t tile, const Element* projection, uint32_t blocks) {
    const uint32_t row_bytes = blocks * 32;
    const SwizzledRows rows(row_bytes);
    for (uint32_t row = threadIdx.x / 2; row < HEAD_DIM; row += THREADS / 2) {
        for (uint32_t chunk = threadIdx.x % 2; chunk < 2 * blocks; chunk += 2) {
            cp_async_16(tile + rows.offset(row, chunk), projection + row * blocks * 16 + chunk * CHUNK);
        }
    }
    cp_async_commit();
}

DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if KV_DTYPE == 1
    mma_m16n8k16_f16(d, a, b);
#else
    mma_m16n8k16_bf16(d, a, b);
#endif
}

// X·R over the warp's 16 rows of the X tile, which become the result.
DEVICE void project(unsigned char* x, uint32_t x_tile, uint32_t projection, uint32_t blocks) {
    const uint32_t lane = lane_index();
    const uint32_t warp_row = warp_index() * WARP_ROWS;
    uint32_t a[K_STEPS][4];
#pragma unroll
    for (uint32_t step = 0; step < K_STEPS; step++) load_fragment_a<X_ROW>(a[step], x_tile, warp_row, step * 2);
    __syncwarp();  // the rows are in registers: their place is free
    const SwizzledRows rows(blocks * 32);
    for (uint32_t block = 0; block < blocks; block++) {
        float d[2][4] = {};
#pragma unroll
        for (uint32_t step = 0; step < K_STEPS; step++) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, projection + rows.offset(step * 16 + lane % 16, block * 2 + lane / 16));
            const uint32_t low[2] = {b[0], b[1]};
            const uint32_t high[2] = {b[2], b[3]};
            mma(d[0], a[step], low);
            mma(d[1], a[step], high);
        }
#pragma unroll
        for (uint32_t n = 0; n < 2; n++) {
#pragma unroll
            for (uint32_t half = 0; half < 2; half++) {
                const uint32_t row = warp_row + lane / 4 + half * 8;
                unsigned char* const chunk = x + Swizzle<X_ROW>::offset(row, block * 2 + n);
                *reinterpret_cast<uint32_t*>(chunk + lane % 4 * 4) = pack2<Element>(d[n][2 * half], d[n][2 * half + 1]);
            }
        }
    }
    __syncwarp();
}

KERNEL(128, 4)
fdc_append(const Element* q_new, const Element* k_new, const Element* v_new, const Element* project_q,
           const Element* project_k, const Element* project_v, const float* cos, const float* sin, const uint32_t* position,
           const int64_t* slot, Element* q, Element* pages, uint64_t* status, const __grid_constant__ FdcAppendParams params) {
    DYNAMIC_SHARED(x);
    const uint32_t x_tile = shared_address(x);
    const uint32_t projection_tile = x_tile + ROWS * X_ROW;
    const FdcHeads& heads = params.heads;
    const Work work = work_of(blockIdx.x, params);
    const uint32_t head_k = heads.k_before[work.head] * 16;  // key channels of the heads before
    const uint32_t head_v = heads.v_before[work.head] * 16;

    // Projections are weights: no kernel before this one writes them.
    const Element* projection = work.kind == QUERIES ? project_q : work.kind == KEYS ? project_k : project_v;
    if (projection != nullptr) {
        load_projection(projection_tile, projection + (work.kind == VALUES ? head_v : head_k) * HEAD_DIM, work.blocks);
    }
    grid_dependency_wait();

    {
        const uint32_t row = threadIdx.x / LOADERS;
        const uint32_t loader = threadIdx.x % LOADERS;
        const uint32_t index = work.first_row + row;
        const uint32_t token = index / work.per_token;
        const bool exists = index < work.rows;
        const int64_t to = exists ? checked_slot(token, slot, position, params) : -1;
        if (exists && to < 0 && slot[token] >= 0 && work.kind == VALUES && work.head == 0 && loader == 0) {
            report_fault(status, FAULT_BAD_INDEX, token);
        }
        if (to < 0) {
            for (uint32_t chunk = loader; chunk < X_ROW / 16; chunk += LOADERS) {
                *reinterpret_cast<uint4*>(x + Swizzle<X_ROW>::offset(row, chunk)) = make_uint4(0, 0, 0, 0);
            }
        } else if (projection == nullptr) {
            const Element* from = work.kind == KEYS ? k_new + token * params.k_new_stride + head_k
                                                    : v_new + token * params.v_new_stride + head_v;
            for (uint32_t chunk = loader; chunk < 2 * work.blocks; chunk += LOADERS) {
                *reinterpret_cast<uint4*>(x + Swizzle<X_ROW>::offset(row, chunk)) = load_global_16(from + chunk * CHUNK);
            }
        } else if (work.kind == VALUES) {
            const Element* from = v_new + token * params.v_new_stride + work.head * HEAD_DIM;
            for (uint32_t chunk = loader; chunk < X_ROW / 16; chunk += LOADERS) {
                *reinterpret_cast<uint4*>(x + Swizzle<X_ROW>::offset(row, chunk)) = load_global_16(from + chunk * CHUNK);
            }
        } else {
            const uint32_t at = ROTARY == 0 ? 0 : position[token];
            const uint64_t table = static_cast<uint64_t>(at) * (params.rotary_dim / 2);
            const Element* from =
                work.kind == KEYS
                    ? k_new + token * params.k_new_stride + work.head * HEAD_DIM
                    : q_new + token * params.q_new_stride + (work.head * params.group + index % params.group) * HEAD_DIM;
            load_rotated(x, row, loader, from, cos + table, sin + table, params);
        }
    }
    cp_async_wait<0>();
    __syncthreads();
    if (projection != nullptr) project(x, x_tile, projection_tile, work.blocks);

    // Each lane takes half of the chunks of one of the warp's rows, so that pairs of lanes write 32 bytes at once.
    const uint32_t row = warp_index() * WARP_ROWS + lane_index() / 2;
    const uint32_t index = work.first_row + row;
    if (index >= work.rows) return;
    const uint32_t token = index / work.per_token;
    auto chunk_of_row = [&](uint32_t chunk) {
        return *reinterpret_cast<const uint4*>(x + Swizzle<X_ROW>::offset(row, chunk));
    };
    if (work.kind == QUERIES) {
        Element* to = q + token * static_cast<uint64_t>(heads.k_before[heads.count] * 16 * params.group)
                      + head_k * params.group + index % params.group * work.blocks * 16;
        for (uint32_t chunk = lane_index() % 2; chunk < 2 * work.blocks; chunk += 2) {
            store_global_16(to + chunk * CHUNK, chunk_of_row(chunk));
        }
        return;
    }
    const int64_t to = checked_slot(token, slot, position, params);
    if (to < 0) return;
    const uint32_t in_page = static_cast<uint32_t>(to) & ((1u << params.page_shift) - 1);
    const uint32_t region = head_k + head_v + (work.kind == VALUES ? k_blocks(heads, work.head) * 16 : 0);
    Element* const start = pages + (to >> params.page_shift) * params.page_stride
                           + (static_cast<uint64_t>(region) << params.page_shift);
    const SwizzledRows rows(work.blocks * 32);
    for (uint32_t chunk = lane_index() % 2; chunk < 2 * work.blocks; chunk += 2) {
        store_global_16(start + rows.offset(in_page, chunk) / 2, chunk_of_row(chunk));
    }
}
