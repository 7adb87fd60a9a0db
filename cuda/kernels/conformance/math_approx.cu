// The approximate functions of ptx/math.cuh, element by element.
//
// in [n] f32   out [n] f32   operation: 0 exp2, 1 log2, 2 reciprocal
//
// Arch:    sm_80 and later.
// Mapping: one thread per element.
// Budget:  16 registers, no shared memory.
// Limit:   none that matters: it exists to be compared with f64.
#include "core.cuh"
#include "ptx/math.cuh"

KERNEL(256, 1) math_approx(const float* in, float* out, uint32_t n, uint32_t operation) {
    const uint32_t i = blockIdx.x * 256 + threadIdx.x;
    if (i >= n) return;
    const float x = in[i];
    switch (operation) {
        case 0: out[i] = exp2_approx(x); break;
        case 1: out[i] = log2_approx(x); break;
        case 2: out[i] = rcp_approx(x); break;
        default: __trap();
    }
}
