// Attention on a quantized KV cache without dequantization: integer products of codes, corrected by cached sums (HACK).
//
//   out = softmax(mask(cap(scale·q·Kᵀ)))·V,  lse = ln Σ exp(score)        per sequence, query and query head
//
// q           [batch, q_len, q_heads, QK_DIM]   KV_DTYPE
// pages       the pool of packed pages: kv_heads segments each, as in tile/hack_page.cuh
// block_table [batch, max_pages] u32 by params
// sink_pool   [num_sink_pages, kv_heads] of k [sinks, QK_DIM] · v [sinks, V_DIM] KV_DTYPE
// open_pool   [num_open_pages, kv_heads] of k [PARTITION, QK_DIM] · v [PARTITION, V_DIM] KV_DTYPE
// sink_page   [batch] u32, open_page [batch] u32
// valid_len, first_unit   of hack_decode_plan
// out         [batch, q_len, q_heads, V_DIM]    KV_DTYPE
// lse         [batch, q_len, q_heads] f32, natural log
// part_acc    [slots, COLUMNS, V_DIM] f32, part_ml [slots, COLUMNS, 2] f32     (workspace, need not be initialised)
// arrivals    [batch·kv_heads·column_blocks] u32, zero before and after the launch (workspace)
//
// For a closed block with key groups (s, m) per channel d and value groups per token t and channel partition γ:
//
//   u_d = q_d·s_d ≈ α_p·u'_d + β_p                          8 bits per query head and channel partition p
//   S_t = Σ_p (α_p·Σ_{d∈p} u'_d·k'_td + β_p·ksum_tp) + Σ_d q_d·m_d
//   w_t = P_t·s_tγ ≈ a_γ·w'_t + c_γ                         8 bits per query head over the block's tokens
//   O_c += a_γ·Σ_t w'_t·v'_tc + c_γ·vsum_c + Σ_t P_t·m_tγ
//
// Sinks and the open block are 16-bit vectors: plain attention, P as a sum of two KV_DTYPE values.
// Query i of q_len sees tokens ≤ kv_len − q_len + i, of them the last `window` and the first `window_sinks`. A query without
// tokens, and every query of a sequence that the plan refused, gets out 0 and lse −inf.
//
// Arch:    sm_80 and later.
// Mapping: a block serves COLUMNS queries × query heads of one KV head. Tokens lie on M and columns on N: Sᵀ = K·uᵀ and
//          Oᵀ = Vᵀ·Wᵀ by m16n8k32 on u8. COLUMN_TILES warps, eight columns each, are a team that shares a ring of its own, through
//          which its pages stream piece by piece; the block's teams take pages in turn and meet at the end of a part. Between the
//          products one movmatrix per 16 tokens turns the codes of P into an operand; nothing else crosses lanes but reductions.
// Budget:  warp-instructions for a page of 64 tokens and 128 channels, 2-bit codes, 8 columns (327 clk of an H200's SM at full
//          bandwidth, 1308 issue slots):
//            copies 12, loads from shared memory 34, codes into fragments 128 (4 masks per word of 16 codes, no shift),
//            integer products 32, u: scale 64, range 80, codes 88, α and β 24, q·m 8 products + 4 loads, β·ksum 4 products + 8
//            conversions, scores 64, softmax 96, P: scales 32, w and its minimum term 64, range 112, codes 88, products' factors
//            32, transposes 8, outputs 64, vsum 48, loop 40: about 1130. In machine code (sm_90a) the loop over pages has 1509 (2
//            bits), 1485 (4) and 1469 (8), of which some 180 only run for masks or a maximum that moves.
//          168 registers where 3 blocks share an SM, else 255.
// Limit:   bytes of pages, each read once, at 4 and 8 bits; instruction issue at 2 bits.
#include "core.cuh"
#include "hack_decode_params.h"
#include "ptx/ldmatrix.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "ptx/shuffle.cuh"
#include "tile/hack_attention.cuh"
#include "tile/hack_codes.cuh"
#include "tile/hack_page.cuh"
#include "types.cuh"

