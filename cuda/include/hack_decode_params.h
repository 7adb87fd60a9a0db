/* Parameters of the kernels in kernels/homomorphic-quant/hack_decode*.cu. */
#ifndef LONGKV_HACK_DECODE_PARAMS_H
#define LONGKV_HACK_DECODE_PARAMS_H

#include <stdint.h>

/* Shape, layout and split of attention over a quantized KV cache. */
struct HackDecodeParams {
    /* Bytes between two pages of codes, a multiple of 16. */
    int64_t page_stride;
    /* Entries between two sequences of the block table. */
    int64_t table_batch_stride;
    /* Sequences. */
    uint32_t batch;
    /* Queries of each sequence, aligned to the end of its tokens. */
    uint32_t q_len;
    /* KV heads. */
    uint32_t kv_heads;
    /* Query heads that read one KV head. */
    uint32_t group;
    /* Blocks of columns that the q_len * group queries of one KV head need. */
    uint32_t column_blocks;
    /* Tokens of a closed block. */
    uint32_t partition;
    /* Tokens at the start of a sequence that are in 16 bits. */
    uint32_t sinks;
    /* Pages that the block table holds for one sequence. */
    uint32_t max_pages;
    /* Pages of codes in the pool; a page id is below this. */
    uint32_t num_pages;
    /* Pages in the pool of sinks. */
    uint32_t num_sink_pages;
    /* Pages in the pool of open blocks. */
    uint32_t num_open_pages;
    /* Largest length that the plan allows. */
    uint32_t max_kv_len;
    /* Tokens that a query sees, itself included; 0 for all. */
    uint32_t window;
    /* First tokens of a sequence that a window leaves visible: at most `sinks`. */
    uint32_t window_sinks;
    /* Pages of one unit of work: 1 for balanced splits; a fixed number for splits that no other sequence changes. */
    uint32_t unit_pages;
    /* 1 where each unit is a part of its own, 0 where a block's units of one item are one part. */
    uint32_t fixed_parts;
    /* Units below which a block does not split further. */
    uint32_t min_units;
    /* Softmax scale. */
    float scale;
    /* Soft-cap of the scaled scores; read only where the kernel is compiled with it. */
    float soft_cap;
    /* Zero. */
    uint32_t _pad;
};

#endif
