// What the four warps of a decode kernel do: stream their own rows of K and V through rings of their own, keep their own softmax
// state over a few query columns, and meet at the end of a part.
//
// Tokens lie on M and columns on N: Sᵀ = K·qᵀ, Oᵀ = Vᵀ·Pᵀ by m16n8k16, P transposed in registers by movmatrix. A tile is
// 64 tokens, 16 for each warp, so the main loop has no block barrier. Where a row's keys lie and which of them a column
// sees is the kernel's to say.
#pragma once

#include "core.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "ptx/shuffle.cuh"
#include "tile/copy_ring.cuh"
#include "tile/fragment.cuh"
#include "tile/partial_states.cuh"
#include "types.cuh"

DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16) { mma_m16n8k16_f16(d, a, b); }
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
    mma_m16n8k16_bf16(d, a, b);
}

template <class ElementType, int QkDim, int VDim, int ColumnTiles>
struct DecodeWarps {
    using Element = ElementType;

    static constexpr uint32_t WARPS = 4;
    static constexpr uint32_t THREADS = WARPS * WARP_SIZE;
    static constexpr uint32_t ROWS = 16;  // tokens of a tile that one warp owns
    static constexpr uint32_t TILE = WARPS * ROWS;
    static constexpr uint32_t COLUMNS = ColumnTiles * 8;

    static constexpr uint32_t K_ROW = QkDim * 2;  // bytes
    static constexpr uint32_t V_ROW = VDim * 2;
    static constexpr uint32_t SLOT = ROWS * (K_ROW > V_ROW ? K_ROW : V_ROW);
    static constexpr uint32_t RING = 16 * 1024;   // bytes of one warp
    static constexpr int SLOTS = RING / SLOT;
    static constexpr uint32_t Q_BYTES = 16 * K_ROW;  // always 16 rows, so that two column tiles load at once
    static_assert(SLOTS >= 2, "one slot in use, one on its way");
    static_assert(COLUMNS * VDim * 4 <= RING, "a warp leaves its O in its own ring");

    static constexpr uint32_t K_STEPS = QkDim / 16;
    static constexpr uint32_t V_TILES = VDim / 16;

    struct Tail {
        float ml[WARPS][COLUMNS][2];
        uint32_t is_last;
    };

    // Visits this lane's 16-byte chunks of eight neighbouring rows of K or V, which start at `rows` and become rows `half`·8 … of a
    // slot: copy(row of the slot, chunk of the row, source).
    template <uint32_t RowBytes, class Copy>
    static DEVICE void for_eight_rows(uint32_t half, const Element* rows, int64_t token_stride, const Copy& copy) {
        constexpr uint32_t CHUNKS = RowBytes / 16;
        if (WARP_SIZE % CHUNKS == 0) {
            // A lane keeps its chunk, so that each copy is an addition from the one before.
            constexpr uint32_t STEP = CHUNKS <= WARP_SIZE ? WARP_SIZE / CHUNKS : 1;
            const uint32_t first_row = lane_index() / CHUNKS;
            const uint32_t chunk = lane_index() % CHUNKS;
            const Element* from = rows + first_row * token_stride + chunk * 8;
#pragma unroll
            for (uint32_t row = 0; row < 8; row += STEP, from += STEP * token_stride) {
                copy(half * 8 + row + first_row, chunk, from);
            }
        } else {
#pragma unroll
            for (uint32_t i = 0; i < 8 * CHUNKS / WARP_SIZE; i++) {
                const uint32_t index = i * WARP_SIZE + lane_index();
                const uint32_t row = index / CHUNKS;
                const uint32_t chunk = index % CHUNKS;
                copy(half * 8 + row, chunk, rows + row * token_stride + chunk * 8);
            }
        }
    }

