// The approximate functions of ptx/math.cuh, element by element.
//
// in [n] f32   out [n] f32   operation: 0 exp2, 1 log2, 2 reciprocal
//
// Arch:    sm_80 and later.
// Mapping: blocks of 256 threads, 16 elements per thread, a block's elements next to each other.
// Budget:  24 registers, no shared memory.
// Limit:   none that matters: it exists to be compared with f64.
#include "core.cuh"
#include "ptx/math.cuh"

constexpr uint32_t THREADS = 256;
constexpr uint32_t PER_BLOCK = 16 * THREADS;

DEVICE float approximate(uint32_t operation, float x) {
    switch (operation) {
        case 0: return exp2_approx(x);
        case 1: return log2_approx(x);
        case 2: return rcp_approx(x);
        default: __trap();
    }
    return 0.0f;
}

KERNEL(256, 1) math_approx(const float* in, float* out, uint32_t n, uint32_t operation) {
    const uint32_t begin = blockIdx.x * PER_BLOCK;
    const uint32_t end = min(begin + PER_BLOCK, n);
    for (uint32_t i = begin + threadIdx.x; i < end; i += THREADS) out[i] = approximate(operation, in[i]);
}
