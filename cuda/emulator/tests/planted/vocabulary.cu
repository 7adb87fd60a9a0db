// out [32 cases, 32 lanes] u32: what CUDA's builtins give for in [32] u32. word [8] u32: targets of atomics, as tests/launches.rs
// sets them. copied [32] u32: `in` by way of cp.async and an mbarrier.
#include "core.cuh"
#include "ptx/mbarrier.cuh"

KERNEL(32, 1) vocabulary(const uint32_t* in, uint32_t* out, uint32_t* word, uint32_t* copied) {
    DYNAMIC_SHARED(shared);
    const uint32_t lane = threadIdx.x, x = in[lane];
    uint32_t row = 0;
    const auto put = [&](uint32_t value) { out[row++ * 32 + lane] = value; };
    put(__shfl_up_sync(FULL_WARP, x, 3, 8));
    put(__shfl_down_sync(FULL_WARP, x, 3, 8));
    put(__shfl_xor_sync(FULL_WARP, x, 9, 16));
    put(__shfl_sync(FULL_WARP, x, lane + 5, 8));
    put(__ballot_sync(FULL_WARP, x % 3 == 0));
    put(__any_sync(FULL_WARP, lane == 31) + 2 * __any_sync(FULL_WARP, 0) + 4 * __all_sync(FULL_WARP, 1) +
        8 * __all_sync(FULL_WARP, lane != 4));
    put(__match_any_sync(FULL_WARP, x % 4));
    int equal = 0;
    const uint32_t matched = __match_all_sync(FULL_WARP, lane / 32, &equal);
    put(matched + equal);
    put(__match_all_sync(FULL_WARP, lane, &equal) + equal);
    put(__reduce_add_sync(FULL_WARP, x));
    put(__reduce_min_sync(FULL_WARP, static_cast<int>(x << 8)));
    put(__reduce_max_sync(FULL_WARP, x << 8));
    put(__reduce_xor_sync(FULL_WARP, x));
    put(__brev(x));
    put(__byte_perm(x, ~x, 0x5610));
    put(__funnelshift_l(x, ~x, lane));
    put(__funnelshift_r(x, ~x, lane));
    put(__popc(x) + 100 * __clz(x) + 10000 * __ffs(x));
    put(__dp4a(static_cast<int>(x), static_cast<int>(~x << 3), -5));
    put(__umulhi(x << 8, x << 9));
    put(__float2int_rn(static_cast<float>(static_cast<int>(x << 8)) / 1000.0f));
    put(lane < 16 ? __reduce_and_sync(0x0000ffffu, x | 1) : __reduce_or_sync(0xffff0000u, x));

    atomicMin(&word[0], x);
    atomicMax(reinterpret_cast<int*>(&word[1]), static_cast<int>(x << 8));
    atomicInc(&word[2], 9);
    atomicDec(&word[3], 9);
    atomicXor(&word[4], x);
    atomicAdd(reinterpret_cast<float*>(&word[5]), 0.5f);
    atomicCAS(&word[6], 7u, 70u);
    atomicSub(&word[7], x);

    // A product of 8-bit integers with k = 16: A is x in every register, B a one in each byte.
    int d[4] = {1, 2, 3, 4};
    const uint32_t a[2] = {x, ~x}, b[1] = {0x01010101u};
    emulator::mma_m16n8k16_s8s8(d, a, b);
    for (int value : d) put(static_cast<uint32_t>(value));

    const uint32_t base = shared_address(shared), barrier = base + 128;
    if (lane == 0) mbarrier_init(barrier, 32);
    __syncwarp();
    emulator::cp_async(base + lane * 4, in + lane, 4, 4);
    emulator::cp_async_mbarrier_arrive_noinc(barrier);
    mbarrier_wait(barrier, 0);
    copied[lane] = reinterpret_cast<const uint32_t*>(shared)[31 - lane];
}
