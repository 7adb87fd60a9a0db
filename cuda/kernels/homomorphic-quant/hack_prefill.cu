// Prefill on codes: ragged batches of queries attend to a quantized KV cache without dequantization (HACK).
//
//   out = softmax(mask(cap(scale·q·Kᵀ)))·V,  lse = ln Σ exp(score)        per query token and query head
//
// q           [num_queries, q_heads, QK_DIM]    KV_DTYPE
// pages, block_table, sink_pool, open_pool, sink_page, open_page: the cache, as hack_decode has it
// cu_queries  [batch + 1] u32, first query of each sequence, then one past the last
// kv_len      [batch] u32, tokens that the cache holds of each sequence
// out         [num_queries, q_heads, V_DIM]     KV_DTYPE, with params.keep 0
// lse         [num_queries, q_heads] f32, natural log, with params.keep 0
// state_o     [num_queries, q_heads, V_DIM] f32 and state_ml [num_queries, q_heads, 2] f32: a raw softmax state (m, l, O) in
//             natural units, which is taken in where params.resume is 1 and left there where params.keep is 1; null where neither
// status      first fault: FAULT_BAD_LENGTH, FAULT_BAD_PAGE, FAULT_BAD_INDEX or FAULT_BAD_RANGE with the sequence
//
// The sums of a closed block are those of hack_decode. With params.cached 1 the queries are the last tokens of what the cache
// holds: all is seen as the cache has it. With 0 they come after it, and what they see of each other is another kernel's: an exact
// prefill runs dense attention over the new tokens first, and continues its state here over the cached ones.
//
// Query i of n sits at p = kv_len − n + i, or at kv_len + i, and sees tokens up to p, of them the last `window` and the first
// `window_sinks`. The other kernel has no sinks: with params.cached 0, a sequence that has more queries than `window` and does not
// hold all of `window_sinks` is a bad length, since its last queries would miss sinks that are among the new tokens.
//
// A query without tokens gets out 0 and lse −inf, or its state stays bit for bit as it is. So do the queries of a sequence whose
// length or pages are bad; a sequence whose cu_queries descend, pass num_queries, begin before another's end or are more than q_len
// is left out, and its rows are not written.
//
// Arch:    sm_80 and later.
// Mapping: a block owns 64 rows of one sequence and KV head, 16 for each of four warps; row r is query head r % group of query
//          r / group. Rows lie on M and tokens on N: S = u·Kᵀ and O = W·V by m16n8k32 on u8, where a page's words, which are A
//          operands of hack_decode, serve as pairs of B operands. The warps share a ring through which pages stream piece by
//          piece. A sequence's last rows, which see most, start first.
//          O of more than 128 channels, or of more than 96 beside long queries or scores of 128 tokens, leaves no registers for the
//          rest: two warps share 16 rows, a block owns 32, and each warp computes all scores but half of the channels of O, 1.5
//          times the operations in all. O of more than 128 channels beside scores of 128 tokens takes four warps to 16 rows.
//          With 8-bit codes that last kind spills up to 8 registers: it is allowed, but not shipped.
// Budget:  255 registers, 64·QK_DIM·2 bytes (or 32, or 16) and a ring of up to 64 KB of shared memory. Warp-instructions for 16 rows and a page of 64
//          tokens and 128 channels, 2-bit codes:
//            u: q and scales 130, range 150, codes 176; q·m 20, β·ksum 24, codes into fragments 128, integer products 64, scores 160,
//            softmax 170, P: scales 96, range 150, minimum terms 64, codes 176, vsum 32, outputs 160, copies and loop 150: about
//            1850. In machine code (sm_90a) the loop over pages has 2286 (2 bits), 2259 (4) and 2410 (8), of which some 200 only run for
//            masks or a maximum that moves; twice hack_decode's loop, which serves 8 columns, is 3018.
// Limit:   instruction issue: 2·64·16·256 operations in some 2100 instructions are a quarter of the bf16 tensor cores' rate.
#include "core.cuh"
#include "hack_prefill_params.h"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "ptx/shuffle.cuh"
#include "status_params.h"
#include "tile/hack_attention.cuh"
#include "tile/hack_codes.cuh"
#include "tile/hack_page.cuh"
#include "tile/hack_rows.cuh"
#include "tile/status.cuh"
#include "types.cuh"

