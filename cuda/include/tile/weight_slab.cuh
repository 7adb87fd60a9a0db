// Weights and activations of hybrid GEMM in shared memory, and the tensor cores' operands made of them.
//
// A slab is 64 output features x 128 bytes of codes, the 16-byte chunk c of row r at chunk c ^ (r % 8): the layout of
// hybrid-gemm/src/pack, in which packed weights already lie in memory. It covers 64 inputs of f16 and bf16, 128 of int8 and
// fp8, 256 of int4, behind which come its int4 scales, f16 [groups, 64], and zero points [groups, 32 bytes], those of rows g and
// g + 8 of 16 in one byte. Activations come in chunks of [tokens, 64 inputs].
//
// Weights are the A operand (16 output features), activations the B operand (8 tokens). Sums over K may take their terms in
// any order, so codes go to the columns of A where ldmatrix puts them, and B follows:
//
//   16-bit:  lane t of a group of four has inputs 2t, 2t+1 and 2t+8, 2t+9 of 16; B by ldmatrix
//   8-bit:   4t … 4t+3 of 16; B is eight bytes of the token's row
//   int4:    8t … 8t+7 of 32, for two products; B is sixteen bytes of the token's row
//
// Codes become 16-bit floats exactly, less their zero points where they have some, which are small integers too. Scales never touch
// them: that of int8 and of fp8 by rows belongs to the epilogue, that of an int4 group or of a block of fp8 multiplies the group's
// sum in f32, 64 inputs at most at a time. A slab lies in one block of fp8, so a block's scale comes with the slab.
#pragma once

#include "core.cuh"
#include "hybrid_gemm_params.h"
#include "ptx/cp_async.cuh"
#include "ptx/half2.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "tile/gemm_epilogue.cuh"
#include "tile/fragment.cuh"
#include "types.cuh"

constexpr uint32_t SLAB_ROW_BYTES = 128;
constexpr uint32_t X_CHUNK_INPUTS = 64;
constexpr uint32_t PIECE = 8;  // 16-bit elements in 16 bytes

// What a FORMAT is.
template <int Format>
struct WeightFormat {
    static constexpr bool FLOAT = Format == HYBRID_FORMAT_FLOAT;
    static constexpr bool INT8 = Format == HYBRID_FORMAT_INT8;
    static constexpr bool BLOCKS = Format == HYBRID_FORMAT_FP8_BLOCKS;
    static constexpr bool FP8 = Format == HYBRID_FORMAT_FP8_ROWS || BLOCKS;
    static constexpr bool BYTES = INT8 || FP8;
    static constexpr bool INT4 = !FLOAT && !BYTES;
    static constexpr bool ZERO_POINTS = INT4 && Format % 32 == HYBRID_FORMAT_ZERO_POINTS;
    // Scales that wait for the epilogue, and scales of sums on the way.
    static constexpr bool CHANNEL_SCALES = INT8 || Format == HYBRID_FORMAT_FP8_ROWS;
    static constexpr bool GROUPED = INT4 || BLOCKS;
    // Inputs of a slab.
    static constexpr uint32_t INPUTS = FLOAT ? 64 : BYTES ? 128 : 256;
    // Chunks of activations that go with a slab.
    static constexpr uint32_t X_CHUNKS = INPUTS / X_CHUNK_INPUTS;
    // Inputs that share a scale.
    static constexpr uint32_t GROUP = INT4 ? Format / 32 * 32 : INPUTS;
    static_assert(!BLOCKS || (GROUP == HYBRID_FP8_BLOCK && HYBRID_FP8_BLOCK % HYBRID_TILE_ROWS == 0), "a slab lies in one block");
    // Inputs whose sum a scale multiplies at a time: a group, or a chunk of activations of it.
    static constexpr uint32_t SCALED = GROUP < X_CHUNK_INPUTS ? GROUP : X_CHUNK_INPUTS;
    // Bytes of a group's scales and zero points, and of those of a slab.
    static constexpr uint32_t GROUP_SCALE_BYTES = INT4 ? HYBRID_TILE_ROWS * 2 : 0;
    static constexpr uint32_t GROUP_ZERO_BYTES = ZERO_POINTS ? HYBRID_TILE_ROWS / 2 : 0;
    static constexpr uint32_t ZEROS_AT = INPUTS / GROUP * GROUP_SCALE_BYTES;
    static constexpr uint32_t SCALE_BYTES = ZEROS_AT + INPUTS / GROUP * GROUP_ZERO_BYTES;
    // Bytes of a slab's scale that lies beside the matrix, and room for all of its scales in shared memory, where tiles start at
    // multiples of 128.
    static constexpr uint32_t BESIDE_BYTES = BLOCKS ? sizeof(float) : 0;
    static constexpr uint32_t SCALE_ROOM = ceil_div(SCALE_BYTES + BESIDE_BYTES, 128u) * 128;

