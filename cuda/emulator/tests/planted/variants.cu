// out [32] u32 = in [32] u32 · FACTOR. The template has the same name in every variant, so it must not be shared
// between them.
#include "core.cuh"

template <typename T>
__noinline__ T scaled(T x) {
    return x * FACTOR;
}

KERNEL(32, 1) variants(const uint32_t* in, uint32_t* out) { out[threadIdx.x] = scaled(in[threadIdx.x]); }
