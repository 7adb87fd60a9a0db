/* Parameters of the kernel in kernels/sparse-attn/sparse_resolve.cu. */
#ifndef LONGKV_SPARSE_RESOLVE_PARAMS_H
#define LONGKV_SPARSE_RESOLVE_PARAMS_H

#include <stdint.h>

/* What a row of the batch is at a step. */
enum SparseRow {
    /* No request: touches nothing, reads nothing. */
    SPARSE_ROW_IDLE = 0,
    /* Pages are closed: selects among them. */
    SPARSE_ROW_SELECTS = 1,
    /* Nothing is closed: reads its open pages, all of its tokens. */
    SPARSE_ROW_DENSE = 2,
    /* Something is wrong with it: reads nothing. */
    SPARSE_ROW_BAD = 3
};

/* Shape of one step of bucketed LRU. */
struct SparseResolveParams {
    /* (Request, KV head) pairs, each with slots of its own. */
    uint32_t rows;
    /* Pages that a row may select; shorter selections are padded. */
    uint32_t max_selected;
    /* Slots of a row. */
    uint32_t slots;
    /* Ages that replacement tells apart. */
    uint32_t buckets;
    /* Entries of the hash table over the selection: a power of two, at least twice max_selected. */
    uint32_t hash_entries;
    /* 1 where pages are fetched ahead between steps: nothing ages, and pages that find no slot stay away. */
    uint32_t prefetch;
};

/* A page that was not resident, and the slot it got. */
struct SparseMiss {
    /* Its place in the selection. */
    uint32_t place;
    /* The page. */
    uint32_t page;
    /* The slot. */
    uint32_t slot;
    /* The page that lost the slot; 0xffffffff if it was free. */
    uint32_t evicted;
};

/* Counts of a row since the caller last cleared them. */
struct SparseCounts {
    /* Steps over a selection. */
    uint64_t steps;
    /* Pages selected. */
    uint64_t selected;
    /* Of these, resident. */
    uint64_t hits;
    /* Of these, not resident. */
    uint64_t misses;
    /* Pages that lost their slot. */
    uint64_t evicted;
    /* Pages fetched before they were selected. */
    uint64_t prefetched;
    /* Pages written to host memory. */
    uint64_t written;
    /* Explicit padding, always 0. */
    uint64_t _pad;
};

#endif
