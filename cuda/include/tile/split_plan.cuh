// How the blocks of a split-KV kernel share ragged work: contiguous ranges of equal size.
//
// Work is a line of units. Sequence s has units[s] units for each of `heads` items (KV heads, or blocks of query columns),
// an item's units are neighbours, and items lie sequence by sequence. Block b of B takes units [T·b/B, T·(b+1)/B) of all T.
// A range covers pieces of few items and an item lies in few ranges; a piece is a part, whose partial state has a slot of
// its own in the workspace, and the last block to finish a part of an item merges them in order.
//
// With fixed parts every unit is a part, so that a sequence's parts and their merge do not depend on the rest of the batch.
#pragma once

#include "core.cuh"

// A piece of one item that one block works on.
struct Part {
    uint32_t sequence;
    uint32_t head;        // item within the sequence
    uint32_t first_unit;  // units of the item that the part covers: [first_unit, end_unit)
    uint32_t end_unit;
    uint32_t index;  // among the parts of the item
    uint32_t count;
    uint64_t slot;         // of this part's partial state
    uint64_t first_slot;   // of part 0
    uint64_t second_slot;  // of part 1; the following ones are slot_step apart
    uint32_t slot_step;

    DEVICE uint64_t slot_of(uint32_t part) const {
        return part == 0 ? first_slot : second_slot + static_cast<uint64_t>(part - 1) * slot_step;
    }
};

struct SplitPlan {
    const uint32_t* first_unit;  // [batch + 1]: units per item, summed over the sequences before
    uint32_t batch;
    uint32_t heads;
    uint32_t blocks;  // that have work
    bool fixed_parts;
    uint64_t total;

    DEVICE SplitPlan(const uint32_t* first_unit, uint32_t batch, uint32_t heads, uint32_t max_blocks, uint32_t min_units,
                     bool fixed_parts)
        : first_unit(first_unit), batch(batch), heads(heads), fixed_parts(fixed_parts) {
        total = static_cast<uint64_t>(first_unit[batch]) * heads;
        const uint64_t wanted = ceil_div<uint64_t>(total, min_units);
        blocks = wanted < max_blocks ? static_cast<uint32_t>(wanted) : max_blocks;
    }

    DEVICE uint64_t begin(uint32_t block) const { return total * block / blocks; }

    // The block whose range holds `unit`: the last b with T·b/B ≤ unit.
    DEVICE uint32_t owner(uint64_t unit) const {
        return static_cast<uint32_t>(((unit + 1) * blocks + total - 1) / total) - 1;
    }

    // The part that begins at `unit` for `block`, whose range ends at `end`.
    DEVICE Part part_at(uint64_t unit, uint64_t end, uint32_t block) const {
        uint32_t low = 0;
        uint32_t high = batch;  // the sequence lies in [low, high)
        while (high - low > 1) {
            const uint32_t middle = (low + high) / 2;
            if (static_cast<uint64_t>(first_unit[middle]) * heads <= unit) low = middle;
            else high = middle;
        }
        const uint32_t units = first_unit[low + 1] - first_unit[low];
        const uint64_t in_sequence = unit - static_cast<uint64_t>(first_unit[low]) * heads;
        Part part;
        part.sequence = low;
        part.head = static_cast<uint32_t>(in_sequence / units);
        part.first_unit = static_cast<uint32_t>(in_sequence % units);
        const uint64_t item = unit - part.first_unit;
        if (fixed_parts) {
            part.end_unit = part.first_unit + 1;
            part.index = part.first_unit;
            part.count = units;
            part.slot = unit;
            part.first_slot = item;
            part.second_slot = item + 1;
            part.slot_step = 1;
        } else {
            const uint64_t item_end = item + units;
            const uint32_t first_block = owner(item);
            part.end_unit = static_cast<uint32_t>((item_end < end ? item_end : end) - item);
            part.index = block - first_block;
            part.count = owner(item_end - 1) - first_block + 1;
            // A block begins at most one item that it does not finish and ends at most one that it did not begin: two slots.
            part.slot = 2 * static_cast<uint64_t>(block) + (part.index == 0);
            part.first_slot = 2 * static_cast<uint64_t>(first_block) + 1;
            part.second_slot = 2 * static_cast<uint64_t>(first_block + 1);
            part.slot_step = 2;
        }
        return part;
    }
};
