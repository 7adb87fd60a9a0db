// CUDA's keywords, vector types and builtin functions, for the host compiler. Included by emulator.h.
#pragma once

#include "emulator_api.h"

// ---- keywords -----------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __shared__ _Pragma("GCC error \"static __shared__ memory is banned: declare DYNAMIC_SHARED(name)\"")
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __builtin_assume(condition) ((void)0)

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_extent())
#define gridDim (::emulator::grid_extent())
constexpr int warpSize = 32;

// ---- vector types -------------------------------------------------------------------------------------------------

#define EMULATOR_VECTOR_TYPES(type, name)                                                       \
    struct alignas(sizeof(type) * 2) name##2 { type x, y; };                                    \
    struct alignas(sizeof(type) * 4 > 16 ? 16 : sizeof(type) * 4) name##4 { type x, y, z, w; }; \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                            \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATOR_VECTOR_TYPES(signed char, char)
EMULATOR_VECTOR_TYPES(unsigned char, uchar)
EMULATOR_VECTOR_TYPES(short, short)
EMULATOR_VECTOR_TYPES(unsigned short, ushort)
EMULATOR_VECTOR_TYPES(int, int)
EMULATOR_VECTOR_TYPES(unsigned, uint)
EMULATOR_VECTOR_TYPES(long long, longlong)
EMULATOR_VECTOR_TYPES(unsigned long long, ulonglong)
EMULATOR_VECTOR_TYPES(float, float)
EMULATOR_VECTOR_TYPES(double, double)
#undef EMULATOR_VECTOR_TYPES

struct int3 {
    int x, y, z;
};
struct float3 {
    float x, y, z;
};
inline int3 make_int3(int x, int y, int z) { return {x, y, z}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }

// ---- block and warp -----------------------------------------------------------------------------------------------

// The line of the call tells two divergent barriers apart that would otherwise meet by chance.
inline void __syncthreads(const char* file = __builtin_FILE(), unsigned line = __builtin_LINE()) {
    emulator::block_barrier(emulator::Vote::None, 0, file, line);
}
inline int __syncthreads_count(int predicate, const char* file = __builtin_FILE(), unsigned line = __builtin_LINE()) {
    return emulator::block_barrier(emulator::Vote::Count, predicate, file, line);
}
inline int __syncthreads_and(int predicate, const char* file = __builtin_FILE(), unsigned line = __builtin_LINE()) {
    return emulator::block_barrier(emulator::Vote::And, predicate, file, line);
}
inline int __syncthreads_or(int predicate, const char* file = __builtin_FILE(), unsigned line = __builtin_LINE()) {
    return emulator::block_barrier(emulator::Vote::Or, predicate, file, line);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::warp_barrier(mask); }

namespace emulator {

template <class T>
inline uint64_t to_bits(T value) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a shuffle moves up to 8 bytes");
    uint64_t bits = 0;
    __builtin_memcpy(&bits, &value, sizeof(T));
    return bits;
}

template <class T>
inline T from_bits(uint64_t bits) {
    T value;
    __builtin_memcpy(&value, &bits, sizeof(T));
    return value;
}

}  // namespace emulator

