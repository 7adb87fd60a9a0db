// How the blocks of a split-KV kernel share ragged work whose items differ in bytes: contiguous ranges of equal weight.
//
// Work is a line of weights, each the bytes of 16 tokens × 16 channels. An item, which is a KV head of a sequence or a block of
// its query columns, takes item_weight for its start and end, then for each group of 16 tokens as much as its head has blocks
// of key and value channels. Items lie sequence by sequence, head by head. Block b of B takes the range [T·b/B, T·(b+1)/B) of
// all T, to the group of tokens: so every block reads nearly the same number of bytes, whatever the lengths and the ranks.
// Where the line runs follows from lengths and ranks alone; the sums over the batch do not even know the ranks
// (attention/decode_plan.cu), so that one plan serves layers of different ranks.
//
// As in tile/split_plan.cuh a range's piece of an item is a part, with a slot of its own for its partial state; the last block
// to finish a part of an item merges them in order. Fixed parts have a fixed number of bytes and belong to the block in whose
// range they begin, so that a sequence's parts and their merge do not depend on the rest of the batch.
#pragma once

#include "core.cuh"
#include "fdc_params.h"
#include "tile/low_rank.cuh"

// A piece of one item that one block works on.
struct WeightedPart {
    uint32_t sequence;
    uint32_t item;         // within the sequence
    uint32_t first_group;  // groups of the item that the part covers: [first_group, end_group); may be none
    uint32_t end_group;
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

struct WeightedSplit {
    const uint32_t* first_unit;  // [batch + 1]: units of 4 groups per item, summed over the sequences before
    const FdcDecodeParams& params;
    uint32_t items;  // of a sequence
    uint32_t blocks;  // that have work
    uint64_t total;

    DEVICE WeightedSplit(const uint32_t* first_unit, const FdcDecodeParams& params, uint32_t max_blocks)
        : first_unit(first_unit), params(params), items(params.heads.count * params.column_blocks) {
        if (params.split == FDC_SPLIT_NONE) {
            total = static_cast<uint64_t>(params.batch) * items;
            blocks = max_blocks;
        } else {
            total = sequence_begin(params.batch);
            const uint64_t wanted = ceil_div<uint64_t>(total, params.min_weight);
            blocks = wanted < max_blocks ? static_cast<uint32_t>(wanted) : max_blocks;
        }
    }

    DEVICE uint64_t begin(uint32_t block) const { return total * block / blocks; }

    // The next part of `block`, whose range goes on from `at` to `end`; moves `at` past it. False where there is none.
    DEVICE bool next(WeightedPart& part, uint64_t& at, uint64_t end, uint32_t block) const {
        while (at < end) {
            if (params.split == FDC_SPLIT_NONE) {
                part.sequence = static_cast<uint32_t>(at / items);
                part.item = static_cast<uint32_t>(at % items);
                whole_item(part);
                at += 1;
                return true;
            }
            const Place place = place_of(at);
            part.sequence = place.sequence;
            part.item = place.item;
            if (params.split == FDC_SPLIT_BALANCED) {
                const uint64_t stop = place.end < end ? place.end : end;
                const uint32_t first_block = owner(place.begin);
                part.first_group = place.group_at(at, params.item_weight);
                part.end_group = place.group_at(stop, params.item_weight);
                part.index = block - first_block;
                part.count = owner(place.end - 1) - first_block + 1;
                // A block begins at most one item that it does not finish and ends at most one that it did not begin.
                part.slot = 2 * static_cast<uint64_t>(block) + (part.index == 0);
                part.first_slot = 2 * static_cast<uint64_t>(first_block) + 1;
                part.second_slot = 2 * static_cast<uint64_t>(first_block + 1);
                part.slot_step = 2;
                at = stop;
                return true;
            }
            if (fixed_part(part, place, at, end)) return true;
            at = place.end;
        }
        return false;
    }

   private:
    // An item and the part of the line that it takes.
    struct Place {
        uint32_t sequence;
        uint32_t item;
        uint32_t groups;
        uint32_t weight;  // of a group
        uint64_t begin;
        uint64_t end;