using Packed = HackPage<K_BITS, V_BITS, PARTITION, QK_DIM, V_DIM>;
using KeyCodes = Packed::KeyCodes;
using ValueCodes = Packed::ValueCodes;
static_assert(SUMS_FIT<KeyCodes::LARGEST, Packed::K_CHANNELS>, "sums over channels are exact as floats");
static_assert(SUMS_FIT<ValueCodes::LARGEST, PARTITION>, "sums over tokens are exact as floats");

using Element = StorageOf<KV_DTYPE>;
using Shape = HackShape<Element, Packed, PARTITION, QK_DIM, V_DIM, COLUMN_TILES, SOFT_CAP != 0>;
using Attention = HackAttention<Shape>;
using KeyPieces = Attention::Stream::KeyPieces;
using ValuePieces = Attention::Stream::ValuePieces;

constexpr uint32_t K_STEPS = QK_DIM / 32;
constexpr uint32_t TOKEN_TILES = PARTITION / 16;
constexpr uint32_t K_PARTITIONS = Packed::K_PARTITIONS;
constexpr uint32_t V_PARTITIONS = Packed::V_PARTITIONS;
constexpr uint32_t K_HALVES = Packed::K_CHANNELS / 16;  // halves of k-steps in a channel partition

// Long queries stay in shared memory: registers hold the outputs of as many channels.
constexpr bool KEEPS_Q = QK_DIM <= 128;

struct Reader {
    float q[KEEPS_Q ? QK_DIM / 4 : 1];  // of column g: channels 4t … 4t + 3 of each half of a k-step, in the unit of scores

    DEVICE void start(const Columns<Shape>& columns, const HackDecodeParams& params) {
        if constexpr (KEEPS_Q) {
            const float to_score = score_factor<Shape>(params);
#pragma unroll
            for (uint32_t half = 0; half < QK_DIM / 16; half++) load_q(&q[half * 4], columns, half, to_score);
        }
    }

    // Four channels of q for the codes of a half of a k-step.
    static DEVICE void load_q(float* four, const Columns<Shape>& columns, uint32_t half, float to_score) {
        const uint32_t lane = lane_index();
        const uint32_t offset = columns.q_offset(lane / 4, half * 2, lane % 4 / 2) + lane % 2 * 8;
        const uint2 words = *reinterpret_cast<const uint2*>(columns.q_rows + offset);
        const float2 low = unpack2<Element>(words.x);
        const float2 high = unpack2<Element>(words.y);
        four[0] = low.x * to_score, four[1] = low.y * to_score;
        four[2] = high.x * to_score, four[3] = high.y * to_score;
    }

