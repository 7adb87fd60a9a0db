// Lists the parts that tile/weighted_split.cuh deals to each block.
//
// first_unit [batch + 1] u32: units per item, summed over the sequences before
// parts      [blocks, room, 8] u32: sequence, item, first group, end group, index, count, slot, slot_of(index)
// counts     [blocks] u32: parts of each block; what exceeds `room` is counted and not listed
//
// Arch:    sm_80 and later.
// Mapping: one thread per block.
// Budget:  72 registers, no shared memory.
// Limit:   latency: it is a test.
#include "core.cuh"
#include "fdc_params.h"
#include "tile/weighted_split.cuh"

KERNEL(32, 1)
weighted_parts(const uint32_t* first_unit, uint32_t* parts, uint32_t* counts, uint32_t room,
               const __grid_constant__ FdcDecodeParams params) {
    if (threadIdx.x != 0) return;
    const WeightedSplit split(first_unit, params, gridDim.x);
    uint32_t count = 0;
    if (blockIdx.x < split.blocks) {
        uint64_t at = split.begin(blockIdx.x);
        const uint64_t end = split.begin(blockIdx.x + 1);
        for (WeightedPart part; split.next(part, at, end, blockIdx.x); count++) {
            if (count >= room) continue;
            uint32_t* const to = parts + (static_cast<uint64_t>(blockIdx.x) * room + count) * 8;
            to[0] = part.sequence, to[1] = part.item, to[2] = part.first_group, to[3] = part.end_group;
            to[4] = part.index, to[5] = part.count;
            to[6] = static_cast<uint32_t>(part.slot), to[7] = static_cast<uint32_t>(part.slot_of(part.index));
        }
    }
    counts[blockIdx.x] = count;
}