        // The group that `position` of the line, within the item or at its end, lies in.
        DEVICE uint32_t group_at(uint64_t position, uint32_t item_weight) const {
            const uint32_t inside = static_cast<uint32_t>(position - begin);
            return inside <= item_weight ? 0 : (inside - item_weight) / weight;
        }
    };

    DEVICE uint64_t sequence_begin(uint32_t sequence) const {
        const uint32_t weight = blocks_before(params.heads, params.heads.count) * params.column_blocks;
        return static_cast<uint64_t>(sequence) * items * params.item_weight
               + static_cast<uint64_t>(first_unit[sequence]) * (FDC_UNIT_GROUPS * weight);
    }

    DEVICE uint32_t groups_of(uint32_t sequence) const {
        return (first_unit[sequence + 1] - first_unit[sequence]) * FDC_UNIT_GROUPS;
    }

    DEVICE uint32_t weight_of(uint32_t item) const {
        const uint32_t head = item / params.column_blocks;
        return blocks_before(params.heads, head + 1) - blocks_before(params.heads, head);
    }

    // What the items of a sequence before `item` take of the line.
    DEVICE uint64_t before(uint32_t item, uint32_t groups) const {
        const uint32_t head = item / params.column_blocks;
        uint32_t weight = blocks_before(params.heads, head) * params.column_blocks;
        if (item % params.column_blocks != 0) weight += item % params.column_blocks * weight_of(item);
        return static_cast<uint64_t>(item) * params.item_weight + static_cast<uint64_t>(groups) * weight;
    }

    // The block whose range holds `position`: the last b with T·b/B ≤ position.
    DEVICE uint32_t owner(uint64_t position) const {
        return static_cast<uint32_t>(((position + 1) * blocks + total - 1) / total) - 1;
    }

    DEVICE Place place_of(uint64_t position) const {
        uint32_t low = 0;
        uint32_t high = params.batch;  // the sequence lies in [low, high)
        while (high - low > 1) {
            const uint32_t middle = (low + high) / 2;
            if (sequence_begin(middle) <= position) low = middle;
            else high = middle;
        }
        Place place;
        place.sequence = low;
        place.groups = groups_of(low);
        const uint64_t sequence = sequence_begin(low);
        low = 0;
        high = items;
        while (high - low > 1) {
            const uint32_t middle = (low + high) / 2;
            if (sequence + before(middle, place.groups) <= position) low = middle;
            else high = middle;
        }
        place.item = low;
        place.weight = weight_of(low);
        place.begin = sequence + before(low, place.groups);
        place.end = place.begin + params.item_weight + static_cast<uint64_t>(place.groups) * place.weight;
        return place;
    }

    DEVICE void whole_item(WeightedPart& part) const {
        part.first_group = 0;
        part.end_group = groups_of(part.sequence);
        part.index = 0;
        part.count = 1;
        part.slot = part.first_slot = part.second_slot = part.slot_step = 0;
    }

    // The first fixed part of an item that begins in [at, end); moves `at` past its beginning.
    DEVICE bool fixed_part(WeightedPart& part, const Place& place, uint64_t& at, uint64_t end) const {
        const uint32_t per_part = max(params.part_weight / place.weight, 1u);
        const uint32_t part_weight = per_part * place.weight;
        const uint32_t inside = static_cast<uint32_t>(at - place.begin);
        // Part 0 begins with the item, part i with its first group.
        part.index = inside == 0 ? 0 : inside <= params.item_weight ? 1 : ceil_div(inside - params.item_weight, part_weight);
        part.count = ceil_div(place.groups, per_part);
        const uint64_t begin =
            place.begin + (part.index == 0 ? 0 : params.item_weight + static_cast<uint64_t>(part.index) * part_weight);
        if (part.index >= part.count || begin >= end) return false;
        part.first_group = part.index * per_part;
        part.end_group = min(part.first_group + per_part, place.groups);
        part.first_slot = (static_cast<uint64_t>(place.sequence) * items + place.item) * params.max_parts;
        part.second_slot = part.first_slot + 1;
        part.slot = part.first_slot + part.index;
        part.slot_step = 1;
        at = begin + 1;
        return true;
    }
};