    // Streams K and V of tiles [first, end) through the warp's ring: load_k(address, tile) and load_v(address, tile) issue copies
    // of the warp's rows, use_k(address, tile) and use_v(address, tile) see them landed, in that order.
    template <class LoadK, class LoadV, class UseK, class UseV>
    static DEVICE void stream(uint32_t first, uint32_t end, uint32_t ring, const LoadK& load_k, const LoadV& load_v,
                              const UseK& use_k, const UseV& use_v) {
        // Copies of K and V alternate through the ring, SLOTS − 1 of them ahead of use: the copy that the use of a K or V issues is
        // always of the same kind.
        constexpr bool ISSUE_V_BESIDE_K = SLOTS % 2 == 0;
        uint32_t next_tile = first;
        RingPosition<SLOTS> next, used;
        auto issue = [&](bool is_v) {
            if (next_tile < end) {
                const uint32_t address = ring + next.slot * SLOT;
                if (is_v) {
                    load_v(address, next_tile);
                    next_tile += 1;
                } else {
                    load_k(address, next_tile);
                }
            }
            cp_async_commit();  // also when empty, so that the waits below always count SLOTS − 1 groups
            next.advance();
        };
        // Waits for the oldest copy and refills the slot that was used before it.
        auto step = [&](bool issues_v) {
            cp_async_wait<SLOTS - 2>();
            __syncwarp();
            issue(issues_v);
            const uint32_t address = ring + used.slot * SLOT;
            used.advance();
            return address;
        };

#pragma unroll
        for (int ahead = 0; ahead < SLOTS - 1; ahead++) issue(ahead % 2 == 1);
        for (uint32_t tile = first; tile < end; tile++) {
            use_k(step(ISSUE_V_BESIDE_K), tile);
            use_v(step(!ISSUE_V_BESIDE_K), tile);
        }
        cp_async_wait<0>();
        __syncwarp();
    }

    // Loads the queries into shared memory as 16 swizzled rows: column c from source(c), or zeros where that is null. The whole
    // block calls.
    template <class Source>
    static DEVICE void load_queries(uint32_t q_tile, const Element* q, const Source& source) {
        constexpr uint32_t CHUNKS = K_ROW / 16;
        for (uint32_t index = threadIdx.x; index < 16 * CHUNKS; index += THREADS) {
            const uint32_t row = index / CHUNKS;
            const uint32_t chunk = index % CHUNKS;
            bool exists;
            const uint64_t vector = source(row, exists);
            cp_async_16_zfill(q_tile + Swizzle<K_ROW>::offset(row, chunk), q + vector * QkDim + chunk * 8, exists ? 16 : 0);
        }
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
    }

    // One warp's softmax state, over its 16 rows of each tile.
    struct Warp {
        float o[V_TILES][ColumnTiles][4];  // Oᵀ: channels × columns
        float m[ColumnTiles][2];           // in units of log2, of columns 2t and 2t + 1
        float l[ColumnTiles][2];           // of this lane's rows alone

        DEVICE void start() {
#pragma unroll
            for (uint32_t n = 0; n < ColumnTiles; n++) {
#pragma unroll
                for (uint32_t e = 0; e < 2; e++) {
                    m[n][e] = NEGATIVE_INFINITY;
                    l[n][e] = 0.0f;
                }
#pragma unroll
                for (uint32_t v = 0; v < V_TILES; v++) {
#pragma unroll
                    for (uint32_t i = 0; i < 4; i++) o[v][n][i] = 0.0f;
                }
            }
        }

