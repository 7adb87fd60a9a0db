// Reads memory as fast as loads go: the ceiling of every kernel that is bound by bytes.
//
// source [pieces] uint4, 16-byte aligned, in device memory or in host memory that the device sees
// out    [blocks, 8] u32: for each warp the exclusive-or of (word + pass) over what it read
//
// Blocks take chunks of 2048 pieces (32 KiB) in turn, `passes` times over the whole.
//
// Arch:    sm_80 and later.
// Mapping: 256 threads, each with 8 loads of 16 bytes in flight: 32 KiB per block.
// Budget:  64 registers, no shared memory.
// Limit:   bytes.
#include "ptx/memory.cuh"
#include "ptx/shuffle.cuh"

constexpr uint32_t THREADS = 256;
constexpr uint32_t LOADS = 8;

KERNEL(THREADS, 4) stream_read(const uint4* source, uint32_t* out, uint64_t pieces, uint32_t passes) {
    uint32_t sum = 0;
    for (uint32_t pass = 0; pass < passes; pass++) {
        for (uint64_t chunk = blockIdx.x; chunk * (THREADS * LOADS) < pieces; chunk += gridDim.x) {
            const uint64_t first = chunk * (THREADS * LOADS) + threadIdx.x;
            uint4 loaded[LOADS];
#pragma unroll
            for (uint32_t i = 0; i < LOADS; i++) {
                const uint64_t piece = first + i * THREADS;
                loaded[i] = make_uint4(0 - pass, 0 - pass, 0 - pass, 0 - pass);  // adds nothing below
                if (piece < pieces) loaded[i] = load_stream_16(source + piece);
            }
#pragma unroll
            for (uint32_t i = 0; i < LOADS; i++) {
                sum ^= (loaded[i].x + pass) ^ (loaded[i].y + pass) ^ (loaded[i].z + pass) ^ (loaded[i].w + pass);
            }
        }
    }
#pragma unroll
    for (uint32_t distance = 16; distance > 0; distance /= 2) sum ^= __shfl_xor_sync(FULL_WARP, sum, distance);
    if (lane_index() == 0) out[blockIdx.x * (THREADS / WARP_SIZE) + warp_index()] = sum;
}