using Packed = HackPage<K_BITS, V_BITS, PARTITION, QK_DIM, V_DIM>;
using KeyCodes = Packed::KeyCodes;
using ValueCodes = Packed::ValueCodes;
static_assert(SUMS_FIT<KeyCodes::LARGEST, Packed::K_CHANNELS>, "sums over channels are exact as floats");
static_assert(SUMS_FIT<ValueCodes::LARGEST, PARTITION>, "sums over tokens are exact as floats");

constexpr uint32_t THREADS = 128;
constexpr uint32_t WARPS = THREADS / WARP_SIZE;
using Element = StorageOf<KV_DTYPE>;
using Shape = HackShape<Element, Packed, PARTITION, QK_DIM, V_DIM, WARPS, SOFT_CAP != 0>;
using Attention = HackAttention<Shape>;
using KeyPieces = Attention::Stream::KeyPieces;
using ValuePieces = Attention::Stream::ValuePieces;
// Warps that share 16 rows: see above.
constexpr uint32_t SHARERS = V_DIM > 128 && PARTITION > 64                                   ? 4
                             : V_DIM > 128 || (V_DIM > 96 && (QK_DIM > 128 || PARTITION > 64)) ? 2
                                                                                               : 1;
using WarpRows = Rows<Shape, SHARERS>;

constexpr uint32_t BLOCK_ROWS = WARPS / SHARERS * WarpRows::WARP_ROWS;
constexpr uint32_t Q_BYTES = BLOCK_ROWS * QK_DIM * 2;
constexpr uint32_t K_STEPS = QK_DIM / 32;
constexpr uint32_t TOKEN_TILES = PARTITION / 8;
constexpr uint32_t TOKEN_STEPS = PARTITION / 32;
constexpr uint32_t V_TILES = WarpRows::V_TILES;
constexpr uint32_t K_PARTITIONS = Packed::K_PARTITIONS;
constexpr uint32_t V_PARTITIONS = WarpRows::PARTITIONS;
constexpr uint32_t K_HALVES = Packed::K_CHANNELS / 16;  // halves of k-steps in a channel partition
// tf32 holds 11 bits: sums past them are two numbers.
constexpr uint32_t K_SUM_PARTS = Packed::K_SUM_MAX > 2047 ? 2 : 1;
constexpr uint32_t V_SUM_PARTS = Packed::V_SUM_MAX > 2047 ? 2 : 1;

// Part `part` of `parts` of a sum of codes, as tf32.
DEVICE uint32_t sum_part(uint32_t sum, uint32_t part, uint32_t parts) {
    const uint32_t bits = parts == 1 ? ~0u : part == 0 ? 0xffu : ~0xffu;
    return bit_cast<uint32_t>(static_cast<float>(sum & bits));
}

// Scores of a page's tokens. Reads the key half of the stream.
DEVICE void scores(float (&s)[TOKEN_TILES][4], const WarpRows& rows, Attention::Stream& stream, float to_score) {
    const uint32_t lane = lane_index();
    const unsigned char* piece = stream.step_keys(0);

    // u = q·s, its 8-bit codes as A operands, and α and β of this lane's rows, one channel partition after another.
    uint32_t codes[K_STEPS][4];
    float alpha[K_PARTITIONS][2];
    float beta[K_PARTITIONS][2];
#pragma unroll
    for (uint32_t p = 0; p < K_PARTITIONS; p++) {
        // Or the compiler loads all of a long query ahead, and runs out of registers.
        if constexpr (K_PARTITIONS > 4) __syncwarp();
#pragma unroll
        for (uint32_t e = 0; e < 2; e++) {
            float u[K_HALVES][4];
            float low = POSITIVE_INFINITY;
            float high = NEGATIVE_INFINITY;
#pragma unroll
            for (uint32_t i = 0; i < K_HALVES; i++) {
                const uint32_t half = p * K_HALVES + i;
                // A lane's scales of the two halves of a k-step are neighbours.
                const Words<8> scales(piece + Packed::K_SCALE, (half / 2 * 4 + lane % 4) * 2 + half % 2);
                rows.load_q(u[i], half, e);
#pragma unroll
                for (uint32_t c = 0; c < 4; c++) {
                    u[i][c] = __fmul_rn(u[i][c], scales.template value<Element>(c));
                    low = fminf(low, u[i][c]);
                    high = fmaxf(high, u[i][c]);
                }
            }
            low = -warp_max<4>(-low);
            high = warp_max<4>(high);
            const EightBit group(low, high);
            alpha[p][e] = group.scale * to_score;
            beta[p][e] = low * to_score;
#pragma unroll
            for (uint32_t i = 0; i < K_HALVES; i++) {
                const uint32_t half = p * K_HALVES + i;
                codes[half / 2][half % 2 * 2 + e] = pack_codes(group.code(u[i][0], low), group.code(u[i][1], low),
                                                               group.code(u[i][2], low), group.code(u[i][3], low));
            }
        }
    }

    // q·m, the same for all tokens: every column of B is the minima.
    float base[4] = {};
#pragma unroll
    for (uint32_t step = 0; step < K_STEPS; step++) {
        const Words<16> minima(piece + Packed::K_MIN, step * 4 + lane % 4);
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            uint32_t a[4];
            rows.load_q(a, step * 2 + half);
            const uint32_t b[2] = {minima.word[half * 2], minima.word[half * 2 + 1]};
            mma_m16n8k16(Element{}, base, a, b);
        }
    }
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) base[i] *= to_score;

    // Σ β·ksum: partitions and the two parts of β lie on K.
    constexpr uint32_t ROUNDS = ceil_div<uint32_t>(K_PARTITIONS, 4);
