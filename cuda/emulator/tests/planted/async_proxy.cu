// out [64] uint4 = in [64] uint4, staged in shared memory and stored by one bulk copy.
#include "core.cuh"
#include "ptx/bulk_copy.cuh"

KERNEL(64, 1) async_proxy(const uint4* in, uint4* out, uint32_t bug) {
    DYNAMIC_SHARED(shared);
    uint4* stage = reinterpret_cast<uint4*>(shared);
    stage[threadIdx.x] = in[threadIdx.x];
    if (bug != 1 && bug != 4) async_proxy_fence();
    __syncthreads();
    if (threadIdx.x == 0) {
        if (bug == 4) async_proxy_fence();  // no mistake: the issuer's fence does as well
        bulk_store(out, shared_address(shared), 1024);
        bulk_commit();
        if (bug == 6) return;
        if (bug == 2) stage[5] = make_uint4(0, 0, 0, 0);  // while it is being read
        if (bug != 3) bulk_wait_read<0>();
        stage[5] = make_uint4(0, 0, 0, 0);
        if (bug == 5) stage[6] = out[6];  // read, but not yet written
        bulk_wait<0>();
        stage[6] = out[6];
    }
}
