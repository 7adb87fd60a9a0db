// Multiplies as fast as mma.sync goes, from registers alone: the ceiling of kernels that do not use wgmma.
//
// a [32 lanes, 4] u32, b [8, 32 lanes, 2] u32: fragments of one A and eight B tiles
// d [blocks, 4 warps, 8, 32 lanes, 4] u32: `rounds` times the product of A with each B, f32 or s32 bits
//
// INSTRUCTION: 0 m16n8k16 bf16 (4096 operations), 3 m16n8k32 s8·s8 (8192), numbered as in mma_fragments.
//
// Arch:    sm_80 and later.
// Mapping: 4 warps per block, eight independent sums each, so that latency does not show.
// Budget:  80 registers, no shared memory.
// Limit:   the matrix unit.
#include "core.cuh"
#include "ptx/mma.cuh"

constexpr uint32_t TILES = 8;

#if INSTRUCTION == 0
using Accumulator = float;
#else
using Accumulator = int32_t;
#endif

DEVICE void multiply(Accumulator (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if INSTRUCTION == 0
    mma_m16n8k16_bf16(d, a, b);
#else
    mma_m16n8k32_s8s8(d, a, b);
#endif
}

KERNEL(128, 4) mma_rate(const uint32_t* a, const uint32_t* b, uint32_t* d, uint32_t rounds) {
    const uint32_t lane = lane_index();
    uint32_t a_registers[4], b_registers[TILES][2];
    Accumulator sums[TILES][4] = {};
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) a_registers[i] = a[lane * 4 + i];
#pragma unroll
    for (uint32_t tile = 0; tile < TILES; tile++) {
        for (uint32_t i = 0; i < 2; i++) b_registers[tile][i] = b[(tile * WARP_SIZE + lane) * 2 + i];
    }
    for (uint32_t round = 0; round < rounds; round++) {
#pragma unroll
        for (uint32_t tile = 0; tile < TILES; tile++) multiply(sums[tile], a_registers, b_registers[tile]);
    }
    uint32_t* to = d + (static_cast<uint64_t>(blockIdx.x) * 4 + warp_index()) * (TILES * WARP_SIZE * 4);
#pragma unroll
    for (uint32_t tile = 0; tile < TILES; tile++) {
        for (uint32_t i = 0; i < 4; i++) to[(tile * WARP_SIZE + lane) * 4 + i] = bit_cast<uint32_t>(sums[tile][i]);
    }
}