#pragma unroll
    for (uint32_t round = 0; round < ROUNDS; round++) {
        float own[2] = {0.0f, 0.0f};
#pragma unroll
        for (uint32_t p = round * 4; p < K_PARTITIONS && p < round * 4 + 4; p++) {
#pragma unroll
            for (uint32_t e = 0; e < 2; e++) own[e] = lane % 4 == p % 4 ? beta[p][e] : own[e];
        }
        const TwoParts of_g(own[0]);
        const TwoParts of_g8(own[1]);
        const uint32_t a[4] = {of_g.high, of_g8.high, of_g.low, of_g8.low};
        // Lanes without a partition read another's sums, which meet a β of 0.
        const uint32_t partition = min(round * 4 + lane % 4, K_PARTITIONS - 1);
        const Words<TOKEN_TILES * Packed::K_SUM_BYTES> sums(piece + Packed::K_SUMS, lane / 4 * K_PARTITIONS + partition);
#pragma unroll
        for (uint32_t n = 0; n < TOKEN_TILES; n++) {
#pragma unroll
            for (uint32_t part = 0; part < K_SUM_PARTS; part++) {
                const uint32_t sum = sum_part(sums.template integer<Packed::K_SUM_BYTES>(n), part, K_SUM_PARTS);
                const uint32_t b[2] = {sum, sum};
                if (round == 0 && part == 0) mma_m16n8k8_tf32(s[n], a, b, base);
                else mma_m16n8k8_tf32(s[n], a, b);
            }
        }
    }

    // Σ α·(u'·k').
    const int32_t zero[4] = {SUM_START, SUM_START, SUM_START, SUM_START};
#pragma unroll
    for (uint32_t group = 0; group < KeyCodes::GROUPS; group++) {
        if (KeyPieces::begins(group)) piece = stream.step_keys(group / KeyPieces::GROUPS);
        const unsigned char* const units = piece + KeyPieces::group_offset(group);
        constexpr uint32_t ROW_PLANES = KeyCodes::ROW_PLANES;
#pragma unroll
        for (uint32_t p = 0; p < K_PARTITIONS; p++) {
            int32_t sums[2 * ROW_PLANES][4];
            const uint32_t first_half = p * K_HALVES;
            const uint32_t end_half = first_half + K_HALVES;
#pragma unroll
            for (uint32_t step = first_half / 2; step < ceil_div(end_half, 2u); step++) {
                uint32_t words[KeyCodes::WORDS];
                KeyCodes::load(words, units + step * KeyCodes::UNIT_BYTES);
                // A step that two partitions share counts in each with the other's half zero.
                const bool has_low = step * 2 >= first_half;
                const bool has_high = step * 2 + 1 < end_half;
                const uint32_t a[4] = {has_low ? codes[step][0] : 0, has_low ? codes[step][1] : 0,
                                       has_high ? codes[step][2] : 0, has_high ? codes[step][3] : 0};
#pragma unroll
                for (uint32_t tile = 0; tile < ROW_PLANES; tile++) {
                    uint32_t fragment[4];
                    KeyCodes::fragment(fragment, words, tile);
#pragma unroll
                    for (uint32_t j = 0; j < 2; j++) {
                        const uint32_t b[2] = {fragment[j], fragment[j + 2]};
                        int32_t(&sum)[4] = sums[2 * tile + j];
                        if (step == first_half / 2) mma_m16n8k32_u8u8(sum, a, b, zero);
                        else mma_m16n8k32_u8u8(sum, a, b);
                    }
                }
            }
#pragma unroll
            for (uint32_t n = 0; n < 2 * ROW_PLANES; n++) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) {
                    float& score = s[group * 2 * ROW_PLANES + n][i];
                    score = __fmaf_rn(alpha[p][i / 2] * KeyCodes::factor(n / 2), sum_to_f32(sums[n][i]), score);
                }
            }
        }
    }
}

