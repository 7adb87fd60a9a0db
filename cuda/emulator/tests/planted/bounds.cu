// out [32] u32 = in [32] u32.
#include "core.cuh"
#include "ptx/cp_async.cuh"

KERNEL(32, 1) bounds(const uint32_t* in, uint32_t* out, uint32_t bug) {
    DYNAMIC_SHARED(shared);
    uint32_t* words = reinterpret_cast<uint32_t*>(shared);
    const uint32_t i = threadIdx.x;
    words[i] = 0;
    uint32_t value = in[i];
    switch (bug) {
    case 1:
        value = in[i + 1];
        break;
    case 2:
        if (i == 31) out[i + 1] = value;
        break;
    case 3:
        if (i == 31) words[i + 1] = value;
        break;
    case 4:
        value = *reinterpret_cast<const volatile uint32_t*>(static_cast<uintptr_t>(i) * 4);
        break;  // null
    case 5:
        *reinterpret_cast<volatile uint32_t*>(0x123456789abc0ull) = value;
        break;  // wild
    case 6:
        value = (in - 4)[i];
        break;
    case 7:
        cp_async_16(shared_address(shared) + 128, in);
        break;
    case 8:
        value = static_cast<uint32_t>(*reinterpret_cast<const uint64_t*>(in + 1));
        break;  // misaligned
    case 9:
        value = words[-1];
        break;
    default:
        break;
    }
    out[i] = value;
}
