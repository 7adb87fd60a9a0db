// Appends new tokens to a KV cache: rotates queries and keys by position (RoPE) and writes keys and values to their slots.
//
//   (a, b) → (a·cos − b·sin, b·cos + a·sin) for each plane of a vector; multiplications and additions are rounded one by one
//
// q_new       [tokens, q_heads, QK_DIM] KV_DTYPE, rotated in place; null where q_heads is 0
// k_new       [tokens, kv_heads, QK_DIM] KV_DTYPE    v_new [tokens, kv_heads, V_DIM] KV_DTYPE
//             tokens by the strides of params, so that slices of a fused projection serve; vectors are 16-byte aligned
// cos, sin    [positions, rotary_dim / 2] f32, 16-byte aligned
// position    [tokens] u32    slot [tokens] i64: page · page size + place in the page; a negative slot skips the token
// k, v        the cache, by the strides of params; slot s lies in page s >> page_shift
// status      first fault: FAULT_BAD_INDEX with the token whose slot or position is out of range, which is skipped
//
// Plane i is the pair of channels (i, i + rotary_dim / 2) if ROTARY is 1 (half-split), (2i, 2i + 1) if 2 (interleaved);
// nothing rotates if it is 0. Channels from rotary_dim on are copied.
//
// Arch:    sm_80 and later.
// Mapping: one block per token; threads take 8-channel chunks (with their partner chunk, where half-split) of all vectors.
// Budget:  64 registers, no shared memory.
// Limit:   bytes: each vector read once and written once.
#include "append_params.h"
#include "core.cuh"
#include "ptx/memory.cuh"
#include "ptx/sync.cuh"
#include "status_params.h"
#include "tile/rotary.cuh"
#include "tile/status.cuh"
#include "types.cuh"

using Element = StorageOf<KV_DTYPE>;

constexpr uint32_t THREADS = 128;
constexpr uint32_t CHUNK = 8;  // channels in 16 bytes

// Pieces of work that one rotated vector has.
DEVICE uint32_t pieces(const AppendParams& params) {
    return ROTARY == HALF_SPLIT ? (QK_DIM - params.rotary_dim / 2) / CHUNK : QK_DIM / CHUNK;
}

// Moves piece `piece` of a vector, rotated, from `from` to `to`, which may be the same.
DEVICE void move_rotated(Element* to, const Element* from, uint32_t piece, const float* cosines, const float* sines,
                         const AppendParams& params) {
    const uint32_t planes = params.rotary_dim / 2;
    if (ROTARY == HALF_SPLIT && piece * CHUNK < planes) {
        const uint32_t low = piece * CHUNK;
        Channels<Element> a(load_global_16(from + low));
        Channels<Element> b(load_global_16(from + low + planes));
        rotate_halves(a, b, cosines + low, sines + low);
        store_global_16(to + low, a.bits());
        store_global_16(to + low + planes, b.bits());
        return;
    }
    // Half-split: the pieces after the planes are those of the channels that do not rotate.
    const uint32_t first = (ROTARY == HALF_SPLIT ? planes : 0) + piece * CHUNK;
    const uint4 bits = load_global_16(from + first);
    if (ROTARY == INTERLEAVED && first < params.rotary_dim) {
        Channels<Element> pairs(bits);
        rotate_pairs(pairs, cosines + first / 2, sines + first / 2);
        store_global_16(to + first, pairs.bits());
    } else {
        store_global_16(to + first, bits);
    }
}

KERNEL(128, 8)
append(Element* q_new, const Element* k_new, const Element* v_new, const float* cos, const float* sin,
       const uint32_t* position, const int64_t* slot, Element* k, Element* v, uint64_t* status,
       const __grid_constant__ AppendParams params) {
    const uint32_t token = blockIdx.x;
    grid_dependency_wait();
    const int64_t to = slot[token];
    if (to < 0) return;
    const uint32_t at = ROTARY == 0 ? 0 : position[token];
    if (to >= params.num_slots || at >= params.positions) {
        if (threadIdx.x == 0) report_fault(status, FAULT_BAD_INDEX, token);
        return;
    }
    const float* const cosines = cos + static_cast<uint64_t>(at) * (params.rotary_dim / 2);
    const float* const sines = sin + static_cast<uint64_t>(at) * (params.rotary_dim / 2);
    const int64_t page = to >> params.page_shift;
    const int64_t in_page = to & ((1ll << params.page_shift) - 1);

    const uint32_t per_vector = pieces(params);
    const uint32_t q_pieces = params.q_heads * per_vector;
    const uint32_t k_pieces = params.kv_heads * per_vector;
    const uint32_t v_pieces = params.kv_heads * (V_DIM / CHUNK);
    for (uint32_t piece = threadIdx.x; piece < q_pieces + k_pieces + v_pieces; piece += THREADS) {
        if (piece < q_pieces) {
            Element* const vector = q_new + token * params.q_new_stride + piece / per_vector * QK_DIM;
            move_rotated(vector, vector, piece % per_vector, cosines, sines, params);
        } else if (piece < q_pieces + k_pieces) {
            const uint32_t head = (piece - q_pieces) / per_vector;
            Element* const vector =
                k + page * params.k_page_stride + in_page * params.k_token_stride + head * params.k_head_stride;
            move_rotated(vector, k_new + token * params.k_new_stride + head * QK_DIM, (piece - q_pieces) % per_vector,
                         cosines, sines, params);
        } else {
            const uint32_t index = piece - q_pieces - k_pieces;
            const uint32_t head = index / (V_DIM / CHUNK);
            const uint32_t channel = index % (V_DIM / CHUNK) * CHUNK;
            Element* const vector =
                v + page * params.v_page_stride + in_page * params.v_token_stride + head * params.v_head_stride;
            store_global_16(vector + channel, load_global_16(v_new + token * params.v_new_stride + head * V_DIM + channel));
        }
    }
}
