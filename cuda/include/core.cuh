// What every device header stands on: fixed-width integers, the KERNEL and DYNAMIC_SHARED macros, addresses of shared memory.
//
// Device code is compiled twice: by NVRTC for a GPU, and by the host's C++ compiler for the emulator, which includes the
// kernel inside a namespace of its own and has declared the CUDA vocabulary before (`emulator.h`). `__CUDACC__` tells the two apart.
//
// A kernel's constants arrive as UPPER_CASE macros, so headers name their template parameters in CamelCase.
#pragma once

#include <stdint.h>

// A function of the device: always inlined, so that wrappers cost nothing and register arrays stay in registers.
#define DEVICE __device__ __forceinline__

#ifdef __CUDACC__
// KERNEL(threads, min_blocks) name(parameters…) { … }: a kernel of exactly `threads` threads per block, compiled so that
// `min_blocks` blocks fit one SM.
#define KERNEL(threads, min_blocks) extern "C" __global__ void __launch_bounds__(threads, min_blocks)
// DYNAMIC_SHARED(name); names the block's dynamic shared memory, its only shared memory, as bytes aligned to 1024.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#else
#define KERNEL(threads, min_blocks) void
#define DYNAMIC_SHARED(name) unsigned char* const name = emulator::dynamic_shared()
#endif

constexpr uint32_t WARP_SIZE = 32;
constexpr uint32_t FULL_WARP = 0xffffffffu;

constexpr float LOG2_E = 1.4426950408889634f;  // exp(x) = exp2(x · LOG2_E)
constexpr float LN_2 = 0.6931471805599453f;    // ln(x) = log2(x) · LN_2

// By their bits: NVRTC has neither <math.h> nor the host compilers' builtins for these.
constexpr float POSITIVE_INFINITY = __builtin_bit_cast(float, 0x7f800000u);
constexpr float NEGATIVE_INFINITY = __builtin_bit_cast(float, 0xff800000u);
constexpr float QUIET_NAN = __builtin_bit_cast(float, 0x7fffffffu);

// The object representation of `value` as a `To`.
template <typename To, typename From>
DEVICE constexpr To bit_cast(const From& value) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
    return __builtin_bit_cast(To, value);
}

// ⌈a / b⌉ for a ≥ 0, b > 0.
template <typename T>
DEVICE constexpr T ceil_div(T a, T b) {
    return (a + b - 1) / b;
}

// The 32-bit address within the shared window that `ldmatrix`, `cp.async`, mbarriers and bulk copies take.
DEVICE uint32_t shared_address(const void* pointer) {
#ifdef __CUDACC__
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#else
    return emulator::shared_address(pointer);
#endif
}

// Lane of a thread within its warp, for blocks whose x extent is a multiple of 32.
DEVICE uint32_t lane_index() { return threadIdx.x % WARP_SIZE; }

// Warp of a thread within its block, for blocks of one dimension.
DEVICE uint32_t warp_index() { return threadIdx.x / WARP_SIZE; }