// O += P·V of a page. Reads the value half of the stream.
DEVICE void accumulate(const float (&p)[TOKEN_TILES][4], WarpRows& rows, Attention::Stream& stream) {
    const uint32_t lane = lane_index();
    const unsigned char* piece = stream.step_values(0);

    // w = P·s, its 8-bit codes as A operands, and a and c of this lane's rows.
    uint32_t codes[V_PARTITIONS][TOKEN_STEPS][4];
    float a[V_PARTITIONS][2];
    float c[V_PARTITIONS][2];
#pragma unroll
    for (uint32_t v = 0; v < V_PARTITIONS; v++) {
        // Of tokens 2t and 2t + 1 of every eight.
        using OfTokens = Words<TOKEN_TILES * 2>;
        const uint32_t first = lane % 4 * 2;
        const uint32_t of_first = first * Packed::V_PARTITIONS + rows.first_partition() + v;
        const uint32_t of_second = of_first + Packed::V_PARTITIONS;
        const OfTokens scales[2] = {{piece + Packed::V_SCALE, of_first}, {piece + Packed::V_SCALE, of_second}};
        const OfTokens minima[2] = {{piece + Packed::V_MIN, of_first}, {piece + Packed::V_MIN, of_second}};
#pragma unroll
        for (uint32_t e = 0; e < 2; e++) {
            float w[TOKEN_TILES][2];
            float low = POSITIVE_INFINITY;
            float high = 0.0f;  // w is never negative
            float minimum = rows.minimum[v][e];
#pragma unroll
            for (uint32_t n = 0; n < TOKEN_TILES; n++) {
#pragma unroll
                for (uint32_t i = 0; i < 2; i++) {
                    const float of_token = p[n][2 * e + i];
                    w[n][i] = __fmul_rn(of_token, scales[i].template value<Element>(n));
                    low = fminf(low, w[n][i]);
                    high = fmaxf(high, w[n][i]);
                    minimum = __fmaf_rn(of_token, minima[i].template value<Element>(n), minimum);
                }
            }
            rows.minimum[v][e] = minimum;
            low = -warp_max<4>(-low);
            const EightBit group(low, warp_max<4>(high));
            a[v][e] = group.scale;
            c[v][e] = low;
#pragma unroll
            for (uint32_t sixteen = 0; sixteen < TOKEN_TILES / 2; sixteen++) {
                const float(&first_eight)[2] = w[2 * sixteen];
                const float(&second_eight)[2] = w[2 * sixteen + 1];
                // The order of Packed::token_of_column.
                codes[v][sixteen / 2][sixteen % 2 * 2 + e] =
                    pack_codes(group.code(first_eight[0], low), group.code(second_eight[0], low),
                               group.code(first_eight[1], low), group.code(second_eight[1], low));
            }
        }
    }

    // Σ c·vsum: the two parts of c lie on K, all other columns of A are zero.
    const Words<V_TILES * Packed::V_SUM_BYTES> vsums(piece + Packed::V_SUMS, lane / 4 * SHARERS + rows.run);
#pragma unroll
    for (uint32_t tile = 0; tile < V_TILES; tile++) {
        const uint32_t v = tile * V_PARTITIONS / V_TILES;
        const TwoParts of_g(lane % 4 == 0 ? c[v][0] : 0.0f);
        const TwoParts of_g8(lane % 4 == 0 ? c[v][1] : 0.0f);
        const uint32_t parts[4] = {of_g.high, of_g8.high, of_g.low, of_g8.low};
#pragma unroll
        for (uint32_t part = 0; part < V_SUM_PARTS; part++) {
            const uint32_t sum = sum_part(vsums.template integer<Packed::V_SUM_BYTES>(tile), part, V_SUM_PARTS);
            const uint32_t b[2] = {sum, sum};
            mma_m16n8k8_tf32(rows.o[tile], parts, b);
        }
    }

    // Σ a·(w'·v') of this warp's groups of channels.
    const int32_t zero[4] = {SUM_START, SUM_START, SUM_START, SUM_START};
    constexpr uint32_t RUN = ValueCodes::GROUPS / SHARERS;
    static_assert(RUN * SHARERS == ValueCodes::GROUPS, "whole groups");
#pragma unroll
    for (uint32_t group = 0; group < ValueCodes::GROUPS; group++) {
        if (ValuePieces::begins(group)) piece = stream.step_values(group / ValuePieces::GROUPS);
        if (SHARERS > 1 && group / RUN != rows.run) continue;
        const unsigned char* const units = piece + ValuePieces::group_offset(group);
        constexpr uint32_t ROW_PLANES = ValueCodes::ROW_PLANES;
        int32_t sums[2 * ROW_PLANES][4];
#pragma unroll
        for (uint32_t step = 0; step < TOKEN_STEPS; step++) {
            uint32_t words[ValueCodes::WORDS];
            ValueCodes::load(words, units + step * ValueCodes::UNIT_BYTES);
#pragma unroll
            for (uint32_t tile = 0; tile < ROW_PLANES; tile++) {
                const uint32_t v = (group % RUN * ROW_PLANES + tile) * 2 * V_PARTITIONS / V_TILES;
                uint32_t fragment[4];
                ValueCodes::fragment(fragment, words, tile);
#pragma unroll
                for (uint32_t j = 0; j < 2; j++) {
                    const uint32_t b[2] = {fragment[j], fragment[j + 2]};
                    int32_t(&sum)[4] = sums[2 * tile + j];
                    if (step == 0) mma_m16n8k32_u8u8(sum, codes[v][step], b, zero);
                    else mma_m16n8k32_u8u8(sum, codes[v][step], b);
                }
            }
        }
#pragma unroll
        for (uint32_t n = 0; n < 2 * ROW_PLANES; n++) {
            const uint32_t place = group % RUN * 2 * ROW_PLANES + n;
            const uint32_t v = place * V_PARTITIONS / V_TILES;
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                float& o = rows.o[place][i];
                o = __fmaf_rn(a[v][i / 2] * ValueCodes::factor(n / 2), sum_to_f32(sums[n][i]), o);
            }
        }
    }
}

