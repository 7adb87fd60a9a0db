// Where a tile's 16-byte chunks lie in shared memory, so that ldmatrix meets no bank conflict.
//
// Shared memory serves 128 bytes at once: eight 16-byte chunks, if they lie in eight different columns of 16 bytes modulo
// 128. The rows of an unpadded tile put the same chunk of neighbouring rows into few columns; here the chunk's number within
// its row is XORed with the row, so that the same chunk of any eight consecutive rows (aligned to 8) fills all eight columns,
// without padding and with every chunk still contiguous.
//
//   RowBytes a multiple of 128:  chunk c of row r lies at chunk c ^ (r % 8) of its row
//   64, 32:                      128 / RowBytes rows share a line: c ^ (r / (128 / RowBytes) % (RowBytes / 16))
//   16:                          one chunk per row; nothing to do
//
// For 128-byte rows this is the hardware's 128-byte swizzle (TMA, wgmma) when the tile starts at a multiple of 1024 bytes.
// Our own pages in global memory use the same map by token, so that a page's tile is one bulk copy.
#pragma once

#include "core.cuh"

template <int RowBytes>
struct Swizzle {
    static_assert(RowBytes == 16 || RowBytes == 32 || RowBytes == 64 || RowBytes % 128 == 0,
                  "rows are 16, 32 or 64 bytes or a multiple of 128");

    static constexpr uint32_t CHUNKS = RowBytes / 16;
    static constexpr uint32_t ROWS_PER_LINE = RowBytes < 128 ? 128 / RowBytes : 1;
    static constexpr uint32_t PERIOD = CHUNKS < 8 ? CHUNKS : 8;

    // Chunk of the row at which logical chunk `chunk` of row `row` is stored; its own inverse.
    static DEVICE constexpr uint32_t chunk(uint32_t row, uint32_t chunk) { return chunk ^ row / ROWS_PER_LINE % PERIOD; }

    // Byte offset within the tile of logical chunk `chunk` of row `row`.
    static DEVICE constexpr uint32_t offset(uint32_t row, uint32_t chunk) {
        return row * RowBytes + Swizzle::chunk(row, chunk) * 16;
    }
};
