// Operand fragments loaded from swizzled tiles in shared memory, and where an accumulator's elements belong.
//
// A tile is rows of RowBytes in the layout of Swizzle<RowBytes>, at a shared address that is a multiple of 128. Layouts of
// the fragments are those of ptx/mma.cuh; elements are 16-bit values, or pairs of 8-bit values where not transposed, so that
// the same loads serve m16n8k16 (16 columns) and m16n8k32 (32 columns): 32 bytes of K either way.
#pragma once

#include "core.cuh"
#include "ptx/ldmatrix.cuh"
#include "tile/swizzle.cuh"

// A operand: rows row0 … row0 + 15, the 32 bytes of K that start at chunk `chunk0`. row0 is a multiple of 8.
template <int RowBytes>
DEVICE void load_fragment_a(uint32_t (&a)[4], uint32_t tile, uint32_t row0, uint32_t chunk0) {
    const uint32_t lane = lane_index();
    const uint32_t row = row0 + lane % 16;
    ldmatrix_x4(a, tile + Swizzle<RowBytes>::offset(row, chunk0 + lane / 16));
}

// A operand from a tile that is stored transposed (K rows, M contiguous; 16-bit values only): K rows k0 … k0 + 15, M
// columns of the 32 bytes that start at chunk `chunk0`. With V [tokens, channels] in shared memory this is Vᵀ.
template <int RowBytes>
DEVICE void load_fragment_a_trans(uint32_t (&a)[4], uint32_t tile, uint32_t k0, uint32_t chunk0) {
    const uint32_t lane = lane_index();
    const uint32_t row = k0 + lane % 8 + lane / 16 * 8;
    ldmatrix_x4_trans(a, tile + Swizzle<RowBytes>::offset(row, chunk0 + lane / 8 % 2));
}

// Two B operands, each [K = 32 bytes, 8]: columns n0 … n0 + 7 into b[0], n0 + 8 … n0 + 15 into b[1], from a tile stored with
// one column of B per row (K contiguous), the 32 bytes of K that start at chunk `chunk0`.
template <int RowBytes>
DEVICE void load_fragment_b2(uint32_t (&b)[2][2], uint32_t tile, uint32_t n0, uint32_t chunk0) {
    const uint32_t lane = lane_index();
    const uint32_t row = n0 + lane % 8 + lane / 16 * 8;
    uint32_t r[4];
    ldmatrix_x4(r, tile + Swizzle<RowBytes>::offset(row, chunk0 + lane / 8 % 2));
    b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}

// Two B operands [16, 8] from a tile stored as B itself (K rows, N contiguous; 16-bit values only): K rows k0 … k0 + 15, the
// 16 columns that start at chunk `chunk0`. With V [tokens, channels] in shared memory this is V.
template <int RowBytes>
DEVICE void load_fragment_b2_trans(uint32_t (&b)[2][2], uint32_t tile, uint32_t k0, uint32_t chunk0) {
    const uint32_t lane = lane_index();
    const uint32_t row = k0 + lane % 16;
    uint32_t r[4];
    ldmatrix_x4_trans(r, tile + Swizzle<RowBytes>::offset(row, chunk0 + lane / 16));
    b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}

// Row and column, within the 16x8 tile, of accumulator register i of a lane.
DEVICE uint32_t accumulator_row(uint32_t lane, uint32_t i) { return lane / 4 + i / 2 * 8; }
DEVICE uint32_t accumulator_column(uint32_t lane, uint32_t i) { return lane % 4 * 2 + i % 2; }
