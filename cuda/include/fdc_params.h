/* Parameters of the kernels in kernels/kv-compress. */
#ifndef LONGKV_FDC_PARAMS_H
#define LONGKV_FDC_PARAMS_H

#include <stdint.h>

/* Constants of the low-rank kernels. */
enum FdcConstants {
    /* KV heads that one layer may have. */
    FDC_MAX_HEADS = 128,
    /* Channels in a block of channels: ranks are multiples of it. */
    FDC_RANK_STEP = 16,
    /* Tokens in a group of tokens, the granule of the work; a page is whole groups. */
    FDC_GROUP = 16,
    /* Groups of tokens in a unit of decode_plan's sums, whose tiles have 64 tokens. */
    FDC_UNIT_GROUPS = 4
};

/* Ranks of the KV heads of one layer, as sums over the heads before, in blocks of 16 channels. From these follow a head's
   ranks, the places of its keys and values in a page, of its queries, outputs and projections, and its share of the work. */
struct FdcHeads {
    /* Blocks of key channels of all heads before each head, then of all heads. */
    uint16_t k_before[129];
    /* Blocks of value channels of all heads before each head, then of all heads. */
    uint16_t v_before[129];
    /* KV heads. */
    uint32_t count;
};

/* Shape and layout of one append of new tokens to a low-rank cache. */
struct FdcAppendParams {
    /* Elements between two pages. */
    int64_t page_stride;
    /* Elements between two tokens of the new queries. */
    int64_t q_new_stride;
    /* Elements between two tokens of the new keys. */
    int64_t k_new_stride;
    /* Elements between two tokens of the new values. */
    int64_t v_new_stride;
    /* Slots in the cache; a slot is below this. */
    int64_t num_slots;
    /* New tokens. */
    uint32_t tokens;
    /* Query heads that read one KV head; 0 where queries are not given. */
    uint32_t group;
    /* Tiles of 64 rows that the queries of one KV head have. */
    uint32_t q_tiles;
    /* Tiles of 64 rows that the keys, or the values, of one KV head have. */
    uint32_t kv_tiles;
    /* Channels that rotate: a multiple of 16. */
    uint32_t rotary_dim;
    /* Positions in the tables of cosines and sines. */
    uint32_t positions;
    /* log2 of the tokens in a page. */
    uint32_t page_shift;
    /* 0. */
    uint32_t padding;
    /* Ranks. */
    struct FdcHeads heads;
};

/* Shape and layout of one rebuilding of dense keys and values from a low-rank cache. */
struct FdcReconstructParams {
    /* Elements between two pages of the low-rank cache. */
    int64_t page_stride;
    /* Pages in the pool: all are rebuilt. */
    uint32_t num_pages;
    /* log2 of the tokens in a page. */
    uint32_t page_shift;
    /* Ranks. */
    struct FdcHeads heads;
};

/* How the work of a decode step is dealt to blocks. */
enum FdcSplit {
    /* Contiguous ranges of equal bytes. */
    FDC_SPLIT_BALANCED = 0,
    /* Parts of a fixed number of bytes each, in contiguous ranges: no sequence's parts depend on another sequence. */
    FDC_SPLIT_FIXED = 1,
    /* One block per sequence and KV head, whatever its bytes: what a kernel without balancing does. */
    FDC_SPLIT_NONE = 2
};

/* Shape, layout and split of one decode step over a low-rank cache. */
struct FdcDecodeParams {
    /* Elements between two pages. */
    int64_t page_stride;
    /* Entries between two sequences of the block table. */
    int64_t table_batch_stride;
    /* Sequences. */
    uint32_t batch;
    /* Queries of each sequence, aligned to the end of its keys. */
    uint32_t q_len;
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
    /* Keys that a query sees, itself included; 0 for all. */
    uint32_t window;
    /* One of FdcSplit. */
    uint32_t split;
    /* Work of a fixed part, in weights: 16 tokens of 16 channels. */
    uint32_t part_weight;
    /* Fixed parts that one item may have: slots of partial states. */
    uint32_t max_parts;
    /* Work of an item besides its bytes, in weights. */
    uint32_t item_weight;
    /* Work below which a block does not split further, in weights. */
    uint32_t min_weight;
    /* Softmax scale: that of the full head dimension, whatever the ranks. */
    float scale;
    /* Soft-cap of the scaled scores; read only where the kernel is compiled with it. */
    float soft_cap;
    /* 0. */
    uint32_t padding;
    /* Ranks. */
    struct FdcHeads heads;
};

#endif
