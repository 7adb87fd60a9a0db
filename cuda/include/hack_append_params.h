/* Parameters of kernels/homomorphic-quant/hack_append.cu. */
#ifndef LONGKV_HACK_APPEND_PARAMS_H
#define LONGKV_HACK_APPEND_PARAMS_H

#include <stdint.h>

/* Shape and layout of one append to a quantized KV cache. */
struct HackAppendParams {
    /* Elements between two tokens of the new keys, a multiple of 8. */
    int64_t k_new_stride;
    /* Elements between two tokens of the new values, a multiple of 8. */
    int64_t v_new_stride;
    /* Bytes between two pages of codes, a multiple of 16. */
    int64_t page_stride;
    /* Entries between two sequences of the block table. */
    int64_t table_batch_stride;
    /* Sequences. */
    uint32_t batch;
    /* KV heads. */
    uint32_t kv_heads;
    /* New tokens in all, over the sequences. */
    uint32_t num_new;
    /* New tokens of one sequence at most. */
    uint32_t max_new;
    /* Largest length that the plan allows. */
    uint32_t max_kv_len;
    /* Tokens at the start of a sequence that stay in 16 bits. */
    uint32_t sinks;
    /* Pages that the block table holds for one sequence. */
    uint32_t max_pages;
    /* Pages of codes in the pool; a page id is below this. */
    uint32_t num_pages;
    /* Pages in the pool of sinks. */
    uint32_t num_sink_pages;
    /* Pages in the pool of open blocks. */
    uint32_t num_open_pages;
};

#endif
