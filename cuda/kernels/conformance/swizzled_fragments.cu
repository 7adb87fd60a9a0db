// Fragments loaded from a tile in the swizzled layout, and the layout itself.
//
// source [32 rows, ROW_BYTES], 16-byte aligned   offsets [32 rows, ROW_BYTES/16] u32: byte offset of each chunk
// fragments [2 row blocks, ROW_BYTES/32, 4 kinds, 32 lanes, 4] u32: for rows 16·i … 16·i + 15 and chunks 2·j, 2·j + 1 the
// registers of load_fragment_a, load_fragment_a_trans, load_fragment_b2 and load_fragment_b2_trans.
// places [32 lanes, 4] u32: 8·row + column of each accumulator register
//
// Arch:    sm_80 and later.
// Mapping: one block of one warp.
// Budget:  80 registers, 32·ROW_BYTES of shared memory.
// Limit:   none that matters: it exists to be compared with the PTX ISA.
#include "core.cuh"
#include "ptx/cp_async.cuh"
#include "tile/fragment.cuh"
#include "tile/swizzle.cuh"

constexpr uint32_t ROWS = 32;
constexpr uint32_t CHUNKS = ROW_BYTES / 16;

KERNEL(32, 1)
swizzled_fragments(const unsigned char* source, uint32_t* offsets, uint32_t* fragments, uint32_t* places) {
    DYNAMIC_SHARED(shared);
    const uint32_t lane = threadIdx.x;
    const uint32_t tile = shared_address(shared);
    for (uint32_t i = lane; i < ROWS * CHUNKS; i += WARP_SIZE) {
        const uint32_t offset = Swizzle<ROW_BYTES>::offset(i / CHUNKS, i % CHUNKS);
        offsets[i] = offset;
        cp_async_16(tile + offset, source + i * 16);
    }
    cp_async_commit();
    for (uint32_t i = 0; i < 4; i++) places[lane * 4 + i] = accumulator_row(lane, i) * 8 + accumulator_column(lane, i);
    cp_async_wait<0>();
    __syncthreads();

    uint32_t* to = fragments + lane * 4;
    for (uint32_t row = 0; row < ROWS; row += 16) {
        for (uint32_t chunk = 0; chunk < CHUNKS; chunk += 2) {
            uint32_t a[4], b[2][2];
            load_fragment_a<ROW_BYTES>(a, tile, row, chunk);
            for (uint32_t i = 0; i < 4; i++) to[i] = a[i];
            load_fragment_a_trans<ROW_BYTES>(a, tile, row, chunk);
            for (uint32_t i = 0; i < 4; i++) to[128 + i] = a[i];
            load_fragment_b2<ROW_BYTES>(b, tile, row, chunk);
            for (uint32_t i = 0; i < 4; i++) to[256 + i] = b[i / 2][i % 2];
            load_fragment_b2_trans<ROW_BYTES>(b, tile, row, chunk);
            for (uint32_t i = 0; i < 4; i++) to[384 + i] = b[i / 2][i % 2];
            to += 512;
        }
    }
}
