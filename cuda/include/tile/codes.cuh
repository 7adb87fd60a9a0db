// Quantized codes packed in the order in which mma.m16n8k32 reads its A operand.
//
// A matrix of codes [Rows, Columns] lies in units of one k-step (32 columns) by a few tiles of 16 rows. A unit holds, for each
// lane in turn, the words of which that lane's fragments consist, so that a warp reads a unit by one vector load per lane,
// without bank conflicts, straight into registers. A byte of a word holds one code of each of its 8 / Bits planes. Planes are
// different row tiles: masking a word in place, without a shift, gives the fragment of plane i as code · 2^(Bits·i), and that
// factor leaves through the multiplier that every row's product gets anyway. Where there are fewer row tiles than planes, the
// upper planes are the second half of the k-step instead, one shift away.
//
// With g = lane / 4 and t = lane % 4, byte b of word j of the unit (group, step), plane i, is
//
//   HALF_PLANES = 1:   row 16·(group·ROW_PLANES + i) + g + 8·(j % 2),               column 32·step + 16·(j / 2) + 4·t + b
//   HALF_PLANES = 2:   row 16·(group·ROW_PLANES + i % ROW_PLANES) + g + 8·j,        column 32·step + 16·(i / ROW_PLANES) + 4·t + b
//
// at bits Bits·i … of the byte. Units lie group by group, step by step within a group.
#pragma once

#include "core.cuh"
#include "ptx/mma.cuh"

template <int Bits, int Rows, int Columns>
struct CodeMatrix {
    static_assert(Bits == 2 || Bits == 4 || Bits == 8, "codes fill bytes");
    static_assert(Rows % 16 == 0 && Columns % 32 == 0, "whole fragments");

    static constexpr uint32_t BITS = Bits;
    static constexpr uint32_t LEVELS = (1u << Bits) - 1;
    static constexpr uint32_t PLANES = 8 / Bits;
    static constexpr uint32_t ROW_TILES = Rows / 16;
    static constexpr uint32_t STEPS = Columns / 32;
    // Planes that are row tiles: the largest power of two that divides both.
    static constexpr uint32_t ROW_PLANES = PLANES % 4 == 0 && ROW_TILES % 4 == 0   ? 4
                                           : PLANES % 2 == 0 && ROW_TILES % 2 == 0 ? 2
                                                                                   : 1;
    static constexpr uint32_t HALF_PLANES = PLANES / ROW_PLANES;
    static_assert(HALF_PLANES <= 2, "a k-step has two halves");
    static constexpr uint32_t GROUPS = ROW_TILES / ROW_PLANES;
    static constexpr uint32_t WORDS = 4 / HALF_PLANES;  // of a lane in a unit
    static constexpr uint32_t UNIT_BYTES = WARP_SIZE * WORDS * 4;
    static constexpr uint32_t GROUP_BYTES = STEPS * UNIT_BYTES;
    static constexpr uint32_t BYTES = GROUPS * GROUP_BYTES;
    static_assert(BYTES == Rows * Columns * Bits / 8, "no padding");
    // Largest value of a fragment: a code of the highest row plane.
    static constexpr uint32_t LARGEST = LEVELS << (Bits * (ROW_PLANES - 1));

    // Row and column of code b of plane i in word j of a lane.
    static DEVICE constexpr uint32_t row(uint32_t group, uint32_t lane, uint32_t word, uint32_t plane) {
        return 16 * (group * ROW_PLANES + plane % ROW_PLANES) + lane / 4 + 8 * (word % 2);
    }
    static DEVICE constexpr uint32_t column(uint32_t step, uint32_t lane, uint32_t word, uint32_t plane, uint32_t b) {
        return 32 * step + 16 * (HALF_PLANES == 1 ? word / 2 : plane / ROW_PLANES) + lane % 4 * 4 + b;
    }

    // This lane's words of a unit at `unit`, in shared memory.
    static DEVICE void load(uint32_t (&words)[WORDS], const unsigned char* unit) {
        if constexpr (WORDS == 4) {
            const uint4 four = reinterpret_cast<const uint4*>(unit)[lane_index()];
            words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
        } else {
            const uint2 two = reinterpret_cast<const uint2*>(unit)[lane_index()];
            words[0] = two.x, words[1] = two.y;
        }
    }

    // The A fragment of row tile `tile` of the unit's group: u8 = code · 2^(Bits·tile).
    static DEVICE void fragment(uint32_t (&a)[4], const uint32_t (&words)[WORDS], uint32_t tile) {
        const uint32_t mask = (LEVELS * 0x01010101u) << (Bits * tile);
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            const uint32_t word = HALF_PLANES == 1 || i < 2 ? words[i % WORDS] : words[i % WORDS] >> (Bits * ROW_PLANES);
            a[i] = Bits == 8 ? word : word & mask;
        }
    }

    // 2^(−Bits·tile): what the products of a row tile's fragments are multiplied by.
    static DEVICE constexpr float factor(uint32_t tile) { return 1.0f / static_cast<float>(1u << (Bits * tile)); }
};

// Sums of u8·u8 products are read as floats without a conversion: they start at the bits of 2²³, whose float has a unit of 1 in
// the last place, so that bits + n are the float 2²³ + n as long as n < 2²³.
constexpr int32_t SUM_START = 0x4b000000;
DEVICE float sum_to_f32(int32_t sum) { return bit_cast<float>(sum) - 8388608.0f; }

// Whether sums of `Count` products of codes up to `Largest` with 8-bit codes stay in range.
template <uint32_t Largest, uint32_t Count>
constexpr bool SUMS_FIT = static_cast<uint64_t>(Largest) * 255 * Count < (1ull << 23);