    // Where chunk `chunk` of a token's 128 bytes lies: the reads of B above meet no bank conflict.
    static DEVICE uint32_t x_chunk(uint32_t token, uint32_t chunk) {
        return FLOAT ? chunk ^ token % 8 : BYTES ? chunk ^ token % 4 * 2 : chunk ^ token % 2 * 4;
    }
};

DEVICE bool multiple_of_16(const void* address, int64_t bytes) {
    return (reinterpret_cast<uint64_t>(address) | static_cast<uint64_t>(bytes)) % 16 == 0;
}

// 16 bytes of elements of which the first `count` are there and the rest zero, one by one: rows that start anywhere.
template <class Element>
DEVICE uint4 gather_piece(const Element* source, uint32_t count) {
    uint32_t words[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        const uint32_t low = 2 * i < count ? source[2 * i].bits : 0;
        const uint32_t high = 2 * i + 1 < count ? source[2 * i + 1].bits : 0;
        words[i] = low | high << 16;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// Starts to bring inputs k0 … of a matrix [rows, k] to `tile`, `Rows` rows of 128 bytes; rows and inputs that are not there
// become zeros. `place` says where a chunk of a row lies. All `Threads` threads call.
template <uint32_t Threads, uint32_t Rows, class Element, class Place>
DEVICE void stage_rows(unsigned char* tile, const Element* source, int64_t stride, uint32_t rows, uint32_t k, uint32_t k0,
                       bool aligned, const Place& place) {
    const uint32_t address = shared_address(tile);
    const auto elements = [&](uint32_t piece) {
        const uint32_t input = k0 + piece % 8 * PIECE;
        const uint32_t there = piece / 8 < rows && input < k ? k - input : 0;
        return there < PIECE ? there : PIECE;
    };
    const auto from = [&](uint32_t piece) { return source + piece / 8 * stride + k0 + piece % 8 * PIECE; };
    const auto to = [&](uint32_t piece) { return piece / 8 * SLAB_ROW_BYTES + place(piece / 8, piece % 8) * 16; };
    if (aligned) {
#pragma unroll
        for (uint32_t piece = threadIdx.x; piece < Rows * 8; piece += Threads) {
            const uint32_t count = elements(piece);
            cp_async_16_zfill(address + to(piece), count > 0 ? from(piece) : source, count * sizeof(Element));
        }
    } else {
#pragma unroll 1
        for (uint32_t piece = threadIdx.x; piece < Rows * 8; piece += Threads) {
            *reinterpret_cast<uint4*>(tile + to(piece)) = gather_piece(from(piece), elements(piece));
        }
    }
}

// Starts to bring `bytes` (a multiple of 16) of packed weights, each read once, to shared memory.
template <uint32_t Threads>
DEVICE void stage_packed(uint32_t tile, const unsigned char* source, uint32_t bytes, uint64_t policy) {
#pragma unroll 4
    for (uint32_t at = threadIdx.x * 16; at < bytes; at += Threads * 16) cp_async_16_policy(tile + at, source + at, policy);
}

// Where weights lie.
struct WeightSource {
    const unsigned char* base;
    uint32_t first_column;  // at `base`
    bool row_major;
    bool aligned;  // rows, for 16-byte reads
};

// The scales of an expert's output features, for the epilogue.
template <int Format>
DEVICE const float* channel_scales(const float* scales, const HybridGemmParams& params, uint32_t expert) {
    return WeightFormat<Format>::CHANNEL_SCALES ? scales + static_cast<uint64_t>(expert) * params.n : nullptr;
}

// Starts to bring the scale of slab `slab` of a column: that of its block, of an expert's [ceil(n / 128), ceil(k / 128)]. One thread
// calls.
DEVICE void stage_block_scale(unsigned char* place, const float* scales, const HybridGemmParams& params, uint32_t expert,
                              uint32_t column, uint32_t slab) {
    const uint64_t block_rows = ceil_div(params.n, uint32_t(HYBRID_FP8_BLOCK));
    const uint64_t row = expert * block_rows + column / (HYBRID_FP8_BLOCK / HYBRID_TILE_ROWS);
    cp_async_4(shared_address(place), scales + row * ceil_div(params.k, uint32_t(HYBRID_FP8_BLOCK)) + slab);
}

// Starts to bring slab `slab` of a tile to shared memory: codes to `codes`, scales that lie with them to `scales`; gives
// the bytes asked for.
template <uint32_t Threads, int Format, class Element>
DEVICE uint32_t stage_slab(unsigned char* codes, unsigned char* scales, const WeightSource& source, const HybridGemmParams& params,
                           uint32_t column, uint32_t k_tile, uint32_t slab, uint64_t policy) {
    using W = WeightFormat<Format>;
    const uint32_t k0 = (k_tile * params.tile_slabs + slab) * W::INPUTS;
    if (W::FLOAT && source.row_major) {
        const uint32_t row = column * HYBRID_TILE_ROWS;
        const uint32_t rows = params.n - row < HYBRID_TILE_ROWS ? params.n - row : HYBRID_TILE_ROWS;
        const uint32_t inputs = params.k - k0 < W::INPUTS ? params.k - k0 : W::INPUTS;
        const Element* const matrix = reinterpret_cast<const Element*>(source.base);
        const uint64_t offset = static_cast<uint64_t>(row - source.first_column * HYBRID_TILE_ROWS) * params.k;
        stage_rows<Threads, HYBRID_TILE_ROWS>(codes, matrix + offset, params.k, rows, params.k, k0, source.aligned,
                                              [](uint32_t row, uint32_t chunk) { return chunk ^ row % 8; });
        return rows * inputs * sizeof(Element);
    }
    // Every tile but the last of a column is full.
    const uint32_t before = k_tile * params.tile_slabs;
    const uint32_t left = ceil_div(params.k, W::INPUTS) - before;
    const uint32_t slabs = left < params.tile_slabs ? left : params.tile_slabs;
    const unsigned char* const tile = source.base + (column - source.first_column) * params.column_bytes
                                      + before * static_cast<uint64_t>(HYBRID_SLAB_BYTES + W::SCALE_BYTES);
    stage_packed<Threads>(shared_address(codes), tile + slab * HYBRID_SLAB_BYTES, HYBRID_SLAB_BYTES, policy);
    if (W::INT4) {
        const unsigned char* const from = tile + slabs * HYBRID_SLAB_BYTES + slab * W::SCALE_BYTES;
        stage_packed<Threads>(shared_address(scales), from, W::SCALE_BYTES, policy);
    }
    return HYBRID_SLAB_BYTES + W::SCALE_BYTES;
}

// Bits of pairs of 16-bit floats: 1, and the 2ⁿ from which on the mantissa's last bit is 1.
template <class Element>
struct PairBits;
template <>
struct PairBits<f16> {
    static constexpr uint32_t ONE = 0x3c003c00, BASE = 0x64006400;
};
template <>
struct PairBits<bf16> {
    static constexpr uint32_t ONE = 0x3f803f80, BASE = 0x43004300;
};
constexpr uint32_t PAIR_SIGNS = 0x80008000;

// Exact floats of two codes of 8 bits, zero-extended in the halves of `codes`: 2ⁿ + (c & 127) less 2ⁿ + (c & 128).
template <class Element>
DEVICE uint32_t floats_of_int8(uint32_t codes) {
    using Bits = PairBits<Element>;
    return fma2(Element{}, (codes & 0x007f007f) | Bits::BASE, Bits::ONE, (codes & 0x00800080) | Bits::BASE | PAIR_SIGNS);
}

// What is added to two codes of 4 bits for a zero point: -(2ⁿ + zero), twice. Symmetric codes are stored 8 higher.
template <class Element>
DEVICE uint32_t less_zero_point(uint32_t zero) {
    return zero * 0x00010001 | PairBits<Element>::BASE | PAIR_SIGNS;
}

// Exact floats of two codes of 4 bits in bits 0-3 of the halves of `codes`, less a zero point: 2ⁿ + c less 2ⁿ + zero.
template <class Element>
DEVICE uint32_t floats_of_int4(uint32_t codes, uint32_t less_zero) {
    using Bits = PairBits<Element>;
    return fma2(Element{}, (codes & 0x000f000f) | Bits::BASE, Bits::ONE, less_zero);
}

// Exact floats of pair `Pair` of four fp8 e4m3.
template <int Pair>
DEVICE uint32_t floats_of_fp8(f16, uint32_t codes) { return cvt_f16x2_e4m3x4<Pair>(codes); }
template <int Pair>
DEVICE uint32_t floats_of_fp8(bf16, uint32_t codes) { return cvt_bf16x2_e4m3x4<Pair>(codes); }

// A operands of 32 inputs, number `half` of the slab: rows row0 … row0 + 15, for two products of 16 inputs. `scales` are those of the
// slab.
template <int Format, class Element>
DEVICE void load_weights(uint32_t (&a)[2][4], uint32_t slab, const unsigned char* scales, uint32_t row0, uint32_t half) {
    using W = WeightFormat<Format>;
    if constexpr (W::FLOAT) {
        load_fragment_a<SLAB_ROW_BYTES>(a[0], slab, row0, half * 4);
        load_fragment_a<SLAB_ROW_BYTES>(a[1], slab, row0, half * 4 + 2);
    } else if constexpr (W::BYTES) {
        uint32_t codes[4];  // rows g and g + 8 of 16 inputs, then of the next 16
        load_fragment_a<SLAB_ROW_BYTES>(codes, slab, row0, half * 2);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if constexpr (W::INT8) {
                a[i / 2][i % 2] = floats_of_int8<Element>(__byte_perm(codes[i], 0, 0x4140));
                a[i / 2][i % 2 + 2] = floats_of_int8<Element>(__byte_perm(codes[i], 0, 0x4342));
            } else {
                a[i / 2][i % 2] = floats_of_fp8<0>(Element{}, codes[i]);
                a[i / 2][i % 2 + 2] = floats_of_fp8<1>(Element{}, codes[i]);
            }
        }
    } else {
        uint32_t codes[2];  // rows g and g + 8
        const uint32_t row = row0 + lane_index() % 16;
        ldmatrix_x2(codes, slab + Swizzle<SLAB_ROW_BYTES>::offset(row, half));
        uint32_t zeros = 0x88;
        if constexpr (W::ZERO_POINTS) {
            const unsigned char* const of_group = scales + W::ZEROS_AT + half * 32 / W::GROUP * W::GROUP_ZERO_BYTES;
            zeros = of_group[row0 / 2 + lane_index() / 4];
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t less_zero = less_zero_point<Element>(zeros >> 4 * i & 0xf);
            a[0][i] = floats_of_int4<Element>(codes[i], less_zero);
            a[0][i + 2] = floats_of_int4<Element>(codes[i] >> 4, less_zero);
            a[1][i] = floats_of_int4<Element>(codes[i] >> 8, less_zero);
            a[1][i + 2] = floats_of_int4<Element>(codes[i] >> 12, less_zero);
        }
    }
}

// B operands of 32 inputs, number `half` (0 or 1) of a chunk of activations: tokens token0 … token0 + 7.
template <int Format>
DEVICE void load_activations(uint32_t (&b)[2][2], const unsigned char* chunk, uint32_t token0, uint32_t half) {
    using W = WeightFormat<Format>;
    const uint32_t lane = lane_index();
    if (W::FLOAT) {
        const uint32_t token = token0 + lane % 8;
        uint32_t r[4];
        ldmatrix_x4(r, shared_address(chunk) + token * SLAB_ROW_BYTES + W::x_chunk(token, half * 4 + lane / 8) * 16);
        b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
        return;
    }
    const uint32_t token = token0 + lane / 4, t = lane % 4;
    const unsigned char* const row = chunk + token * SLAB_ROW_BYTES;
    if (W::BYTES) {
#pragma unroll
        for (uint32_t i = 0; i < 2; i++) {
            const uint32_t at = W::x_chunk(token, half * 4 + i * 2 + t / 2) * 16 + t % 2 * 8;
            const uint2 x = *reinterpret_cast<const uint2*>(row + at);
            b[i][0] = x.x, b[i][1] = x.y;
        }
    } else {
        const uint4 x = *reinterpret_cast<const uint4*>(row + W::x_chunk(token, half * 4 + t) * 16);
        b[0][0] = x.x, b[0][1] = x.y, b[1][0] = x.z, b[1][1] = x.w;
    }
}

DEVICE void mma_16(bf16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_m16n8k16_bf16(d, a, b); }
DEVICE void mma_16(f16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_m16n8k16_f16(d, a, b); }

// Sums of a warp: 16·RowTiles output features x 8·TokenTiles tokens.
template <int Format, class Element, int RowTiles, int TokenTiles>
struct SlabSums {
    using W = WeightFormat<Format>;

    float sums[RowTiles][TokenTiles][4];

    DEVICE void clear() {
#pragma unroll
        for (int row = 0; row < RowTiles; row++) {
#pragma unroll
            for (int token = 0; token < TokenTiles; token++) clear(sums[row][token]);
        }
    }

    static DEVICE void clear(float (&sum)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] = 0;
    }

    // Adds the products of chunk `chunk` of the slab's activations.
    DEVICE void add(const unsigned char* slab, const unsigned char* scales, const unsigned char* x, uint32_t chunk, uint32_t row0,
                    uint32_t token0) {
        const uint32_t codes = shared_address(slab);
        if constexpr (W::GROUPED) {
#pragma unroll
            for (uint32_t part = 0; part < X_CHUNK_INPUTS / W::SCALED; part++) {
                add_scaled(codes, scales, x, chunk, part, row0, token0);
            }
        } else {
#pragma unroll
            for (uint32_t half = 0; half < 2; half++) {
                uint32_t a[RowTiles][2][4];
#pragma unroll
                for (int row = 0; row < RowTiles; row++) {
                    load_weights<Format, Element>(a[row], codes, scales, row0 + row * 16, chunk * 2 + half);
                }
#pragma unroll
                for (int token = 0; token < TokenTiles; token++) {
                    uint32_t b[2][2];
                    load_activations<Format>(b, x, token0 + token * 8, half);
#pragma unroll
                    for (int i = 0; i < 2; i++) {
#pragma unroll
                        for (int row = 0; row < RowTiles; row++) mma_16(Element{}, sums[row][token], a[row][i], b[i]);
                    }
                }
            }
        }
    }

    // The same of inputs that share a scale: part `part` of the chunk. Their weights wait in registers, so that their sums, eight
    // tokens at a time, need few.
    DEVICE void add_scaled(uint32_t codes, const unsigned char* scales, const unsigned char* x, uint32_t chunk, uint32_t part,
                           uint32_t row0, uint32_t token0) {
        constexpr uint32_t HALVES = W::SCALED / 32;
        const uint32_t first_half = chunk * 2 + part * HALVES;  // of the slab
        uint32_t a[HALVES][RowTiles][2][4];
#pragma unroll
        for (uint32_t half = 0; half < HALVES; half++) {
#pragma unroll
            for (int row = 0; row < RowTiles; row++) {
                load_weights<Format, Element>(a[half][row], codes, scales, row0 + row * 16, first_half + half);
            }
        }
        float2 scale[RowTiles];
#pragma unroll
        for (int row = 0; row < RowTiles; row++) {
            scale[row] = scales_of(scales + first_half * 32 / W::GROUP * W::GROUP_SCALE_BYTES, row0 + row * 16);
        }
#pragma unroll
        for (int token = 0; token < TokenTiles; token++) {
            float group[RowTiles][4];
#pragma unroll
            for (int row = 0; row < RowTiles; row++) clear(group[row]);
#pragma unroll
            for (uint32_t half = 0; half < HALVES; half++) {
                uint32_t b[2][2];
                load_activations<Format>(b, x, token0 + token * 8, part * HALVES + half);
#pragma unroll
                for (int i = 0; i < 2; i++) {
#pragma unroll
                    for (int row = 0; row < RowTiles; row++) mma_16(Element{}, group[row], a[half][row][i], b[i]);
                }
            }
#pragma unroll
            for (int row = 0; row < RowTiles; row++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    sums[row][token][i] = __fmaf_rn(i < 2 ? scale[row].x : scale[row].y, group[row][i], sums[row][token][i]);
                }
            }
        }
    }

    // The scales of a group for rows g and g + 8 of the 16 from row0 on: one for both in a block.
    static DEVICE float2 scales_of(const unsigned char* scales, uint32_t row0) {
        if constexpr (W::BLOCKS) {
            const float scale = *reinterpret_cast<const float*>(scales);
            return make_float2(scale, scale);
        } else {
            const f16* const of_rows = reinterpret_cast<const f16*>(scales) + row0 + lane_index() / 4;
            return make_float2(to_f32(of_rows[0]), to_f32(of_rows[8]));
        }
    }

    // Stores the sums to shared memory, `tile` by sums_index; theirs start at row0 and token0.
    DEVICE void store(float* tile, uint32_t row0, uint32_t token0) const {
        const uint32_t lane = lane_index();
#pragma unroll
        for (int row = 0; row < RowTiles; row++) {
#pragma unroll
            for (int token = 0; token < TokenTiles; token++) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) {
                    const uint32_t at_token = token0 + token * 8 + accumulator_column(lane, i);
                    tile[sums_index(at_token, row0 + row * 16 + accumulator_row(lane, i))] = sums[row][token][i];
                }
            }
        }
    }

    // Calls with each sum whose token is below `tokens`: the token, the row, the sum. Theirs start at row0 and token0.
    template <class Call>
    DEVICE void each_sum(uint32_t row0, uint32_t token0, uint32_t tokens, const Call& call) {
        const uint32_t lane = lane_index();
#pragma unroll
        for (int row = 0; row < RowTiles; row++) {
#pragma unroll
            for (int tile = 0; tile < TokenTiles; tile++) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) {
                    const uint32_t token = token0 + tile * 8 + accumulator_column(lane, i);
                    if (token < tokens) call(token, row0 + row * 16 + accumulator_row(lane, i), sums[row][tile][i]);
                }
            }
        }
    }
};
