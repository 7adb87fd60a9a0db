/* Parameters of the kernel in kernels/sparse-attn/sparse_gather.cu. */
#ifndef LONGKV_SPARSE_GATHER_PARAMS_H
#define LONGKV_SPARSE_GATHER_PARAMS_H

#include <stdint.h>

/* Pools and tables of one gather. */
struct SparseGatherParams {
    /* (Request, KV head) pairs: row = request * kv_heads + kv_head. */
    uint32_t rows;
    /* KV heads of a request. */
    uint32_t kv_heads;
    /* Misses that a row may have. */
    uint32_t max_selected;
    /* Slots of a row. */
    uint32_t slots;
    /* Pages of a request's host table. */
    uint32_t max_pages;
    /* Pages of host memory, each of kv_heads runs. */
    uint32_t host_pages;
    /* Runs of device memory. */
    uint32_t device_pages;
    /* Bytes of a run, a multiple of 16. */
    uint32_t run_bytes;
};

#endif
