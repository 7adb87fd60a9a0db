// Rows from place to place: what a collective sends is packed into messages, and what it receives is put where it belongs.
//
//   destination[c.destination][c.destination_offset + r·c.destination_stride + i] =
//       source[c.source][c.source_offset + r·c.source_stride + i]              for every copy c, row r of c.rows, byte i of a row
//
// source0-2       bytes, 16-byte aligned; null where params says 0 bytes
// destination0-2  bytes, 16-byte aligned; null where params says 0 bytes. Copies do not overlap.
// copies          [gridDim.y] PackCopy: some heads of every token, a shard's tokens of a packed tensor, K and V behind each other
// status          FAULT_BAD_RANGE with the copy: one outside its buffers, or not in units of 4 bytes, is skipped
//
// Arch:    sm_80 and later.
// Mapping: the blocks of a column of the grid share one copy, chunk by chunk: of 16 bytes where all its numbers are multiples of
//          that, else of 4; neighbouring threads move neighbouring chunks of a row, four each before the first is stored.
// Budget:  64 registers, no shared memory.
// Limit:   bytes, each read and written once.
#include "core.cuh"
#include "pack_params.h"
#include "ptx/memory.cuh"
#include "ptx/sync.cuh"
#include "status_params.h"
#include "tile/status.cuh"

constexpr uint32_t THREADS = 256;
constexpr uint32_t IN_FLIGHT = 4;

// One past the last byte that a copy touches on one side; ~0 for more than 64 bits hold.
DEVICE uint64_t end_of(uint64_t offset, uint64_t stride, const PackCopy& copy) {
    constexpr uint64_t MOST = ~0ull >> 1;
    const uint64_t steps = copy.rows - 1;
    if (steps != 0 && stride > MOST / steps) return ~0ull;
    const uint64_t span = steps * stride;
    return offset > MOST - span || copy.row_bytes > MOST - span - offset ? ~0ull : offset + span + copy.row_bytes;
}

// Whether a copy stays within its buffers, in whole units.
DEVICE bool is_valid(const PackCopy& copy, const PackParams& params) {
    if (copy.source >= PACK_BUFFERS || copy.destination >= PACK_BUFFERS) return false;
    const uint64_t all = copy.source_offset | copy.source_stride | copy.destination_offset | copy.destination_stride;
    if ((all | copy.row_bytes) % PACK_UNIT != 0) return false;
    // Chunks are counted in 32 bits, and a block's next ones behind the end too.
    if (static_cast<uint64_t>(copy.rows) * (copy.row_bytes / PACK_UNIT) >= 1u << 31) return false;
    return end_of(copy.source_offset, copy.source_stride, copy) <= params.source_bytes[copy.source]
        && end_of(copy.destination_offset, copy.destination_stride, copy) <= params.destination_bytes[copy.destination];
}

struct Chunk16 {
    uint4 value;
    static constexpr uint32_t BYTES = 16;
    DEVICE void load(const unsigned char* from) { value = load_stream_16(from); }
    DEVICE void store(unsigned char* to) const { store_global_16(to, value); }
};

struct Chunk4 {
    uint32_t value;
    static constexpr uint32_t BYTES = 4;
    DEVICE void load(const unsigned char* from) { value = load_stream_4(from); }
    DEVICE void store(unsigned char* to) const { *reinterpret_cast<uint32_t*>(to) = value; }
};

template <class Chunk>
DEVICE void move_rows(const unsigned char* from, unsigned char* to, const PackCopy& copy) {
    const uint32_t per_row = copy.row_bytes / Chunk::BYTES;
    const uint32_t total = copy.rows * per_row;
    const uint32_t step = gridDim.x * THREADS;
    for (uint32_t first = blockIdx.x * THREADS + threadIdx.x; first < total; first += IN_FLIGHT * step) {
        Chunk chunks[IN_FLIGHT];
        unsigned char* places[IN_FLIGHT];
#pragma unroll
        for (uint32_t i = 0; i < IN_FLIGHT; i++) {
            const uint32_t index = first + i * step;
            places[i] = nullptr;
            if (index >= total || index < first) continue;
            const uint64_t row = index / per_row;
            const uint64_t byte = index % per_row * Chunk::BYTES;
            chunks[i].load(from + row * copy.source_stride + byte);
            places[i] = to + row * copy.destination_stride + byte;
        }
#pragma unroll
        for (uint32_t i = 0; i < IN_FLIGHT; i++) {
            if (places[i] != nullptr) chunks[i].store(places[i]);
        }
        if (total - first <= IN_FLIGHT * step) return;  // the next first could wrap
    }
}

KERNEL(256, 4)
pack(const unsigned char* source0, const unsigned char* source1, const unsigned char* source2, unsigned char* destination0,
     unsigned char* destination1, unsigned char* destination2, const PackCopy* copies, uint64_t* status,
     const __grid_constant__ PackParams params) {
    grid_dependency_wait();
    const PackCopy copy = copies[blockIdx.y];
    if (copy.rows == 0 || copy.row_bytes == 0) return;
    if (!is_valid(copy, params)) {
        if (blockIdx.x == 0 && threadIdx.x == 0) report_fault(status, FAULT_BAD_RANGE, blockIdx.y);
        return;
    }
    const unsigned char* const from = (copy.source == 0 ? source0 : copy.source == 1 ? source1 : source2) + copy.source_offset;
    unsigned char* const to =
        (copy.destination == 0 ? destination0 : copy.destination == 1 ? destination1 : destination2) + copy.destination_offset;
    const uint64_t all = copy.source_offset | copy.source_stride | copy.destination_offset | copy.destination_stride;
    if ((all | copy.row_bytes) % Chunk16::BYTES == 0) {
        move_rows<Chunk16>(from, to, copy);
    } else {
        move_rows<Chunk4>(from, to, copy);
    }
}