// Whether a sequence's run of queries is one: no thread of the block finds a query out of order.
DEVICE bool queries_are_bad(const uint32_t* cu_queries, uint32_t sequence, const HackPrefillParams& params) {
    const uint32_t begin = cu_queries[sequence];
    const uint32_t end = cu_queries[sequence + 1];
    bool bad = begin > end || end > params.num_queries || end - begin > params.cache.q_len;
    for (uint32_t before = threadIdx.x; before < sequence; before += THREADS) bad |= cu_queries[before] > begin;
    return __syncthreads_or(bad) != 0;
}

// The length of the sequence, or 0 where it cannot be read, or where its queries need sinks that nobody attends to.
DEVICE uint32_t readable_len(uint32_t len, uint32_t queries, uint32_t sequence, const uint32_t* block_table,
                             const uint32_t* sink_page, const uint32_t* open_page, uint64_t* status,
                             const HackPrefillParams& prefill) {
    const HackDecodeParams& params = prefill.cache;
    const HackTokens tokens(len, params);
    const bool misses_sinks =
        !prefill.cached && params.window > 0 && len < params.window_sinks && queries > params.window;
    if (len > params.max_kv_len || tokens.closed > params.max_pages || misses_sinks) {
        if (threadIdx.x == 0) report_fault(status, FAULT_BAD_LENGTH, sequence);
        return 0;
    }
    bool bad = false;
    const uint32_t* const table = block_table + sequence * params.table_batch_stride;
    for (uint32_t page = threadIdx.x; page < tokens.closed; page += THREADS) bad |= table[page] >= params.num_pages;
    if (__syncthreads_or(bad)) {
        if (threadIdx.x == 0) report_fault(status, FAULT_BAD_PAGE, sequence);
        return 0;
    }
    if ((tokens.sinks > 0 && sink_page[sequence] >= params.num_sink_pages) ||
        (tokens.open > 0 && open_page[sequence] >= params.num_open_pages)) {
        if (threadIdx.x == 0) report_fault(status, FAULT_BAD_INDEX, sequence);
        return 0;
    }
    return len;
}

