/* Parameters of the kernels in kernels/sparse-attn/sparse_plan.cu and sparse_attend.cu. */
#ifndef LONGKV_SPARSE_ATTEND_PARAMS_H
#define LONGKV_SPARSE_ATTEND_PARAMS_H

#include <stdint.h>

/* Constants of sparse attention. */
enum SparseAttendConstants {
    /* Tokens of a tile, the granule of the work. */
    SPARSE_TILE = 64
};

/* A page that a row reads: where it lies and how much of it is there. */
struct SparseEntry {
    /* Run of device memory that holds the page. */
    uint32_t run;
    /* Tokens of it that exist, from the first on. */
    uint32_t tokens;
};

/* Sizes of one plan: from slots and open pages to lists of runs. */
struct SparsePlanParams {
    /* (Request, KV head) pairs: row = request * kv_heads + kv_head. */
    uint32_t rows;
    /* KV heads of a request. */
    uint32_t kv_heads;
    /* Pages that a row may select. */
    uint32_t max_selected;
    /* Slots of a row. */
    uint32_t slots;
    /* Open pages that a row may have. */
    uint32_t max_open;
    /* Pages that a request may have. */
    uint32_t max_pages;
    /* Runs of device memory. */
    uint32_t num_runs;
    /* log2 of the tokens in a page, at least 3. */
    uint32_t page_shift;
    /* Tiles of one unit of work. */
    uint32_t unit_tiles;
    /* Pages of host memory. */
    uint32_t host_pages;
};

/* Shape and split of one attention over lists of runs. */
struct SparseAttendParams {
    /* (Request, KV head) pairs. */
    uint32_t rows;
    /* Query heads that read one KV head. */
    uint32_t group;
    /* Entries that the list of a row can hold. */
    uint32_t max_entries;
    /* Runs of device memory. */
    uint32_t num_runs;
    /* log2 of the tokens in a page, at least 3. */
    uint32_t page_shift;
    /* Tiles of one unit of work: 1 for balanced splits; a fixed number for splits that no other row changes. */
    uint32_t unit_tiles;
    /* 1 where each unit is a part of its own, 0 where a block's units of one row are one part. */
    uint32_t fixed_parts;
    /* Units below which a block does not split further. */
    uint32_t min_units;
    /* Softmax scale. */
    float scale;
    /* Soft-cap of the scaled scores; read only where the kernel is compiled with it. */
    float soft_cap;
};

#endif
