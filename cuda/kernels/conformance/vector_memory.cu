// Every load and store of ptx/memory.cuh: copies `source` once through each pair.
//
// source [n] uint4, 16-byte aligned   out [9, n] uint4, 16-byte aligned; plane p has piece (i + p) % n at place i, through
// one pair of wrappers each; plane 8 rounds the four f32 of the piece to f16 (low 8 bytes) and bf16 (high 8 bytes).
//
// Each plane reads other addresses because the compiler turns equal loads into one.
//
// Arch:    sm_80 and later; programmatic dependent launch from sm_90 on.
// Mapping: one thread per 16 bytes.
// Budget:  56 registers, no shared memory.
// Limit:   bytes.
#include "types.cuh"
#include "ptx/memory.cuh"
#include "ptx/sync.cuh"

KERNEL(128, 1) vector_memory(const uint4* source, uint4* out, uint32_t n) {
    const uint32_t i = blockIdx.x * 128 + threadIdx.x;
    grid_dependency_wait();
    if (i < n) {
        uint4* to = out + i;
        auto from = [&](uint32_t plane) { return source + (i + plane) % n; };
        prefetch_l2(from(0));
        store_global_16(to, load_global_16(from(0)));
        store_stream_16(to + n, load_stream_16(from(1)));
        store_global_16(to + 2 * n, load_evict_first_16(from(2)));
        store_global_16(to + 3 * n, load_readonly_16(from(3)));

        const uint2* halves = reinterpret_cast<const uint2*>(from(4));
        uint2* to_halves = reinterpret_cast<uint2*>(to + 4 * n);
        store_stream_8(to_halves, load_stream_8(halves));
        store_global_8(to_halves + 1, load_stream_8(halves + 1));

        const uint32_t* words = reinterpret_cast<const uint32_t*>(from(5));
        store_global_16(to + 5 * n, make_uint4(load_stream_4(words), load_stream_4(words + 1), load_stream_4(words + 2),
                                               load_stream_4(words + 3)));

        store_4(reinterpret_cast<float*>(to + 6 * n), load_f32x4(reinterpret_cast<const float*>(from(6))));
        const float* floats = reinterpret_cast<const float*>(from(7));
        store_4(reinterpret_cast<float*>(to + 7 * n),
                make_float4(load_f32(floats), load_f32(floats + 1), load_f32(floats + 2), load_f32(floats + 3)));
        const float4 v = load_f32x4(reinterpret_cast<const float*>(from(8)));
        store_4(reinterpret_cast<f16*>(to + 8 * n), v);
        store_4(reinterpret_cast<bf16*>(to + 8 * n) + 4, v);
    }
    grid_dependency_launch();
}
