// Attention on a quantized KV cache with dequantization in registers: what hack_decode is compared with.
//
// Reads the same pages through the same rings and has the same parameters, tiles and splits; only what happens to a page
// differs. Codes become KV_DTYPE values s·k' + m, rounded once, and go through 16-bit products with q and P:
//
//   out = softmax(mask(cap(scale·q·K̂ᵀ)))·V̂,  lse = ln Σ exp(score)        per sequence, query and query head
//
// Buffers are those of hack_decode. P is rounded to KV_DTYPE.
//
// Arch:    sm_80 and later.
// Mapping: as hack_decode. The bytes 0, 2 and 1, 3 of a word of codes become two pairs of values by a shift, a mask and two
//          multiply-adds each; products take channels (and tokens) in that order, which costs nothing, since both operands do.
// Budget:  two instructions per code at 2 and 4 bits: 1024 warp-instructions for a page of 64 tokens and 128 channels, beside
//          about 500 for softmax, products and loads. 168 registers where 3 blocks fit an SM, else 255.
// Limit:   bytes of pages at 8 bits; instruction issue below.
#include "core.cuh"
#include "hack_decode_params.h"
#include "ptx/half2.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "tile/hack_attention.cuh"
#include "tile/hack_page.cuh"
#include "types.cuh"

using Packed = HackPage<K_BITS, V_BITS, PARTITION, QK_DIM, V_DIM>;
using KeyCodes = Packed::KeyCodes;
using ValueCodes = Packed::ValueCodes;
using Element = StorageOf<KV_DTYPE>;
using Shape = HackShape<Element, Packed, PARTITION, QK_DIM, V_DIM, COLUMN_TILES, SOFT_CAP != 0>;
using Attention = HackAttention<Shape>;
using KeyPieces = Attention::Stream::KeyPieces;
using ValuePieces = Attention::Stream::ValuePieces;

constexpr uint32_t K_STEPS = QK_DIM / 32;
constexpr uint32_t TOKEN_TILES = PARTITION / 16;
constexpr uint32_t V_PARTITIONS = Packed::V_PARTITIONS;

// A float whose unit in the last place is 1: or-ing small integers into its bits adds them. 1024 in f16, 128 in bf16.
constexpr uint32_t BASE = KV_DTYPE == DTYPE_F16 ? 0x64006400u : 0x43004300u;
constexpr uint32_t MINUS_BASE = BASE | 0x80008000u;
constexpr uint32_t ONE = KV_DTYPE == DTYPE_F16 ? 0x3c003c00u : 0x3f803f80u;
constexpr uint32_t SIXTEEN = KV_DTYPE == DTYPE_F16 ? 0x4c004c00u : 0x41804180u;

// Integers below the base's range, in the low bits of both halves, as a pair of values.
DEVICE uint32_t pair_of(uint32_t integers) { return fma2(Element{}, integers | BASE, ONE, MINUS_BASE); }

// The codes of Bits bits that start at bits `shift` and `shift` + 16 of a word, as a pair of values.
template <uint32_t Bits>
DEVICE uint32_t code_pair(uint32_t word, uint32_t shift) {
    if constexpr (Bits == 8 && KV_DTYPE == DTYPE_BF16) {
        // bf16 holds 8 bits, its integers beside 128 only 7: the code in two halves.
        const uint32_t high = pair_of(word >> (shift + 4) & 0x000f000fu);
        return fma2(Element{}, high, SIXTEEN, pair_of(word >> shift & 0x000f000fu));
    } else {
        return pair_of(word >> shift & ((1u << Bits) - 1) * 0x00010001u);
    }
}

// Low halves, and high halves, of two words.
DEVICE uint32_t low_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
DEVICE uint32_t high_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

