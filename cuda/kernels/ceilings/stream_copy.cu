// Copies memory as fast as loads and stores go.
//
// source [pieces] uint4, out [pieces] uint4, both 16-byte aligned
//
// Arch:    sm_80 and later.
// Mapping: 256 threads, each with 8 loads of 16 bytes in flight; blocks take chunks of 2048 pieces in turn.
// Budget:  64 registers, no shared memory.
// Limit:   bytes, read and written.
#include "ptx/memory.cuh"

constexpr uint32_t THREADS = 256;
constexpr uint32_t LOADS = 8;

KERNEL(THREADS, 4) stream_copy(const uint4* source, uint4* out, uint64_t pieces) {
    for (uint64_t chunk = blockIdx.x; chunk * (THREADS * LOADS) < pieces; chunk += gridDim.x) {
        const uint64_t first = chunk * (THREADS * LOADS) + threadIdx.x;
        uint4 loaded[LOADS];
#pragma unroll
        for (uint32_t i = 0; i < LOADS; i++) {
            const uint64_t piece = first + i * THREADS;
            if (piece < pieces) loaded[i] = load_stream_16(source + piece);
        }
#pragma unroll
        for (uint32_t i = 0; i < LOADS; i++) {
            const uint64_t piece = first + i * THREADS;
            if (piece < pieces) store_stream_16(out + piece, loaded[i]);
        }
    }
}
