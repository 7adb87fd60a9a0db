/* Parameters of the kernel kernels/attention/append.cu. */
#ifndef LONGKV_APPEND_PARAMS_H
#define LONGKV_APPEND_PARAMS_H

#include <stdint.h>

/* Shape and layout of one append of new tokens to a KV cache. */
struct AppendParams {
    /* Elements between two pages of K, or 0 where K is not paged. */
    int64_t k_page_stride;
    /* Elements between two tokens of K. */
    int64_t k_token_stride;
    /* Elements between two heads of K. */
    int64_t k_head_stride;
    /* Elements between two pages of V, or 0 where V is not paged. */
    int64_t v_page_stride;
    /* Elements between two tokens of V. */
    int64_t v_token_stride;
    /* Elements between two heads of V. */
    int64_t v_head_stride;
    /* Elements between two tokens of the queries. */
    int64_t q_new_stride;
    /* Elements between two tokens of the new keys. */
    int64_t k_new_stride;
    /* Elements between two tokens of the new values. */
    int64_t v_new_stride;
    /* Slots in the cache; a slot is below this. */
    int64_t num_slots;
    /* New tokens. */
    uint32_t tokens;
    /* Query heads to rotate; 0 where queries are not given. */
    uint32_t q_heads;
    /* KV heads. */
    uint32_t kv_heads;
    /* Channels that rotate: a multiple of 16. */
    uint32_t rotary_dim;
    /* Positions in the tables of cosines and sines. */
    uint32_t positions;
    /* log2 of the slots in a page; 62 where the cache is one run of slots. */
    uint32_t page_shift;
};

#endif
