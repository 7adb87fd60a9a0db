// Every form of ldmatrix, and movmatrix, on raw registers.
//
// matrices [4, 8 rows, 8] u16   row_of_lane [32] u32: the row (0-31, over all four matrices) whose address a lane gives
// out [7, 32 lanes, 4] u32: x1, x2, x4, x1.trans, x2.trans, x4.trans, then movmatrix of each x4 register; registers that a
// form does not load stay as they were.
//
// Arch:    sm_80 and later.
// Mapping: one block of one warp.
// Budget:  40 registers, 512 bytes of shared memory.
// Limit:   none that matters: it exists to be compared with the PTX ISA.
#include "core.cuh"
#include "ptx/ldmatrix.cuh"

KERNEL(32, 1) ldmatrix_fragments(const uint32_t* matrices, const uint32_t* row_of_lane, uint32_t* out) {
    DYNAMIC_SHARED(shared);
    const uint32_t lane = threadIdx.x;
    for (uint32_t word = lane; word < 128; word += WARP_SIZE) reinterpret_cast<uint32_t*>(shared)[word] = matrices[word];
    __syncthreads();
    const uint32_t address = shared_address(shared) + row_of_lane[lane] % 32 * 16;

    uint32_t x1[1], x2[2], x4[4];
    uint32_t* to = out + lane * 4;
    ldmatrix_x1(x1, address);
    to[0] = x1[0];
    to += 128;
    ldmatrix_x2(x2, address);
    for (uint32_t i = 0; i < 2; i++) to[i] = x2[i];
    to += 128;
    ldmatrix_x4(x4, address);
    for (uint32_t i = 0; i < 4; i++) to[i] = x4[i];
    for (uint32_t i = 0; i < 4; i++) to[4 * 128 + i] = movmatrix_trans(x4[i]);
    to += 128;
    ldmatrix_x1_trans(x1, address);
    to[0] = x1[0];
    to += 128;
    ldmatrix_x2_trans(x2, address);
    for (uint32_t i = 0; i < 2; i++) to[i] = x2[i];
    to += 128;
    ldmatrix_x4_trans(x4, address);
    for (uint32_t i = 0; i < 4; i++) to[i] = x4[i];
}
