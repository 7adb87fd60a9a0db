// One tensor-core product per warp on raw registers: d = d + a·b.
//
// a [tiles, 32 lanes, 4] u32   b [tiles, 32 lanes, 2] u32   d [tiles, 32 lanes, 4] u32 (f32 or s32 bits), in and out
//
// INSTRUCTION: 0 m16n8k16 bf16, 1 m16n8k16 f16, 2 m16n8k8 tf32, 3 m16n8k32 s8·s8, 4 s8·u8, 5 u8·s8, 6 u8·u8.
//
// Arch:    sm_80 and later.
// Mapping: one block of one warp per tile.
// Budget:  32 registers, no shared memory.
// Limit:   none that matters: it exists to be compared with the fragment layouts of the PTX ISA.
#include "core.cuh"
#include "ptx/mma.cuh"

#if INSTRUCTION <= 2
using Accumulator = float;
#else
using Accumulator = int32_t;
#endif

DEVICE void multiply(Accumulator (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if INSTRUCTION == 0
    mma_m16n8k16_bf16(d, a, b);
#elif INSTRUCTION == 1
    mma_m16n8k16_f16(d, a, b);
#elif INSTRUCTION == 2
    mma_m16n8k8_tf32(d, a, b);
#elif INSTRUCTION == 3
    mma_m16n8k32_s8s8(d, a, b);
#elif INSTRUCTION == 4
    mma_m16n8k32_s8u8(d, a, b);
#elif INSTRUCTION == 5
    mma_m16n8k32_u8s8(d, a, b);
#else
    mma_m16n8k32_u8u8(d, a, b);
#endif
}

KERNEL(32, 1) mma_fragments(const uint32_t* a, const uint32_t* b, uint32_t* d) {
    const uint32_t lane = blockIdx.x * WARP_SIZE + threadIdx.x;
    uint32_t a_registers[4], b_registers[2];
    Accumulator accumulator[4];
    for (uint32_t i = 0; i < 4; i++) a_registers[i] = a[lane * 4 + i];
    for (uint32_t i = 0; i < 2; i++) b_registers[i] = b[lane * 2 + i];
    for (uint32_t i = 0; i < 4; i++) accumulator[i] = bit_cast<Accumulator>(d[lane * 4 + i]);
    multiply(accumulator, a_registers, b_registers);
    for (uint32_t i = 0; i < 4; i++) d[lane * 4 + i] = bit_cast<uint32_t>(accumulator[i]);
}