// A operand of a 16-column half of a k-step for row tile `tile`: s·code + m, where scale and min hold the pairs of columns
// (4t, 4t + 2) and (4t + 1, 4t + 3).
template <class Codes>
DEVICE void fragment(uint32_t (&a)[4], const uint32_t (&words)[Codes::WORDS], uint32_t tile, uint32_t half,
                     const uint32_t (&scale)[2], const uint32_t (&min)[2]) {
    constexpr uint32_t BITS = Codes::BITS;
    const uint32_t shift = BITS * (tile + (Codes::HALF_PLANES == 2 ? half * Codes::ROW_PLANES : 0));
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        const uint32_t word = words[Codes::HALF_PLANES == 1 ? half * 2 + i % 2 : i % 2];
        a[i] = fma2(Element{}, code_pair<BITS>(word, shift + 8 * (i / 2)), scale[i / 2], min[i / 2]);
    }
}

struct Reader {
    // B operands of q for each half of a k-step: channels 4t and 4t + 2, then 4t + 1 and 4t + 3.
    uint32_t q[QK_DIM / 16][2];
    float to_score;

    DEVICE void start(const Columns<Shape>& columns, const HackDecodeParams& params) {
        to_score = score_factor<Shape>(params);
        const uint32_t lane = lane_index();
#pragma unroll
        for (uint32_t half = 0; half < QK_DIM / 16; half++) {
            const uint32_t offset = columns.q_offset(lane / 4, half * 2, lane % 4 / 2) + lane % 2 * 8;
            const uint2 four = *reinterpret_cast<const uint2*>(columns.q_rows + offset);
            q[half][0] = low_halves(four.x, four.y);
            q[half][1] = high_halves(four.x, four.y);
        }
    }

