/* Parameters of the kernels in kernels/attention/decode*.cu. */
#ifndef LONGKV_DECODE_PARAMS_H
#define LONGKV_DECODE_PARAMS_H

#include <stdint.h>

/* Constants of the decode kernels. */
enum DecodeConstants {
    /* Tokens of a tile, the granule of the decode kernels' work. */
    DECODE_TILE = 64
};

/* Shape, layout and split of one decode step. */
struct DecodeParams {
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
    /* Entries between two sequences of the block table. */
    int64_t table_batch_stride;
    /* Entries between two KV heads of the block table; 0 where all heads share it. */
    int64_t table_head_stride;
    /* Sequences. */
    uint32_t batch;
    /* Queries of each sequence, aligned to the end of its keys. */
    uint32_t q_len;
    /* KV heads. */
    uint32_t kv_heads;
    /* Query heads that read one KV head. */
    uint32_t group;
    /* Blocks of columns that the q_len * group queries of one KV head need. */
    uint32_t column_blocks;
    /* log2 of the tokens in a page. */
    uint32_t page_shift;
    /* Pages that the block table holds for one sequence. */
    uint32_t max_pages;
    /* Pages in the pool; a page id is below this. */
    uint32_t num_pages;
    /* Tokens in a contiguous cache. */
    uint32_t num_tokens;
    /* Largest length that the plan allows. */
    uint32_t max_kv_len;
    /* Keys that a query sees, itself included; 0 for all. */
    uint32_t window;
    /* Tiles of one unit of work: 1 for balanced splits; a fixed number for splits that no other sequence changes. */
    uint32_t unit_tiles;
    /* 1 where each unit is a part of its own, 0 where a block's units of one item are one part. */
    uint32_t fixed_parts;
    /* Units below which a block does not split further. */
    uint32_t min_units;
    /* Softmax scale. */
    float scale;
    /* Soft-cap of the scaled scores; read only where the kernel is compiled with it. */
    float soft_cap;
};

#endif