    // Scores of a page's tokens. Reads the key half of the stream.
    DEVICE void scores(float (&s)[TOKEN_TILES][4], const Columns<Shape>& columns, Attention::Stream& stream,
                       float to_score) const {
        const uint32_t lane = lane_index();
        const unsigned char* piece = stream.step_keys(0);

        // u = q·s, its 8-bit codes, and α and β, one channel partition after another.
        uint32_t codes[K_STEPS][2];
        float alpha[K_PARTITIONS][2];  // of columns 2t and 2t + 1
        float beta[K_PARTITIONS];      // of column g
#pragma unroll
        for (uint32_t p = 0; p < K_PARTITIONS; p++) {
            float u[K_HALVES][4];
            float low = POSITIVE_INFINITY;
            float high = NEGATIVE_INFINITY;
#pragma unroll
            for (uint32_t i = 0; i < K_HALVES; i++) {
                const uint32_t half = p * K_HALVES + i;
                // A lane's scales of the two halves of a k-step are neighbours.
                const Words<8> scales(piece + Packed::K_SCALE, (half / 2 * 4 + lane % 4) * 2 + half % 2);
                float four[4];
                if constexpr (!KEEPS_Q) load_q(four, columns, half, to_score);
#pragma unroll
                for (uint32_t c = 0; c < 4; c++) {
                    u[i][c] = __fmul_rn(KEEPS_Q ? q[half * 4 + c] : four[c], scales.template value<Element>(c));
                    low = fminf(low, u[i][c]);
                    high = fmaxf(high, u[i][c]);
                }
            }
            low = -warp_max<4>(-low);
            high = warp_max<4>(high);
            const EightBit group(low, high);
            beta[p] = low;
            alpha[p][0] = __shfl_sync(FULL_WARP, group.scale, lane % 4 * 8);
            alpha[p][1] = __shfl_sync(FULL_WARP, group.scale, lane % 4 * 8 + 4);
#pragma unroll
            for (uint32_t i = 0; i < K_HALVES; i++) {
                const uint32_t half = p * K_HALVES + i;
                codes[half / 2][half % 2] = pack_codes(group.code(u[i][0], low), group.code(u[i][1], low),
                                                       group.code(u[i][2], low), group.code(u[i][3], low));
            }
        }

        // q·m, the same for all tokens: every row of A is the minima.
        float base[4] = {};
#pragma unroll
        for (uint32_t step = 0; step < K_STEPS; step++) {
            const Words<16> minima(piece + Packed::K_MIN, step * 4 + lane % 4);
            uint32_t b[2][2];
            columns.load_q(b, step);
#pragma unroll
            for (uint32_t half = 0; half < 2; half++) {
                const uint32_t low = minima.word[half * 2];
                const uint32_t high = minima.word[half * 2 + 1];
                const uint32_t a[4] = {low, low, high, high};
                mma_m16n8k16(Element{}, base, a, b[half]);
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) base[i] *= to_score;

        // Σ β·ksum: partitions and the two parts of β lie on K. Sums past tf32's 11 bits are two parts as well.
        constexpr uint32_t ROUNDS = ceil_div<uint32_t>(K_PARTITIONS, 4);
        constexpr bool WIDE = Packed::K_SUM_MAX > 2047;
#pragma unroll
        for (uint32_t round = 0; round < ROUNDS; round++) {
            float own = 0.0f;
#pragma unroll
            for (uint32_t p = round * 4; p < K_PARTITIONS && p < round * 4 + 4; p++) own = lane % 4 == p % 4 ? beta[p] : own;
            const TwoParts parts(own);
            const uint32_t b[2] = {parts.high, parts.low};
            // Lanes without a partition read another's sums, which meet a β of 0.
            const uint32_t partition = min(round * 4 + lane % 4, K_PARTITIONS - 1);
            const Words<PARTITION / 8 * Packed::K_SUM_BYTES> sums(piece + Packed::K_SUMS, lane / 4 * K_PARTITIONS + partition);
#pragma unroll
            for (uint32_t tile = 0; tile < TOKEN_TILES; tile++) {
                const uint32_t sum[2] = {sums.template integer<Packed::K_SUM_BYTES>(tile * 2),
                                         sums.template integer<Packed::K_SUM_BYTES>(tile * 2 + 1)};
#pragma unroll
                for (uint32_t part = 0; part < (WIDE ? 2 : 1); part++) {
                    const uint32_t bits = !WIDE ? ~0u : part == 0 ? 0xffu : ~0xffu;
                    const uint32_t g = bit_cast<uint32_t>(static_cast<float>(sum[0] & bits));
                    const uint32_t g8 = bit_cast<uint32_t>(static_cast<float>(sum[1] & bits));
                    const uint32_t a[4] = {g, g8, g, g8};
                    if (round == 0 && part == 0) mma_m16n8k8_tf32(s[tile], a, b, base);
                    else mma_m16n8k8_tf32(s[tile], a, b);
                }
            }
        }

        // Σ α·(u'·k').
        const int32_t zero[4] = {SUM_START, SUM_START, SUM_START, SUM_START};
#pragma unroll
        for (uint32_t group = 0; group < KeyCodes::GROUPS; group++) {
            if (KeyPieces::begins(group)) piece = stream.step_keys(group / KeyPieces::GROUPS);
            const unsigned char* const units = piece + KeyPieces::group_offset(group);
#pragma unroll
            for (uint32_t p = 0; p < K_PARTITIONS; p++) {
                constexpr uint32_t ROW_PLANES = KeyCodes::ROW_PLANES;
                int32_t sums[ROW_PLANES][4];
                const uint32_t first_half = p * K_HALVES;
                const uint32_t end_half = first_half + K_HALVES;
#pragma unroll
                for (uint32_t step = first_half / 2; step < ceil_div(end_half, 2u); step++) {
                    uint32_t words[KeyCodes::WORDS];
                    KeyCodes::load(words, units + step * KeyCodes::UNIT_BYTES);
                    // A step that two partitions share counts in each with the other's half zero.
                    const uint32_t b[2] = {step * 2 >= first_half ? codes[step][0] : 0,
                                           step * 2 + 1 < end_half ? codes[step][1] : 0};
#pragma unroll
                    for (uint32_t tile = 0; tile < ROW_PLANES; tile++) {
                        uint32_t a[4];
                        KeyCodes::fragment(a, words, tile);
                        if (step == first_half / 2) mma_m16n8k32_u8u8(sums[tile], a, b, zero);
                        else mma_m16n8k32_u8u8(sums[tile], a, b);
                    }
                }
#pragma unroll
                for (uint32_t tile = 0; tile < ROW_PLANES; tile++) {
#pragma unroll
                    for (uint32_t i = 0; i < 4; i++) {
                        float& score = s[group * ROW_PLANES + tile][i];
                        score = __fmaf_rn(alpha[p][i % 2] * KeyCodes::factor(tile), sum_to_f32(sums[tile][i]), score);
                    }
                }
            }
        }
    }

    // O += P·V of a page. Reads the value half of the stream.
    DEVICE void accumulate(const float (&p)[TOKEN_TILES][4], Columns<Shape>& columns, Attention::Stream& stream) const {
        const uint32_t lane = lane_index();
        const unsigned char* piece = stream.step_values(0);

        // w = P·s, its 8-bit codes as B operands, and a and c of this lane's columns.
        uint32_t codes[V_PARTITIONS][TOKEN_TILES];
        float a[V_PARTITIONS][2];
        float c[V_PARTITIONS][2];
#pragma unroll
        for (uint32_t v = 0; v < V_PARTITIONS; v++) {
            const Words<PARTITION / 4> scales(piece + Packed::V_SCALE, lane / 4 * V_PARTITIONS + v);
            const Words<PARTITION / 4> minima(piece + Packed::V_MIN, lane / 4 * V_PARTITIONS + v);
            float w[TOKEN_TILES][4];
            float low[2] = {POSITIVE_INFINITY, POSITIVE_INFINITY};
            float high[2] = {0.0f, 0.0f};  // w is never negative
#pragma unroll
            for (uint32_t tile = 0; tile < TOKEN_TILES; tile++) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) {
                    const uint32_t token = tile * 2 + i / 2;
                    w[tile][i] = __fmul_rn(p[tile][i], scales.template value<Element>(token));
                    low[i % 2] = fminf(low[i % 2], w[tile][i]);
                    high[i % 2] = fmaxf(high[i % 2], w[tile][i]);
                    columns.minimum[v][i % 2] = __fmaf_rn(p[tile][i], minima.template value<Element>(token), columns.minimum[v][i % 2]);
                }
            }
            float reciprocal[2];
#pragma unroll
            for (uint32_t e = 0; e < 2; e++) {
                c[v][e] = -warp_max_strided<4>(-low[e]);
                const EightBit group(c[v][e], warp_max_strided<4>(high[e]));
                a[v][e] = group.scale;
                reciprocal[e] = group.reciprocal;
            }
#pragma unroll
            for (uint32_t tile = 0; tile < TOKEN_TILES; tile++) {
                float code[4];
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) code[i] = __fmaf_rn(w[tile][i] - c[v][i % 2], reciprocal[i % 2], ROUND);
                // Two tokens of column 2t, then of 2t + 1: what Packed::token_of_column makes of the transpose.
                codes[v][tile] = movmatrix_trans(pack_codes(code[0], code[2], code[1], code[3]));
            }
        }

        // Σ c·vsum.
        const Words<V_DIM / 8 * Packed::V_SUM_BYTES> vsums(piece + Packed::V_SUMS, lane / 4);
