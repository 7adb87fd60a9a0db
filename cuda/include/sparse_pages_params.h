/* Parameters of the kernels in kernels/sparse-attn/sparse_append.cu, sparse_close.cu and sparse_flush.cu. */
#ifndef LONGKV_SPARSE_PAGES_PARAMS_H
#define LONGKV_SPARSE_PAGES_PARAMS_H

#include <stdint.h>

/* A page that was just closed. */
struct SparseClosing {
    /* The page. */
    uint32_t page;
    /* Run of device memory that holds it. */
    uint32_t run;
    /* The slot that it got; 0xffffffff for none. */
    uint32_t slot;
    /* The page that lost the slot; 0xffffffff if it was free. */
    uint32_t evicted;
};

/* Shape of one append of new tokens to open pages. */
struct SparseAppendParams {
    /* Requests. */
    uint32_t requests;
    /* New tokens of each request, aligned to the end of its keys. */
    uint32_t tokens;
    /* KV heads of a request. */
    uint32_t kv_heads;
    /* Bytes of a key, a multiple of 16. */
    uint32_t k_bytes;
    /* Bytes of a value, a multiple of 16. */
    uint32_t v_bytes;
    /* log2 of the tokens in a page. */
    uint32_t page_shift;
    /* Open pages that a row may have. */
    uint32_t max_open;
    /* Runs of device memory. */
    uint32_t num_runs;
};

/* Shape and rule of one closing of open pages. */
struct SparseCloseParams {
    /* (Request, KV head) pairs: row = request * kv_heads + kv_head. */
    uint32_t rows;
    /* KV heads of a request. */
    uint32_t kv_heads;
    /* Slots of a row. */
    uint32_t slots;
    /* Open pages that a row may have. */
    uint32_t max_open;
    /* Pages that a request may have. */
    uint32_t max_pages;
    /* Entries that a row's list of closed pages can hold. */
    uint32_t max_closing;
    /* Pages of a partition. */
    uint32_t partition_pages;
    /* log2 of the tokens in a page. */
    uint32_t page_shift;
    /* Context up to which everything stays open. */
    uint32_t dense_tokens;
    /* Ages that replacement tells apart. */
    uint32_t buckets;
    /* 1 where any number of partitions may be closed, 0 where only the one that a decoded token fills. */
    uint32_t bulk;
    /* Pages of host memory. */
    uint32_t host_pages;
    /* Runs of device memory. */
    uint32_t num_runs;
    /* Explicit padding, always 0. */
    uint32_t _pad;
};

/* Pools and tables of one write-back. */
struct SparseFlushParams {
    /* (Request, KV head) pairs. */
    uint32_t rows;
    /* KV heads of a request. */
    uint32_t kv_heads;
    /* Entries that a row's list of closed pages can hold. */
    uint32_t max_closing;
    /* Slots of a row. */
    uint32_t slots;
    /* Pages of a request's host table. */
    uint32_t max_pages;
    /* Pages of host memory, each of kv_heads runs. */
    uint32_t host_pages;
    /* Runs of device memory. */
    uint32_t num_runs;
    /* Bytes of a run, a multiple of 16. */
    uint32_t run_bytes;
};

#endif
