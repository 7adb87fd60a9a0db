// Packed pages streaming through a ring in shared memory that a team of warps shares.
//
// A segment comes in pieces: each half's fields with its first groups of codes, then its other groups, 4 KB of codes or one group
// at a time. Pieces are used in their order, and which piece a step refills is known at compile time, so that a copy is a run of
// cp.async with constant sizes.
#pragma once

#include "core.cuh"
#include "hack_decode_params.h"
#include "ptx/cp_async.cuh"
#include "ptx/sync.cuh"
#include "tile/hack_page.cuh"

// One half of a segment: `Fields` bytes, then codes.
template <class Codes, uint32_t Fields>
struct Pieces {
    static constexpr uint32_t FIT = 4096 / Codes::GROUP_BYTES > 0 ? 4096 / Codes::GROUP_BYTES : 1;
    static constexpr uint32_t GROUPS = FIT < Codes::GROUPS ? FIT : Codes::GROUPS;
    static constexpr uint32_t COUNT = ceil_div<uint32_t>(Codes::GROUPS, GROUPS);
    static constexpr uint32_t LARGEST = Fields + GROUPS * Codes::GROUP_BYTES;

    static DEVICE constexpr uint32_t offset(uint32_t piece) {
        return piece == 0 ? 0 : Fields + piece * GROUPS * Codes::GROUP_BYTES;
    }
    static DEVICE constexpr uint32_t bytes(uint32_t piece) {
        const uint32_t after = (piece + 1) * GROUPS;
        return Fields + (after < Codes::GROUPS ? after : Codes::GROUPS) * Codes::GROUP_BYTES - offset(piece);
    }
    // Whether a group begins a piece, other than the first.
    static DEVICE constexpr bool begins(uint32_t group) { return group > 0 && group % GROUPS == 0; }
    // Where a group lies in the piece that holds it.
    static DEVICE constexpr uint32_t group_offset(uint32_t group) {
        return (group < GROUPS ? Fields : 0) + group % GROUPS * Codes::GROUP_BYTES;
    }
};

template <class Page, int TeamWarps>
struct PageStream {
    using KeyPieces = Pieces<typename Page::KeyCodes, Page::K_CODES>;
    using ValuePieces = Pieces<typename Page::ValueCodes, Page::V_CODES>;
    static constexpr uint32_t PIECES = KeyPieces::COUNT + ValuePieces::COUNT;
    static constexpr uint32_t SLOT = KeyPieces::LARGEST > ValuePieces::LARGEST ? KeyPieces::LARGEST : ValuePieces::LARGEST;
    static constexpr uint32_t FIT = TeamWarps * 16 * 1024 / SLOT;
    static constexpr int SLOTS = FIT > 8 ? 8 : FIT < 3 ? 3 : FIT;
    static constexpr uint32_t BYTES = SLOTS * SLOT;
    static constexpr uint32_t NONE = ~0u;

    unsigned char* ring;
    uint32_t team;
    uint32_t step_blocks;        // from one page of this team to its next
    const unsigned char* pages;  // the pool
    uint32_t place;              // in a page: of the KV head's segment, and of this thread's first 16 bytes there
    const uint32_t* table;
    const HackDecodeParams& params;
    uint32_t fetch = 0;  // the block after the one that is being fetched
    uint32_t end = 0;
    uint32_t page = NONE;    // that is being fetched
    uint32_t next_page = 0;  // of block `fetch`: read a page ahead, so that no copy waits for its address
    uint32_t slot = 0;       // offset of the slot that the next copy fills; the one after it is used next

    // The plan has checked the ids, but the table is the caller's to change: an id that has gone bad since reads a wrong page,
    // never memory outside the pool.
    DEVICE void look_up() {
        if (fetch < end) next_page = min(table[fetch], params.num_pages - 1);
    }

    // Fetches `bytes` of the current segment from `offset` on.
    DEVICE void copy(uint32_t offset, uint32_t bytes) {
        constexpr uint32_t THREADS = TeamWarps * WARP_SIZE;
        const uint32_t first = threadIdx.x % THREADS * 16;
        const uint32_t to = shared_address(ring) + slot + first;
        const unsigned char* const from = pages + page * params.page_stride + place + offset;
#pragma unroll
        for (uint32_t at = 0; at < bytes; at += THREADS * 16) {
            if (at + THREADS * 16 <= bytes || first < bytes - at) cp_async_16(to + at, from + at);
        }
    }

    // Fetches piece `piece` of the sequence of pages; with piece 0 a new page begins.
    DEVICE void issue(uint32_t piece) {
        if (piece == 0) {
            page = fetch < end ? next_page : NONE;
            fetch += step_blocks;
            look_up();
        }
        if (page != NONE) {
            if (piece < KeyPieces::COUNT) {
                copy(KeyPieces::offset(piece), KeyPieces::bytes(piece));
            } else {
                const uint32_t of_values = piece - KeyPieces::COUNT;
                copy(Page::KEY_BYTES + ValuePieces::offset(of_values), ValuePieces::bytes(of_values));
            }
        }
        cp_async_commit();  // also when empty, so that the waits always count SLOTS − 1 groups
        slot = slot + SLOT == BYTES ? 0 : slot + SLOT;
    }

    // Where the segment of a KV head and this thread's bytes of it lie in a page.
    static DEVICE uint32_t place_of(uint32_t kv_head) {
        return kv_head * Page::SEGMENT_BYTES + threadIdx.x % (TeamWarps * WARP_SIZE) * 16;
    }

    // Starts on blocks first, first + step_blocks, … < end.
    DEVICE void start(uint32_t first, uint32_t end_block) {
        fetch = first;
        end = end_block;
        look_up();
#pragma unroll
        for (uint32_t ahead = 0; ahead < SLOTS - 1; ahead++) issue(ahead % PIECES);
    }

    // Waits for piece `piece` of the current page, refills the slot that was used before it, and returns its place. Copies are
    // SLOTS − 1 ahead, so that the slot after the one just refilled is the oldest.
    DEVICE const unsigned char* step(uint32_t piece) {
        cp_async_wait<SLOTS - 2>();
        sync();
        issue((piece + SLOTS - 1) % PIECES);
        return ring + slot;
    }
    DEVICE const unsigned char* step_keys(uint32_t piece) { return step(piece); }
    DEVICE const unsigned char* step_values(uint32_t piece) { return step(KeyPieces::COUNT + piece); }

    // All pages are used: nothing is on its way to the ring, and the team has left it.
    DEVICE void finish() {
        cp_async_wait<0>();
        sync();
    }

    DEVICE void sync() const {
        if constexpr (TeamWarps == 1) __syncwarp();
        else named_barrier_sync(1 + team, TeamWarps * WARP_SIZE);
    }
};