// The rows from `first_row` on of a sequence of `queries` queries.
DEVICE HackRowsItem item_of(uint32_t sequence, uint32_t kv_head, uint32_t first_row, uint32_t first_query, uint32_t queries,
                            uint32_t kv_len, const HackPrefillParams& params) {
    const HackDecodeParams& cache = params.cache;
    HackRowsItem item;
    item.sequence = sequence;
    item.kv_head = kv_head;
    item.first_column = first_row;
    item.first_query = first_query;
    item.queries = queries;
    item.kv_len = kv_len;
    item.total = params.cached ? kv_len : kv_len + queries;
    const HackTokens tokens(kv_len, cache);
    item.sinks = tokens.sinks;
    item.closed = tokens.closed;
    item.open = tokens.open;
    item.of_first = item.visible_to_row(first_row, cache);
    const VisibleTokens of_last = item.visible_to_row(min(first_row + BLOCK_ROWS, queries * cache.group) - 1, cache);
    item.last_begin = of_last.begin;
    const uint32_t begin = item.of_first.begin > item.sinks ? item.of_first.begin - item.sinks : 0;
    const uint32_t end = of_last.end > item.sinks ? of_last.end - item.sinks : 0;
    item.end_block = min(ceil_div<uint32_t>(end, PARTITION), item.closed);
    item.begin_block = min(begin / PARTITION, item.end_block);
    return item;
}

// Index of a row in out and lse.
DEVICE uint64_t row_index(const HackRowsItem& item, uint32_t row, const HackDecodeParams& params) {
    const uint64_t token = item.first_query + row / params.group;
    return token * params.kv_heads * params.group + item.kv_head * params.group + row % params.group;
}

