// Where a tile's 16-byte chunks lie in shared memory, so that ldmatrix meets no bank conflict.
//
// Shared memory serves 128 bytes at once: eight 16-byte chunks, if they lie in eight different columns of 16 bytes modulo
// 128. The rows of an unpadded tile put the same chunk of neighbouring rows into few columns; here the chunk's number within
// its row is XORed with the row, so that the same chunk of any eight consecutive rows (aligned to 8) fills all eight columns,
// without padding and with every chunk still contiguous.
//
// With 2ⁿ the largest power of two that divides the chunks of a row, at most 8, chunk c of row r lies at chunk
// c ^ (r / (8 / 2ⁿ) % 2ⁿ) of its row:
//
//   RowBytes a multiple of 128:  c ^ (r % 8)
//   64, 192, 320 …:              c ^ (r / 2 % 4); the rows of a pair start in different halves of a line
//   32:                          c ^ (r / 4 % 2)
//   16:                          one chunk per row; nothing to do
//
// For 128-byte rows this is the hardware's 128-byte swizzle (TMA, wgmma) when the tile starts at a multiple of 1024 bytes.
// Our own pages in global memory use the same map by token, so that a page's tile is one bulk copy.
#pragma once

#include "core.cuh"

template <int RowBytes>
struct Swizzle {
    static_assert(RowBytes > 0 && RowBytes % 16 == 0, "rows are whole chunks of 16 bytes");

    static constexpr uint32_t CHUNKS = RowBytes / 16;
    static constexpr uint32_t PERIOD = CHUNKS % 8 == 0 ? 8 : CHUNKS % 4 == 0 ? 4 : CHUNKS % 2 == 0 ? 2 : 1;
    static constexpr uint32_t ROWS_PER_STEP = 8 / PERIOD;

    // Chunk of the row at which logical chunk `chunk` of row `row` is stored; its own inverse.
    static DEVICE constexpr uint32_t chunk(uint32_t row, uint32_t chunk) { return chunk ^ row / ROWS_PER_STEP % PERIOD; }

    // Byte offset within the tile of logical chunk `chunk` of row `row`.
    static DEVICE constexpr uint32_t offset(uint32_t row, uint32_t chunk) {
        return row * RowBytes + Swizzle::chunk(row, chunk) * 16;
    }
};