template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
    return emulator::from_bits<T>(
        emulator::shuffle(emulator::Shuffle::Index, mask, emulator::to_bits(value), lane, width));
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    return emulator::from_bits<T>(
        emulator::shuffle(emulator::Shuffle::Up, mask, emulator::to_bits(value), (int)delta, width));
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    return emulator::from_bits<T>(
        emulator::shuffle(emulator::Shuffle::Down, mask, emulator::to_bits(value), (int)delta, width));
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
    return emulator::from_bits<T>(
        emulator::shuffle(emulator::Shuffle::Xor, mask, emulator::to_bits(value), lanes, width));
}
inline unsigned __ballot_sync(unsigned mask, int predicate) { return emulator::ballot(mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return emulator::vote_any(mask, predicate != 0); }
inline int __all_sync(unsigned mask, int predicate) { return emulator::vote_all(mask, predicate != 0); }
template <class T>
inline unsigned __match_any_sync(unsigned mask, T value) {
    return emulator::match_any(mask, emulator::to_bits(value));
}
template <class T>
inline unsigned __match_all_sync(unsigned mask, T value, int* all_equal) {
    return emulator::match_all(mask, emulator::to_bits(value), all_equal);
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
    return emulator::reduce(emulator::Reduction::Add, mask, value);
}
inline int __reduce_add_sync(unsigned mask, int value) {
    return (int)emulator::reduce(emulator::Reduction::Add, mask, (uint32_t)value);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
    return emulator::reduce(emulator::Reduction::MinU32, mask, value);
}
inline int __reduce_min_sync(unsigned mask, int value) {
    return (int)emulator::reduce(emulator::Reduction::MinS32, mask, (uint32_t)value);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
    return emulator::reduce(emulator::Reduction::MaxU32, mask, value);
}
inline int __reduce_max_sync(unsigned mask, int value) {
    return (int)emulator::reduce(emulator::Reduction::MaxS32, mask, (uint32_t)value);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
    return emulator::reduce(emulator::Reduction::And, mask, value);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
    return emulator::reduce(emulator::Reduction::Or, mask, value);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
    return emulator::reduce(emulator::Reduction::Xor, mask, value);
}

// ---- atomics (relaxed) --------------------------------------------------------------------------------------------

#define EMULATOR_ATOMIC(name, type, bits, operation)                                                                \
    inline type name(type* word, type value) {                                                                      \
        return emulator::from_bits<type>(                                                                           \
            emulator::atomic_u##bits(emulator::Atomic::operation, word, (uint##bits##_t)emulator::to_bits(value))); \
    }
EMULATOR_ATOMIC(atomicAdd, int, 32, Add)
EMULATOR_ATOMIC(atomicAdd, unsigned, 32, Add)
EMULATOR_ATOMIC(atomicAdd, unsigned long long, 64, Add)
EMULATOR_ATOMIC(atomicAdd, float, 32, AddFloat)
EMULATOR_ATOMIC(atomicAdd, double, 64, AddFloat)
EMULATOR_ATOMIC(atomicMin, int, 32, MinSigned)
EMULATOR_ATOMIC(atomicMin, unsigned, 32, MinUnsigned)
EMULATOR_ATOMIC(atomicMin, long long, 64, MinSigned)
EMULATOR_ATOMIC(atomicMin, unsigned long long, 64, MinUnsigned)
EMULATOR_ATOMIC(atomicMax, int, 32, MaxSigned)
EMULATOR_ATOMIC(atomicMax, unsigned, 32, MaxUnsigned)
EMULATOR_ATOMIC(atomicMax, long long, 64, MaxSigned)
EMULATOR_ATOMIC(atomicMax, unsigned long long, 64, MaxUnsigned)
EMULATOR_ATOMIC(atomicExch, int, 32, Exchange)
EMULATOR_ATOMIC(atomicExch, unsigned, 32, Exchange)
EMULATOR_ATOMIC(atomicExch, unsigned long long, 64, Exchange)
EMULATOR_ATOMIC(atomicExch, float, 32, Exchange)
EMULATOR_ATOMIC(atomicAnd, int, 32, And)
EMULATOR_ATOMIC(atomicAnd, unsigned, 32, And)
EMULATOR_ATOMIC(atomicAnd, unsigned long long, 64, And)
EMULATOR_ATOMIC(atomicOr, int, 32, Or)
EMULATOR_ATOMIC(atomicOr, unsigned, 32, Or)
EMULATOR_ATOMIC(atomicOr, unsigned long long, 64, Or)
EMULATOR_ATOMIC(atomicXor, int, 32, Xor)
EMULATOR_ATOMIC(atomicXor, unsigned, 32, Xor)
EMULATOR_ATOMIC(atomicXor, unsigned long long, 64, Xor)
EMULATOR_ATOMIC(atomicInc, unsigned, 32, Increment)
EMULATOR_ATOMIC(atomicDec, unsigned, 32, Decrement)
#undef EMULATOR_ATOMIC
inline int atomicSub(int* word, int value) { return atomicAdd((unsigned*)word, 0u - (unsigned)value); }
inline unsigned atomicSub(unsigned* word, unsigned value) { return atomicAdd(word, 0u - value); }
inline int atomicCAS(int* word, int compare, int value) {
    return (int)emulator::atomic_cas_u32(word, (uint32_t)compare, (uint32_t)value);
}
inline unsigned atomicCAS(unsigned* word, unsigned compare, unsigned value) {
    return emulator::atomic_cas_u32(word, compare, value);
}
inline unsigned long long atomicCAS(unsigned long long* word, unsigned long long compare, unsigned long long value) {
    return emulator::atomic_cas_u64(word, compare, value);
}

// Fences order nothing for the checker: see emulator_api.h.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) { emulator::yield(); }
[[noreturn]] inline void __trap() { emulator::trap(); }

// ---- loads and stores with cache hints ----------------------------------------------------------------------------

template <class T>
inline T __ldg(const T* p) {
    return *p;
}
template <class T>
inline T __ldca(const T* p) {
    return *p;
}
template <class T>
inline T __ldcg(const T* p) {
    return *p;
}
template <class T>
inline T __ldcs(const T* p) {
    return *p;
}
template <class T>
inline void __stcg(T* p, T value) {
    *p = value;
}
template <class T>
inline void __stcs(T* p, T value) {
    *p = value;
}
inline size_t __cvta_generic_to_shared(const void* p) { return emulator::shared_address(p); }

// ---- integers -----------------------------------------------------------------------------------------------------

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
    x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
    x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
    x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
    return __builtin_bswap32(x);
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes = (uint64_t)y << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        const unsigned pick = selector >> 4 * i & 15;
        unsigned byte = (unsigned)(bytes >> 8 * (pick & 7)) & 255;
        if (pick & 8) byte = byte & 128 ? 255 : 0;  // bit 3 replicates the sign, as prmt does
        result |= byte << 8 * i;
    }
    return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)(((uint64_t)high << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)(((uint64_t)high << 32 | low) >> (shift & 31));
}
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += (int)(int8_t)(a >> 8 * i) * (int8_t)(b >> 8 * i);
    return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 4; i++) c += (a >> 8 * i & 255) * (b >> 8 * i & 255);
    return c;
}
inline int __mulhi(int a, int b) { return (int)((long long)a * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline int __mul24(int a, int b) { return (a << 8 >> 8) * (b << 8 >> 8); }

#define EMULATOR_MIN_MAX(type)                                \
    inline type min(type a, type b) { return b < a ? b : a; } \
    inline type max(type a, type b) { return a < b ? b : a; }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(unsigned)
EMULATOR_MIN_MAX(long)
EMULATOR_MIN_MAX(unsigned long)
EMULATOR_MIN_MAX(long long)
EMULATOR_MIN_MAX(unsigned long long)
#undef EMULATOR_MIN_MAX
inline unsigned min(int a, unsigned b) { return min((unsigned)a, b); }
inline unsigned min(unsigned a, int b) { return min(a, (unsigned)b); }
inline unsigned max(int a, unsigned b) { return max((unsigned)a, b); }
inline unsigned max(unsigned a, int b) { return max(a, (unsigned)b); }
inline int abs(int x) { return x < 0 ? -x : x; }

// ---- floats: -ffp-contract=off makes plain operators the `_rn` intrinsics -----------------------------------------

#define EMULATOR_LIBM(name)                   \
    extern "C" float name##f(float) noexcept; \
    extern "C" double name(double) noexcept;
EMULATOR_LIBM(exp)
EMULATOR_LIBM(exp2)
EMULATOR_LIBM(expm1) EMULATOR_LIBM(log) EMULATOR_LIBM(log2) EMULATOR_LIBM(log10) EMULATOR_LIBM(log1p)
    EMULATOR_LIBM(sqrt) EMULATOR_LIBM(sin) EMULATOR_LIBM(cos) EMULATOR_LIBM(tanh) EMULATOR_LIBM(erf)
        EMULATOR_LIBM(floor) EMULATOR_LIBM(ceil) EMULATOR_LIBM(trunc) EMULATOR_LIBM(rint) EMULATOR_LIBM(round)
            EMULATOR_LIBM(fabs) EMULATOR_LIBM(nearbyint)
#undef EMULATOR_LIBM
#define EMULATOR_LIBM2(name)                         \
    extern "C" float name##f(float, float) noexcept; \
    extern "C" double name(double, double) noexcept;
                EMULATOR_LIBM2(pow) EMULATOR_LIBM2(fmod) EMULATOR_LIBM2(copysign)
#undef EMULATOR_LIBM2
                    extern "C" float fmaf(float, float, float) noexcept;
extern "C" double fma(double, double, double) noexcept;
extern "C" float ldexpf(float, int) noexcept;
extern "C" float fmaxf(float, float) noexcept;
extern "C" float fminf(float, float) noexcept;
extern "C" double fmax(double, double) noexcept;
extern "C" double fmin(double, double) noexcept;
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline bool isnan(float x) { return x != x; }
inline bool isinf(float x) { return __builtin_isinf(x) != 0; }
inline bool isfinite(float x) { return __builtin_isfinite(x) != 0; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return powf(10.0f, x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

// Conversions saturate and take NaN to 0, as on the device.
namespace emulator {
template <class T>
inline T saturate(double x, double low, double high) {
    return x != x ? T(0) : x <= low ? T(low) : x >= high ? T(high) : T(x);
}
inline int to_s32(double x) { return saturate<int>(x, -2147483648.0, 2147483647.0); }
inline unsigned to_u32(double x) { return saturate<unsigned>(x, 0.0, 4294967295.0); }
}  // namespace emulator
inline int __float2int_rn(float x) { return emulator::to_s32(rint((double)x)); }
inline int __float2int_rz(float x) { return emulator::to_s32(trunc((double)x)); }
inline int __float2int_rd(float x) { return emulator::to_s32(floor((double)x)); }
inline int __float2int_ru(float x) { return emulator::to_s32(ceil((double)x)); }
inline unsigned __float2uint_rn(float x) { return emulator::to_u32(rint((double)x)); }
inline unsigned __float2uint_rz(float x) { return emulator::to_u32(trunc((double)x)); }
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned x) { return (float)x; }
inline float __double2float_rn(double x) { return (float)x; }
inline unsigned __float_as_uint(float x) { return emulator::from_bits<unsigned>(emulator::to_bits(x)); }
inline int __float_as_int(float x) { return emulator::from_bits<int>(emulator::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return emulator::from_bits<float>(x); }
inline float __int_as_float(int x) { return emulator::from_bits<float>((uint32_t)x); }
inline long long __double_as_longlong(double x) { return emulator::from_bits<long long>(emulator::to_bits(x)); }
inline double __longlong_as_double(long long x) { return emulator::from_bits<double>((uint64_t)x); }