// Loads the block's queries into shared memory as swizzled rows; rows that do not exist are zero.
DEVICE void load_queries(uint32_t q_tile, const Element* q, const HackRowsItem& item, const HackDecodeParams& params) {
    constexpr uint32_t K_ROW = QK_DIM * 2;
    constexpr uint32_t CHUNKS = K_ROW / 16;
    for (uint32_t index = threadIdx.x; index < BLOCK_ROWS * CHUNKS; index += THREADS) {
        const uint32_t row = index / CHUNKS;
        const uint32_t chunk = index % CHUNKS;
        const bool exists = item.first_column + row < item.queries * params.group;
        const Element* source = q + (exists ? row_index(item, item.first_column + row, params) * QK_DIM : 0) + chunk * 8;
        cp_async_16_zfill(q_tile + Swizzle<K_ROW>::offset(row, chunk), source, exists ? 16 : 0);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
}

// The factors by which a row's state and the one it continues come together, and their sum's (m, l).
struct Joined {
    float m;  // natural units
    float l;
    float own;
    float before;
    bool continues;  // whether there is a state before
};

DEVICE Joined join(float m, float l, const float* ml_before) {
    Joined joined{m * LN_2, l, 1.0f, 0.0f, false};
    // The running maximum passes NaN over; a state without a maximum would count as empty.
    if (l != l) joined.m = QUIET_NAN;
    if (ml_before == nullptr || ml_before[0] == NEGATIVE_INFINITY) return joined;
    joined.continues = true;
    const float larger = fmaxf(joined.m, ml_before[0]);
    joined.own = m == NEGATIVE_INFINITY ? 0.0f : exp_relative(joined.m, larger);
    joined.before = exp_relative(ml_before[0], larger);
    joined.l = l * joined.own + ml_before[1] * joined.before;
    joined.m = joined.l != joined.l ? QUIET_NAN : larger;
    return joined;
}

KERNEL(128, 2)
hack_prefill(const Element* q, const unsigned char* pages, const uint32_t* block_table, const Element* sink_pool,
             const Element* open_pool, const uint32_t* sink_page, const uint32_t* open_page, const uint32_t* cu_queries,
             const uint32_t* kv_len, Element* out, float* lse, float* state_o, float* state_ml, uint64_t* status,
             const __grid_constant__ HackPrefillParams params) {
    DYNAMIC_SHARED(shared_bytes);
    const HackDecodeParams& cache = params.cache;
    const uint32_t sequence = blockIdx.y / cache.kv_heads;
    const uint32_t kv_head = blockIdx.y % cache.kv_heads;

    grid_dependency_wait();
    if (queries_are_bad(cu_queries, sequence, params)) {
        if (threadIdx.x == 0) report_fault(status, FAULT_BAD_RANGE, sequence);
        return;
    }
    const uint32_t first_query = cu_queries[sequence];
    const uint32_t queries = cu_queries[sequence + 1] - first_query;
    const uint32_t tiles = ceil_div(queries * cache.group, BLOCK_ROWS);
    if (blockIdx.x >= tiles) return;
    const uint32_t len = readable_len(kv_len[sequence], queries, sequence, block_table, sink_page, open_page, status, params);
    const uint32_t first_row = (tiles - 1 - blockIdx.x) * BLOCK_ROWS;
    const HackRowsItem item = item_of(sequence, kv_head, first_row, first_query, queries, len, params);

    load_queries(shared_address(shared_bytes), q, item, cache);
    Attention::Stream stream{shared_bytes + Q_BYTES,
                             0,
                             1,
                             pages,
                             Attention::Stream::place_of(kv_head),
                             block_table + sequence * cache.table_batch_stride,
                             cache};
    WarpRows rows;
    rows.start(shared_bytes, warp_index() / SHARERS * WarpRows::WARP_ROWS, warp_index() % SHARERS);
    const HackBuffers<Element> buffers{q,         pages,   block_table, sink_pool, open_pool, sink_page, open_page,
                                       nullptr,   nullptr, nullptr,     nullptr,   nullptr,   nullptr,   nullptr};
    Attention::attend_16_bit(rows, stream, item, buffers, cache);
    const float to_score = score_factor<Shape>(cache);
    stream.start(item.begin_block, item.end_block);
    for (uint32_t block = item.begin_block; block < item.end_block; block++) {
        float s[TOKEN_TILES][4];
        scores(s, rows, stream, to_score);
        rows.mask_block(s, item, block, cache);
        rows.softmax(s, cache);
        accumulate(s, rows, stream);
    }
    stream.finish();
    rows.finish();

    const uint32_t t = lane_index() % 4;
    const bool writes_ml = t == 0 && rows.run == 0;
    uint64_t index[2];
    Joined joined[2];
    bool exists[2];
#pragma unroll
    for (uint32_t e = 0; e < 2; e++) {
        const uint32_t row = first_row + rows.first_row + lane_index() / 4 + 8 * e;
        exists[e] = row < queries * cache.group;
        index[e] = exists[e] ? row_index(item, row, cache) : 0;
        joined[e] = join(rows.m[e], rows.l[e], exists[e] && params.resume ? state_ml + 2 * index[e] : nullptr);
    }
    // All lanes of a row have read what one of them overwrites.
    if constexpr (SHARERS == 1) __syncwarp();
    else __syncthreads();
#pragma unroll
    for (uint32_t e = 0; e < 2; e++) {
        if (!exists[e]) continue;
        const bool stays = params.resume && rows.m[e] == NEGATIVE_INFINITY && rows.l[e] == 0.0f;
        if (params.keep && stays) continue;
        if (!params.keep) {
            SoftmaxState state;
            state.m = joined[e].m;
            state.l = joined[e].l;
            const float scale = state.l > 0.0f || state.l != state.l ? 1.0f / state.l : 0.0f;
            joined[e].own *= scale;
            joined[e].before *= scale;
            if (writes_ml) lse[index[e]] = state.lse();
        } else if (writes_ml) {
            state_ml[2 * index[e]] = joined[e].m;
            state_ml[2 * index[e] + 1] = joined[e].l;
        }
#pragma unroll
        for (uint32_t tile = 0; tile < V_TILES; tile++) {
            const uint64_t place = index[e] * V_DIM + rows.run * WarpRows::CHANNELS + tile * 8 + t * 2;
            float2 pair = make_float2(rows.o[tile][2 * e] * joined[e].own, rows.o[tile][2 * e + 1] * joined[e].own);
            if (joined[e].continues) {  // an empty state's O may hold anything
                const float2 before = *reinterpret_cast<const float2*>(state_o + place);
                pair.x += before.x * joined[e].before;
                pair.y += before.y * joined[e].before;
            }
            if (params.keep) *reinterpret_cast<float2*>(state_o + place) = pair;
            else *reinterpret_cast<uint32_t*>(out + place) = pack2<Element>(pair.x, pair.y);
        }
    }
}
