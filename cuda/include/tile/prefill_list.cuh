// How the blocks of a prefill walk a list of tiles: each draws one tile of one head after another, longest first, and
// walks the spans of keys that follow it.
//
// The list may be the caller's, so nothing in it is trusted: whatever it holds, blocks stay within q, the cache and the list,
// and end.
#pragma once

#include "core.cuh"
#include "prefill_params.h"
#include "ptx/sync.cuh"
#include "status_params.h"
#include "tile/prefill_rows.cuh"
#include "tile/status.cuh"

// What a block has drawn; in shared memory beside the tile's description.
struct PrefillDraw {
    uint32_t drawn;  // place among the tiles of all heads
    uint32_t flags;  // PrefillTileFlags
    uint32_t fault;  // of the entry read last
};

// What is wrong with a tile that is to be read from the list; FAULT_NONE for nothing.
template <bool Paged>
DEVICE uint32_t tile_fault(const PrefillTile& tile, uint32_t entry, const PrefillParams& params) {
    // Differences instead of sums: nothing wraps, and no number of 64 bits takes registers through the loop over keys.
    if (tile.queries > params.num_queries || tile.first_query > params.num_queries - tile.queries) return FAULT_BAD_RANGE;
    if (tile.first_row >= tile.queries * params.group) return FAULT_BAD_RANGE;
    const int32_t keys = static_cast<int32_t>(tile.kv_len);
    if (tile.kv_len > params.max_kv_len || tile.end > keys || tile.begin > keys) return FAULT_BAD_RANGE;
    if (Paged) {
        if (tile.sequence >= params.batch) return FAULT_BAD_INDEX;
        if ((tile.kv_len + (1u << params.page_shift) - 1) >> params.page_shift > params.max_pages) return FAULT_BAD_RANGE;
    } else if (tile.kv_len > params.num_tokens || tile.kv_start > params.num_tokens - tile.kv_len) {
        return FAULT_BAD_RANGE;
    }
    // A span lies behind the one before, so that there is an end.
    if (tile.next != 0 && (tile.next <= entry || tile.next >= params.max_tiles)) return FAULT_BAD_INDEX;
    return FAULT_NONE;
}

// Copies the words from `first_word` on of an entry of the list, one thread each; a barrier before anyone looks.
DEVICE void copy_tile(PrefillTile& tile, const PrefillTile* list, uint32_t entry, uint32_t first_word) {
    constexpr uint32_t WORDS = sizeof(PrefillTile) / sizeof(uint32_t);
    const uint32_t word = first_word + threadIdx.x;
    if (word < WORDS) {
        const uint64_t place = static_cast<uint64_t>(entry) * WORDS + word;
        reinterpret_cast<uint32_t*>(&tile)[word] = reinterpret_cast<const uint32_t*>(list)[place];
    }
}

// Draws the block's next tile with queries; false when none is left. The whole block calls, with Roles
// from different places, and has left the item before. `work` counts draws; the grid's last one leaves it zero again.
template <bool Roles = false, bool Paged, class Element>
DEVICE bool draw_tile(PrefillDraw& draw, PrefillItem<Element, Paged>& item, const PrefillBuffers<Element>& buffers,
                      uint32_t* work, uint64_t* status, const PrefillParams& params) {
    const uint32_t total = min(*buffers.tile_count, params.max_tiles) * params.kv_heads;
    for (;;) {
        block_barrier<Roles>();
        if (threadIdx.x == 0) {
            draw.drawn = atomic_add_acq_rel_u32(work, 1);
            if (draw.drawn + 1 == total + gridDim.x) *work = 0;  // plain: nobody looks at it before the next launch
        }
        block_barrier<Roles>();
        if (draw.drawn >= total) return false;
        const uint32_t entry = draw.drawn / params.kv_heads;
        copy_tile(item.tile, buffers.tiles, entry, 0);
        block_barrier<Roles>();
        if (threadIdx.x == 0) {
            draw.flags = item.tile.flags;
            draw.fault = tile_fault<Paged>(item.tile, entry, params);
            if (draw.fault == FAULT_NONE) {
                item.place(draw.drawn % params.kv_heads, buffers, params);
            } else {
                report_fault(status, draw.fault, entry);
            }
        }
        block_barrier<Roles>();
        if (draw.fault == FAULT_NONE) return true;
    }
}

// Goes on to the next span of the item's rows; false if it was the last. The whole block calls, with Roles from different places.
template <bool Roles = false, bool Paged, class Element>
DEVICE bool next_span(PrefillDraw& draw, PrefillItem<Element, Paged>& item, const PrefillBuffers<Element>& buffers,
                      uint64_t* status, const PrefillParams& params) {
    // The rows stay those of the first span, whatever the others' entries say.
    constexpr uint32_t SPAN_WORD = 4;  // kv_start
    const uint32_t next = item.tile.next;
    if (next == 0) return false;
    block_barrier<Roles>();  // everyone has left the span before
    copy_tile(item.tile, buffers.tiles, next, SPAN_WORD);
    block_barrier<Roles>();
    if (threadIdx.x == 0) {
        draw.fault = tile_fault<Paged>(item.tile, next, params);
        if (draw.fault != FAULT_NONE) {
            report_fault(status, draw.fault, next);
            item.tile.kv_len = 0;
            item.tile.next = 0;
        }
        item.place(item.kv_head, buffers, params);
    }
    block_barrier<Roles>();
    return true;
}

// Leaves the rows of a carrying kernel as their tile says: as a state, after what was stored of it has joined, or as output.
template <class Rows, class Item, class Element>
DEVICE void leave_rows(Rows& rows, float* state_o, float* state_ml, Element* out, float* lse, const PrefillDraw& draw,
                       const Item& item, const PrefillParams& params) {
    const bool resume = params.resume != 0 || (draw.flags & PREFILL_TILE_RESUME) != 0;
    const bool finish = lse != nullptr && (draw.flags & PREFILL_TILE_FINISH) != 0;
    rows.settle();
    if (resume) rows.join_state(state_o, state_ml, finish, item, params);
    if (finish) {
        rows.normalise(lse, item, params);
    } else {
        rows.store_sums(state_ml, resume, item, params);
    }
    if (finish && out != nullptr) {
        rows.store(out, false, item, params);
    } else {
        rows.store(state_o, resume && !finish, item, params);
    }
}
