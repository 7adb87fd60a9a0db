// The packed page of quantized keys and values (`PageLayout::Packed`): one closed block of Partition tokens of one KV head.
//
// A segment is read front to back by the decode kernel, keys first; every field starts at a multiple of 16 bytes:
//
//   k_scale  [QkDim] 16-bit          by position_of_scale
//   k_min    [QkDim] 16-bit          by position_of_min
//   k_sums   [8, K_PARTITIONS, Partition / 8] u8 or u16: token 8·j + g at (g, partition, j)
//   k_codes  CodeMatrix<KBits, Partition, QkDim>: rows are tokens, columns are channels
//   v_scale  [8, V_PARTITIONS, Partition / 8] 16-bit: token 8·j + g at (g, partition, j)
//   v_min    the same
//   v_sums   [8, VDim / 8] u8 or u16: channel 8·j + g at (g, j)
//   v_codes  CodeMatrix<VBits, VDim, Partition>: rows are channels, columns are tokens in the order of token_of_column
//
// Orders are those in which lanes (g = lane / 4, t = lane % 4) of mma fragments need the values side by side.
// homomorphic-quant/src/page/packed.rs writes the same on the CPU.
#pragma once

#include "core.cuh"
#include "tile/codes.cuh"

// Π_c: channels that share a scale. min(partition, dim), reduced by 16 until it divides dim.
DEVICE constexpr uint32_t channel_partition(uint32_t partition, uint32_t dim) {
    uint32_t channels = partition < dim ? partition : dim;
    while (dim % channels != 0) channels -= 16;
    return channels;
}

template <int KBits, int VBits, int Partition, int QkDim, int VDim>
struct HackPage {
    static_assert(Partition % 32 == 0 && QkDim % 32 == 0 && VDim % 32 == 0, "whole fragments");

    using KeyCodes = CodeMatrix<KBits, Partition, QkDim>;
    using ValueCodes = CodeMatrix<VBits, VDim, Partition>;

    static constexpr uint32_t K_CHANNELS = channel_partition(Partition, QkDim);
    static constexpr uint32_t V_CHANNELS = channel_partition(Partition, VDim);
    static constexpr uint32_t K_PARTITIONS = QkDim / K_CHANNELS;
    static constexpr uint32_t V_PARTITIONS = VDim / V_CHANNELS;
    static constexpr uint32_t K_SUM_MAX = K_CHANNELS * KeyCodes::LEVELS;
    static constexpr uint32_t V_SUM_MAX = Partition * ValueCodes::LEVELS;
    static constexpr uint32_t K_SUM_BYTES = K_SUM_MAX <= 255 ? 1 : 2;
    static constexpr uint32_t V_SUM_BYTES = V_SUM_MAX <= 255 ? 1 : 2;

    // Offsets in the key half, which starts the segment.
    static constexpr uint32_t K_SCALE = 0;
    static constexpr uint32_t K_MIN = K_SCALE + 2 * QkDim;
    static constexpr uint32_t K_SUMS = K_MIN + 2 * QkDim;
    static constexpr uint32_t K_CODES = K_SUMS + Partition * K_PARTITIONS * K_SUM_BYTES;
    static constexpr uint32_t KEY_BYTES = K_CODES + KeyCodes::BYTES;
    // Offsets in the value half, which follows.
    static constexpr uint32_t V_SCALE = 0;
    static constexpr uint32_t V_MIN = V_SCALE + 2 * Partition * V_PARTITIONS;
    static constexpr uint32_t V_SUMS = V_MIN + 2 * Partition * V_PARTITIONS;
    static constexpr uint32_t V_CODES = V_SUMS + VDim * V_SUM_BYTES;
    static constexpr uint32_t VALUE_BYTES = V_CODES + ValueCodes::BYTES;

    static constexpr uint32_t SEGMENT_BYTES = KEY_BYTES + VALUE_BYTES;
    static_assert(K_CODES % 16 == 0 && KEY_BYTES % 16 == 0 && V_CODES % 16 == 0 && VALUE_BYTES % 16 == 0,
                  "fields start at chunks of 16 bytes");

    // Channel whose key scale lies at a position: a lane's four channels 4t … 4t + 3 of both halves of a k-step.
    static DEVICE constexpr uint32_t channel_of_scale(uint32_t position) {
        return position / 32 * 32 + position / 4 % 2 * 16 + position / 8 % 4 * 4 + position % 4;
    }
    // Channel whose key minimum lies at a position: a lane's pairs 2t, 2t + 1 of every 8 channels of a k-step.
    static DEVICE constexpr uint32_t channel_of_min(uint32_t position) {
        return position / 32 * 32 + position / 2 % 4 * 8 + position / 8 % 4 * 2 + position % 2;
    }
    // Token of the block behind a column of v_codes. A score accumulator holds tokens 2t' and 2t' + 8 of two heads in the order
    // that one transposing 8x8 move of 16-bit pairs turns into these.
    static DEVICE constexpr uint32_t token_of_column(uint32_t column) {
        return column / 16 * 16 + column / 4 % 4 * 2 + column / 2 % 2 + column % 2 * 8;
    }
    static DEVICE constexpr uint32_t position_of_k_sum(uint32_t token, uint32_t partition) {
        return (token % 8 * K_PARTITIONS + partition) * (Partition / 8) + token / 8;
    }
    static DEVICE constexpr uint32_t position_of_v_group(uint32_t token, uint32_t partition) {
        return (token % 8 * V_PARTITIONS + partition) * (Partition / 8) + token / 8;
    }
    static DEVICE constexpr uint32_t position_of_v_sum(uint32_t channel) { return channel % 8 * (VDim / 8) + channel / 8; }
};