        // Sᵀ of the 16 rows of K at `k` with the columns of q; the result is unscaled.
        DEVICE void scores(float (&s)[ColumnTiles][4], uint32_t k, uint32_t q) const {
#pragma unroll
            for (uint32_t n = 0; n < ColumnTiles; n++) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) s[n][i] = 0.0f;
            }
#pragma unroll
            for (uint32_t step = 0; step < K_STEPS; step++) {
                uint32_t a[4];
                uint32_t b[2][2];
                load_fragment_a<K_ROW>(a, k, 0, step * 2);
                load_fragment_b2<K_ROW>(b, q, 0, step * 2);
#pragma unroll
                for (uint32_t n = 0; n < ColumnTiles; n++) mma_m16n8k16(s[n], a, b[n], Element{});
            }
        }

        // Scales, caps and masks scores, moves the running maximum, and leaves P in `s`. hidden(n, i) says whether this lane's
        // element i of column tile n is a key that its column does not see.
        template <bool SoftCap, class Hidden>
        DEVICE void softmax(float (&s)[ColumnTiles][4], float scale, float soft_cap, const Hidden& hidden) {
            const float to_cap = SoftCap ? scale / soft_cap : 0.0f;
            const float to_log2 = SoftCap ? soft_cap * LOG2_E : scale * LOG2_E;
#pragma unroll
            for (uint32_t n = 0; n < ColumnTiles; n++) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) {
                    if (SoftCap) s[n][i] = tanhf(s[n][i] * to_cap);
                    if (hidden(n, i)) s[n][i] = NEGATIVE_INFINITY;
                }
#pragma unroll
                for (uint32_t e = 0; e < 2; e++) {
                    // The factor is positive, so the maximum is taken before it and each score meets it in a multiply-add.
                    const float largest = warp_max_strided<4>(fmaxf(s[n][e], s[n][e + 2]));
                    const float m_new = fmaxf(m[n][e], largest * to_log2);
                    const float reference = m_new == NEGATIVE_INFINITY ? 0.0f : m_new;
                    const float shrink = exp2_approx(m[n][e] - reference);
                    m[n][e] = m_new;
                    s[n][e] = exp2_approx(__fmaf_rn(s[n][e], to_log2, -reference));
                    s[n][e + 2] = exp2_approx(__fmaf_rn(s[n][e + 2], to_log2, -reference));
                    l[n][e] = l[n][e] * shrink + s[n][e] + s[n][e + 2];
#pragma unroll
                    for (uint32_t v = 0; v < V_TILES; v++) {
                        o[v][n][e] *= shrink;
                        o[v][n][e + 2] *= shrink;
                    }
                }
            }
        }

        // Oᵀ += Vᵀ·Pᵀ over the 16 rows of V at `v`.
        DEVICE void accumulate(const float (&p)[ColumnTiles][4], uint32_t v) {
            uint32_t b[ColumnTiles][2];
#pragma unroll
            for (uint32_t n = 0; n < ColumnTiles; n++) {
                b[n][0] = movmatrix_trans(pack2<Element>(p[n][0], p[n][1]));
                b[n][1] = movmatrix_trans(pack2<Element>(p[n][2], p[n][3]));
            }
#pragma unroll
            for (uint32_t tile = 0; tile < V_TILES; tile++) {
                uint32_t a[4];
                load_fragment_a_trans<V_ROW>(a, v, 0, tile * 2);
#pragma unroll
                for (uint32_t n = 0; n < ColumnTiles; n++) mma_m16n8k16(o[tile][n], a, b[n], Element{});
            }
        }

        // Leaves the state in shared memory: O [columns, channels] in the warp's ring, (m, l) in the tail, m in natural units.
        DEVICE void leave(unsigned char* ring, Tail& tail) const {
            leave_state<VDim>(reinterpret_cast<float*>(ring), tail.ml[warp_index()], o, m, l, V_TILES);
        }
    };

    using WarpStates = RingStates<COLUMNS, VDim, RING>;
    using Fold = ColumnFold<VDim, THREADS>;

    // Blocks of an SM that its shared memory has room for (1 KB of each is the system's), up to `wanted`: a bound on registers
    // beyond that would only starve the block.
    static DEVICE constexpr uint32_t blocks_per_sm(uint32_t wanted) {
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
        constexpr uint32_t SM_SHARED = 100 * 1024;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
        constexpr uint32_t SM_SHARED = 164 * 1024;
#else
        constexpr uint32_t SM_SHARED = 228 * 1024;
#endif
        constexpr uint32_t FITTING = SM_SHARED / (Q_BYTES + WARPS * RING + sizeof(Tail) + 1024);
        return FITTING < wanted ? FITTING : wanted;
    }
};