#pragma unroll
        for (uint32_t tile = 0; tile < V_DIM / 16; tile++) {
            const uint32_t v = tile * 16 / Packed::V_CHANNELS;
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                const float vsum = static_cast<float>(vsums.template integer<Packed::V_SUM_BYTES>(tile * 2 + i / 2));
                columns.o[tile][i] = __fmaf_rn(c[v][i % 2], vsum, columns.o[tile][i]);
            }
        }

        // Σ a·(w'·v').
        const int32_t zero[4] = {SUM_START, SUM_START, SUM_START, SUM_START};
#pragma unroll
        for (uint32_t group = 0; group < ValueCodes::GROUPS; group++) {
            if (ValuePieces::begins(group)) piece = stream.step_values(group / ValuePieces::GROUPS);
            const unsigned char* const units = piece + ValuePieces::group_offset(group);
            constexpr uint32_t ROW_PLANES = ValueCodes::ROW_PLANES;
            int32_t sums[ROW_PLANES][4];
#pragma unroll
            for (uint32_t step = 0; step < ValueCodes::STEPS; step++) {
                uint32_t words[ValueCodes::WORDS];
                ValueCodes::load(words, units + step * ValueCodes::UNIT_BYTES);
#pragma unroll
                for (uint32_t tile = 0; tile < ROW_PLANES; tile++) {
                    const uint32_t v = (group * ROW_PLANES + tile) * 16 / Packed::V_CHANNELS;
                    const uint32_t b[2] = {codes[v][step * 2], codes[v][step * 2 + 1]};
                    uint32_t fragment[4];
                    ValueCodes::fragment(fragment, words, tile);
                    if (step == 0) mma_m16n8k32_u8u8(sums[tile], fragment, b, zero);
                    else mma_m16n8k32_u8u8(sums[tile], fragment, b);
                }
            }
#pragma unroll
            for (uint32_t tile = 0; tile < ROW_PLANES; tile++) {
                const uint32_t v = (group * ROW_PLANES + tile) * 16 / Packed::V_CHANNELS;
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) {
                    float& o = columns.o[group * ROW_PLANES + tile][i];
                    o = __fmaf_rn(a[v][i % 2] * ValueCodes::factor(tile), sum_to_f32(sums[tile][i]), o);
                }
            }
        }
    }

    DEVICE void attend(Columns<Shape>& columns, Attention::Stream& stream, const HackItem& item, uint32_t block,
                       const HackDecodeParams& params) const {
        float s[TOKEN_TILES][4];
        scores(s, columns, stream, score_factor<Shape>(params));
        columns.mask_block(s, item, block, params);
        columns.softmax(s, params);
        accumulate(s, columns, stream);
    }
};

KERNEL(128, Attention::BLOCKS_PER_SM)
hack_decode(const Element* q, const unsigned char* pages, const uint32_t* block_table, const Element* sink_pool,
            const Element* open_pool, const uint32_t* sink_page, const uint32_t* open_page, const uint32_t* valid_len,
            const uint32_t* first_unit, Element* out, float* lse, float* part_acc, float* part_ml, uint32_t* arrivals,
            const __grid_constant__ HackDecodeParams params) {
    DYNAMIC_SHARED(shared_bytes);
    const HackBuffers<Element> buffers{q,         pages,     block_table, sink_pool, open_pool, sink_page, open_page,
                                       valid_len, first_unit, out,        lse,       part_acc,  part_ml,   arrivals};
    Attention::run<Reader>(shared_bytes, buffers, params);
}
