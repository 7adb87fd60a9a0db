// Every form of stmatrix on raw registers.
//
// registers [32 lanes, 4] u32   row_of_lane [32] u32: the row (0-31, over four matrices) whose address a lane gives
// out [6, 4 matrices, 8 rows, 8] u16: shared memory after x1, x2, x4, x1.trans, x2.trans, x4.trans; bytes that a form does
// not store are 0xEE.
//
// Arch:    sm_90a.
// Mapping: one block of one warp.
// Budget:  32 registers, 512 bytes of shared memory.
// Limit:   none that matters: it exists to be compared with the PTX ISA.
#include "core.cuh"
#include "ptx/ldmatrix.cuh"

// Fills shared memory, runs one store, and copies shared memory to `out`.
template <class Store>
DEVICE void observe(unsigned char* shared, uint32_t* out, const Store& store) {
    uint32_t* words = reinterpret_cast<uint32_t*>(shared);
    for (uint32_t word = threadIdx.x; word < 128; word += WARP_SIZE) words[word] = 0xeeeeeeeeu;
    __syncthreads();
    store();
    __syncthreads();
    for (uint32_t word = threadIdx.x; word < 128; word += WARP_SIZE) out[word] = words[word];
    __syncthreads();
}

KERNEL(32, 1) stmatrix_fragments(const uint32_t* registers, const uint32_t* row_of_lane, uint32_t* out) {
    DYNAMIC_SHARED(shared);
    const uint32_t lane = threadIdx.x;
    const uint32_t address = shared_address(shared) + row_of_lane[lane] % 32 * 16;
    uint32_t x4[4];
    for (uint32_t i = 0; i < 4; i++) x4[i] = registers[lane * 4 + i];
    const uint32_t x1[1] = {x4[0]};
    const uint32_t x2[2] = {x4[0], x4[1]};
    observe(shared, out, [&] { stmatrix_x1(address, x1); });
    observe(shared, out + 128, [&] { stmatrix_x2(address, x2); });
    observe(shared, out + 256, [&] { stmatrix_x4(address, x4); });
    observe(shared, out + 384, [&] { stmatrix_x1_trans(address, x1); });
    observe(shared, out + 512, [&] { stmatrix_x2_trans(address, x2); });
    observe(shared, out + 640, [&] { stmatrix_x4_trans(address, x4); });
}
