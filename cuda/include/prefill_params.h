/* Parameters of the kernels kernels/attention/prefill*.cu. */
#ifndef LONGKV_PREFILL_PARAMS_H
#define LONGKV_PREFILL_PARAMS_H

#include <stdint.h>

/* What the rows of a tile of a carrying kernel start from and end as: bits of PrefillTile's flags. */
enum PrefillTileFlags {
    /* The rows' state is stored already and goes on; without it, it starts empty. */
    PREFILL_TILE_RESUME = 1,
    /* No keys follow in later launches: the rows end as output. */
    PREFILL_TILE_FINISH = 2
};

/*
 * A tile of the rows of a segment, which is a run of queries, with a span of keys. Query i of the segment sees the span's keys
 * from i + begin on and before i + end, its first keys before `prefix`, and of those before i + end the first `sinks`.
 */
struct PrefillTile {
    /* Row of the block table. */
    uint32_t sequence;
    /* The segment's first query, in q. */
    uint32_t first_query;
    /* Queries of the segment. */
    uint32_t queries;
    /* The tile's first row, among queries * group. */
    uint32_t first_row;
    /* First token of the span in a contiguous cache. */
    uint32_t kv_start;
    /* Keys of the span; 0 where its rows see nothing. */
    uint32_t kv_len;
    /* Where what a query sees ends, less the query; kv_len for all. */
    int32_t end;
    /* Where it begins, less the query; -queries for the first key. */
    int32_t begin;
    /* First keys of the span that stay visible before `begin`. */
    uint32_t sinks;
    /* First keys of the span that every query sees, past `end` too. */
    uint32_t prefix;
    /* Entry of the list with the same rows' next span, further behind; 0 for none. For carrying kernels. */
    uint32_t next;
    /* PrefillTileFlags, of a tile that is no other's `next`. */
    uint32_t flags;
};

/* Where KV heads lie in the tensor maps of K and V. */
struct PrefillMapHeads {
    /* Columns of K from one head to the next. */
    uint32_t k_columns;
    /* Rows of K from one head to the next. */
    uint32_t k_rows;
    /* Columns of V from one head to the next. */
    uint32_t v_columns;
    /* Rows of V from one head to the next. */
    uint32_t v_rows;
};

/* Shape, layout and mask of one prefill. */
struct PrefillParams {
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
    /* Query tokens of all sequences. */
    uint32_t num_queries;
    /* KV heads. */
    uint32_t kv_heads;
    /* Query heads that read one KV head. */
    uint32_t group;
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
    /* 1 where a query sees the keys up to its own position, 0 where it sees all; of the tiles that are planned. */
    uint32_t causal;
    /* Keys that a query sees, itself included; 0 for all. */
    uint32_t window;
    /* First keys of the sequence that stay visible outside the window. */
    uint32_t sinks;
    /* First keys of the sequence that every query sees, past its own position too. */
    uint32_t prefix;
    /* Rows of a tile: the kernel's own number. */
    uint32_t tile_rows;
    /* Entries that the list has room for. */
    uint32_t max_tiles;
    /* 1 where the softmax state starts from the one stored, 0 where it starts empty. */
    uint32_t resume;
    /* Softmax scale. */
    float scale;
    /* Soft-cap of the scaled scores; read only where the kernel is compiled with it. */
    float soft_cap;
};

#endif
