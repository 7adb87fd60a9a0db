// Copies of tensor tiles described by a tensor map (TMA). PTX ISA, "cp.async.bulk.tensor".
//
// The map gives base, extents, strides, box and swizzle of a tensor in global memory; the driver encodes it on the host and
// the kernel takes it as a `const __grid_constant__ TensorMap` parameter. Elements outside the tensor arrive as zeros and
// count as bytes. With the 128-byte swizzle a box row is 128 bytes, the destination lies at a multiple of 1024 bytes, and
// 16-byte chunk c of row r is stored at chunk c ^ (r % 8): the layout of Swizzle<128> in tile/swizzle.cuh.
#pragma once

#include "core.cuh"

#if defined(__CUDACC__) && __CUDA_ARCH__ < 900
#error "ptx/tma.cuh needs sm_90 or later"
#endif

#ifndef __CUDACC__
// Kernels take maps by value; that g++ 4.6 changed how is of no interest.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

// The driver's CUtensorMap: 128 opaque bytes, aligned as CUDA 13 has them.
struct alignas(128) TensorMap {
    uint64_t opaque[16];
};

// The box at column x, row y of a 2-D tensor to shared memory; completes on `barrier`. cp.async.bulk.tensor.2d
DEVICE void tma_load_2d(uint32_t destination, const TensorMap& map, uint32_t barrier, int32_t x, int32_t y) {
#ifdef __CUDACC__
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            destination),
        "l"(&map), "r"(barrier), "r"(x), "r"(y)
        : "memory");
#else
    emulator::tma_load_2d(destination, &map, barrier, x, y);
#endif
}

// The box at column x, row y of plane z of a 3-D tensor, as above; a plane that there is not arrives as zeros. cp.async.bulk.tensor.3d
DEVICE void tma_load_3d(uint32_t destination, const TensorMap& map, uint32_t barrier, int32_t x, int32_t y, int32_t z) {
#ifdef __CUDACC__
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
            destination),
        "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z)
        : "memory");
#else
    emulator::tma_load_3d(destination, &map, barrier, x, y, z);
#endif
}

// Fetches the map itself ahead of its first use. prefetch.tensormap
DEVICE void tma_prefetch_map(const TensorMap& map) {
#ifdef __CUDACC__
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map));
#else
    static_cast<void>(map);
#endif
}
