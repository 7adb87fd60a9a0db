// Writes memory as fast as stores go.
//
// out [pieces] uint4, 16-byte aligned: piece i becomes (i, ~i, i · 0x9e3779b9, seed), never one repeated value
//
// Arch:    sm_80 and later.
// Mapping: 256 threads, 8 stores of 16 bytes each; blocks take chunks of 2048 pieces in turn.
// Budget:  48 registers, no shared memory.
// Limit:   bytes.
#include "ptx/memory.cuh"

constexpr uint32_t THREADS = 256;
constexpr uint32_t STORES = 8;

KERNEL(THREADS, 4) stream_write(uint4* out, uint64_t pieces, uint32_t seed) {
    for (uint64_t chunk = blockIdx.x; chunk * (THREADS * STORES) < pieces; chunk += gridDim.x) {
#pragma unroll
        for (uint32_t i = 0; i < STORES; i++) {
            const uint64_t piece = chunk * (THREADS * STORES) + threadIdx.x + i * THREADS;
            const uint32_t low = static_cast<uint32_t>(piece);
            if (piece < pieces) store_stream_16(out + piece, make_uint4(low, ~low, low * 0x9e3779b9u, seed));
        }
    }
}