    DEVICE void scores(float (&s)[TOKEN_TILES][4], Attention::Stream& stream) const {
        const uint32_t lane = lane_index();
        const uint32_t t = lane % 4;
        const unsigned char* piece = stream.step_keys(0);
        uint32_t scale[K_STEPS][2][2];
        uint32_t min[K_STEPS][2][2];
#pragma unroll
        for (uint32_t step = 0; step < K_STEPS; step++) {
            const uint4 scales = reinterpret_cast<const uint4*>(piece + Packed::K_SCALE)[step * 4 + t];
            const uint32_t words[4] = {scales.x, scales.y, scales.z, scales.w};
            // Minima lie in pairs 2t', 2t' + 1 of every eight channels: those of 4t … 4t + 3 are two neighbours' pairs.
            const uint32_t* const minima = reinterpret_cast<const uint32_t*>(piece + Packed::K_MIN) + step * 16;
#pragma unroll
            for (uint32_t half = 0; half < 2; half++) {
                scale[step][half][0] = low_halves(words[half * 2], words[half * 2 + 1]);
                scale[step][half][1] = high_halves(words[half * 2], words[half * 2 + 1]);
                const uint32_t eight = half * 2 + t / 2;
                const uint32_t low = minima[t % 2 * 8 + eight];
                const uint32_t high = minima[t % 2 * 8 + 4 + eight];
                min[step][half][0] = low_halves(low, high);
                min[step][half][1] = high_halves(low, high);
            }
        }
#pragma unroll
        for (uint32_t group = 0; group < KeyCodes::GROUPS; group++) {
            if (KeyPieces::begins(group)) piece = stream.step_keys(group / KeyPieces::GROUPS);
            const unsigned char* const units = piece + KeyPieces::group_offset(group);
#pragma unroll
            for (uint32_t step = 0; step < K_STEPS; step++) {
                uint32_t words[KeyCodes::WORDS];
                KeyCodes::load(words, units + step * KeyCodes::UNIT_BYTES);
#pragma unroll
                for (uint32_t tile = 0; tile < KeyCodes::ROW_PLANES; tile++) {
                    float(&sum)[4] = s[group * KeyCodes::ROW_PLANES + tile];
#pragma unroll
                    for (uint32_t i = 0; i < 4 && step == 0; i++) sum[i] = 0.0f;
#pragma unroll
                    for (uint32_t half = 0; half < 2; half++) {
                        uint32_t a[4];
                        fragment<KeyCodes>(a, words, tile, half, scale[step][half], min[step][half]);
                        mma_m16n8k16(Element{}, sum, a, q[step * 2 + half]);
                    }
                }
            }
        }
#pragma unroll
        for (uint32_t tile = 0; tile < TOKEN_TILES; tile++) {
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) s[tile][i] *= to_score;
        }
    }

    DEVICE void accumulate(const float (&p)[TOKEN_TILES][4], Columns<Shape>& columns, Attention::Stream& stream) const {
        const uint32_t t = lane_index() % 4;
        const unsigned char* piece = stream.step_values(0);
        // Scales and minima of this lane's tokens: (2t, 2t + 1), then (2t + 8, 2t + 9) of each 16.
        uint32_t scale[V_PARTITIONS][TOKEN_TILES][2];
        uint32_t min[V_PARTITIONS][TOKEN_TILES][2];
#pragma unroll
        for (uint32_t v = 0; v < V_PARTITIONS; v++) {
#pragma unroll
            for (uint32_t tile = 0; tile < TOKEN_TILES; tile++) {
                const auto pairs = [&](uint32_t field, uint32_t (&out)[2]) {
                    const uint32_t* const words = reinterpret_cast<const uint32_t*>(piece + field);
                    const uint32_t even = words[(2 * t * V_PARTITIONS + v) * (PARTITION / 16) + tile];
                    const uint32_t odd = words[((2 * t + 1) * V_PARTITIONS + v) * (PARTITION / 16) + tile];
                    out[0] = low_halves(even, odd);
                    out[1] = high_halves(even, odd);
                };
                pairs(Packed::V_SCALE, scale[v][tile]);
                pairs(Packed::V_MIN, min[v][tile]);
            }
        }
        uint32_t b[TOKEN_TILES][2];
#pragma unroll
        for (uint32_t tile = 0; tile < TOKEN_TILES; tile++) {
            b[tile][0] = movmatrix_trans(pack2<Element>(p[tile][0], p[tile][1]));
            b[tile][1] = movmatrix_trans(pack2<Element>(p[tile][2], p[tile][3]));
        }
#pragma unroll
        for (uint32_t group = 0; group < ValueCodes::GROUPS; group++) {
            if (ValuePieces::begins(group)) piece = stream.step_values(group / ValuePieces::GROUPS);
            const unsigned char* const units = piece + ValuePieces::group_offset(group);
#pragma unroll
            for (uint32_t step = 0; step < ValueCodes::STEPS; step++) {
                uint32_t words[ValueCodes::WORDS];
                ValueCodes::load(words, units + step * ValueCodes::UNIT_BYTES);
#pragma unroll
                for (uint32_t tile = 0; tile < ValueCodes::ROW_PLANES; tile++) {
                    const uint32_t of = group * ValueCodes::ROW_PLANES + tile;
                    const uint32_t v = of * 16 / Packed::V_CHANNELS;
#pragma unroll
                    for (uint32_t half = 0; half < 2; half++) {
                        const uint32_t tokens = step * 2 + half;
                        uint32_t a[4];
                        fragment<ValueCodes>(a, words, tile, half, scale[v][tokens], min[v][tokens]);
                        mma_m16n8k16(Element{}, columns.o[of], a, b[tokens]);
                    }
                }
            }
        }
    }

    DEVICE void attend(Columns<Shape>& columns, Attention::Stream& stream, const HackItem& item, uint32_t block,
                       const HackDecodeParams& params) const {
        float s[TOKEN_TILES][4];
        scores(s, stream);
        columns.mask_block(s, item, block, params);
        columns.softmax(s, params);
        accumulate(s, columns, stream);
    }
};

KERNEL(128, Attention::BLOCKS_PER_SM)
hack_dequant_decode(const Element* q, const unsigned char* pages, const uint32_t* block_table, const Element* sink_pool,
                    const Element* open_pool, const uint32_t* sink_page, const uint32_t* open_page,
                    const uint32_t* valid_len, const uint32_t* first_unit, Element* out, float* lse, float* part_acc,
                    float* part_ml, uint32_t* arrivals, const __grid_constant__ HackDecodeParams params) {
    DYNAMIC_SHARED(shared_bytes);
    const HackBuffers<Element> buffers{q,         pages,     block_table, sink_pool, open_pool, sink_page, open_page,
                                       valid_len, first_unit, out,        lse,       part_acc,  part_ml,   arrivals};
    Attention::run<Reader>(shared_bytes, buffers, params);
}
