// out [32] u32 = in [32] · weights [32], of which only the weights are there before the kernels of the stream before this one have ended.
#include "core.cuh"
#include "ptx/sync.cuh"

KERNEL(32, 1) dependent(const uint32_t* in, const uint32_t* weights, uint32_t* out, uint32_t bug) {
    const uint32_t weight = weights[threadIdx.x];
    uint32_t x = bug == 1 ? in[threadIdx.x] : 0;
    if (bug == 2) out[threadIdx.x] = 0;  // which an earlier kernel may still read
    if (bug != 3 && (bug != 4 || threadIdx.x == 0)) grid_dependency_wait();
    if (bug != 1) x = in[threadIdx.x];
    out[threadIdx.x] = x * weight;
}
