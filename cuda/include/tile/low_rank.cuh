// Low-rank pages: the ranks of a layer's KV heads, and rows whose length is known only at run time.
//
// A page holds, head after head, the head's keys [page size, r_k] and values [page size, r_v], rows without padding, their
// 16-byte chunks swizzled by row as in tile/swizzle.cuh. Ranks are multiples of 16 and counted in blocks of 16 channels, which
// are 32 bytes of a row.
#pragma once

#include "core.cuh"
#include "fdc_params.h"

DEVICE uint32_t k_blocks(const FdcHeads& heads, uint32_t head) { return heads.k_before[head + 1] - heads.k_before[head]; }
DEVICE uint32_t v_blocks(const FdcHeads& heads, uint32_t head) { return heads.v_before[head + 1] - heads.v_before[head]; }

// Blocks of keys and values of all heads before `head`: its place in a page, and in a token's bytes.
DEVICE uint32_t blocks_before(const FdcHeads& heads, uint32_t head) { return heads.k_before[head] + heads.v_before[head]; }

// The map of Swizzle<RowBytes> for rows of a multiple of 32 bytes.
struct SwizzledRows {
    uint32_t row_bytes;
    uint32_t shift;  // log2 of the rows that share a swap
    uint32_t mask;   // period − 1

    DEVICE explicit SwizzledRows(uint32_t row_bytes) : row_bytes(row_bytes) {
        // The chunks of a row are divisible by 2; by 4 and 8 too?
        mask = row_bytes % 64 != 0 ? 1 : row_bytes % 128 != 0 ? 3 : 7;
        shift = row_bytes % 64 != 0 ? 2 : row_bytes % 128 != 0 ? 1 : 0;
    }

    // What the chunk's number is XORed with in this row.
    DEVICE uint32_t swap(uint32_t row) const { return row >> shift & mask; }
    // Byte offset of logical chunk `chunk` of row `row`.
    DEVICE uint32_t offset(uint32_t row, uint32_t chunk) const { return row * row_bytes + (chunk ^ swap(row)) * 16; }
};
