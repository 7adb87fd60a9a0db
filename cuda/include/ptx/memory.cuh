// Global memory in 16-byte pieces with cache hints. PTX ISA, "Data Movement: ld, ld.global.nc, st, prefetch".
//
// Hints change speed only. Every address is a multiple of the access size; the emulator stops at one that is not.
//
// The `nc` loads (`load_stream_*`, `load_evict_first_16`, `load_readonly_16`) go through the read-only path: only for memory
// that nobody writes from the start of the launch to its end. Under programmatic dependent launch that start lies before
// the previous kernel's end, so that its results must be read by the other loads.
#pragma once

#include "core.cuh"
#include "types.cuh"

#ifndef __CUDACC__
// The device faults on a misaligned vector access; x86 would not.
template <typename T>
DEVICE const T* aligned(const void* address) {
    if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) __trap();
    return static_cast<const T*>(address);
}
#endif

// 16 bytes, coherent. ld.global.v4
DEVICE uint4 load_global_16(const void* address) {
#ifdef __CUDACC__
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address)
                 : "memory");
    return v;
#else
    return *aligned<uint4>(address);
#endif
}

// One f32 that is read once: not kept in L1. ld.global.L1::no_allocate
DEVICE float load_f32(const float* address) {
#ifdef __CUDACC__
    float v;
    asm volatile("ld.global.L1::no_allocate.f32 %0, [%1];" : "=f"(v) : "l"(address) : "memory");
    return v;
#else
    return *aligned<float>(address);
#endif
}

// Four neighbouring f32 that are read once, 16-byte aligned: not kept in L1. ld.global.L1::no_allocate.v4
DEVICE float4 load_f32x4(const float* address) {
#ifdef __CUDACC__
    float4 v;
    asm volatile("ld.global.L1::no_allocate.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(address)
                 : "memory");
    return v;
#else
    return *aligned<float4>(address);
#endif
}

// 16 bytes that are read once: not kept in L1, and L2 fetches the whole 128-byte line. ld.global.nc.L1::no_allocate.L2::128B
DEVICE uint4 load_stream_16(const void* address) {
#ifdef __CUDACC__
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
    return v;
#else
    return *aligned<uint4>(address);
#endif
}

// 8 bytes that are read once. ld.global.nc.L1::no_allocate.L2::128B
DEVICE uint2 load_stream_8(const void* address) {
#ifdef __CUDACC__
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address));
    return v;
#else
    return *aligned<uint2>(address);
#endif
}

// 4 bytes that are read once. ld.global.nc.L1::no_allocate.L2::128B
DEVICE uint32_t load_stream_4(const void* address) {
#ifdef __CUDACC__
    uint32_t v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(v) : "l"(address));
    return v;
#else
    return *aligned<uint32_t>(address);
#endif
}

// 16 bytes that are soon read again by this SM, but are first to leave L1 under pressure. ld.global.nc.L1::evict_first
DEVICE uint4 load_evict_first_16(const void* address) {
#ifdef __CUDACC__
    uint4 v;
    asm volatile("ld.global.nc.L1::evict_first.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
    return v;
#else
    return *aligned<uint4>(address);
#endif
}

// 16 bytes through the read-only path with the default policy. ld.global.nc.v4
DEVICE uint4 load_readonly_16(const void* address) {
#ifdef __CUDACC__
    uint4 v;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
    return v;
#else
    return *aligned<uint4>(address);
#endif
}

// 16 bytes. st.global.v4
DEVICE void store_global_16(void* address, uint4 v) {
#ifdef __CUDACC__
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
#else
    *const_cast<uint4*>(aligned<uint4>(address)) = v;
#endif
}

// 8 bytes. st.global.v2
DEVICE void store_global_8(void* address, uint2 v) {
#ifdef __CUDACC__
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(v.x), "r"(v.y) : "memory");
#else
    *const_cast<uint2*>(aligned<uint2>(address)) = v;
#endif
}

// 16 bytes that this kernel does not read again: first to leave the caches. st.global.cs
DEVICE void store_stream_16(void* address, uint4 v) {
#ifdef __CUDACC__
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
#else
    *const_cast<uint4*>(aligned<uint4>(address)) = v;
#endif
}

// 8 bytes that this kernel does not read again. st.global.cs
DEVICE void store_stream_8(void* address, uint2 v) {
#ifdef __CUDACC__
    asm volatile("st.global.cs.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(v.x), "r"(v.y) : "memory");
#else
    *const_cast<uint2*>(aligned<uint2>(address)) = v;
#endif
}

// Four f32 rounded to nearest even and stored side by side, aligned to the four elements.
DEVICE void store_4(float* address, float4 v) {
    store_global_16(address, make_uint4(bit_cast<uint32_t>(v.x), bit_cast<uint32_t>(v.y), bit_cast<uint32_t>(v.z),
                                        bit_cast<uint32_t>(v.w)));
}
DEVICE void store_4(f16* address, float4 v) {
    store_global_8(address, make_uint2(pack2<f16>(v.x, v.y), pack2<f16>(v.z, v.w)));
}
DEVICE void store_4(bf16* address, float4 v) {
    store_global_8(address, make_uint2(pack2<bf16>(v.x, v.y), pack2<bf16>(v.z, v.w)));
}

// Starts to bring the line of `address` into L2. prefetch.global.L2
DEVICE void prefetch_l2(const void* address) {
#ifdef __CUDACC__
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#else
    static_cast<void>(address);
#endif
}
